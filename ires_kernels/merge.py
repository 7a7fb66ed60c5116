"""Merging whole checkpoints: open, plan, stream, and keep the result only if everything went well."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ires_kernels import device as devices
from ires_kernels import manifest, statedict, stream
from ires_kernels.checkpoint import FileId
from ires_kernels.header import CheckpointError
from ires_kernels.inputs import StrPath, open_inputs, roles_of_apply
from ires_kernels.plan import MANIFESTS, Plan, plan_apply, plan_extract
from ires_kernels.reader import differing, second_copies
from ires_kernels.report import Report
from ires_kernels.rules import ArgumentError, Rules
from ires_kernels.store import NewFolder, check_destination
from ires_kernels.stream import Outcome, Progress
from ires_kernels.summary import inspect
from ires_kernels.verification import verify

__all__ = ["apply", "extract", "inspect", "load", "verify"]

_CHUNK = 1 << 20  # bytes at a time of a side file

Factors = Iterable[tuple[str, float | Sequence[float]]] | Mapping[str, float | Sequence[float]]


def extract(
    base: StrPath,
    instruct: StrPath,
    out: StrPath,
    *,
    dtype: str = "f32",
    skip: Iterable[str] | str = (),
    allow_missing: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    sync: bool = True,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Report | Plan:
    """Write instruct - base, the instruction residual (Jindal et al., arXiv 2410.10739), into the new folder `out`.

    dtype          of the residual: f32 loses nothing of a bf16 or f16 pair beyond one rounding; bf16 and f16 are half
                   the size; f64
    skip           regular expressions found in the names of tensors to leave out
    allow_missing  leave out tensors that only one of the two models has, which is an error otherwise
    rounding, seed as in the tensor operations; every tensor draws its own random bits
    sync           False does without waiting for the disk, and so without surviving a power cut
    device         cpu, or a GPU such as cuda or cuda:1 to compute on: same files, same report
    threads        None: one per CPU, 16 at most
    progress       called as progress(bytes_done, bytes_in_all) about ten times a second
    dry_run        return the Plan and write nothing

    Raises CheckpointError, StoreError and ArgumentError, all ValueErrors, before anything is written; OSError when the
    disk fails. Nothing is left at `out` in any of these cases.
    """
    rules = Rules.of(0, skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed)
    inputs = open_inputs({"base": base, "instruct": instruct})
    return _carry_out(plan_extract(inputs, rules), Path(out), sync, device, threads, progress, dry_run)


def apply(
    target: StrPath,
    residual: StrPath | Sequence[StrPath],
    *,
    out: StrPath,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | None = None,
    allow_missing: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    sync: bool = True,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Report | Plan:
    """Write target + alpha * residual into the new folder `out`, with the layout and config of the target.

    residual       a residual folder; several of them, added in this order and rounded once; or the pair of models
                   (instruct, base), whose difference is taken on the way. The tokenizer, chat template and
                   generation_config.json come from the instruct model or the first residual that has them
    alpha          a factor for all residuals, or one for each
    alphas         pairs of a regular expression and factors, as alpha: the first one found in a tensor's name decides
    skip           regular expressions found in the names of tensors that are copied as they are
    dtype          f32, bf16, f16 or f64 for all float tensors of the output; None keeps the target's
    allow_missing  copy from the target what the other models lack, and leave out what the target lacks

    The others as for `extract`, and the same errors.
    """
    plan = _plan_apply(target, residual, alpha, alphas, skip, dtype, allow_missing, rounding, seed)
    return _carry_out(plan, Path(out), sync, device, threads, progress, dry_run)


def load(
    target: StrPath,
    residual: StrPath | Sequence[StrPath],
    *,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | None = None,
    allow_missing: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Merge while loading: a state dict of what `apply` would write, on the device, and nothing on the disk.

    Names, shapes, dtypes and bits are those of the files that `apply` makes of the same arguments. A head that the
    files leave out because it is the embedding is there under its name too, and is the same tensor, as in
    ``model.state_dict()``; so ``model.load_state_dict`` takes the result, and ``assign=True`` does without a copy.

    Results are computed where they stay: beyond them it takes a few windows a thread. On a GPU all work is over on
    return, so any stream may use them. Arguments and errors as for `apply`, and MemoryError when the device has no room
    for the result.
    """
    plan = _plan_apply(target, residual, alpha, alphas, skip, dtype, allow_missing, rounding, seed)
    _check_threads(threads)
    place = devices.resolve(device)
    file_ids = _file_ids(plan)
    _compare(plan, file_ids)
    tensors = statedict.allocate(plan.steps, place)
    outcome = stream.fill(
        tensors,
        plan.steps,
        file_ids,
        plan.rules,
        hashed=[role for role, checkpoint in plan.inputs.items() if checkpoint.kind == "residual"],
        processors=devices.processors(place),
        threads=threads,
        progress=progress,
    )
    _check_residuals(plan, outcome)
    _check_unchanged(plan)
    shared = statedict.shared_head(plan.inputs["target"])
    if shared is not None:
        head, embedding = shared
        tensors[head] = tensors[embedding]
    return tensors


def _plan_apply(
    target: StrPath,
    residual: StrPath | Sequence[StrPath],
    alpha: float | Sequence[float],
    alphas: Factors,
    skip: Iterable[str] | str,
    dtype: str | None,
    allow_missing: bool,
    rounding: str,
    seed: int,
) -> Plan:
    inputs = open_inputs(roles_of_apply(target, residual))
    rules = Rules.of(
        1 if "instruct" in inputs else len(inputs) - 1,
        alpha=alpha,
        alphas=alphas,
        skip=skip,
        dtype=dtype,
        allow_missing=allow_missing,
        rounding=rounding,
        seed=seed,
    )
    return plan_apply(inputs, rules, second_copies(inputs))


def _carry_out(
    plan: Plan,
    out: Path,
    sync: bool,
    device: str | torch.device,
    threads: int | None,
    progress: Progress | None,
    dry_run: bool,
) -> Report | Plan:
    check_destination(out, [checkpoint.path for checkpoint in plan.inputs.values()])
    _check_threads(threads)
    processors = devices.processors(devices.resolve(device))
    if dry_run:
        return plan
    started = time.perf_counter()
    file_ids = _file_ids(plan)
    compared = _compare(plan, file_ids)
    with NewFolder(out, sync=sync) as folder:
        files = {file.name: folder.create(file.name, file.header, file.size) for file in plan.files}
        outcome = stream.run(
            plan.steps,
            file_ids,
            plan.rules,
            lambda step, start, data, _: files[step.file].write(data, step.offset + start),
            processors=processors,
            threads=threads,
            progress=progress,
        )
        for role, hashes in compared.items():
            outcome.inputs.setdefault(role, {}).update(hashes)
        _check_residuals(plan, outcome)
        # What loaders look for first comes last.
        others = {}
        for side in plan.side_files:
            hasher = xxhash.xxh3_128()
            folder.add(side.name, _chunks(side.source, hasher))
            others[side.name] = {"from": side.role, "xxh3_128": hasher.hexdigest()}
        for name, content in plan.documents:
            folder.add(name, [content])
            others[name] = {"from": plan.operation, "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        report = Report.of(plan, outcome, out, 0.0)
        folder.add(MANIFESTS[plan.operation], [manifest.build(plan, outcome, report, others)])
        _check_unchanged(plan)
        folder.commit()
    return Report.of(plan, outcome, out, time.perf_counter() - started)


def _compare(plan: Plan, file_ids: Mapping[Path, FileId]) -> dict[str, dict[str, str]]:
    """Refuse tensors that would be copied, or left out, although instruct and base differ in them; returns digests."""
    different, digests = differing(plan.comparisons, file_ids)
    if different:
        lines = [f"cannot {plan.operation}: tensors that are not floating point differ between instruct and base:"]
        for name, _, (instruct, base) in different[:10]:
            lines.append(f"  {name!r} is {instruct.dtype} in {instruct.path}, and another in {base.path}")
        lines += [f"  and {len(different) - 10} more"] if len(different) > 10 else []
        raise CheckpointError("\n".join([*lines, "Such values have no difference to add: leave them out with --skip."]))
    return digests


def _check_residuals(plan: Plan, outcome: Outcome) -> None:
    """Compare what was read of residuals with the hashes that `extract` recorded: it costs nothing here."""
    for role, checkpoint in plan.inputs.items():
        if checkpoint.kind == "residual":
            recorded = manifest.tensors(checkpoint)
            for name, found in outcome.inputs.get(role, {}).items():
                wanted = recorded.get(name, {}).get("xxh3_128", found)
                if found != wanted:
                    raise CheckpointError(
                        f"{checkpoint.tensors[name].path}: tensor {name!r} is damaged: its xxh3_128 is {found}, "
                        f"residual.json says {wanted}. Extract or copy the residual again."
                    )


def _check_unchanged(plan: Plan) -> None:
    changed = [path for checkpoint in plan.inputs.values() for path in checkpoint.changed()]
    if changed:
        raise CheckpointError(f"{changed[0]}: changed while it was read. Wait for its writer, then start again.")


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, wanted 1 or more.")


def _file_ids(plan: Plan) -> dict[Path, FileId]:
    return {shard.path: shard.file_id for checkpoint in plan.inputs.values() for shard in checkpoint.shards}


def _chunks(path: Path, hasher: xxhash.xxh3_128) -> Iterator[bytes]:
    """A file by pieces, hashed on the way."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            yield chunk
