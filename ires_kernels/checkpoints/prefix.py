"""What lies under a prefix of a store, as a folder that may be written: listed, read whole, put and removed.

A file that is put is there as a whole, or not at all. Where a store can promise that, a file that is put as a `new` one
is there only if nobody has put one before.
"""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from ires_kernels.checkpoints.addresses import Address, Missing, Unreachable
from ires_kernels.checkpoints.objects import Pin, all_of, explained, library, store_at, told, wait_for
from ires_kernels.files.opening import MAX_MANIFEST

T = TypeVar("T")


_MANY = 100_000
"""Files, far more than an output has."""


class Taken(Unreachable):
    """What was to be new is there already."""


class Prefix:
    """Names are those under the address, with slashes where they lie deeper."""

    def __init__(self, address: Address) -> None:
        """Raises CheckpointError where nothing here can ask the store."""
        self.address = address
        self.writer = store_at(address, writes=True)
        """What sends, which may take long; what asks is given up earlier."""
        self._store = store_at(address)

    def names(self) -> set[str]:
        """All there are; of very many the first ones. Raises Unreachable."""
        return wait_for(self._names())

    async def _names(self) -> set[str]:
        found: set[str] = set()
        try:
            async for chunk in library(self.address).list(self._store):
                found.update(entry["path"] for entry in chunk if entry["path"])  # but for the mark of an empty folder
                if len(found) > _MANY:
                    break
        except BaseException as error:
            raise explained(error, self.address, "write") from None
        return found

    def read(self, name: str) -> bytes | None:
        """All of a small file; None where it is not there."""
        return wait_for(self._read(name))

    async def _read(self, name: str) -> bytes | None:
        where = self.address.child(name)
        try:
            answer = await library(where).get_async(self._store, name)
            if answer.meta["size"] > MAX_MANIFEST:
                raise Unreachable(where, f"has {answer.meta['size']} bytes, wanted {MAX_MANIFEST} at most")
            return bytes(await answer.bytes_async())
        except BaseException as error:
            reason = explained(error, where)
            if isinstance(reason, Missing) and isinstance(error, FileNotFoundError):
                return None
            raise reason from None

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """All of small files that are there."""
        return _by_name({name: self._read(name) for name in names})

    def put(self, name: str, content: bytes, *, new: bool = False) -> None:
        """Have a file with this content. Raises Taken where it was to be a new one, and is there."""
        wait_for(self.put_later(name, content, new=new))

    async def put_later(self, name: str, content: bytes, *, new: bool = False) -> None:
        where = self.address.child(name)
        obstore = library(where)
        try:
            await obstore.put_async(
                self.writer, name, content, mode="create" if new else "overwrite", use_multipart=False
            )
        except BaseException as error:
            if new and isinstance(error, obstore.exceptions.AlreadyExistsError):
                raise Taken(where, "is there already") from None
            if not new or not _is_unknown(error):
                raise explained(error, where, "write") from None
            if await self._read(name) is not None:  # what can be told by such a store
                raise Taken(where, "is there already") from None
            await self.put_later(name, content)

    def pins(self, names: Iterable[str]) -> dict[str, Pin]:
        """What the files are, of those that are there."""
        return _by_name({name: self.pin_later(name) for name in names})

    async def pin_later(self, name: str) -> Pin | None:
        where = self.address.child(name)
        try:
            return told(await library(where).head_async(self._store, name))
        except BaseException as error:
            reason = explained(error, where)
            if isinstance(reason, Missing) and isinstance(error, FileNotFoundError):
                return None
            raise reason from None

    def remove(self, names: Collection[str]) -> None:
        """Have none of these any more."""
        _by_name({name: self._remove(name) for name in names})

    async def _remove(self, name: str) -> None:
        where = self.address.child(name)
        try:
            with suppress(FileNotFoundError):
                await library(where).delete_async(self._store, name)
        except BaseException as error:
            raise explained(error, where, "remove") from None


def _is_unknown(error: BaseException) -> bool:
    """Whether a store does not know what it was asked for: to put a file only where there is none."""
    return type(error).__name__ in ("NotSupportedError", "NotImplementedError") or " 501 " in f"{error}"


def _by_name(work: dict[str, Coroutine[Any, Any, T | None]]) -> dict[str, T]:
    found = wait_for(all_of(list(work.values())))
    return {name: each for name, each in zip(work, found, strict=True) if each is not None}
