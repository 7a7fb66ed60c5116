"""The commands and their arguments; options that several of them have are in options.py."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ires_kernels.command_line import completions, operands, options, run
from ires_kernels.command_line.streams import NotPrinted, fail, say
from ires_kernels.version import VERSION

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
"""What argparse is to take for a number: of its own accord it takes -1e-3 for an option."""


class Parser(argparse.ArgumentParser):
    """One whose help ends as other results do where it cannot be printed."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Of argparse, which says nothing where help cannot be printed."""
        if file is not sys.stdout:
            super()._print_message(message, file)
            return
        try:
            say(message.rstrip("\n"))
        except NotPrinted as error:
            raise SystemExit(fail(3, f"standard output: {error.strerror}.")) from None


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What a command line asks for; for None that of this process."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(_without_dashes(sys.argv[1:] if argv is None else argv))
    if arguments.run is run.apply and not any(text.startswith("-") for text in rest):
        arguments.residuals += rest  # argparse takes positional arguments in one run only
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it makes of a command line has the function to call as `run`."""
    parser = Parser(prog="ires", description="Exact arithmetic on checkpoints of language models.")
    parser.add_argument("--version", action="version", version=f"ires_kernels {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    every = (
        _extract, _apply, _merge, _compare, _inspect, _verify, _resume, _finish, _rollback, _status, _sha256, _publish,
        _completions,
    )  # fmt: skip
    for add in every:
        add(commands)
    return parser


def _extract(commands: Commands) -> None:
    parser = commands.add_parser("extract", help="write instruct - base as a residual folder")
    parser.add_argument("base", metavar="BASE", help="folder or .safetensors file of the base model")
    parser.add_argument("instruct", metavar="INSTRUCT", help="the instruct model made from it")
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="the new folder to write, here or at s3://bucket/folder"
    )
    options.merging(parser, dtype="f32", kept="of the residual (default: f32)")
    options.stream(parser)
    parser.set_defaults(run=run.extract)


def _apply(commands: Commands) -> None:
    parser = commands.add_parser("apply", help="write target + alpha * residual as a model folder")
    parser.add_argument("target", metavar="TARGET", help="folder or .safetensors file of the model to add to")
    parser.add_argument(
        "residuals",
        metavar="RESIDUAL[:ALPHA]",
        nargs="*",
        help="residual folders, with a factor or with that of --alpha",
    )
    parser.add_argument("--instruct", metavar="PATH", help="in place of residuals: add instruct - base in one pass")
    parser.add_argument("--base", metavar="PATH", help="the base model that goes with --instruct")
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="factor of the residuals that have none of their own (default: 1)"
    )
    parser.add_argument(
        "--alpha-for",
        "--alphas",
        dest="alpha_for",
        type=operands.alpha_for,
        action="append",
        default=[],
        metavar="REGEX=A[,A…]",
        help="other factors, one for each residual, for tensors in whose name REGEX is found; the first found decides",
    )
    parser.add_argument(
        "--pair",
        action="append",
        default=[],
        metavar="I:B[:A]",
        help="an instruct model and its base, and a factor for their difference; repeatable: all are added in one pass",
    )
    options.destination(parser)
    options.merging(parser, dtype=None, kept="of all tensors of floats or codes (default: as in the target)")
    parser._negative_number_matcher = _NEGATIVE_NUMBER
    options.stream(parser)
    parser.set_defaults(run=run.apply, parser=parser)


def _merge(commands: Commands) -> None:
    parser = commands.add_parser("merge", help="do what a recipe in YAML asks for, or an ires.json again")
    parser.add_argument("recipe", metavar="RECIPE", help="recipe.yml, or the ires.json of an output")
    options.destination(parser)
    options.running(parser)
    options.stream(parser)
    options.trust_inputs(parser)
    parser.set_defaults(run=run.merge, parser=parser, target=None)


def _compare(commands: Commands) -> None:
    parser = commands.add_parser("compare", help="say how far target and instruct are from base, and how that fits")
    parser.add_argument("target", metavar="TARGET", help="folder or .safetensors file of the model to add to")
    parser.add_argument("--instruct", required=True, metavar="PATH", help="the instruct model")
    parser.add_argument("--base", required=True, metavar="PATH", help="the base model of both")
    parser.add_argument(
        "--alpha", type=float, default=1.0, metavar="A", help="of which to say what rounding would leave (default: 1)"
    )
    options.dtype_option(parser, "which the merged model would have (default: the target's)")
    options.matching(parser)
    options.follow_links(parser)
    options.stream(parser)
    options.plot(parser, "heat maps of layers and kinds of tensors, alpha, and ulps")
    parser.add_argument("--html", metavar="PATH", help="also write a page of its own, which loads nothing")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU, 8 at most; more was slower")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    options.key(parser)
    parser._negative_number_matcher = _NEGATIVE_NUMBER
    parser.set_defaults(run=run.compare)


def _inspect(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="describe a model, a residual or a .safetensors file")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options.plot(parser, "where its parameters are")
    options.key(parser)
    options.follow_links(parser)
    options.stream(parser)
    parser.set_defaults(run=run.inspect)


def _verify(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="compute a finished merge again and compare every bit")
    parser.add_argument("out", metavar="OUT", help="the output of extract, apply or merge")
    parser.add_argument("--hashes-only", action="store_true", help="compare with recorded hashes; needs no inputs")
    for role in ("target", "instruct", "base"):
        parser.add_argument(f"--{role}", metavar="PATH", help=f"where the {role} model is now, if it was moved")
    parser.add_argument("--residual", metavar="PATH", action="append", default=[], help="as above; all, in order")
    parser.add_argument("--pair", metavar="I:B", action="append", default=[], help="as above; all, in order")
    parser.add_argument(
        "--model",
        metavar="PATH",
        action="append",
        default=[],
        help="of a recipe of merge_method linear: the models after the first one, in order; that is the target",
    )
    options.trust_inputs(parser)
    options.follow_links(parser)
    options.common(parser)
    parser.set_defaults(run=run.verify)


def _resume(commands: Commands) -> None:
    parser = commands.add_parser("resume", help="finish an interrupted extract, apply or merge")
    parser.add_argument("path", metavar="PATH", help="its OUT, or its TARGET if it was in place")
    options.adopt(parser)
    options.lock(parser)
    options.common(parser)
    parser.set_defaults(run=run.resume)


def _finish(commands: Commands) -> None:
    parser = commands.add_parser("finish", help="finish a new folder whose workers have ended")
    parser.add_argument("out", metavar="OUT", help="the folder that --workers or --rank were to write")
    options.lock(parser)
    options.common(parser)
    parser.set_defaults(run=run.finish)


def _rollback(commands: Commands) -> None:
    parser = commands.add_parser("rollback", help="take back an unfinished merge, or one with --keep-undo")
    parser.add_argument("path", metavar="PATH", help="its OUT, or its TARGET if it was in place")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options.adopt(parser)
    options.lock(parser)
    options.key(parser)
    parser.set_defaults(run=run.rollback)


def _status(commands: Commands) -> None:
    parser = commands.add_parser("status", help="say whether a merge is unfinished, and what to do")
    parser.add_argument("path", metavar="PATH", help="a model, or an OUT that is not there yet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options.key(parser)
    parser.set_defaults(run=run.status)


def _sha256(commands: Commands) -> None:
    parser = commands.add_parser("sha256", help="print sha256 sums of weights, and compare them with SHA256SUMS")
    parser.add_argument("path", metavar="PATH", help="a model or a residual")
    parser.add_argument("--write", action="store_true", help="also write them into SHA256SUMS")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    options.follow_links(parser)
    options.key(parser)
    parser.set_defaults(run=run.sha256)


def _publish(commands: Commands) -> None:
    parser = commands.add_parser("publish", help="take paths and times out of an output's ires.json, to upload it")
    parser.add_argument("out", metavar="OUT", help="the output of extract, apply or merge")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU, 8 at most; more was slower")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    options.follow_links(parser)
    options.key(parser)
    parser.set_defaults(run=run.publish)


def _completions(commands: Commands) -> None:
    parser = commands.add_parser(
        "completions", help="print what a shell is to source, to complete commands and options"
    )
    parser.add_argument("shell", choices=completions.SHELLS, help="as in `source <(ires completions bash)`")
    parser.set_defaults(run=completions.run, commands=commands, key=None)


def _without_dashes(argv: Sequence[str]) -> list[str]:
    """Arguments without the first `--`: all behind it are paths, and argparse takes ./-path for no option."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [*argv[:end], *(f"./{text}" if text.startswith("-") else text for text in argv[end + 1 :])]
