"""Where an output comes from: makes the manifest of a merge, which `manifest` reads, and the hashes in it.

Tensor hashes are xxh3_128 of the tensor's bytes; the digest of a checkpoint is xxh3_128 of the sorted lines ``name
dtype shape hash``, so equal tensors give equal digests however they are split into files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from ires_kernels.checkpoints import hub, names
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId
from ires_kernels.checkpoints.manifest import Stamp
from ires_kernels.checkpoints.sources import contents
from ires_kernels.files import interrupts, trust
from ires_kernels.files.samples import sample
from ires_kernels.files.transfer import chunks
from ires_kernels.planning.inputs import recorded
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Operand, Step, by_output, copied
from ires_kernels.records.report import Report
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.version import VERSION

SUMS = "SHA256SUMS"
"""Name of the file with the sums of a folder, in the format of `sha256sum -c`."""


def build(
    plan: Plan,
    outcome: Outcome,
    report: Report,
    stamps: Mapping[str, Mapping[str, Stamp]],
    others: Mapping[str, dict[str, str]],
    *,
    outputs: Mapping[str, str] | None = None,
    paths: Mapping[str, str] | None = None,
    sha256: Mapping[str, str] | None = None,
    in_place: Mapping[str, Any] | None = None,
    previous: Mapping[str, str | None] | None = None,
    unsynced: str = "",
    sketch: Mapping[str, str] | None = None,
) -> bytes:
    """The manifest as JSON text.

    stamps    of the inputs' weights as they were read, by role and name
    outputs   samples of a new folder's weights, by name
    others    the output's other files, by name, with their hash and origin
    paths     where the inputs are, if that is not where they were opened
    sha256    of whole files, by name
    in_place  what is special about an update in place: the hash of a tensor that was not read is then the `previous`
              one, or null, and that of what the target held is not known
    unsynced  where nothing was fsynced, the boot_id of the machine
    sketch    of a residual, `ancestry.sketch`
    """
    known = {**(previous or {}), **outcome.outputs} if in_place else outcome.outputs
    outputs_made, why = by_output(plan.steps), copied(plan.steps)
    entries = {
        output.name: {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "xxh3_128": known.get(output.name) if in_place else known[output.name],
            "inputs": read_by(parts, outcome.inputs),
            **({"copied": why[output.name]} if output.name in why else {}),
            **({"update": norm} if (norm := _update(parts, outcome)) else {}),
        }
        for output, parts in outputs_made.items()
    }
    hashes = [(output.name, output.dtype, output.shape, known.get(output.name)) for output in outputs_made]
    table: dict[str, Any] = {
        "ires": VERSION,
        "operation": plan.operation,
        "id": plan.id,
        "digest": digest((n, d, s, h) for n, d, s, h in hashes if h) if all(h for *_, h in hashes) else None,
        "inputs": {
            role: _input(
                plan, role, outcome.inputs.get(role, {}), (paths or {}).get(role, f"{checkpoint.path}"), stamps[role]
            )
            for role, checkpoint in plan.inputs.items()
        },
        "rules": plan.rules.to_dict(),
        **({"layout": layout} if (layout := plan.layout()) else {}),
        "ancestry": [found.to_dict() for found in plan.ancestry],
        "report": report.numbers(),
        "files": dict(others),
        **({"samples": dict(outputs)} if outputs else {}),
        **({} if in_place else {"headers": {f.name: xxhash.xxh3_128_hexdigest(f.header) for f in plan.files}}),
        **({"sha256": dict(sha256)} if sha256 else {}),
        **({"in_place": dict(in_place)} if in_place else {}),
        **({"unsynced": unsynced} if unsynced else {}),
        "tensors": entries,
    }
    if plan.operation == "extract":
        table["sketch"] = dict(sketch or {})
        table |= plan.about
        table["tied"] = all(map(names.is_tied, plan.inputs.values()))
        table["not_stored"] = {
            name: {"reason": reason, "dtype": ref.dtype, "shape": list(ref.shape)}
            for name, (reason, ref) in plan.not_stored.items()
        }
    return as_text(trust.signed("manifest", table))


def as_text(table: Mapping[str, Any]) -> bytes:
    """A manifest as it lies in a folder."""
    # A path that is not UTF-8 has its bytes as lone surrogates, and these are escaped as JSON escapes them.
    return (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def sha256(
    files: Mapping[str, Path], threads: int | None = None, tell: Callable[[int], None] | None = None
) -> dict[str, str]:
    """sha256 of whole files, by name, as the Hub shows it. An interrupt ends it within a moment.

    tell  called in the calling thread, some times a second and at the end, with how many bytes were read

    The calling thread works as well, so that it does where the system starts no other.
    """
    found: dict[str, str] = {}
    waiting, errors = deque(files), deque[BaseException]()
    read = dict.fromkeys(files, 0)
    told = [0.0]

    def look() -> None:
        if tell is not None and time.monotonic() > told[0] + 0.1:
            told[0] = time.monotonic()
            tell(sum(read.values()))

    def work(ended: threading.Event | None) -> None:
        try:
            while waiting and not errors:
                with suppress(IndexError):  # another thread was faster
                    name = waiting.popleft()
                    found[name] = one(name, is_asked=ended is None)
        except BaseException as error:
            errors.append(error)
        finally:
            if ended is not None:
                ended.set()

    def one(name: str, is_asked: bool) -> str:
        hasher = hashlib.sha256()
        for piece in contents(files[name], hasher):
            read[name] += len(piece)
            if is_asked:
                look()
            if errors:
                break
        return hasher.hexdigest()

    with interrupts.held():
        events = []
        for _ in range(min(len(files), threads or len(os.sched_getaffinity(0))) - 1):
            event = threading.Event()
            try:
                threading.Thread(target=work, args=(event,), name="ires-sha256").start()
            except RuntimeError:
                break
            events.append(event)
        work(None)
        for event in events:
            while not event.wait(0.1):
                try:
                    interrupts.check()
                    if not errors:
                        look()
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0]
    if tell is not None:
        tell(sum(read.values()))
    return {name: found[name] for name in files}


def hash_file(path: Path) -> str:
    """xxh3_128 of a whole file."""
    hasher = xxhash.xxh3_128()
    for _ in chunks(path, hasher):
        pass
    return hasher.hexdigest()


def has_hash(path: Path, digest: str) -> bool:
    """Whether a file is there, and is what it was when this was its xxh3_128."""
    try:
        return hash_file(path) == digest
    except FileNotFoundError:
        return False


def sums_file(sums: Mapping[str, str]) -> bytes:
    """The sums as `sha256sum -c` reads them."""
    lines = []
    for name, digest in sums.items():
        line = f"{digest}  {name}"
        if "\n" in name:  # which a backslash at the beginning says
            line = "\\" + line.replace("\\", r"\\").replace("\n", r"\n")
        lines.append(f"{line}\n")
    return "".join(lines).encode(errors="surrogateescape")


def digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The digest of a checkpoint from (name, dtype, shape, xxh3_128) of all its tensors."""
    lines = sorted(f"{name} {dtype} {list(shape)} {hash_}\n" for name, dtype, shape, hash_ in tensors)
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def stamps(
    checkpoint: Checkpoint, samples: Mapping[str, str], current: Mapping[Path, FileId] | None = None
) -> dict[str, Stamp]:
    """What its weights are, by name; `current` is what they were when they were opened, if it has another time."""
    ids = checkpoint.file_ids if current is None else current
    return {path.name: Stamp(**ids[path].stamp(), sample=samples.get(path.name, "")) for path in checkpoint.file_ids}


def as_left(path: Path, seed: str) -> dict[str, Any]:
    """What a file of the target is when all of it is new. Its other times change when it is shown."""
    file_id = FileId.of(path)
    return {"size": file_id.size, "mtime_ns": file_id.mtime_ns, "sample": sample(path, seed)}


def layouts(checkpoint: Checkpoint) -> dict[str, str]:
    """Hash of what its weights have where, by the name of the file."""
    found: dict[str, list[Any]] = {shard.path.name: [] for shard in checkpoint.shards}
    for ref in checkpoint.tensors.values():
        found[ref.path.name].append([ref.offset, ref.name, ref.dtype, ref.shape])
    return {name: xxhash.xxh3_128_hexdigest(json.dumps(sorted(table)).encode()) for name, table in found.items()}


def digest_of(operands: Iterable[Operand], hashes: Mapping[str, str]) -> str:
    """The `digest` of what was read of a checkpoint; whole tensors have the lines that they have in that of a model."""
    return digest(
        (each.text, each.dtype, each.refs[0].shape if each.is_whole else (each.count,), hashes[each.key])
        for each in operands
    )


def read_by(parts: Iterable[Step], hashes: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Role → xxh3_128 of what the steps of one output read of it: of the bytes in the order in which they are read.

    Of several steps it is the `digest` of what each reads.

    hashes  of all that was read, by role and key; a role of which not all was read is left out
    """
    read: dict[str, list[Operand]] = {}
    for step in parts:
        for operand in step.operands:
            read.setdefault(operand.role, []).append(operand)
    found = {}
    for role, operands in read.items():
        known = hashes.get(role, {})
        if all(operand.key in known for operand in operands):
            found[role] = known[operands[0].key] if len(operands) == 1 else digest_of(operands, known)
    return found


def _update(parts: Iterable[Step], outcome: Outcome) -> float | None:
    """The norm of what was added to a tensor, in as many digits as any order of adding up gives; None of a blend."""
    if any(part.is_from_zero and part.operands[0].role == "target" for part in parts):
        return None
    found = [outcome.tallies[part.label].norm2 for part in parts if part.label in outcome.tallies]
    norm = math.sqrt(math.fsum(found)) if all(map(math.isfinite, found)) else math.inf
    return float(f"{norm:.6g}") if math.isfinite(norm) else None


def _made_of(residual: Checkpoint) -> dict[str, Any]:
    """What a residual says that it was made of, as far as that can be found again elsewhere: no paths."""
    inputs = residual.manifest.table.get("inputs", {}) if residual.manifest else {}
    keys = ("digest", "hub", "made_of")
    return {role: {key: entry[key] for key in keys if key in entry} for role, entry in inputs.items()}


def _input(plan: Plan, role: str, hashes: Mapping[str, str], path: str, stamps: Mapping[str, Stamp]) -> dict[str, Any]:
    """Where an input was, its digest if all of its tensors were read, and in place that of what was."""
    tensors = plan.inputs[role].tensors
    all_read = hashes.keys() >= tensors.keys()
    table: dict[str, Any] = {
        "path": recorded(path),
        "digest": digest((n, t.dtype, t.shape, hashes[n]) for n, t in tensors.items()) if all_read else None,
        "files": {name: asdict(stamp) for name, stamp in stamps.items()},
    }
    repo = hub.repo_of(plan.inputs[role].path)
    if repo is not None:
        table["hub"] = repo._asdict()
    if plan.operation == "extract" and plan.inputs[role].kind == "residual":
        table["made_of"] = _made_of(plan.inputs[role])
    if plan.in_place and role not in plan.roles_of_target():
        table["read"] = digest_of(plan.reads(role).values(), hashes)
    return table
