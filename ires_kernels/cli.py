"""The command line: ``ires``, or ``python -m ires_kernels``.

Exit codes: 0 done; 1 verify found a difference; 2 wrong usage or refused input; 3 the disk, a GPU or the environment
failed, or has ruined a model; 4 a bug; 130 interrupted, and 128 + N stopped by another signal N.
Results go to stdout, with --json as one JSON document; progress and errors go to stderr.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ires_kernels.command_line.failures import explain
from ires_kernels.command_line.parser import parse
from ires_kernels.command_line.signals import Once, Stopped
from ires_kernels.command_line.streams import flush, open_streams
from ires_kernels.files import trust


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits by itself with 2 for wrong usage."""
    open_streams()
    mask = os.umask(0o077)
    os.umask(mask & 0o077)  # one that closes files to their owner would close them to us
    arguments, code = None, 0
    once = Once()
    try:
        once.take_over()
        arguments = parse(argv)
        if arguments.key:
            os.environ[trust.VARIABLE] = arguments.key
        try:
            code = arguments.run(arguments)
        except BaseException as error:
            code = explain(error, arguments)
        once.pass_over()
    except Stopped as error:  # before the command, or as another error was told of
        code = explain(error, arguments)
    except SystemExit as error:
        once.pass_over()
        raise SystemExit(flush(int(error.code or 0))) from None
    finally:
        if argv is not None:  # else the process ends, and a late signal is to change nothing about that
            os.umask(mask)
            once.give_back()
    return flush(code)
