"""Addresses of models that are not on this disk: https://, s3://, gs:// and az://, and what of one may be shown.

An address may carry secrets, a user with a password or the signature in its query. They are for whoever asks its host,
and for nobody else: what is written and said of a model is its address without them.
"""

from __future__ import annotations

import base64
import errno
import os
import re
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ires_kernels.files.opening import CheckpointError
from ires_kernels.files.plain import without_secrets

_ADDRESS = re.compile(r"(https?|s3|gs|az)://", re.IGNORECASE)
_PLACES = {"s3": "s3://bucket/folder", "gs": "gs://bucket/folder", "az": "az://container/folder"}


class Unreachable(OSError):
    """Something that is elsewhere could not be read."""

    def __init__(self, where: object, why: str) -> None:
        super().__init__(errno.EREMOTEIO, why, f"{where}")


class Missing(Unreachable):
    """There is nothing under that name, or nothing that may be read: some stores answer the same to both."""


class Changed(Unreachable, ValueError):
    """It is no longer the file that it was, so nothing that was made of it is of use: see `NewFolder`."""

    def __init__(self, where: object) -> None:
        super().__init__(where, "changed after it was first read. Start again when nobody writes there")


class Address(NamedTuple):
    """Where a folder or a file is; `str` is without secrets."""

    scheme: str
    host: str
    """With its port; of the stores, the bucket."""
    path: str
    """As it is written in an address, from the first slash on, without the last one."""
    query: str = ""
    user: str = ""
    """user:password, as it is written."""

    @classmethod
    def of(cls, text: str | os.PathLike[str]) -> Address:
        """Raises CheckpointError for what is none."""
        said = without_secrets(f"{text}")
        try:
            parts = urlsplit(f"{text}")
            parts.port  # noqa: B018 - raises where it is none
        except ValueError:  # whose words have parts of a password in them
            raise CheckpointError(
                f"{said}: is no address. In a user's name and password write `/`, `?`, `#` and `@` as %2F, %3F, %23 "
                "and %40; a port is a number below 65536."
            ) from None
        scheme, user, host = parts.scheme.lower(), *_split_user(parts)
        wanted = _PLACES.get(scheme, "https://host/folder")
        bad = not host or parts.fragment or (scheme in _PLACES and (parts.query or user))
        left_out = re.search(r"[\t\r\n]", f"{text}")  # by urlsplit
        if bad or left_out or not parts.path.isprintable() or ".." in unquote(parts.path).split("/"):
            raise CheckpointError(f"{said}: is no address of a model, wanted {wanted} or a .safetensors file there.")
        return cls(scheme, host, parts.path.rstrip("/"), parts.query, user)

    @property
    def is_store(self) -> bool:
        """Whether its host can be asked what it has."""
        return self.scheme in _PLACES

    @property
    def is_file(self) -> bool:
        """Whether this is one file of weights, by its name."""
        return self.path.endswith(".safetensors")

    @property
    def name(self) -> str:
        """The last part."""
        return unquote(self.path.rpartition("/")[2])

    @property
    def parent(self) -> Address:
        """The folder that it is in."""
        return self._replace(path=self.path.rpartition("/")[0])

    def child(self, name: str) -> Address:
        """A file of a folder."""
        return self._replace(path=f"{self.path}/{quote(name)}")

    def full(self) -> str:
        """All of it, for the host alone."""
        at, query = f"{self.user}@" if self.user else "", f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{at}{self.host}{self.path}{query}"

    def authorization(self) -> dict[str, str]:
        """The header that has user and password, for the host alone."""
        secret = base64.b64encode(unquote(self.user).encode()).decode()
        return {"Authorization": f"Basic {secret}"} if self.user else {}

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"


def is_address(path: object) -> bool:
    """Whether a path is the address of something elsewhere."""
    return _ADDRESS.match(f"{path}") is not None


def is_elsewhere(path: object) -> bool:
    """Whether a path that was written down is that of something elsewhere, at an address or on the Hub."""
    return is_address(path) or f"{path}".startswith("hf+stream://")


def _split_user(parts: SplitResult) -> tuple[str, str]:
    user, _, host = parts.netloc.rpartition("@")
    return user, host if parts.scheme.lower() in _PLACES else host.lower()
