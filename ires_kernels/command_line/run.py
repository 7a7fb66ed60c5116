"""What each command does: its arguments become those of the function of the same name, and its result is printed."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import ires_kernels as ik
from ires_kernels.checkpoints import hub, roles
from ires_kernels.command_line import operands, printing
from ires_kernels.command_line.progress import progress_bar
from ires_kernels.command_line.streams import fail, say, tell
from ires_kernels.planning import recipe_files
from ires_kernels.planning.inputs import check_model
from ires_kernels.planning.rules import ArgumentError

if TYPE_CHECKING:
    from ires_kernels.streaming.asked import Progress


def _stream(arguments: argparse.Namespace, *names: str) -> None:
    """With --stream: make names on the Hub, among the arguments of these names, those of what is read where it is."""
    for name in names if arguments.stream else ():
        if getattr(arguments, name) is not None:
            setattr(arguments, name, hub.streamed(getattr(arguments, name)))


def extract(arguments: argparse.Namespace) -> int:
    _stream(arguments, "base", "instruct")
    with progress_bar(arguments, "extract") as progress:
        result = ik.extract(
            arguments.base, arguments.instruct, arguments.out, dtype=arguments.dtype, **_options(arguments, progress)
        )
    return printing.result(arguments, result)


def apply(arguments: argparse.Namespace) -> int:
    pair = arguments.instruct is not None and arguments.base is not None
    ways = [pair, bool(arguments.pair), bool(arguments.residuals)]
    if ways.count(True) != 1 or (arguments.instruct is None) != (arguments.base is None):
        arguments.parser.error("give one or more residuals, or --instruct and --base, or one or more --pair")
    _check_destination(arguments)
    if arguments.in_place:
        hub.check_local(arguments.target)
    _stream(arguments, "target", "instruct", "base")
    common = 1.0 if arguments.alpha is None else arguments.alpha
    alpha: float | list[float] = common
    residuals: tuple[hub.StrPath, ...] | list[str] | list[tuple[str, str]]
    if pair:
        residuals = (hub.local(arguments.instruct), hub.local(arguments.base))
        for role, path in zip(("instruct", "base"), residuals, strict=True):
            check_model(path, role, follow_links=arguments.follow_links)
    else:
        as_is = (lambda path: path) if not arguments.stream else hub.streamed
        pairs = [((as_is(one), as_is(two)), by) for (one, two), by in map(operands.pair, arguments.pair)]
        specs = [(as_is(path), by) for path, by in map(operands.residual, arguments.residuals)]
        given = [factor for _, factor in (pairs or specs)]
        if arguments.alpha is not None and all(factor is not None for factor in given):
            what = "pairs" if pairs else "residuals"
            raise ArgumentError(
                f"{[*arguments.pair, *arguments.residuals][0]} has a factor of its own, and --alpha "
                f"{arguments.alpha:g} is for {what} that have none. Leave one of the two out."
            )
        residuals = [models for models, _ in pairs] or [path for path, _ in specs]
        alpha = [common if factor is None else factor for factor in given]
    with progress_bar(arguments, "apply") as progress:
        result = ik.apply(
            arguments.target,
            residuals,
            out=arguments.out,
            in_place=arguments.in_place,
            undo=arguments.undo or "ring",
            tag=arguments.tag,
            compare=arguments.compare,
            alpha=alpha,
            alphas=arguments.alpha_for,
            dtype=arguments.dtype,
            **_options(arguments, progress),
        )
    return printing.result(arguments, result)


def compare(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        from ires_kernels.pictures import plot

        plot.check(arguments.plot)
    if arguments.html:
        from ires_kernels.pictures import page

        page.check(arguments.html)
    _stream(arguments, "target", "instruct", "base")
    with progress_bar(arguments, "compare") as progress:
        report = ik.compare(
            arguments.target,
            (arguments.instruct, arguments.base),
            alpha=arguments.alpha,
            curve=bool(arguments.plot or arguments.html),
            skip=arguments.skip,
            dtype=arguments.dtype,
            allow_missing=arguments.allow_missing,
            vocabulary=arguments.vocabulary,
            renames=arguments.rename,
            trust_names=arguments.trust_names,
            threads=arguments.threads,
            progress=progress,
            follow_links=arguments.follow_links,
        )
    if arguments.plot:
        plot.compared(report, arguments.plot)
    if arguments.html:
        page.write(report, arguments.html)
    return printing.result(arguments, report)


def merge(arguments: argparse.Namespace) -> int:
    _check_destination(arguments)
    if arguments.in_place:  # which is to be known if this fails
        asked = recipe_files.read(
            arguments.recipe, in_place=True, trust_inputs=arguments.trust_inputs, follow_links=arguments.follow_links
        )
        arguments.target = asked.paths["target"]
    with progress_bar(arguments, "merge") as progress:
        result = ik.merge(
            arguments.recipe,
            out=arguments.out,
            in_place=arguments.in_place,
            undo=arguments.undo or "ring",
            tag=arguments.tag,
            compare=arguments.compare,
            stream=arguments.stream,
            trust_inputs=arguments.trust_inputs,
            **_how(arguments, progress),
        )
    return printing.result(arguments, result)


def _check_destination(arguments: argparse.Namespace) -> None:
    if not arguments.in_place and (arguments.undo or arguments.tag):
        arguments.parser.error("--undo, --keep-undo, --no-undo and --tag go with --in-place")


def _options(arguments: argparse.Namespace, progress: Progress | None) -> dict[str, Any]:
    return {
        "skip": arguments.skip,
        "allow_missing": arguments.allow_missing,
        "rounding": arguments.rounding,
        "seed": arguments.seed,
        "vocabulary": arguments.vocabulary,
        "renames": arguments.rename,
        "trust_names": arguments.trust_names,
        **_how(arguments, progress),
    }


def _how(arguments: argparse.Namespace, progress: Progress | None) -> dict[str, Any]:
    """How a merge is carried out, whatever is asked for."""
    return {
        "sync": not arguments.no_sync,
        "sha256": arguments.sha256,
        "device": arguments.device,
        "threads": arguments.threads,
        "dry_run": arguments.dry_run,
        "progress": progress,
        "follow_links": arguments.follow_links,
        "lock": not arguments.no_lock,
        "workers": operands.workers(arguments),
    }


def verify(arguments: argparse.Namespace) -> int:
    given = {role: getattr(arguments, role) for role in ("target", "instruct", "base")}
    residuals = arguments.residual
    if len(residuals) == 1:
        given["residual"] = residuals[0]
    else:
        given |= dict(zip(roles.of_residuals(len(residuals)), residuals, strict=True))
    pairs = [path for text in arguments.pair for path in operands.pair(text)[0]]
    given |= dict(zip(roles.of_pairs(len(pairs) // 2), pairs, strict=True))
    given |= dict(zip(roles.of_models(1 + len(arguments.model))[1:], arguments.model, strict=True))
    with progress_bar(arguments, "verify") as progress:
        report = ik.verify(
            arguments.out,
            inputs={role: path for role, path in given.items() if path is not None},
            hashes_only=arguments.hashes_only,
            trust_inputs=arguments.trust_inputs,
            follow_links=arguments.follow_links,
            device=arguments.device,
            threads=arguments.threads,
            progress=progress,
        )
    printing.result(arguments, report)
    return 0 if report.ok else 1


def resume(arguments: argparse.Namespace) -> int:
    with progress_bar(arguments, "resume") as progress:
        report = ik.resume(
            arguments.path,
            device=arguments.device,
            threads=arguments.threads,
            progress=progress,
            lock=not arguments.no_lock,
            adopt=arguments.adopt,
        )
    return printing.result(arguments, report)


def finish(arguments: argparse.Namespace) -> int:
    with progress_bar(arguments, "finish") as progress:
        report = ik.finish(
            arguments.out,
            device=arguments.device,
            threads=arguments.threads,
            progress=progress,
            lock=not arguments.no_lock,
        )
    return printing.result(arguments, report)


def rollback(arguments: argparse.Namespace) -> int:
    done = ik.rollback(arguments.path, lock=not arguments.no_lock, adopt=arguments.adopt)
    if not arguments.quiet:
        tell(done)
    return 0


def status(arguments: argparse.Namespace) -> int:
    found = ik.status(arguments.path)
    return printing.result(arguments, found)


def inspect(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        from ires_kernels.pictures import plot

        plot.check(arguments.plot)
    _stream(arguments, "path")
    table = ik.inspect(arguments.path, follow_links=arguments.follow_links)
    if arguments.plot:
        plot.inspected(table, arguments.plot)
    tensors = table["all_tensors"] if arguments.tensors else table.pop("all_tensors")
    if arguments.json:
        say(json.dumps(table, indent=2))
        return 0
    tell(printing.inspected(table, tensors if arguments.tensors else ()))
    return 0


def sha256(arguments: argparse.Namespace) -> int:
    with progress_bar(arguments, "sha256") as progress:
        sums = ik.sha256(
            arguments.path,
            write=arguments.write,
            threads=arguments.threads,
            progress=progress,
            follow_links=arguments.follow_links,
        )
    if arguments.json:
        say(json.dumps(sums.to_dict(), indent=2))
    elif not arguments.quiet:
        say(f"{sums}")  # for `sha256sum -c`: whole lines, however long
    if sums.unrecorded:
        names = ", ".join(sums.unrecorded)
        fail(0, f"{sums.path}: SHA256SUMS has no sum of {names}, or none that can be read: nothing was compared.")
    for name in sums.differ:
        fail(1, f"{sums.path}: {name} has another sum than SHA256SUMS says: {sums.recorded[name]}.")
    return 0 if sums.ok else 1


def publish(arguments: argparse.Namespace) -> int:
    with progress_bar(arguments, "publish") as progress:
        found = ik.publish(
            arguments.out, threads=arguments.threads, progress=progress, follow_links=arguments.follow_links
        )
    return printing.result(arguments, found)
