"""Options that several commands have."""

from __future__ import annotations

import argparse

from ires_kernels.dtypes import number_of
from ires_kernels.planning.rules import DTYPES, VOCABULARIES


def destination(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--out", metavar="OUT", help="the new folder to write, here or at s3://bucket/folder")
    where.add_argument("--in-place", action="store_true", help="change the files of TARGET, with no second copy")
    undo = parser.add_mutually_exclusive_group()
    undo.add_argument(
        "--undo",
        choices=["ring", "all", "none"],
        help="in place: the old bytes to keep: what an interrupted run needs (ring, the default), all, or none",
    )
    undo.add_argument(
        "--keep-undo",
        dest="undo",
        action="store_const",
        const="all",
        help="--undo all: `ires rollback` can take back the finished update as well",
    )
    undo.add_argument(
        "--no-undo",
        dest="undo",
        action="store_const",
        const="none",
        help="--undo none: faster, but to be killed or to lose power on the way ruins TARGET",
    )
    parser.add_argument("--tag", default="", metavar="TEXT", help="in place: to apply the same once more on purpose")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with a pair of models: also say how far both are from base, as `ires compare` does, in the same pass",
    )


def merging(parser: argparse.ArgumentParser, *, dtype: str | None, kept: str) -> None:
    dtype_option(parser, f"dtype {kept}", default=dtype)
    matching(parser)
    parser.add_argument("--rounding", choices=["nearest", "stochastic"], default="nearest")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    running(parser)


def dtype_option(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    parser.add_argument("--dtype", type=_dtype, choices=list(DTYPES), default=default, help=text)


def _dtype(text: str) -> str:
    """The short name of a dtype; what is none stays what it is, and is refused."""
    number = number_of(text)
    return number.name.lower() if number else text


def matching(parser: argparse.ArgumentParser) -> None:
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
        "--renames",
        dest="rename",
        action="append",
        default=[],
        metavar="A=B",
        help="what is A in names of the output is B in the other models, as model.=model.language_model.; repeatable. "
        "Most of this is found without being told",
    )
    parser.add_argument(
        "--trust-names", action="store_true", help="match tensors by names and shapes alone, and compare no values"
    )


def trust_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-inputs",
        action="store_true",
        help="read the inputs where the manifest says that they are, though it was not signed with your key",
    )


def running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-sync", action="store_true", help="do not wait for the disk: a power cut may ruin the output"
    )
    parser.add_argument(
        "--sha256", action="store_true", help="also write sha256 sums of the weights, as the Hub has them"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and write nothing")
    workers(parser)
    follow_links(parser)
    lock(parser)
    common(parser)


def workers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("one of several processes that were all given this command, with -o")
    group.add_argument(
        "--workers", choices=["env"], help="env: which one it is say torchrun, mpirun, Slurm or Kubernetes, if asked to"
    )
    group.add_argument("--rank", type=int, metavar="R", help="which one it is, from 0 on; it does its share and ends")
    group.add_argument("--world", type=int, metavar="W", help="how many they are")
    group = parser.add_argument_group("or by a cluster, with -o")
    group.add_argument("--engine", choices=["ray"], help="have it done by the machines of a Ray cluster")
    group.add_argument(
        "--address", metavar="A", help="of that cluster (default: RAY_ADDRESS, or processes of this machine)"
    )


def follow_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="accept files in a model's folder that are links out of it, and so copy what they lead to; for models of "
        "your own (links into the Hub's own cache need no leave)",
    )


def stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read the weights of models on the Hub where they are, and download nothing to its cache",
    )


def common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="D",
        help="cpu, or cuda or cuda:N: the same weights, and slower with files on both ends (default: cpu)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU, 8 at most; more was slower")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON if asked for")
    key(parser)


def lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="do without the lock (flock), on a file system that has none: no other process may write there",
    )


def adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="take up an update in place whose key is lost, as that of a container that has ended: it is followed "
        "without proof, so only what you have begun yourself, and nothing that was downloaded",
    )


def key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        metavar="PATH",
        help="the file with the key that signs the state of merges, as IRES_KEY; made if it is not there "
        "(default: ires_kernels/key in XDG_STATE_HOME or ~/.local/state)",
    )


def plot(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--plot", metavar="PATH", help=f"also draw {what}: .png or .svg (needs matplotlib)")
