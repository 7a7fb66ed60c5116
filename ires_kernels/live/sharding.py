"""Parameters of which each process has a block: DTensors, as fully_shard and parallelize_module make them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from ires_kernels.checkpoints.header import brief
from ires_kernels.live.peers import Peers
from ires_kernels.planning.box import Box
from ires_kernels.planning.rules import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_FLAT = (
    "is sharded by FullyShardedDataParallel, which keeps parameters flat: nothing can be told of them. Shard the model "
    "with torch.distributed.fsdp.fully_shard, or apply to its files, and load those."
)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one that several processes hold."""
    # What nobody has imported, nothing is an instance of; the import takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the memory where it is."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def reshard(module: nn.Module) -> None:
    """Make every parameter the block of this process again; after a forward pass those of the root are whole ones."""
    for part in module.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(part).__mro__):
            raise ArgumentError(f"{type(part).__name__} {_FLAT}")
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            part.reshard()  # type: ignore[operator]


def peers(module: nn.Module | None) -> Peers:
    """The processes that hold a module: alone, where it is not sharded. What is whole in it is made blocks again.

    Raises ArgumentError where its tensors lie in two sets of processes.
    """
    if not isinstance(module, nn.Module):
        return Peers()
    reshard(module)
    meshes: list[DeviceMesh] = []
    for tensor in (*module.parameters(), *module.buffers()):
        if is_sharded(tensor) and tensor.device_mesh not in meshes:
            meshes.append(tensor.device_mesh)
    if not meshes:
        return Peers()
    import torch.distributed as dist

    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    for mesh in meshes:
        strangers = set(mesh.mesh.flatten().tolist()) - ranks
        if strangers:
            raise ArgumentError(
                f"the module has tensors on the ranks {sorted(ranks)} and on {sorted(strangers)}, and none on all of "
                "them. Apply to the parts of the module on their own."
            )
    groups: list[ProcessGroup] = [largest.get_group(dim) for dim in range(largest.ndim)]
    return Peers(groups, dist.get_rank())


def box(name: str, tensor: DTensor) -> Box:
    """Which block of a tensor this process has. Raises ArgumentError for what is no block, or no plain numbers."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in tensor.placements:
        if placement.is_partial():
            raise ArgumentError(
                f"{brief(name)} is {placement}: its numbers are sums of what several processes have. Give it another "
                "placement first (redistribute)."
            )
    shape, placements = tuple(tensor.shape), tuple(tensor.placements)
    size, first = compute_local_shape_and_global_offset(shape, tensor.device_mesh, placements)
    here = tuple(local(tensor).shape)
    if here != tuple(size) or not all(_is_block(tensor, dim) for dim in range(len(shape))):
        raise ArgumentError(
            f"{brief(name)} is laid out by {list(placements)}, and what rank {tensor.device_mesh.get_rank()} has of "
            f"it, {list(here)}, is no block of {list(shape)}. Give it another placement first (redistribute)."
        )
    return Box(shape, tuple(first), tuple(size))


def like(tensor: DTensor, here: Tensor) -> DTensor:
    """A tensor that is sharded as another one is, of which this is here."""
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(here, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _is_block(tensor: DTensor, dim: int) -> bool:
    """Whether the indexes of one dimension that are here follow each other: cut more than once they may not."""
    from torch.distributed.tensor import Shard

    cuts = [(number, each) for number, each in enumerate(tensor.placements) if _cuts(each, dim, tensor.dim())]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or (len(cuts) < 2 and all(type(each) is Shard for _, each in cuts)):
        return coordinate is not None
    indexes = torch.arange(tensor.shape[dim]).reshape([-1 if other == dim else 1 for other in range(tensor.dim())])
    for number, placement in cuts:
        pieces, _ = placement._split_tensor(  # type: ignore[attr-defined]
            indexes, tensor.device_mesh.size(number), with_padding=False, contiguous=False
        )
        indexes = pieces[coordinate[number]]
    found: Sequence[int] = indexes.flatten().tolist()
    return not found or found[-1] - found[0] == len(found) - 1


def _cuts(placement: Placement, dim: int, dims: int) -> bool:
    """Whether a placement cuts a dimension."""
    cut = getattr(placement, "dim", None)
    return cut is not None and cut % max(dims, 1) == dim
