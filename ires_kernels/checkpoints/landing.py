"""Where an address leads: a server may send who asks on to another host, which must not learn a signature in a query.

The client that reads names the address that it comes from (`Referer`), query and all. So an address with a query is
asked for once before, by one that goes nowhere by itself, and what reads is given the address in the end.
"""

from __future__ import annotations

from functools import cache
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from ires_kernels.checkpoints.addresses import Address, Unreachable
from ires_kernels.files.opening import CheckpointError

_HOPS = 5
_SECONDS = 30


class _Stay(HTTPRedirectHandler):
    def http_error_302(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage) -> None:
        """Nobody is asked but who was meant to be."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def landing(address: Address) -> Address:
    """The address to read, where one is sent on; itself where not. Raises Unreachable where it leads to none."""
    here = address
    for _ in range(_HOPS):
        location = _location(here)
        if location is None:
            return here
        try:
            there = Address.of(urljoin(here._replace(user="").full(), location))
        except (CheckpointError, ValueError):
            raise Unreachable(address, "leads to what is no address") from None
        if there.scheme not in ("https", "http") or (here.scheme, there.scheme) == ("https", "http"):
            raise Unreachable(address, f"leads from {here.scheme} to {there.scheme}")
        is_same_host = (here.scheme, here.host) == (there.scheme, there.host)
        here = there._replace(user=here.user) if is_same_host and not there.user else there
    raise Unreachable(address, f"leads from one address to another, more than {_HOPS} times")


@cache
def _opener() -> OpenerDirector:  # which takes some time to be made
    return build_opener(_Stay)


def _location(address: Address) -> str | None:
    """Where an answer says to ask instead; None where none does, or nobody answers, as reading will find out."""
    try:
        request = Request(address._replace(user="").full(), headers={"Range": "bytes=0-0", **address.authorization()})
        with _opener().open(request, timeout=_SECONDS):
            return None
    except HTTPError as error:
        error.close()
        return error.headers.get("Location") if error.code in (301, 302, 303, 307, 308) else None
    except ValueError:
        raise Unreachable(address, "leads to what is no address") from None
    except (OSError, HTTPException):
        return None
