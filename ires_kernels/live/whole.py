"""A sharded model as if it were whole, for planning: the few elements that it looks at come from who has them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, Shard, TensorRef
from ires_kernels.checkpoints.header import Header, TensorInfo, tensor_bytes
from ires_kernels.live.peers import PeerError, Peers
from ires_kernels.live.snapshot import Snapshot
from ires_kernels.planning.box import Box
from ires_kernels.planning.evidence import places

_SMALL = 1 << 13
"""Bytes of a tensor that is sampled as one run: planning reads what is so near at once."""


class _Want(NamedTuple):
    """Bytes of a tensor of which a process has not all."""

    name: str
    begin: int
    size: int


class Whole:
    """All of a module's tensors as a `Source`, out of what each process has a copy of.

    Which elements planning looks at is decided by what it finds. So whenever one process lacks some, all are asked for
    them, and those that have planned already go on to answer until the last one has (`answer`).
    """

    def __init__(self, name: str, before: Snapshot, boxes: Mapping[str, Box], peers: Peers) -> None:
        """`name`: what errors call it. `boxes`: what `before` has of the tensors of which it has not all."""
        self.path = Path("/dev/null") / name
        self.before = before
        self._boxes = boxes
        self._peers = peers
        self._names = list(before.infos)
        sizes = [
            tensor_bytes(info.dtype, boxes[name].shape if name in boxes else info.shape)
            for name, info in before.infos.items()
        ]
        self._ends = list(accumulate(sizes))
        self._check_same()
        self._known: dict[str, list[tuple[int, bytes]]] = {}
        for want, data in self._gathered([want for name in self._names for want in self._samples(name)]).items():
            self._known.setdefault(want.name, []).append((want.begin, data))

    def checkpoint(self, config: dict[str, Any] | None) -> Checkpoint:
        """All of it as a model."""
        infos, begin = {}, 0
        for name, end in zip(self._names, self._ends, strict=True):
            info = self.before.infos[name]
            shape = self._boxes[name].shape if name in self._boxes else info.shape
            infos[name] = TensorInfo(info.dtype, shape, begin, end)
            begin = end
        shard = Shard(self.path, Header(infos, {}, 0, begin), self.stamp())
        refs = {name: TensorRef(name, i.dtype, i.shape, self.path, i.begin, i.nbytes) for name, i in infos.items()}
        return Checkpoint(self.path, "model", (shard,), refs, None, {}, config, None)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Raises PeerError where another process has failed."""
        while len(view):
            number = bisect_right(self._ends, offset)
            taken = min(len(view), self._ends[number] - offset)
            begin = offset - (self._ends[number - 1] if number else 0)
            view[:taken] = self._bytes(_Want(self._names[number], begin, taken))
            view, offset = view[taken:], offset + taken

    def read_views(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            self.read_into(view, offset)
            offset += len(view)

    def reads(self, *_: int) -> None:
        """They may be in another process."""

    def answer(self) -> None:
        """Give the others what they still look at, until none of them plans any more."""
        while self._round(None):
            pass

    def stamp(self) -> FileId:
        return FileId(0, 0, self._ends[-1], 0, 0)

    def will_need(self, offset: int, size: int) -> None:
        """It comes when it is read."""

    def close(self) -> None:
        """It goes with its memory."""

    def _check_same(self) -> None:
        """Make sure that all processes have a module of the same tensors. Raises PeerError."""
        mine = [
            (name, info.dtype, end) for (name, info), end in zip(self.before.infos.items(), self._ends, strict=True)
        ]
        digest = xxhash.xxh3_128_hexdigest(f"{mine} {sorted(self._boxes)}".encode())
        for rank, its in self._peers.exchange("the module", digest).items():
            if its != digest:
                raise PeerError(
                    f"rank {rank} has other tensors in its module than rank {self._peers.rank}: nothing was changed. "
                    "Give each process its part of one module."
                )

    def _samples(self, name: str) -> Iterator[_Want]:
        """What planning looks at in any case of a tensor that lies in parts."""
        if name in self._boxes:
            info, shape = self.before.infos[name], self._boxes[name].shape
            nbytes = tensor_bytes(info.dtype, shape)
            width = tensor_bytes(info.dtype, (8,)) // 8
            for first, count in [(0, nbytes // width)] if nbytes <= _SMALL else places(shape):
                yield _Want(name, first * width, count * width)

    def _bytes(self, want: _Want) -> bytes:
        if want.name not in self._boxes:
            return self._own(self.before.infos[want.name].begin + want.begin, want.size)
        for begin, data in self._known.get(want.name, []):
            if begin <= want.begin and want.begin + want.size <= begin + len(data):
                return data[want.begin - begin :][: want.size]
        return self._round(want)[want]

    def _round(self, want: _Want | None) -> dict[_Want, bytes]:
        """Ask for something, or nothing more, and give what others ask for; what came, nothing where nobody asks."""
        asked = [each for each in self._peers.exchange("planning", want).values() if each is not None]
        return self._gathered(sorted(set(asked))) if asked else {}

    def _gathered(self, wants: Sequence[_Want]) -> dict[_Want, bytes]:
        """Bytes from wherever they are. All processes ask for the same, in one order."""
        told = self._peers.exchange("looking", [[*self._pieces(want)] for want in wants]).values()
        found = {}
        for number, want in enumerate(wants):
            data = bytearray(want.size)
            for each in told:
                for at, piece in each[number]:
                    data[at : at + len(piece)] = piece
            found[want] = bytes(data)
        return found

    def _pieces(self, want: _Want) -> Iterator[tuple[int, bytes]]:
        """What is here of some bytes, and where it is among them."""
        box, info = self._boxes[want.name], self.before.infos[want.name]
        if box.numel:
            width = info.nbytes // box.numel
            for first, at, count in box.runs(want.begin // width, -(-(want.begin + want.size) // width)):
                begin, end = max(first * width, want.begin), min((first + count) * width, want.begin + want.size)
                yield begin - want.begin, self._own(info.begin + at * width + begin - first * width, end - begin)

    def _own(self, offset: int, size: int) -> bytes:
        view = memoryview(bytearray(size))
        self.before.read_into(view, offset)
        return bytes(view)
