"""The command line: ``ires``, or ``python -m ires_kernels``.

Exit codes: 0 done; 1 verify found a difference; 2 wrong usage or refused input; 3 the disk, a GPU or the environment
failed, or has ruined a model; 4 a bug; 130 interrupted, and 128 + N stopped by another signal N.
Results go to stdout, with --json as one JSON document; progress and errors go to stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import ires_kernels as ik
from ires_kernels.checkpoints import hub, roles
from ires_kernels.checkpoints.folders import MERGE_ADAPTER
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import interrupts, trust
from ires_kernels.files.hidden import unfinished
from ires_kernels.files.plain import plain, plain_lines
from ires_kernels.files.plain import table as columns
from ires_kernels.files.store import LostError, StoreError, is_unfinished, partial_path
from ires_kernels.planning import recipe_files
from ires_kernels.planning.inputs import check_model
from ires_kernels.planning.plan import VERSION, size
from ires_kernels.planning.rules import DTYPES, VOCABULARIES, ArgumentError
from ires_kernels.streaming.tiles import ComputeError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from _typeshed import SupportsWrite

    from ires_kernels.streaming.stream import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits by itself with 2 for wrong usage."""
    _open_streams()
    mask = os.umask(0o077)
    os.umask(mask & 0o077)  # one that closes files to their owner would close them to us
    arguments, code = None, 0
    once = _Once()
    try:
        once.take_over()
        arguments = _parse(argv)
        if arguments.key:
            os.environ[trust.VARIABLE] = arguments.key
        try:
            code = arguments.run(arguments)
        except BaseException as error:
            code = _explain(error, arguments)
    except Stopped as error:  # before the command, or as another error was told of
        code = _explain(error, arguments)
    except SystemExit as error:
        raise SystemExit(_flush(int(error.code or 0))) from None
    finally:
        if argv is not None:  # else the process ends, and a late signal is to change nothing about that
            os.umask(mask)
            once.give_back()
    return _flush(code)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(_without_dashes(sys.argv[1:] if argv is None else argv))
    if arguments.run is _apply and not any(text.startswith("-") for text in rest):
        arguments.residuals += rest  # argparse takes positional arguments in one run only
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _explain(error: BaseException, arguments: argparse.Namespace | None) -> int:
    """Say on stderr what has ended a command, and what is left of it; returns the exit code."""
    if isinstance(error, KeyboardInterrupt) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the interrupt came first, or later, but this is what to know
    if isinstance(error, LostError):
        return _fail(3, f"{error}")
    if isinstance(error, (CheckpointError, StoreError, ArgumentError)):
        if isinstance(error, CheckpointError) and error.problems and getattr(arguments, "json", False):
            try:
                _say(json.dumps({"error": f"{error}", "problems": error.problems}, indent=2))
            except OSError:  # what follows still tells
                _mute(sys.stdout)
        return _fail(2, f"{error}", _unfinished(arguments))
    if isinstance(error, _NotPrinted):
        return _fail(3, f"standard output: {error.strerror}. What the command had to do is done.")
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(3, plain(f"{place}{error.strerror or error}."), _state(arguments))
    if isinstance(error, ComputeError):
        return _fail(3, f"{error}", _state(arguments))
    if isinstance(error, Stopped) and error.number != signal.SIGINT:
        return _fail(128 + error.number, f"stopped by {signal.Signals(error.number).name}.", _state(arguments))
    if isinstance(error, KeyboardInterrupt):
        return _fail(130, "interrupted.", _state(arguments))
    if not isinstance(error, Exception) or os.environ.get("IRES_DEBUG"):
        raise error
    kind = type(error).__name__
    return _fail(4, f"unexpected {kind}: {plain(error)}. IRES_DEBUG=1 shows where it comes from.", _state(arguments))


class Stopped(KeyboardInterrupt):
    """A signal that asks to end in order, Ctrl-C among them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Once:
    """The handler of signals that ask to end: the first one raises Stopped. What follows brings things in order."""

    def __init__(self) -> None:
        self._raised = False
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __call__(self, number: int, _: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise Stopped(number)

    def take_over(self) -> None:
        """Handle the signals that nobody ignores or handles otherwise."""
        interrupts.keep(None)
        sys.unraisablehook = self._keep
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = before
                    signal.signal(number, self)

    def _keep(self, what: UnraisableHookArgs, /) -> None:
        """The signal came while a finaliser ran: it is not to be lost with what that raised."""
        if isinstance(what.exc_value, Stopped):
            interrupts.keep(what.exc_value)
        else:
            self._hook(what)

    def give_back(self) -> None:
        """Leave them to who had them before."""
        sys.unraisablehook = self._hook
        for number, before in self._before.items():
            signal.signal(number, before)


def _without_dashes(argv: Sequence[str]) -> list[str]:
    """Arguments without the first `--`: all behind it are paths, and argparse takes ./-path for no option."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [*argv[:end], *(f"./{text}" if text.startswith("-") else text for text in argv[end + 1 :])]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ires", description="Exact arithmetic on checkpoints of language models.")
    parser.add_argument("--version", action="version", version=f"ires_kernels {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    extract = commands.add_parser("extract", help="write instruct - base as a residual folder")
    extract.add_argument("base", metavar="BASE", help="folder or .safetensors file of the base model")
    extract.add_argument("instruct", metavar="INSTRUCT", help="the instruct model made from it")
    extract.add_argument("-o", "--out", required=True, metavar="OUT", help="the new folder to write")
    _merge_options(extract, dtype="f32", kept="of the residual (default: f32)")
    extract.set_defaults(run=_extract)

    apply = commands.add_parser("apply", help="write target + alpha * residual as a model folder")
    apply.add_argument("target", metavar="TARGET", help="folder or .safetensors file of the model to add to")
    apply.add_argument(
        "residuals",
        metavar="RESIDUAL[:ALPHA]",
        nargs="*",
        help="residual folders, with a factor or with that of --alpha",
    )
    apply.add_argument("--instruct", metavar="PATH", help="in place of residuals: add instruct - base in one pass")
    apply.add_argument("--base", metavar="PATH", help="the base model that goes with --instruct")
    apply.add_argument(
        "--alpha", type=float, metavar="A", help="factor of the residuals that have none of their own (default: 1)"
    )
    apply.add_argument(
        "--alpha-for",
        type=_alpha_for,
        action="append",
        default=[],
        metavar="REGEX=A[,A…]",
        help="other factors, one for each residual, for tensors in whose name REGEX is found; the first found decides",
    )
    apply.add_argument(
        "--pair",
        action="append",
        default=[],
        metavar="I:B[:A]",
        help="an instruct model and its base, and a factor for their difference; repeatable: all are added in one pass",
    )
    _destination(apply)
    _merge_options(apply, dtype=None, kept="of all tensors of floats or codes (default: as in the target)")
    # argparse takes -1e-3 for an option, if it is not told that this is a number.
    apply._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    apply.set_defaults(run=_apply, parser=apply)

    merge = commands.add_parser("merge", help="do what a recipe in YAML asks for, or an ires.json again")
    merge.add_argument("recipe", metavar="RECIPE", help="recipe.yml, or the ires.json of an output")
    _destination(merge)
    _run_options(merge)
    _trust_inputs(merge)
    merge.set_defaults(run=_merge, parser=merge, target=None)

    compare = commands.add_parser("compare", help="say how far target and instruct are from base, and how that fits")
    compare.add_argument("target", metavar="TARGET", help="folder or .safetensors file of the model to add to")
    compare.add_argument("--instruct", required=True, metavar="PATH", help="the instruct model")
    compare.add_argument("--base", required=True, metavar="PATH", help="the base model of both")
    compare.add_argument(
        "--alpha", type=float, default=1.0, metavar="A", help="of which to say what rounding would leave (default: 1)"
    )
    compare.add_argument(
        "--dtype", choices=list(DTYPES), help="which the merged model would have (default: the target's)"
    )
    _matching_options(compare)
    _follow_links(compare)
    _plot_option(compare, "heat maps of layers and kinds of tensors, alpha, and ulps")
    compare.add_argument("--html", metavar="PATH", help="also write a page of its own, which loads nothing")
    compare.add_argument("--threads", type=int, metavar="N", help="default: one per CPU, 8 at most; more was slower")
    compare.add_argument("--json", action="store_true", help="print the result as JSON")
    compare.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    _key_option(compare)
    compare._negative_number_matcher = apply._negative_number_matcher
    compare.set_defaults(run=_compare)

    inspect = commands.add_parser("inspect", help="describe a model, a residual or a .safetensors file")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    _plot_option(inspect, "where its parameters are")
    _key_option(inspect)
    _follow_links(inspect)
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="compute a finished merge again and compare every bit")
    verify.add_argument("out", metavar="OUT", help="the output folder of extract or apply")
    verify.add_argument("--hashes-only", action="store_true", help="compare with recorded hashes; needs no inputs")
    for role in ("target", "instruct", "base"):
        verify.add_argument(f"--{role}", metavar="PATH", help=f"where the {role} model is now, if it was moved")
    verify.add_argument("--residual", metavar="PATH", action="append", default=[], help="as above; all, in order")
    verify.add_argument("--pair", metavar="I:B", action="append", default=[], help="as above; all, in order")
    _trust_inputs(verify)
    _follow_links(verify)
    _common_options(verify)
    verify.set_defaults(run=_verify)

    resume = commands.add_parser("resume", help="finish an interrupted extract or apply")
    resume.add_argument("path", metavar="PATH", help="its OUT, or its TARGET if it was in place")
    _adopt_option(resume)
    _lock_option(resume)
    _common_options(resume)
    resume.set_defaults(run=_resume)

    rollback = commands.add_parser("rollback", help="take back an unfinished merge, or one with --keep-undo")
    rollback.add_argument("path", metavar="PATH", help="its OUT, or its TARGET if it was in place")
    rollback.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _adopt_option(rollback)
    _lock_option(rollback)
    _key_option(rollback)
    rollback.set_defaults(run=_rollback)

    status = commands.add_parser("status", help="say whether a merge is unfinished, and what to do")
    status.add_argument("path", metavar="PATH", help="a model, or an OUT that is not there yet")
    status.add_argument("--json", action="store_true", help="print JSON")
    _key_option(status)
    status.set_defaults(run=_status)
    return parser


def _destination(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--out", metavar="OUT", help="the new folder to write")
    where.add_argument("--in-place", action="store_true", help="change the files of TARGET, with no second copy")
    undo = parser.add_mutually_exclusive_group()
    undo.add_argument(
        "--keep-undo",
        dest="undo",
        action="store_const",
        const="all",
        help="in place: keep all old bytes, so that `ires rollback` can take back the finished update",
    )
    undo.add_argument(
        "--no-undo",
        dest="undo",
        action="store_const",
        const="none",
        help="in place: keep no old bytes; faster, but to be killed or to lose power on the way ruins TARGET",
    )
    parser.add_argument("--tag", default="", metavar="TEXT", help="in place: to apply the same once more on purpose")


def _merge_options(parser: argparse.ArgumentParser, *, dtype: str | None, kept: str) -> None:
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype, help=f"dtype {kept}")
    _matching_options(parser)
    parser.add_argument("--rounding", choices=["nearest", "stochastic"], default="nearest")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    _run_options(parser)


def _matching_options(parser: argparse.ArgumentParser) -> None:
    """Which tensors belong together, and which are left out."""
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out tensors in whose name REGEX is found (apply copies them from the target); repeatable",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="accept tensors that only some of the models have, as long as nine tenths of the residual find a place",
    )
    # A name of its own, as the value of an option that may go without one could be the next residual.
    parser.add_argument(
        "--allow-missing=any",
        dest="allow_missing",
        action="store_const",
        const="any",
        help="the same, however little of the residual finds a place",
    )
    parser.add_argument(
        "--vocabulary",
        choices=VOCABULARIES,
        help="whose tokens and rows of embeddings the output has where tokenizers disagree; rows: by number, whatever "
        "tokens they belong to (default: tokens decide, and what is not clear is refused)",
    )
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="A=B",
        help="what is A in names of the output is B in the other models, as model.=model.language_model.; repeatable. "
        "Most of this is found without being told",
    )
    parser.add_argument(
        "--trust-names", action="store_true", help="match tensors by names and shapes alone, and compare no values"
    )


def _trust_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-inputs",
        action="store_true",
        help="read the inputs where the manifest says that they are, though it was not signed with your key",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-sync", action="store_true", help="do not wait for the disk: a power cut may ruin the output"
    )
    parser.add_argument(
        "--sha256", action="store_true", help="also write sha256 sums of the weights, as the Hub has them"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and write nothing")
    _follow_links(parser)
    _lock_option(parser)
    _common_options(parser)


def _follow_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="accept files in a model's folder that are links out of it, and so copy what they lead to; for models of "
        "your own (links into the Hub's own cache need no leave)",
    )


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="D",
        help="cpu, or cuda or cuda:N: the same weights, and slower with files on both ends (default: cpu)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU, 8 at most; more was slower")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    _key_option(parser)


def _lock_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="do without the lock (flock), on a file system that has none: no other process may write there",
    )


def _adopt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="take up an update in place whose key is lost, as that of a container that has ended: it is followed "
        "without proof, so only what you have begun yourself, and nothing that was downloaded",
    )


def _key_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        metavar="PATH",
        help="the file with the key that signs the state of merges, as IRES_KEY; made if it is not there "
        "(default: ires_kernels/key in XDG_STATE_HOME or ~/.local/state)",
    )


def _plot_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--plot", metavar="PATH", help=f"also draw {what}: .png or .svg (needs matplotlib)")


def _alpha_for(text: str) -> tuple[str, tuple[float, ...] | float]:
    pattern, _, values = text.rpartition("=")
    try:
        factors = tuple(float(value) for value in values.split(","))
    except ValueError:
        factors = ()
    if not pattern or not factors:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted REGEX=ALPHA, or =ALPHA,ALPHA,… for several residuals")
    return pattern, factors if len(factors) > 1 else factors[0]


def _residual(text: str) -> tuple[str, float | None]:
    """Path and factor of PATH or PATH:ALPHA; a path that exists is one, colons and all."""
    path, colon, factor = text.rpartition(":")
    if not os.path.lexists(text) and colon and path:
        try:
            return path, float(factor)
        except ValueError:
            if os.path.lexists(path):
                raise ArgumentError(
                    f"{text}: {factor!r} is no factor of {path}, wanted a number, as {path}:0.5, or nothing."
                ) from None
    return text, None


def _pair(text: str) -> tuple[tuple[str, str], float | None]:
    """The models and the factor of INSTRUCT:BASE or INSTRUCT:BASE:ALPHA, of which models that exist may have colons."""
    models, factor = text, None
    if _parted(text) is None:
        models, factor = _residual(text)
    found = _parted(models)
    if found is None:
        raise ArgumentError(
            f"{text}: is no pair, wanted INSTRUCT:BASE or INSTRUCT:BASE:ALPHA: two models with a colon between them, "
            "and a number as the factor."
        )
    return found, factor


def _parted(text: str) -> tuple[str, str] | None:
    """The two sides of the colon that parts models; None where none does."""
    places = [match.start() for match in re.finditer(":(?!//)", text)][::-1]
    sides = [(text[:at], text[at + 1 :]) for at in places if text[:at] and text[at + 1 :]]
    there = [pair for pair in sides if all(os.path.lexists(path) or hub.is_remote(path) for path in pair)]
    if there:
        return there[0]
    return sides[0] if len(sides) == 1 and not _is_number(sides[0][1]) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _extract(arguments: argparse.Namespace) -> int:
    with _progress(arguments, "extract") as progress:
        result = ik.extract(
            arguments.base, arguments.instruct, arguments.out, dtype=arguments.dtype, **_options(arguments, progress)
        )
    return _print_result(arguments, result)


def _apply(arguments: argparse.Namespace) -> int:
    pair = arguments.instruct is not None and arguments.base is not None
    ways = [pair, bool(arguments.pair), bool(arguments.residuals)]
    if ways.count(True) != 1 or (arguments.instruct is None) != (arguments.base is None):
        arguments.parser.error("give one or more residuals, or --instruct and --base, or one or more --pair")
    _check_destination(arguments)
    if arguments.in_place:
        hub.check_local(arguments.target)
    common = 1.0 if arguments.alpha is None else arguments.alpha
    alpha: float | list[float] = common
    residuals: tuple[hub.StrPath, ...] | list[str] | list[tuple[str, str]]
    if pair:
        residuals = (hub.local(arguments.instruct), hub.local(arguments.base))
        for role, path in zip(("instruct", "base"), residuals, strict=True):
            check_model(path, role, follow_links=arguments.follow_links)
    else:
        pairs = [_pair(text) for text in arguments.pair]
        specs = [_residual(text) for text in arguments.residuals]
        given = [factor for _, factor in (pairs or specs)]
        if arguments.alpha is not None and all(factor is not None for factor in given):
            what = "pairs" if pairs else "residuals"
            raise ArgumentError(
                f"{[*arguments.pair, *arguments.residuals][0]} has a factor of its own, and --alpha "
                f"{arguments.alpha:g} is for {what} that have none. Leave one of the two out."
            )
        residuals = [models for models, _ in pairs] or [path for path, _ in specs]
        alpha = [common if factor is None else factor for factor in given]
    with _progress(arguments, "apply") as progress:
        result = ik.apply(
            arguments.target,
            residuals,
            out=arguments.out,
            in_place=arguments.in_place,
            undo=arguments.undo or "ring",
            tag=arguments.tag,
            alpha=alpha,
            alphas=arguments.alpha_for,
            dtype=arguments.dtype,
            **_options(arguments, progress),
        )
    return _print_result(arguments, result)


def _compare(arguments: argparse.Namespace) -> int:
    from ires_kernels.pictures import page, plot

    if arguments.plot:
        plot.check(arguments.plot)
    if arguments.html:
        page.check(arguments.html)
    with _progress(arguments, "compare") as progress:
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
    return _print_result(arguments, report)


def _merge(arguments: argparse.Namespace) -> int:
    _check_destination(arguments)
    if arguments.in_place:  # which is to be known if this fails
        asked = recipe_files.read(
            arguments.recipe, in_place=True, trust_inputs=arguments.trust_inputs, follow_links=arguments.follow_links
        )
        arguments.target = asked.paths["target"]
    with _progress(arguments, "merge") as progress:
        result = ik.merge(
            arguments.recipe,
            out=arguments.out,
            in_place=arguments.in_place,
            undo=arguments.undo or "ring",
            tag=arguments.tag,
            trust_inputs=arguments.trust_inputs,
            **_how(arguments, progress),
        )
    return _print_result(arguments, result)


def _check_destination(arguments: argparse.Namespace) -> None:
    if not arguments.in_place and (arguments.undo or arguments.tag):
        arguments.parser.error("--keep-undo, --no-undo and --tag go with --in-place")


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
    }


def _verify(arguments: argparse.Namespace) -> int:
    given = {role: getattr(arguments, role) for role in ("target", "instruct", "base")}
    residuals = arguments.residual
    if len(residuals) == 1:
        given["residual"] = residuals[0]
    else:
        given |= dict(zip(roles.of_residuals(len(residuals)), residuals, strict=True))
    pairs = [path for text in arguments.pair for path in _pair(text)[0]]
    given |= dict(zip(roles.of_pairs(len(pairs) // 2), pairs, strict=True))
    with _progress(arguments, "verify") as progress:
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
    _print_result(arguments, report)
    return 0 if report.ok else 1


def _resume(arguments: argparse.Namespace) -> int:
    with _progress(arguments, "resume") as progress:
        report = ik.resume(
            arguments.path,
            device=arguments.device,
            threads=arguments.threads,
            progress=progress,
            lock=not arguments.no_lock,
            adopt=arguments.adopt,
        )
    return _print_result(arguments, report)


def _rollback(arguments: argparse.Namespace) -> int:
    done = ik.rollback(arguments.path, lock=not arguments.no_lock, adopt=arguments.adopt)
    if not arguments.quiet:
        _say(done)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    found = ik.status(arguments.path)
    _say(json.dumps(found.to_dict(), indent=2) if arguments.json else f"{found}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        from ires_kernels.pictures import plot

        plot.check(arguments.plot)
    table = ik.inspect(arguments.path, follow_links=arguments.follow_links)
    if arguments.plot:
        plot.inspected(table, arguments.plot)
    tensors = table["all_tensors"] if arguments.tensors else table.pop("all_tensors")
    if arguments.json:
        _say(json.dumps(table, indent=2))
        return 0
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in table["parameters_by_dtype"].items())
    rows = [
        (table["kind"], table["path"]),
        ("parameters", f"{table['parameters']:,} in {table['tensors']} tensors ({dtypes})"),
        ("size", f"{size(table['bytes'])} in {len(table['files'])} files"),
        *((key, f"{value}") for key, value in table["config"].items()),
    ]
    rows += [("head", "is the embedding")] if table["head_is_embedding"] else []
    rows += [("not read", ", ".join(table["beside"]))] if table["beside"] else []
    if table["shard"]:
        rows.append(("shard", "{} of {}: the other tensors of the model are not in this file".format(*table["shard"])))
    if table["empty"]:
        count = len(table["empty"])
        names = f"{count} tensor{'s' * (count > 1)} without elements, such as {table['empty'][0]}"
        rows.append(("empty", f"{names}: saved under ZeRO-3 without gathering?"))
    if table["adapter"]:
        names = f"{len(table['adapter'])} tensors, such as {table['adapter'][0]}"
        rows.append(("adapter", f"{names}. {MERGE_ADAPTER}"))
    if table["quantized"]:
        rows.append(("quantized", f"{len(table['quantized'])} tensors: {next(iter(table['quantized'].values()))}"))
    rows += [("format", f"{form}: {count} weight{'s' * (count > 1)}") for form, count in table["formats"].items()]
    if table["not_decoded"]:
        name, why = next(iter(table["not_decoded"].items()))
        rows.append(
            (
                "not decoded",
                f"{len(table['not_decoded'])} weight{'s' * (len(table['not_decoded']) > 1)}, such as {name}: {why}",
            )
        )
    made_by = table["made_by"]
    rows += [("made by", f"ires {made_by['operation']}, {made_by.get('id')}")] if "operation" in made_by else []
    rows += [(f"from {role}", f"{entry.get('path')}") for role, entry in made_by.get("inputs", {}).items()]
    rows += [("note", text) for text in table["notes"]]
    lines = [_tensor(each) for each in tensors if arguments.tensors]
    _say("\n".join([columns(rows), *map(plain, lines)]))
    return 0


def _tensor(entry: dict[str, Any]) -> str:
    """A stored tensor in a line, and where it is a part of a quantized weight, of which."""
    stored = f"{entry['dtype']:<8} {entry['shape']!s:<20} {entry['name']}  {entry['file']}"
    if "format" in entry:
        return f"{stored}  {entry['format']} codes of {entry['weight']} {entry['numbers']}"
    return f"{stored}  of {entry['weight']}" if "weight" in entry else stored


def _print_result(arguments: argparse.Namespace, result: Any) -> int:
    if arguments.json:
        _say(json.dumps(result.to_dict(), indent=2))
    elif not arguments.quiet:
        _say(f"{result}")
    return 0


@contextmanager
def _progress(arguments: argparse.Namespace, what: str) -> Iterator[Progress | None]:
    """A progress bar with bytes, speed and time left, on a terminal. It draws in the thread that does the work."""
    if arguments.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    drawing = [True]

    def draw(work: Callable[[], object]) -> None:
        """A terminal that goes away, or is full, is no reason to end a merge."""
        if drawing[0]:
            try:
                work()
            except Exception:
                drawing[0] = False

    task = bar.add_task(what, total=None)
    draw(bar.start)
    try:
        yield lambda done, todo: draw(lambda: bar.update(task, completed=done, total=todo, refresh=True))
    finally:
        draw(bar.stop)


def _path(arguments: argparse.Namespace | None) -> Path | None:
    """What a command writes, None if it only reads."""
    if arguments is None or arguments.run not in (_extract, _apply, _merge, _resume, _rollback):
        return None
    if arguments.run in (_resume, _rollback):
        return Path(arguments.path)
    path = arguments.target if getattr(arguments, "in_place", False) else arguments.out
    return None if path is None else Path(path)


def _unfinished(arguments: argparse.Namespace | None) -> str:
    """What is unfinished there and what to do about it; nothing where nothing is."""
    path = _path(arguments)
    try:
        if path is not None and (unfinished(path) or is_unfinished(partial_path(path))):
            found = ik.status(path)
            return f"{found}" if found.state != "foreign" else ""  # the error has said that
    except (OSError, ValueError):  # what cannot be looked at cannot be told
        return f"`ires status {path}` says what is left of it."
    return ""


def _state(arguments: argparse.Namespace | None) -> str:
    """What a failed merge has left, and the next step."""
    path = _path(arguments)
    unfinished_there = _unfinished(arguments)
    if arguments is None or path is None or unfinished_there:
        return unfinished_there
    try:
        if arguments.run is _rollback or (getattr(arguments, "in_place", False) and path.exists()):
            return f"{path} is as it was, or finished: `ires status {path}` says which."
        if path.exists():
            return f"There is something at {path}: `ires verify {path}` says whether it is the complete output."
    except OSError:
        return f"`ires status {path}` says what is left of it."
    return f"{path} was not written and nothing is left of it."


class _NotPrinted(OSError):
    """The result of a command could not be printed."""


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Of argparse, which says nothing where help cannot be printed."""
        if file is not sys.stdout:
            super()._print_message(message, file)
            return
        try:
            _say(message.rstrip("\n"))
        except _NotPrinted as error:
            raise SystemExit(_fail(3, f"standard output: {error.strerror}.")) from None


def _say(text: str) -> None:
    """Print a result. Raises _NotPrinted where that fails, but not where whoever reads it has seen enough."""
    try:
        print(plain_lines(*text.split("\n")), flush=True)
    except BrokenPipeError:
        _mute(sys.stdout)
    except OSError as error:
        _mute(sys.stdout)
        raise _NotPrinted(error.errno, error.strerror) from error


def _fail(code: int, *lines: str) -> int:
    try:
        text = "\n".join([f"ires: {lines[0]}", *filter(None, lines[1:])])
        print(plain_lines(*text.split("\n")), file=sys.stderr, flush=True)
    except OSError:  # the exit code still tells
        _mute(sys.stderr)
    return code


def _open_streams() -> None:
    """Let what was closed lead nowhere: the next file to be opened would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")


def _flush(code: int) -> int:
    """Bring out what argparse or a library has printed, or drop it, for Python would exit with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _mute(stream)
        except OSError as error:
            _mute(stream)
            if stream is sys.stdout and not code:
                code = _fail(3, f"standard output: {error.strerror}.")
    return code


def _mute(stream: TextIO) -> None:
    """What is written to a stream from now on, and what it has not brought out yet, leads nowhere."""
    with suppress(io.UnsupportedOperation):  # it is in memory
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
