"""The picture of a model card: how much was added where, layer by kind of tensor, by what the manifest recorded."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.files.durable import replace_file
from ires_kernels.pictures import grid, plot
from ires_kernels.records import card

_CAPTION = "Root mean square of what was added, by layer and kind of matrix"
_TITLE = "what was added (rms)"
NO_MATPLOTLIB = "none: it takes matplotlib (`pip install 'ires_kernels[plot]'`), and publishing again"


def draw(folder: Path, manifest: Manifest) -> str:
    """Draw it beside the card that the merge has written, and show it there; its name, or why there is none.

    Empty where there is no such card, or nothing is known of what was added.
    """
    text = card.own(folder, manifest.files)
    updates = {
        name: (each.update, math.prod(each.shape))
        for name, each in manifest.tensors.items()
        if each.update and len(each.shape) > 1  # those of norms would leave one colour to all else
    }
    if text is None or not updates:
        return ""
    picture = Path(text).with_suffix(".png").name
    if picture in manifest.files:
        return f"none: {picture} came with the target"
    if find_spec("matplotlib") is None:
        return NO_MATPLOTLIB
    plot.profiled(grid.of_updates(updates), _TITLE, folder / picture)
    before = (folder / text).read_bytes()
    if f"]({picture})".encode() not in before:
        replace_file(folder / text, before.rstrip() + f"\n\n![{_CAPTION}]({picture})\n".encode())
    return picture
