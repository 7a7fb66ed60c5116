"""Scales and the like are looked at before anything is written: one that is no number spoils a block of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Files
from ires_kernels.files import interrupts
from ires_kernels.planning.steps import Step


def faults(steps: Iterable[Step], file_ids: Mapping[Path, FileId]) -> dict[tuple[str, str], str]:
    """What is wrong with what belongs to the codes that the steps decode, by role and name of the weight."""
    weights = {
        (operand.role, ref.tensor): ref
        for step in steps
        for operand in step.operands
        for ref in operand.refs
        if isinstance(ref, QuantizedRef)
    }
    if not weights:
        return {}
    from ires_kernels.backends.companions import fault

    found = {}
    read = [part for ref in weights.values() for _, part in ref.parts[1:]]
    files = Files(
        file_ids, (part.path for part in read), reads=lambda: ((part.path, part.offset, part.nbytes) for part in read)
    )
    try:
        for key, ref in weights.items():
            interrupts.check()
            parts = {}
            for name, part in ref.parts[1:]:
                parts[name] = memoryview(bytearray(part.nbytes))
                files.open(part.path).read_into(parts[name], part.offset)
                files.release(part.path)
            wrong = fault(ref.format, ref.full, parts)
            if wrong:
                found[key] = f"{wrong} ({ref.path})"
    finally:
        files.close()
    return found
