"""What belongs to the tensors of a model in the others, and whether their values agree that it does."""

from __future__ import annotations

import shlex
from collections.abc import Container, Mapping
from contextlib import nullcontext

from ires_kernels.checkpoints import names, roles
from ires_kernels.checkpoints.header import brief
from ires_kernels.planning import absences
from ires_kernels.planning.alignment import Aligned, align
from ires_kernels.planning.by_token import tensors_by_token
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.layout import Layout
from ires_kernels.planning.matching import Match

_RENAMES = (
    "A of --rename A=B is a part of names of {role}, between dots, B what it is in {others}: `ires inspect --tensors` "
    "lists the names."
)
_ODD = (
    "Take models that one exporter has saved, or leave such tensors as they are with --skip {skip}; where values may "
    "differ as much as that, --trust-names compares none."
)


def match(role: str, layouts: Mapping[str, Layout] | None, looks: Looks | None, found: Findings) -> None:
    """Find what belongs to the tensors of `role` in the other models, unless their layouts are known already."""
    if layouts is not None:
        found.matcher.layouts = layouts
        return
    if found.rules.trust_names:
        found.notes.append("tensors were matched by names and shapes alone (--trust-names): no values were compared")
    with nullcontext(looks) if looks is not None else Looks(found.inputs) as used:
        aligned = {
            other: align(
                None if found.rules.trust_names else used,
                role,
                other,
                found.inputs,
                copies=found.matcher.copies,
                left=lambda name: found.skipped(name) is not None,
                renames=found.rules.renames,
            )
            for other in found.inputs
            if other != role
        }
    found.matcher.layouts = {other: each.layout for other, each in aligned.items()}
    for old, new in found.rules.renames:
        if not any((old, new) in each.renamed for each in aligned.values()):
            text = f"--rename {shlex.quote(f'{old}={new}')} gives no tensor of {role} a partner of as many elements"
            found.problem(text, _RENAMES.format(role=role, others=" or ".join(aligned)))
    # What is zero in base, or too little to tell, may have become anything in its descendants.
    silent = {name for other, each in aligned.items() if roles.is_base(other) for name in each.silent}
    for other, each in aligned.items():
        for text, advice, about in each.problems:
            found.problem(text, advice, about)
            found.told.update(about)
        found.told.update(each.passed)
        found.notes += each.notes
        _check_values(role, other, each, silent, found)


def _check_values(role: str, other: str, aligned: Aligned, silent: Container[str], found: Findings) -> None:
    """Refuse tensors whose values are not those of what they were matched with, where those of others are."""
    tensors, matcher = found.inputs[role].tensors, found.matcher

    def is_asked(match: Match) -> bool:
        """Whether values have a say: something is added, and not by tokens, which are looked at elsewhere."""
        by_token = None if match.absent else tensors_by_token(match.refs, found)
        return not match.absent and (by_token is None or found.vocabulary.split(by_token) is None)

    failed = [
        name
        for name in aligned.failed
        if name not in silent
        and not (names.is_head(name) and found.inputs[other].kind == "residual")  # base may have had none of its own
        and any(found.rules.factors(name) or (1,))
        and all(map(is_asked, matcher.of(role, tensors[name])))
    ]
    by_kind: dict[tuple[str, str], list[str]] = {}
    for name in failed:
        by_kind.setdefault((names.pattern(name), aligned.causes.get(name, "")), []).append(name)
    everything = {name for checkpoint in found.inputs.values() for name in checkpoint.tensors}
    runs = aligned.layout.runs
    skip = absences.skip_pattern(failed, {*failed}, everything) if failed else ""
    for (kind, cause), those in by_kind.items():
        many = len(those) > 1
        is_named = all(name not in runs for name in those)
        what = f"{len(those)} tensors {kind}" if many else brief(those[0])
        verb = ("agree" if many else "agrees") if is_named else ("fit" if many else "fits")
        which = f"in name and shape with {other}" if is_named else f"by name and shape what {other} has for it"
        mean = sum(aligned.failed[name] for name in those) / len(those)
        text = (
            f"{what} {verb} {which}, {'their' if many else 'its'} values do not (cosine {mean:.2f}), while those of "
            f"{aligned.agreed} others do{f': {other} {cause}' if cause else ''}"
        )
        found.problem(text, _ODD.format(skip=skip), those)
