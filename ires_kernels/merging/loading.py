"""Merges whose result stays in memory: a state dict, or its tensors one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ires_kernels.merging.request import Added, Factors, Renames, wanted
from ires_kernels.planning.inputs import StrPath, check_flags
from ires_kernels.streaming.asked import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ires_kernels.live.loading import Weights


def load(
    target: StrPath,
    residual: Added,
    *,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    device: str | torch.device | Mapping[str, str | int | torch.device] = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
    module: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Merge while loading: a state dict of what `apply` would write, on the device, and nothing on the disk.

    >>> state_dict = ik.load("target/", ("instruct/", "base/"), alpha=0.7)
    >>> state_dict["model.norm.weight"].dtype
    torch.bfloat16

    Names, shapes, dtypes and bits are those of the files that `apply` makes of the same arguments. A head that the
    files leave out because it is the embedding is there under its name too, and is the same tensor, as in
    ``model.state_dict()``; so ``load_state_dict`` of a causal language model takes the result, and ``assign=True`` does
    without a copy. What else a model shares, or names otherwise than its files do, is for its loader to tell.

    module  gets the tensors as its parameters and buffers, with the dtypes that they have, and need have no memory
            before: its parameters may be on the meta device. What it ties stays tied; requires_grad is kept. It is
            checked before anything is computed, and has to have the names that the files have

    device  also "cuda:all": each GPU gets tensors that follow each other in the model, of as many bytes as the others
            but for a tensor, and all compute at the same time. Or by the beginnings of names, as a device_map:
            {"model.layers.0": 0, "": "cuda:1"}. With a sharded module it is one, the process's own

    Results are computed where they stay: beyond them it takes a few tiles a thread. On a GPU all work is over on
    return, so any stream may use them; up to 128 MiB of pinned host memory a GPU stay for the next call, until
    ``ires_kernels.streaming.device.free()``. Arguments and errors as for `apply`, and MemoryError when the device has
    no room for the result. Nothing is counted: of NaN, overflow and lost updates `apply` alone tells.
    """
    check_flags(follow_links=follow_links)
    from ires_kernels.live import assigning, loading, sharding
    from ires_kernels.streaming import statedict

    with sharding.peers(module) as peers:
        paths, rules = wanted(
            target, residual, alpha, alphas, follow_links,
            skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed,
            vocabulary=vocabulary, renames=renames, trust_names=trust_names,
        )  # fmt: skip
        tells = peers.is_first
        weights = loading.planned(paths, rules, device, threads, progress, follow_links=follow_links, tells=tells)
        head, embedding = statedict.shared_head(weights.target) or ("", "")
        if module is not None:
            assigning.check(module, weights.metadata, head)
        if module is not None and peers.are_several:
            again = {head: embedding} if head and assigning.are_apart(module, head, embedding) else {}
            tensors = weights.blocks(assigning.boxes(module), again, peers)
        else:
            tensors = weights.all()
        if head:
            tensors.setdefault(head, tensors[embedding])
        if module is not None:
            made = assigning.assign(module, tensors, peers)
            return made if peers.are_several else tensors
    return tensors


def weights(
    target: StrPath,
    residual: Added,
    *,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    device: str | torch.device | Mapping[str, str | int | torch.device] = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> Weights:
    """The tensors of a merged model one after the other, for what takes pairs of names and tensors, such as a server.

    >>> weights = ik.weights("target/", ("instruct/", "base/"), alpha=0.7)
    >>> weights.metadata["model.norm.weight"]
    (torch.bfloat16, (16,))
    >>> for name, tensor in weights:
    ...     assert (tensor.dtype, tensor.shape) == weights.metadata[name]

    Names, order and bits are those of the files that `apply` would write. Some 256 MiB are computed at a time, and no
    more is held here; nothing is written. Where a residual turns out to be damaged, or a file changed, the iteration
    ends with CheckpointError, and what was taken is not to be used. Arguments as for `load`; progress is told for each
    of these parts anew.
    """
    check_flags(follow_links=follow_links)
    paths, rules = wanted(
        target, residual, alpha, alphas, follow_links,
        skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed,
        vocabulary=vocabulary, renames=renames, trust_names=trust_names,
    )  # fmt: skip
    from ires_kernels.live import loading

    return loading.planned(paths, rules, device, threads, progress, follow_links=follow_links)
