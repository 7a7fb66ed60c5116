"""Making an output fit for others: its manifest, and the picture of its card."""

from __future__ import annotations

from ires_kernels.checking.recorded import check_weights
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.pictures import profile
from ires_kernels.planning.inputs import StrPath
from ires_kernels.records import publication
from ires_kernels.records.publication import Publication
from ires_kernels.streaming.asked import Progress


def publish(
    out: StrPath, *, threads: int | None = None, progress: Progress | None = None, follow_links: bool = False
) -> Publication:
    """Take out of an output's manifest what tells of this machine, and say what of its folder to upload.

    >>> report = ik.apply("target/", ("instruct/", "base/"), out="merged/")
    >>> ik.publish("merged/").names
    {'target': 'target', 'instruct': 'instruct', 'base': 'base'}
    >>> bool(ik.verify("merged/", inputs={"target": "target/", "instruct": "instruct/", "base": "base/"}))
    True

    Names of folders stand in place of paths, and of models in the Hub's cache their ids and commits, so that `verify`
    and `merge` find those again; others have to be told where they are. Where the merge has written a card and
    matplotlib is there, the card gets a picture of what was added where. Nothing else is changed.

    Before that the weights are read, and compared with the hashes in the manifest: an upload takes longer than that.

    Raises CheckpointError where there is none, where the output is not complete, and where it is damaged.
    """

    def check(checkpoint: Checkpoint, table: Manifest) -> None:
        check_weights(checkpoint, table, threads, progress)

    return publication.publish(out, check, profile.draw, follow_links=follow_links)
