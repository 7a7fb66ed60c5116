"""What was done before, as a manifest tells: to a model in place, or in a new folder; and whether it still is so.

A manifest is believed only where it is signed with our own key, and what it says of files only where these are still
the ones: by all their times, place on the disk and a sample of their bytes, or else by the hashes of what was read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from ires_kernels.checkpoints import hub, manifest, standins
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId
from ires_kernels.checkpoints.folders import listed
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Asked, Input, Manifest, Numbers, Update
from ires_kernels.files.durable import boot_id
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.samples import sample
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step, by_output
from ires_kernels.records import provenance
from ires_kernels.records.operation import samples_of
from ires_kernels.records.report import Report
from ires_kernels.streaming import stream


def applied(target: Checkpoint, threads: int | None = None) -> tuple[list[Update], list[str]]:
    """What was applied to this model, as long as its bytes are still the result of that; the last one last.

    And warnings of what its manifests say of updates besides, for which nothing stands.
    """
    found: list[Update] = []
    warnings = []
    for table in manifests(target):
        if table.in_place is None:
            continue
        if not table.is_mine:
            warnings.append(
                f"{table.path} says that update {table.id} was applied before, but is not signed with your key, so it "
                "is not believed: if this is that very update, it is in the model twice now"
            )
            continue
        if is_doubtful(table) and not has_hashes(target, table, threads):
            raise StoreError(
                f"{target.path}: was updated with --no-sync before the machine was restarted, and is not what that "
                "wrote. Copy the model again; or, if it was you who changed it since, delete its manifest first."
            )
        if unchanged(target, table, threads):
            found += table.history()
        else:
            warnings.append(
                f"{table.path} tells of update {table.id}, but the model is not what that left: it was changed since, "
                "so what was applied to it before is not known"
            )
    return found, warnings


def under_way(plan: Plan, recipe: str) -> Update:
    """What a later manifest will say of an update that is about to begin, as far as it is known by now."""
    inputs = {
        role: Input(
            os.path.realpath(checkpoint.path),
            checkpoint.manifest.digest if checkpoint.kind == "residual" and checkpoint.manifest else None,
            files=provenance.stamps(checkpoint, {}),
        )
        for role, checkpoint in plan.inputs.items()
    }
    return Update(plan.id, recipe, inputs, Numbers(), Asked(**plan.rules.to_dict()))


def repeated(plan: Plan, recipe: str, history: Sequence[Update], threads: int | None = None) -> Update | None:
    """The entry of the history that is what `plan` would do, with the same other models.

    Raises StoreError where that cannot be told.
    """
    for entry in history:
        if entry.recipe == recipe:
            others = plan.inputs.keys() - plan.roles_of_target()
            same = [_is_same(plan, role, entry, threads) for role in sorted(others)]
            if None in same:
                raise StoreError(
                    f"{plan.inputs['target'].path}: this looks like {entry.id}, which was applied before, but "
                    "the files of the other models have other times now. To apply it once more, give it a --tag."
                )
            if all(same):
                return entry
    return None


def other_input(plan: Plan, table: Manifest, threads: int | None = None) -> tuple[str, Path] | None:
    """Role and file of an input of `plan` that is not what a new folder was made of, which the manifest tells of."""
    for role, checkpoint in plan.inputs.items():
        if not is_stamped(checkpoint, table.inputs.get(role, Input()), table.id):
            hashes = {role: stream.hashes(plan.reads(role), checkpoint.file_ids, threads=threads)}
            for output, parts in by_output(plan.steps).items():
                recorded = table.tensors[output.name].inputs if output.name in table.tensors else {}
                found = provenance.read_by(parts, hashes).get(role)
                if found is not None and found != recorded.get(role):
                    return role, _read_of(role, parts)
    for side in plan.side_files:
        known = table.files.get(side.name)
        found = provenance.hash_file(side.source) if side.content is None else xxh3_128_hexdigest(side.content)
        if known is None or known.xxh3_128 != found:
            return side.role, side.source
    return None


def changed(inputs: Mapping[str, Checkpoint], table: Manifest) -> Iterable[str]:
    """Warnings of inputs whose weights are not what an output was made of, by their sizes and samples."""
    for role, checkpoint in inputs.items():
        recorded = table.inputs.get(role, Input()).files
        samples = samples_of(checkpoint, table.id)
        now = {path.name: (file_id.size, samples[path.name]) for path, file_id in checkpoint.file_ids.items()}
        then = {name: (stamp.size, stamp.sample) for name, stamp in recorded.items()}
        if then and now != then:
            other = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
            yield (
                f"{checkpoint.path}: is not the {role} that {table.path.name} tells of: {listed(other)} changed since. "
                "What is made now is another model"
            )


def compared(report: Report, table: Manifest) -> Report:
    """The report of an output that was made again, with whether its tensors are those that the manifest tells of."""
    again = manifest.read(Path(hub.local(f"{report.out}")) / table.path.name)
    if again is None or table.digest is None:
        return report
    if again.digest == table.digest:
        return replace(report, notes=(*report.notes, f"all tensors are those of {table.path}: the digest is the same"))
    text = f"the tensors are not those of {table.path}: the digest is {again.digest}, and not {table.digest}"
    return replace(report, warnings=(*report.warnings, text))


def _read_of(role: str, parts: Iterable[Step]) -> Path:
    """The first file that is read of an input."""
    return next(operand.paths[0] for step in parts for operand in step.operands if operand.role == role)


def is_as_written(plan: Plan, out: Path, table: Manifest) -> bool:
    """Whether a new folder is what was written, as far as times, samples of the weights and other files tell.

    The manifest is written last, so the times of a file that nobody touched since are not after those of the manifest.
    """
    if is_doubtful(table) or table.samples.keys() != {file.name for file in plan.files}:
        return False
    if not all((out / file.name).is_file() for file in plan.files):
        return False
    try:
        if any(standins.far(out / file.name) for file in plan.files):
            return _is_as_put(plan, out, table)
        last = FileId.of(table.path)
        now = {file: FileId.of(out / file.name) for file in plan.files}
        return (
            all(file.size == file_id.size for file, file_id in now.items())
            and all(max(id_.mtime_ns, id_.ctime_ns) <= min(last.mtime_ns, last.ctime_ns) for id_ in now.values())
            and all(sample(out / name, table.id) == known for name, known in table.samples.items())
            and all(provenance.hash_file(out / name) == side.xxh3_128 for name, side in table.files.items())
        )
    except (FileNotFoundError, CheckpointError):
        return False


def _is_as_put(plan: Plan, out: Path, table: Manifest) -> bool:
    """`is_as_written` of an output in a store, which has no times, but tells when a file is another."""
    places = {file: standins.far(out / file.name) for file in plan.files}
    return all(
        here is not None and here.size == file.size and table.samples[file.name] == f"{here.tag:032x}"
        for file, here in places.items()
    ) and all(provenance.hash_file(out / name) == side.xxh3_128 for name, side in table.files.items())


def is_stamped(checkpoint: Checkpoint, recorded: Input, id_: str) -> bool:
    """Whether its weights are the very files that were recorded under this id, and a sample of each is the same."""
    return provenance.stamps(checkpoint, samples_of(checkpoint, id_)) == recorded.files


def unchanged(target: Checkpoint, table: Manifest, threads: int | None = None) -> bool:
    """Whether the model is what the manifest of an update in place says: by time and sample, or else by all hashes."""
    recorded = table.in_place.files if table.in_place else {}
    if not all(shard.path.name in recorded for shard in target.shards):
        return False
    return _is_as_left(target, table) or has_hashes(target, table, threads)


def replaceable(target: Checkpoint, table: Manifest) -> bool:
    """Whether all bytes of the model's files are those that an update in place has left, each in its place.

    By times and samples; or else by all hashes, if there is one of every tensor, and the layout.
    """
    entry = table.in_place
    if entry is None:
        return False
    if entry.files.keys() == {shard.path.name for shard in target.shards} and _is_as_left(target, table):
        return True
    whole = all(name in table.tensors and table.tensors[name].xxh3_128 for name in target.tensors)
    return whole and entry.layouts == provenance.layouts(target) and has_hashes(target, table)


def is_doubtful(table: Manifest) -> bool:
    """Whether nobody knows if what the manifest tells of has reached the disk: no fsync, and a restart since."""
    return table.unsynced not in ("", boot_id())


def has_hashes(target: Checkpoint, table: Manifest, threads: int | None = None) -> bool:
    """Whether all tensors of which the manifest has a hash have that."""
    hashes = {name: tensor.xxh3_128 for name, tensor in table.tensors.items()}
    refs = {name: ref for name, ref in target.tensors.items() if hashes.get(name)}
    found = stream.hashes(refs, target.file_ids, threads=threads)
    return bool(found) and all(hashes[name] == digest for name, digest in found.items())


def _is_as_left(target: Checkpoint, table: Manifest) -> bool:
    """Whether the files of a model have the sizes, times and samples with which an update in place has left them.

    Not the other times, which showing the files has set; and a backup that comes back has its own place on the disk.
    """
    recorded = table.in_place.files if table.in_place else {}
    return all(
        (known := recorded.get(shard.path.name)) is not None
        and (known.size, known.mtime_ns) == (shard.file_id.size, shard.file_id.mtime_ns)
        and known.sample == sample(shard.path, table.id)
        for shard in target.shards
    )


def _is_same(plan: Plan, role: str, entry: Update, threads: int | None) -> bool | None:
    """Whether an input is the one that was recorded; None when nobody knows."""
    checkpoint, recorded = plan.inputs[role], entry.inputs.get(role, Input())
    if is_stamped(checkpoint, recorded, entry.id):
        return True
    if recorded.read is None:
        return None
    reads = plan.reads(role)
    hashes = stream.hashes(reads, checkpoint.file_ids, threads=threads)
    return provenance.digest_of(reads.values(), hashes) == recorded.read


def manifests(target: Checkpoint) -> list[Manifest]:
    """That of a model, and that of the same file under its other name: alone, or as the weights of its folder."""
    tables = [target.manifest] if target.manifest else []
    if len(target.shards) == 1:
        file = target.shards[0].path
        other = file.with_name(f"{file.name}.ires.json") if target.path.is_dir() else file.with_name("ires.json")
        try:
            table = manifest.read(other)
        except (OSError, CheckpointError):  # it may be anybody's
            return tables
        tables += [table] if table else []
    return tables
