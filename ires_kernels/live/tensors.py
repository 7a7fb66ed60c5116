"""What a module holds that its files would hold: each tensor once, by the name that the files are likely to have."""

from __future__ import annotations

import json
import operator
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ires_kernels.checkpoints.header import brief
from ires_kernels.live import sharding
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.streaming.cpu import TORCH_DTYPES
from ires_kernels.tensors.overlap import overlaps_itself

DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The names of safetensors."""
_AROUND = {"_orig_mod", "_checkpoint_wrapped_module"}
"""What torch.compile and activation checkpointing put into the names of what they are put around."""
_QUANTIZED = "apply_ adds to plain numbers. Apply to the files of the model, and load those."


def inner(module: nn.Module) -> nn.Module:
    """The module that has the names of the files: not what torch.compile or DistributedDataParallel put around it."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(around := getattr(module, "_orig_mod", None), nn.Module):
            module = around
        else:
            return module


def of(module: nn.Module, known: Sequence[Container[str]] = ()) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name. What is there under several names has the one that most of `known` do.

    Raises ArgumentError for what cannot be changed in place, and TypeError where this is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type(module).__name__} {brief(module)}, wanted a torch.nn.Module")
    if getattr(module, "is_quantized", False):
        raise ArgumentError(f"{type(module).__name__} is quantized: {_QUANTIZED}")
    alike: dict[object, list[tuple[str, Tensor]]] = {}
    for name, tensor in named(module):
        _check(name, sharding.local(tensor) if sharding.is_sharded(tensor) else tensor)
        alike.setdefault(_place(tensor), []).append((name, tensor))
    if not alike:
        raise ArgumentError(f"{type(module).__name__} has no parameters and no buffers.")
    found = dict(max(names, key=lambda each: sum(each[0] in some for some in known)) for names in alike.values())
    _check_apart((name, sharding.local(tensor)) for name, tensor in found.items())
    return found


def config(module: nn.Module) -> dict[str, Any] | None:
    """What config.json of the module would say, as far as it has a config of transformers."""
    write = getattr(getattr(module, "config", None), "to_json_string", None)
    if not callable(write):
        return None
    table = json.loads(write())
    table.pop("quantization_config", None)  # of what it was loaded from: these are plain numbers
    return table if isinstance(table, dict) else None


def named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, under each of their names."""
    return ((name, tensor) for name, _, _, tensor in placed(module))


def placed(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, the module that has it, under which key, and the tensor.

    In the order of a state dict, and as the module has them, whatever hooks would make of that.
    """
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = ".".join(word for word in path.split(".") if word not in _AROUND)
        kept = [item for item in part._buffers.items() if item[0] not in part._non_persistent_buffers_set]
        for name, tensor in (*part._parameters.items(), *kept):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, part, name, tensor


def _check(name: str, tensor: Tensor) -> None:
    """Refuse what is no plain memory."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ArgumentError(f"{brief(name)} is a {type(tensor).__name__}, wanted a plain tensor. {_QUANTIZED}")
    if tensor.device.type == "meta":
        raise ArgumentError(f"{brief(name)} is on the meta device, and has no numbers: load the model first.")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        kind = f"{tensor.dtype}" if tensor.layout == torch.strided else f"{tensor.layout}"
        raise ArgumentError(f"{brief(name)} is {kind.removeprefix('torch.')}, which no file holds. {_QUANTIZED}")
    if tensor.is_inference():
        raise ArgumentError(
            f"{brief(name)} was made in torch.inference_mode, and must not be changed outside of it. Load the model "
            "outside, or under torch.no_grad."
        )
    if not has_memory(tensor):
        raise ArgumentError(
            f"{brief(name)} has no memory under all of its elements: its storage was freed or resized. Bring its "
            "numbers back first."
        )
    if overlaps_itself(tensor):
        raise ArgumentError(
            f"{brief(name)} is expanded, or a view whose elements share memory. Give it memory of its own (clone)."
        )
    if tensor.is_neg() or tensor.is_conj():
        raise ArgumentError(f"{brief(name)} is a view of numbers of other signs. Give it memory of its own (clone).")


def has_memory(tensor: Tensor) -> bool:
    """Whether all elements are in memory that is there; of what was freed for a while the shape stays."""
    if not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return bool(tensor.data_ptr()) and end <= tensor.untyped_storage().nbytes()


def _place(tensor: Tensor) -> object:
    """What two tensors share that are one."""
    here = sharding.local(tensor)
    if not here.numel():
        return id(tensor)
    return here.device, here.data_ptr(), here.dtype, tuple(here.shape), here.stride(), tuple(tensor.shape)


def _check_apart(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that share some of their memory, and not all of it: what would become of that is anybody's guess.

    Those whose elements lie between each other's do not, and count as if they did.
    """
    end, before, where = 0, "", None
    extents = [(*_extent(tensor), name) for name, tensor in named]
    for device, low, high, name in sorted(extents, key=operator.itemgetter(0, 1)):
        if device == where and low < end:
            raise ArgumentError(f"{brief(before)} and {brief(name)} share some of their memory. Clone one of them.")
        if device != where or high > end:
            end, before, where = high, name, device


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """Its device, and the addresses of its first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return f"{tensor.device}", tensor.data_ptr(), tensor.data_ptr() + length
