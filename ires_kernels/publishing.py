"""Making an output fit for others: its manifest, and the picture of its card."""

from __future__ import annotations

from ires_kernels.pictures import profile
from ires_kernels.planning.inputs import StrPath
from ires_kernels.records import publication
from ires_kernels.records.publication import Publication


def publish(out: StrPath, *, follow_links: bool = False) -> Publication:
    """Take out of an output's manifest what tells of this machine, and say what of its folder to upload.

    >>> report = ik.apply("target/", ("instruct/", "base/"), out="merged/")
    >>> ik.publish("merged/").names
    {'target': 'target', 'instruct': 'instruct', 'base': 'base'}
    >>> bool(ik.verify("merged/", inputs={"target": "target/", "instruct": "instruct/", "base": "base/"}))
    True

    Names of folders stand in place of paths, and of models in the Hub's cache their ids and commits, so that `verify`
    and `merge` find those again; others have to be told where they are. Where the merge has written a card and
    matplotlib is there, the card gets a picture of what was added where. Nothing else is changed.

    Raises CheckpointError where there is none, or where the output is not complete.
    """
    return publication.publish(out, profile.draw, follow_links=follow_links)
