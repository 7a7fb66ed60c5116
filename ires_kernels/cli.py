"""The command line: ``ires``, or ``python -m ires_kernels``.

Exit codes: 0 done; 1 verify found a difference; 2 wrong usage or refused input; 3 the disk or a GPU failed;
4 a bug; 130 interrupted, and 128 + N stopped by another signal N.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from ires_kernels import merge, trust
from ires_kernels.header import CheckpointError
from ires_kernels.inplace import unfinished
from ires_kernels.inputs import kind_of
from ires_kernels.plan import VERSION, size
from ires_kernels.rules import DTYPES, ArgumentError
from ires_kernels.store import StoreError, is_unfinished, partial_path
from ires_kernels.stream import Progress
from ires_kernels.windows import ComputeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits by itself with 2 for wrong usage."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed; the next file to be opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    rest = [text for text in rest if text != "--"]
    if arguments.run is _apply and not any(text.startswith("-") for text in rest):
        arguments.residuals += rest  # argparse takes positional arguments in one run only
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    if arguments.key:
        os.environ[trust.VARIABLE] = arguments.key
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except (CheckpointError, StoreError, ArgumentError) as error:
        return _fail(2, f"{error}", _unfinished(arguments))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(3, f"{place}{error.strerror or error}.", _state(arguments))
    except ComputeError as error:
        return _fail(3, f"{error}", _state(arguments))
    except Stopped as error:
        return _fail(128 + error.number, f"stopped by {signal.Signals(error.number).name}.", _state(arguments))
    except KeyboardInterrupt:
        return _fail(130, "interrupted.", _state(arguments))
    except Exception as error:
        if os.environ.get("IRES_DEBUG"):
            raise
        kind = type(error).__name__
        return _fail(4, f"unexpected {kind}: {error}. IRES_DEBUG=1 shows where it comes from.", _state(arguments))


class Stopped(KeyboardInterrupt):
    """A signal that asks to end in order, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP):  # once is enough: what follows brings things in order
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ires", description="Exact arithmetic on checkpoints of language models.")
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
        "residuals", metavar="RESIDUAL[:ALPHA]", nargs="*", help="residual folders, each with a factor if not --alpha"
    )
    apply.add_argument("--instruct", metavar="PATH", help="in place of residuals: add instruct - base in one pass")
    apply.add_argument("--base", metavar="PATH", help="the base model that goes with --instruct")
    apply.add_argument("--alpha", type=float, default=1.0, metavar="A", help="factor of the residuals (default: 1)")
    apply.add_argument(
        "--alpha-for",
        type=_alpha_for,
        action="append",
        default=[],
        metavar="REGEX=A[,A…]",
        help="other factors for tensors in whose name REGEX is found; the first that is found decides",
    )
    where = apply.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--out", metavar="OUT", help="the new folder to write")
    where.add_argument("--in-place", action="store_true", help="change the files of TARGET, with no second copy")
    undo = apply.add_mutually_exclusive_group()
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
    apply.add_argument("--tag", default="", metavar="TEXT", help="in place: to apply the same once more on purpose")
    _merge_options(apply, dtype=None, kept="of all float tensors (default: as in the target)")
    # argparse takes -1e-3 for an option, if it is not told that this is a number.
    apply._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    apply.set_defaults(run=_apply, parser=apply)

    inspect = commands.add_parser("inspect", help="describe a model, a residual or a .safetensors file")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    _key_option(inspect)
    _follow_links(inspect)
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="compute a finished merge again and compare every bit")
    verify.add_argument("out", metavar="OUT", help="the output folder of extract or apply")
    verify.add_argument("--hashes-only", action="store_true", help="compare with recorded hashes; needs no inputs")
    for role in ("target", "instruct", "base"):
        verify.add_argument(f"--{role}", metavar="PATH", help=f"where the {role} model is now, if it was moved")
    verify.add_argument("--residual", metavar="PATH", action="append", default=[], help="as above; all, in order")
    _follow_links(verify)
    _common_options(verify)
    verify.set_defaults(run=_verify)

    resume = commands.add_parser("resume", help="finish an interrupted extract or apply")
    resume.add_argument("path", metavar="PATH", help="its OUT, or its TARGET if it was in place")
    _common_options(resume)
    resume.set_defaults(run=_resume)

    rollback = commands.add_parser("rollback", help="take back an unfinished merge, or one with --keep-undo")
    rollback.add_argument("path", metavar="PATH", help="its OUT, or its TARGET if it was in place")
    rollback.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _key_option(rollback)
    rollback.set_defaults(run=_rollback)

    status = commands.add_parser("status", help="say whether a merge is unfinished, and what to do")
    status.add_argument("path", metavar="PATH", help="a model, or an OUT that is not there yet")
    status.add_argument("--json", action="store_true", help="print JSON")
    _key_option(status)
    status.set_defaults(run=_status)
    return parser


def _merge_options(parser: argparse.ArgumentParser, *, dtype: str | None, kept: str) -> None:
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype, help=f"dtype {kept}")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out tensors in whose name REGEX is found (apply copies them from the target); repeatable",
    )
    parser.add_argument("--allow-missing", action="store_true", help="accept tensors that only some of the models have")
    parser.add_argument("--rounding", choices=["nearest", "stochastic"], default="nearest")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    parser.add_argument(
        "--no-sync", action="store_true", help="do not wait for the disk: a power cut may ruin the output"
    )
    parser.add_argument(
        "--sha256", action="store_true", help="also write sha256 sums of the weights, as the Hub has them"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and write nothing")
    _follow_links(parser)
    _common_options(parser)


def _follow_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="accept files in a model's folder that are links out of it, and so copy what they lead to; for models of "
        "your own (links into the Hub's own cache need no leave)",
    )


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="D", help="compute on cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU, 16 at most")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    _key_option(parser)


def _key_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        metavar="PATH",
        help="the file with the key that signs the state of merges, as IRES_KEY; made if it is not there "
        "(default: ires_kernels/key in XDG_STATE_HOME or ~/.local/state)",
    )


def _alpha_for(text: str) -> tuple[str, tuple[float, ...] | float]:
    pattern, _, values = text.rpartition("=")
    try:
        factors = tuple(float(value) for value in values.split(","))
    except ValueError:
        factors = ()
    if not pattern or not factors:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted REGEX=ALPHA, or =ALPHA,ALPHA,… for several residuals")
    return pattern, factors if len(factors) > 1 else factors[0]


def _residual(text: str, default: float) -> tuple[str, float]:
    """Path and factor of PATH or PATH:ALPHA; a path that exists is one, colons and all."""
    path, colon, factor = text.rpartition(":")
    if not os.path.exists(text) and colon and path:
        try:
            return path, float(factor)
        except ValueError:
            pass
    return text, default


def _extract(arguments: argparse.Namespace) -> int:
    with _progress(arguments, "extract") as progress:
        result = merge.extract(
            arguments.base, arguments.instruct, arguments.out, dtype=arguments.dtype, **_options(arguments, progress)
        )
    return _print_result(arguments, result)


def _apply(arguments: argparse.Namespace) -> int:
    pair = arguments.instruct is not None and arguments.base is not None
    if pair == bool(arguments.residuals) or (arguments.instruct is None) != (arguments.base is None):
        arguments.parser.error("give one or more residuals, or --instruct and --base")
    if not arguments.in_place and (arguments.undo or arguments.tag):
        arguments.parser.error("--keep-undo, --no-undo and --tag go with --in-place")
    alpha: float | list[float] = arguments.alpha
    residuals: tuple[str, ...] | list[str]
    if pair:
        residuals = (arguments.instruct, arguments.base)
        for role, path in (("instruct", arguments.instruct), ("base", arguments.base)):
            if kind_of(path, follow_links=arguments.follow_links) != "model":  # or two residuals would pass
                raise ArgumentError(f"{path}: is a residual, wanted a model as {role}.")
    else:
        specs = [_residual(text, arguments.alpha) for text in arguments.residuals]
        residuals, alpha = [path for path, _ in specs], [factor for _, factor in specs]
    with _progress(arguments, "apply") as progress:
        result = merge.apply(
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


def _options(arguments: argparse.Namespace, progress: Progress | None) -> dict[str, Any]:
    return {
        "skip": arguments.skip,
        "allow_missing": arguments.allow_missing,
        "rounding": arguments.rounding,
        "seed": arguments.seed,
        "sync": not arguments.no_sync,
        "sha256": arguments.sha256,
        "device": arguments.device,
        "threads": arguments.threads,
        "dry_run": arguments.dry_run,
        "progress": progress,
        "follow_links": arguments.follow_links,
    }


def _verify(arguments: argparse.Namespace) -> int:
    given = {role: getattr(arguments, role) for role in ("target", "instruct", "base")}
    residuals = arguments.residual
    if len(residuals) == 1:
        given["residual"] = residuals[0]
    else:
        given |= {f"residual-{number}": path for number, path in enumerate(residuals, 1)}
    with _progress(arguments, "verify") as progress:
        report = merge.verify(
            arguments.out,
            inputs={role: path for role, path in given.items() if path is not None},
            hashes_only=arguments.hashes_only,
            follow_links=arguments.follow_links,
            device=arguments.device,
            threads=arguments.threads,
            progress=progress,
        )
    _print_result(arguments, report)
    return 0 if report.ok else 1


def _resume(arguments: argparse.Namespace) -> int:
    with _progress(arguments, "resume") as progress:
        report = merge.resume(arguments.path, device=arguments.device, threads=arguments.threads, progress=progress)
    return _print_result(arguments, report)


def _rollback(arguments: argparse.Namespace) -> int:
    done = merge.rollback(arguments.path)
    if not arguments.quiet:
        print(done)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    found = merge.status(arguments.path)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    table = merge.inspect(arguments.path, follow_links=arguments.follow_links)
    tensors = table["all_tensors"] if arguments.tensors else table.pop("all_tensors")
    if arguments.json:
        print(json.dumps(table, indent=2))
        return 0
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in table["parameters_by_dtype"].items())
    rows = [
        (table["kind"], table["path"]),
        ("parameters", f"{table['parameters']:,} in {table['tensors']} tensors ({dtypes})"),
        ("size", f"{size(table['bytes'])} in {len(table['files'])} files"),
        *((key, f"{value}") for key, value in table["config"].items()),
    ]
    rows += [("head", "is the embedding")] if table["head_is_embedding"] else []
    if table["quantized"]:
        rows.append(("quantized", f"{len(table['quantized'])} tensors: {next(iter(table['quantized'].values()))}"))
    made_by = table["made_by"]
    rows += [("made by", f"ires {made_by['operation']}, {made_by.get('id')}")] if "operation" in made_by else []
    rows += [(f"from {role}", f"{entry.get('path')}") for role, entry in made_by.get("inputs", {}).items()]
    width = max(len(title) for title, _ in rows)
    print("\n".join(f"{title:<{width}}  {text}" for title, text in rows))
    if arguments.tensors:
        for tensor in tensors:
            print(f"{tensor['dtype']:<8} {tensor['shape']!s:<20} {tensor['name']}  {tensor['file']}")
    return 0


def _print_result(arguments: argparse.Namespace, result: Any) -> int:
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
    elif not arguments.quiet:
        print(result)
    return 0


@contextmanager
def _progress(arguments: argparse.Namespace, what: str) -> Iterator[Progress | None]:
    """A progress bar with bytes, speed and time left, on a terminal."""
    if arguments.quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, todo: bar.update(task, completed=done, total=todo)


def _path(arguments: argparse.Namespace) -> Path | None:
    """What a command writes, None if it only reads."""
    if arguments.run not in (_extract, _apply, _resume, _rollback):
        return None
    return Path(getattr(arguments, "path", None) or arguments.out or arguments.target)


def _unfinished(arguments: argparse.Namespace) -> str:
    """What is unfinished there and what to do about it; nothing where nothing is."""
    path = _path(arguments)
    try:
        if path is not None and (unfinished(path) or is_unfinished(partial_path(path))):
            return f"{merge.status(path)}"
    except (OSError, ValueError):  # what cannot be looked at cannot be told
        return f"`ires status {path}` says what is left of it."
    return ""


def _state(arguments: argparse.Namespace) -> str:
    """What a failed merge has left, and the next step."""
    path = _path(arguments)
    unfinished_there = _unfinished(arguments)
    if path is None or unfinished_there:
        return unfinished_there
    try:
        if arguments.run is _rollback or (getattr(arguments, "in_place", False) and path.exists()):
            return f"{path} is as it was, or finished: `ires status {path}` says which."
        if path.exists():
            return f"There is something at {path}: `ires verify {path}` says whether it is the complete output."
    except OSError:
        return f"`ires status {path}` says what is left of it."
    return f"{path} was not written and nothing is left of it."


def _fail(code: int, *lines: str) -> int:
    print(f"ires: {lines[0]}", *filter(None, lines[1:]), sep="\n", file=sys.stderr)
    return code
