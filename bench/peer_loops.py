"""Two merges as people write them in PyTorch, target + (instruct - base) in float32, for models of the same layout.

    python peer_loops.py chunked|tensorwise TARGET INSTRUCT BASE OUT

`chunked` is the careful one: float32 buffers of fixed size, reused, and the output written as it comes. `tensorwise` is
the usual one: a dictionary of tensors for each shard, and save_file.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHUNK = 1 << 20  # elements


class Model:
    """Lazy access to the tensors of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


def chunked(target: Path, instruct: Path, base: Path, out: Path) -> None:
    models = [Model(folder) for folder in (target, instruct, base)]
    t, i, b = torch.empty(3, CHUNK)
    for shard in sorted(target.glob("*.safetensors")):
        with open(shard, "rb") as file:
            size = file.read(8)
            header = file.read(int.from_bytes(size, "little"))
        table = json.loads(header)
        table.pop("__metadata__", None)
        with open(out / shard.name, "wb") as file:
            file.write(size + header)
            for name in sorted(table, key=lambda name: table[name]["data_offsets"]):
                x, y, z = (model[name].flatten() for model in models)
                stored = torch.empty(CHUNK, dtype=x.dtype)
                for start in range(0, len(x), CHUNK):
                    n = min(CHUNK, len(x) - start)
                    part = slice(start, start + n)
                    t[:n].copy_(x[part])
                    i[:n].copy_(y[part])
                    b[:n].copy_(z[part])
                    t[:n].add_(i[:n].sub_(b[:n]))
                    file.write(stored[:n].copy_(t[:n]).view(torch.uint8).numpy())


def tensorwise(target: Path, instruct: Path, base: Path, out: Path) -> None:
    i, b = Model(instruct), Model(base)
    for shard in sorted(target.glob("*.safetensors")):
        merged = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                t = file.get_tensor(name)
                merged[name] = (t.float() + (i[name].float() - b[name].float())).to(t.dtype)
        save_file(merged, out / shard.name, metadata={"format": "pt"})


def main() -> None:
    merge = {"chunked": chunked, "tensorwise": tensorwise}[sys.argv[1]]
    target, instruct, base, out = map(Path, sys.argv[2:])
    out.mkdir()
    merge(target, instruct, base, out)
    for path in target.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)


if __name__ == "__main__":
    main()
