"""What can be done with the tensors of checkpoints, one after the other: a run, a look, hashes, tensors in memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ires_kernels.checkpoints.checkpoint import FileId, TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Source
from ires_kernels.files.journal import NO_THREAD
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.streaming.asked import Asked, Done, Fitted, How, Placed, Progress, Told, Write
from ires_kernels.streaming.engine import Engine
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.tiles import Processors, ReadOnly, on_cpu

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.streaming.encoded import Scales

_MAX_THREADS = 8
"""By default. On a machine of 16 cores with an H100, models in its page cache, 16 were slower than 8: `load` onto the
GPU ran at 11.8 and 16.6 GB/s, and `apply` to a new folder took longer as well."""


def default_threads() -> int:
    """One for each CPU that this process may use, up to a limit."""
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)


def run(
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    rules: Rules,
    write: Write,
    *,
    hashed: Container[str] | None = None,
    processors: Processors = on_cpu,
    counted: bool = True,
    fit: Fitted | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    in_order: bool = False,
    stops: Container[tuple[str, int]] | None = None,
    done: Mapping[str, Done] | None = None,
    scales: Callable[[QuantizedRef], Scales] | None = None,
    written: Container[Path] = (),
    outcome: Outcome | None = None,
    failed: Callable[[], None] | None = None,
) -> Outcome:
    """Carry out `steps`, whose inputs lie in files that must still be those of `file_ids`; `write` gets the results.

    hashed   the roles whose inputs are hashed; None: all of them. Results always are
    counted  whether the outcome has tallies
    fit      what is asked besides of each tile that a difference is added to; the tallies of these steps have it
    in_order claims the tiles strictly in the order of the steps, so that `write` may wait for those before its own
    stops    (tensor name, byte in it) where an interrupt may end the run. With them the tiles are claimed in order as
             well, and all tiles before the stop are written
    done     what is written already, by the tensor's name: "add" and "add_difference" overwrite their first operand
    scales   gives those of weights that get new codes, where they are known; None: they are found on the way
    written  input files that `write` may write to before they are read
    outcome  to be completed and returned; None: a new one
    failed   called when something goes wrong, for a `write` that waits

    A signal that raises ends the run at the next tile, or stop; more of them do not end it sooner. Where the system
    starts no more threads, those that there are do all of it, and at the least the calling one does.

    Raises what went wrong first, with tensor and file in it, when all threads have stopped: CheckpointError for a file
    that changed, OSError for one that cannot be read or written, ComputeError for a processor that failed.
    """
    asked = Asked(steps, file_ids, rules, write, stops=stops, done=done or {}, scales=scales, written=written)
    told = Told(Outcome() if outcome is None else outcome, progress, failed)
    in_order = in_order or stops is not None
    return Engine(asked, How(processors, threads or default_threads(), hashed, counted, in_order, fit), told).run()


def check_threads() -> None:
    """Raise OSError where the system starts no more threads, for who cannot do without another one."""
    try:
        thread = threading.Thread(target=_nothing)
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, NO_THREAD) from None
    thread.join()


def fill(
    tensors: Mapping[str, Tensor],
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    rules: Rules,
    *,
    hashed: Container[str],
    processors: Processors = on_cpu,
    threads: int | None = None,
    progress: Progress | None = None,
    memory: Mapping[Path, Source] | None = None,
    placed: Placed | None = None,
) -> Outcome:
    """`run` into contiguous tensors by name, on the processor's device. Inputs of the roles `hashed` are hashed.

    memory  of models that are in no files, by their paths
    placed  told of each tile when its results are there
    """
    import torch

    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    into = {name: (elements, elements.view(torch.uint8)) for name, elements in flat.items()}
    asked = Asked(steps, file_ids, rules, _nothing, into, memory=memory or {}, placed=placed)
    how = How(processors, threads or default_threads(), hashed, counted=False)
    return Engine(asked, how, Told(Outcome(), progress)).run()


def look(
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    processors: Processors,
    *,
    hashed: Container[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    outcome: Outcome | None = None,
) -> int:
    """Show the operands of `steps` to a processor that makes nothing of them; returns bytes read. Errors as of `run`.

    Nothing is written: what the processor learns is its own. The outcome gets the hashes of inputs of the roles
    `hashed`.
    """
    asked = Asked(steps, file_ids, Rules(), _nothing, kept=False)
    told = Told(Outcome() if outcome is None else outcome, progress)
    how = How(processors, threads or default_threads(), hashed, counted=False)
    return Engine(asked, how, told).run().bytes_read


def hashes(
    refs: Mapping[str, TensorRef | Operand],
    file_ids: Mapping[Path, FileId],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """xxh3_128 of the bytes of tensors and operands, under the names that they have here. Errors as of `run`."""
    steps = []
    for name, ref in refs.items():
        operand = _as_stored(ref if isinstance(ref, Operand) else Operand("input", (ref,)))
        output = Output(name, operand.dtype, (operand.count,), f"{operand.paths[0]}")
        steps.append(Step(output, "copy", (operand,)))
    return run(steps, file_ids, Rules(), _nothing, processors=ReadOnly, threads=threads, progress=progress).outputs


def _as_stored(operand: Operand) -> Operand:
    """The bytes that the digest of an operand is of, as an operand that is nothing but bytes."""
    if not operand.is_decoded:
        return operand
    from ires_kernels.streaming.decoded import stored

    return Operand(operand.role, tuple(each for ref in operand.refs for each in stored(ref)))


def _nothing(*_: object) -> None:
    """What is written of results that stay where they were made, or are only looked at."""
