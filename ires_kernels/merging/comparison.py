"""How a residual fits a target, told before it is added."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ires_kernels.checking import guards
from ires_kernels.checkpoints import configs, hub
from ires_kernels.merging.request import PAIR, Renames
from ires_kernels.planning import ancestry
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import Pair, StrPath, check_flags, open_inputs, roles_of_apply
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.reader import second_copies

if TYPE_CHECKING:
    import torch

    from ires_kernels.records.fit import FitReport


def compare(
    target: StrPath,
    residual: Pair,
    *,
    alpha: float = 1.0,
    curve: bool = False,
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> FitReport:
    """Say how the difference of a pair (instruct, base) fits a target that descends from base; nothing is written.

    >>> report = ik.compare("target/", ("instruct/", "base/"), alpha=0.7)
    >>> report.total.cosine is not None, sorted(report.kinds)[:2]
    (True, ['lm_head', 'mlp'])

    All weights are read once. Of each tensor, layer and kind of tensor, and of all together: how far target and
    instruct are from base, relative to its norm; the cosine of these two differences, and how often their signs differ;
    how many weights instruct has changed by an ulp of the target's dtype at most; and how much of alpha rounding to
    nearest would leave. Of weights that are stored as codes this last is not known.

    curve  also for other alphas, for a picture

    The others as for `apply`, and the same errors.
    """
    check_flags(follow_links=follow_links, curve=curve)
    paths = roles_of_apply(hub.local(target), hub.locals_of(residual), follow_links=follow_links)
    if list(paths) != PAIR:
        raise ArgumentError(f"{', '.join(paths)} are given; wanted a target and a pair of models: (instruct, base).")
    asked = Rules.of(1, alpha=alpha)
    rules = Rules.of(
        1,
        skip=skip,
        dtype=dtype,
        allow_missing=allow_missing,
        vocabulary=vocabulary,
        renames=renames,
        trust_names=trust_names,
    )
    options = Options.of("cpu", threads, progress, idle=True)
    start = time.monotonic()
    inputs = open_inputs(paths, follow_links=follow_links)
    with Looks(inputs) as looks:
        plan = plan_apply(inputs, rules, second_copies(inputs), looks=looks)
        kin = ancestry.compare(inputs, plan.steps, looks)
    left_out = [plan.share.text()] if plan.share else []
    known = (*configs.differences(inputs), *ancestry.warnings(kin, inputs), *left_out)
    from ires_kernels.records.fit import CURVE, FitReport
    from ires_kernels.streaming.fitting import fits

    alphas = (*asked.alpha, *(CURVE if curve else ()))
    found, read = fits(plan.steps, guards.file_ids(plan), alphas, threads=options.threads, progress=options.progress)
    guards.check_unchanged(plan, {})
    return FitReport.of(plan, found, alphas, time.monotonic() - start, read, known)
