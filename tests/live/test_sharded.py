"""Modules that several processes hold: 4 of them over gloo, which run all that is here, and one test for each of it.

What every process has is compared with its block of what one process alone makes of the same files.
"""

from __future__ import annotations

import copy
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from children import end_of, forked
from families import family
from quantized_models import ENCODED
from relayouts import Layout, Sizes
from relayouts import family as relatives
from small_models import Tensors, normal, same, write_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.live import sharding
from ires_kernels.live import tensors as held
from ires_kernels.live.peers import PeerError
from ires_kernels.planning.rules import ArgumentError

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WORLD = 4
SIZES = Sizes(hidden=32, intermediate=64, head=8)
IDS = torch.tensor([[5, 6, 7]])
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Something that all processes do at the same time, in one folder."""
    CHECKS[function.__name__] = function
    return function


def block(name: str, tensor: Tensor, whole: Tensor) -> Tensor:
    """What this process is to have of a tensor."""
    if not sharding.is_sharded(tensor):
        return whole
    # Not by our own box: by what torch makes of the numbers of all elements.
    numbers = torch.arange(whole.numel()).view(whole.shape)
    mine = distribute_tensor(numbers, tensor.device_mesh, _plain(tensor), src_data_rank=None).to_local()
    if mine.shape != sharding.local(tensor).shape or _plain(tensor) != list(tensor.placements):
        box = sharding.box(name, tensor)
        mine = numbers[tuple(slice(first, first + size) for first, size in zip(box.first, box.size, strict=True))]
    return whole.reshape(-1)[mine.reshape(-1)].view(mine.shape)


def _plain(tensor: DTensor) -> list[Any]:
    return [each if isinstance(each, (Shard, Replicate)) else Replicate() for each in tensor.placements]


def assert_blocks(module: nn.Module, wanted: dict[str, Tensor]) -> None:
    sharding.reshard(module)
    found = dict(held.named(module))
    assert found.keys() <= wanted.keys()
    wrong = [name for name, t in found.items() if not same(sharding.local(t), block(name, t, wanted[name]))]
    assert wrong == []


def sharded(module: Any, mesh: DeviceMesh) -> Any:
    """By fully_shard, layer by layer."""
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def split(module: Any, mesh: DeviceMesh) -> Any:
    """By columns and rows on the dimension tp of a mesh, and then by fully_shard on dp."""
    for layer in module.model.layers:
        plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        parallelize_module(layer, mesh["tp"], plan)
    return sharded(module, mesh["dp"])


def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])


def read(folder: Path, kind: str = "LlamaForCausalLM") -> Any:
    return getattr(transformers, kind).from_pretrained(folder / "target", dtype=torch.bfloat16).eval()


def pair(folder: Path) -> tuple[Path, Path]:
    return folder / "instruct", folder / "base"


def assert_applied(folder: Path, model: nn.Module, added: Any, plain: nn.Module | None = None, **rules: Any) -> None:
    """A module gets what one that is not sharded would get, and what it had before again."""
    if plain is None:
        before, wanted = ik.load(folder / "target", added, alpha=0.0), ik.load(folder / "target", added, **rules)
    else:
        before = {name: tensor.clone() for name, tensor in held.named(plain)}
        ik.apply_(plain, added, **rules)
        wanted = dict(held.named(plain))
    assert_blocks(model, before)
    objects, pointers = [*model.parameters()], [sharding.local(p).data_ptr() for p in model.parameters()]
    with ik.apply_(model, added, **rules) as applied:
        assert_blocks(model, wanted)
        assert any(not same(sharding.local(t), block(n, t, before[n])) for n, t in held.named(model))
        assert applied.nbytes < sum(tensor.nbytes for tensor in wanted.values())
    assert_blocks(model, before)
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))
    assert [sharding.local(p).data_ptr() for p in model.parameters()] == pointers


@check
def fully_sharded_over_four(folder: Path) -> None:
    model = sharded(read(folder / "tied"), mesh(4))
    with torch.no_grad():
        said = model(IDS).logits
    assert not isinstance(model.model.norm.weight, DTensor)  # whole after a forward pass
    applied = ik.apply_(model, pair(folder / "tied"), 0.7)
    assert isinstance(model.model.norm.weight, DTensor)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = ik.load(folder / "tied/target", pair(folder / "tied"), alpha=0.7)
    assert_blocks(model, wanted)
    plain = read(folder / "tied")
    plain.load_state_dict(wanted)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    applied.undo()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, said)
    assert_applied(folder / "tied", model, pair(folder / "tied"), alpha=0.7, rounding="stochastic", seed=5)


@check
def fully_sharded_over_two(folder: Path) -> None:
    """Two modules, each over two processes."""
    model = sharded(read(folder / "tied"), mesh(2, 2)["dp"])
    assert_applied(folder / "tied", model, pair(folder / "tied"), alpha=-1.25)
    assert_applied(folder / "tied", model, folder / "tied/residual", alpha=0.5, alphas=[("mlp", 2.0)], skip="norm")


@check
def split_by_columns_and_rows_and_fully_sharded(folder: Path) -> None:
    model = split(read(folder / "plain"), mesh(2, 2))
    kinds = {str(list(p.placements)) for p in model.parameters() if isinstance(p, DTensor)}
    assert any("_StridedShard" in kind for kind in kinds)
    assert "[Shard(dim=0), Shard(dim=1)]" in kinds
    assert_applied(folder / "plain", model, pair(folder / "plain"), alpha=0.7)
    assert_applied(folder / "plain", model, folder / "plain/residual", alpha=0.7, rounding="stochastic", seed=5)


@check
def in_other_ways(folder: Path) -> None:
    """With copies, by columns, and computing in another dtype."""
    cross = mesh(2, 2)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)

    def columns(parameter: nn.Parameter) -> Shard:
        return Shard(parameter.dim() - 1)

    model = read(folder / "plain")
    for layer in model.model.layers:
        fully_shard(layer, mesh=cross, mp_policy=policy, shard_placement_fn=columns)
    fully_shard(model, mesh=cross, reshard_after_forward=False, mp_policy=policy)
    assert list(model.model.layers[0].mlp.up_proj.weight.placements) == [Replicate(), Shard(1)]
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.float32
    assert_applied(folder / "plain", model, pair(folder / "plain"), alpha=0.7, rounding="stochastic")
    with pytest.raises(ArgumentError, match=r"is torch\.bfloat16 in the module, and would get torch\.float32"):
        ik.load(folder / "plain/target", pair(folder / "plain"), dtype="f32", module=model)


@check
def experts_in_one_tensor(folder: Path) -> None:
    """Their files have each expert on its own."""
    plain = read(folder / "mixtral", "MixtralForCausalLM")
    model = sharded(copy.deepcopy(plain), mesh(4))
    assert_applied(folder / "mixtral", model, pair(folder / "mixtral"), plain, alpha=0.7, rounding="stochastic")


@check
def a_residual_in_another_layout(folder: Path) -> None:
    model = split(read(folder / "layouts"), mesh(2, 2))
    fused = (folder / "layouts/fused instruct", folder / "layouts/fused base")
    assert_applied(folder / "layouts", model, fused, alpha=0.7, rounding="stochastic")


@check
def quantized_models(folder: Path) -> None:
    model = split(read(folder / "layouts"), mesh(2, 2))
    for name in ("fp8", "mxfp8"):
        quantized = (folder / f"layouts/{name} instruct", folder / "layouts/base")
        assert_applied(folder / "layouts", model, quantized, alpha=0.7)


class Pieces(nn.Module):
    """A module whose tensors are in uneven blocks, empty ones, and copies."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        whole = mesh(4)
        cross = mesh(2, 2)
        places: dict[str, tuple[DeviceMesh, list[Any]]] = {
            "rows": (whole, [Shard(0)]),
            "few": (whole, [Shard(0)]),
            "columns": (whole, [Shard(1)]),
            "last": (cross, [Shard(2), Shard(1)]),
            "copies": (cross, [Replicate(), Shard(0)]),
            "twice": (cross, [Shard(0), Shard(0)]),
            "scalar": (whole, [Replicate()]),
        }
        for name, (where, placements) in places.items():
            self.register_parameter(name, nn.Parameter(distribute_tensor(tensors[name], where, placements)))
        self.register_buffer("plain", tensors["plain"].clone())


SHAPES = {
    "rows": (5, 16),
    "few": (3, 8),
    "columns": (6, 10),
    "last": (3, 5, 7),
    "copies": (7, 4),
    "twice": (9, 3),
    "scalar": (),
    "plain": (40,),
}


@check
def uneven_and_empty_blocks(folder: Path) -> None:
    model = Pieces(ik.load(folder / "pieces/target", pair(folder / "pieces"), alpha=0.0)).eval()
    for rounding in ("nearest", "stochastic"):
        assert_applied(folder / "pieces", model, pair(folder / "pieces"), alpha=0.7, rounding=rounding, seed=2)
        assert_applied(folder / "pieces", model, folder / "pieces/residual", alpha=0.7, rounding=rounding, seed=2)
    applied = ik.apply_(model, pair(folder / "pieces"))
    assert ("few" in applied.changed) == (dist.get_rank() < 3)


@check
def only_what_is_here_is_read(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).eval()
    read: list[int] = []
    source, places = sources.LocalFile.read_into, sources.LocalFile.reads

    def counted(self: sources.LocalFile, view: memoryview, offset: int) -> None:
        read.append(len(view))
        source(self, view, offset)

    def told(self: sources.LocalFile, offset: int, size: int) -> list[sources.Read]:
        read.append(size)
        return places(self, offset, size)

    model.load_state_dict({name: t.float() for name, t in ik.load(folder / "wide/base", pair(folder / "wide")).items()})
    fully_shard(model, mesh=mesh(4))
    sources.LocalFile.read_into = counted  # type: ignore[method-assign]
    sources.LocalFile.reads = told  # type: ignore[method-assign]
    try:
        ik.apply_(model, pair(folder / "wide"))
    finally:
        sources.LocalFile.read_into, sources.LocalFile.reads = source, places  # type: ignore[method-assign]
    here = 2 * 256 * 512 * 4 // 4
    assert here < sum(read) < here + 16384  # and samples


@check
def sums_and_flat_parameters_are_refused(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).eval()
    partial = DTensor.from_local(torch.zeros(512, 256), mesh(4), [Partial()], run_check=False)
    model[0].weight = nn.Parameter(partial)
    with pytest.raises(ArgumentError, match=r"'0\.weight' is P.*sums of what several processes have"):
        ik.apply_(model, pair(folder / "wide"))
    # What this leaves in a process is every other row.
    model[0].weight = nn.Parameter(distribute_tensor(torch.zeros(512, 256), mesh(4), [Shard(0)]))
    spec = model[0].weight._spec  # type: ignore[union-attr]
    strided = torch.distributed.tensor.placement_types._StridedShard(0, split_factor=2)
    spec.placements = (strided,)
    with pytest.raises(ArgumentError, match=r"is no block of \[512, 256\]"):
        ik.apply_(model, pair(folder / "wide"))
    flat = FullyShardedDataParallel(nn.Sequential(nn.Linear(8, 8)), device_id=torch.device("cpu"))
    with pytest.raises(ArgumentError, match="keeps parameters flat"):
        ik.apply_(flat, pair(folder / "wide"))


@check
def one_that_fails_fails_all(folder: Path) -> None:
    model = sharded(read(folder / "plain"), mesh(4))
    before = ik.load(folder / "plain/target", pair(folder / "plain"), alpha=0.0)
    rank = dist.get_rank()
    mine = pair(folder / "plain") if rank != 2 else (folder / "nowhere", folder / "plain/base")
    with pytest.raises(PeerError if rank != 2 else (CheckpointError, ArgumentError), match="nowhere"):
        ik.apply_(model, mine)
    assert_blocks(model, before)
    with pytest.raises(PeerError, match=r"rank [01] was called with other arguments"):
        ik.apply_(model, pair(folder / "plain"), 0.7 if rank else 0.8)
    assert_blocks(model, before)
    model.register_buffer(f"of {rank}", torch.ones(3))
    with pytest.raises(PeerError, match=r"rank [01] has other tensors in its module"):
        ik.apply_(model, pair(folder / "plain"), allow_missing=True)
    del model._buffers[f"of {rank}"]

    def fail(done: int, _: int) -> None:
        if rank == 1 and done:
            raise OSError(5, "Input/output error")

    for undo in (True, False):
        with pytest.raises(PeerError if rank != 1 else OSError, match="Input/output error"):
            ik.apply_(model, pair(folder / "plain"), undo=undo, progress=fail)
        assert_blocks(model, before)
    assert_applied(folder / "plain", model, pair(folder / "plain"), alpha=0.7)


@check
def a_damaged_residual_changes_nothing(folder: Path) -> None:
    model = sharded(read(folder / "plain"), mesh(4))
    before = ik.load(folder / "plain/target", pair(folder / "plain"), alpha=0.0)
    with pytest.raises((CheckpointError, PeerError), match="is damaged"):
        ik.apply_(model, folder / "plain/damaged")
    assert_blocks(model, before)
    with torch.device("meta"):
        empty = sharded(transformers.LlamaForCausalLM(model.config), mesh(4))
    empty.model.rotary_emb = model.model.rotary_emb
    with pytest.raises((CheckpointError, PeerError), match="is damaged"):
        ik.load(folder / "plain/target", folder / "plain/damaged", module=empty)
    assert all(parameter.is_meta for parameter in empty.parameters())


@check
def what_an_optimiser_did_is_not_lost(folder: Path) -> None:
    model = sharded(read(folder / "tied"), mesh(4))
    before = ik.load(folder / "tied/target", pair(folder / "tied"), alpha=0.0)
    applied = ik.apply_(model, pair(folder / "tied"), 0.7)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).logits.float().sum().backward()
    optimiser.step()
    with pytest.raises(ArgumentError, match="force=True"):
        applied.undo()
    applied.undo(force=True)
    assert_blocks(model, before)


@check
def compiled_layers_keep_their_names(folder: Path) -> None:
    model = read(folder / "plain")
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    assert_applied(folder / "plain", sharded(model, mesh(4)), pair(folder / "plain"), alpha=0.7)


@check
def loaded_into_blocks_without_memory(folder: Path) -> None:
    for place, make, shape in (("tied", sharded, (4,)), ("plain", split, (2, 2))):
        wanted = ik.load(folder / place / "target", pair(folder / place), alpha=0.7, rounding="stochastic")
        plain = read(folder / place)
        plain.load_state_dict(wanted)
        with torch.device("meta"):
            empty = transformers.LlamaForCausalLM(plain.config).to(torch.bfloat16).eval()
        empty.model.rotary_emb = plain.model.rotary_emb
        model = make(empty, mesh(*shape))
        model.model.norm.weight.requires_grad_(False)
        rules: dict[str, Any] = {"alpha": 0.7, "rounding": "stochastic"}
        found = ik.load(folder / place / "target", pair(folder / place), module=model, **rules)
        assert_blocks(model, wanted)
        assert all(isinstance(tensor, DTensor) for tensor in found.values())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (place == "tied")
        assert not model.model.norm.weight.requires_grad
        with torch.no_grad():
            if place == "tied":
                assert torch.equal(model(IDS).logits, plain(IDS).logits)
            else:
                torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=2e-2, rtol=0)
        sharding.reshard(model)
        pointers = [sharding.local(p).data_ptr() for p in model.parameters()]
        ik.load(folder / place / "target", pair(folder / place), module=model, alpha=0.0)  # which has memory by now
        assert_blocks(model, ik.load(folder / place / "target", pair(folder / place), alpha=0.0))
        assert [sharding.local(p).data_ptr() for p in model.parameters()] == pointers


@check
def one_that_is_killed_fails_the_others(folder: Path) -> None:
    """The last one, as afterwards they are three."""
    model = sharded(read(folder / "plain"), mesh(4))
    before = ik.load(folder / "plain/target", pair(folder / "plain"), alpha=0.0)

    def die(done: int, _: int) -> None:
        if dist.get_rank() == 3 and done:
            os._exit(0)

    with pytest.raises(RuntimeError, match="onnection"):
        ik.apply_(model, pair(folder / "plain"), progress=die)
    assert_blocks(model, before)


def run(rank: int, folder: Path) -> None:
    """All checks in one process; what each of them raised is left in a file."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/met", timedelta(seconds=60), WORLD, rank)
    for name, function in CHECKS.items():
        text = ""
        try:
            function(folder)
        except BaseException:
            text = traceback.format_exc()
        (folder / f"{name}-{rank}").write_text(text)
        if name != one_that_is_killed_fails_the_others.__name__:
            dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes have done it all."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used a GPU cannot be forked: run this file on its own")
    folder = tmp_path_factory.mktemp("sharded")
    family(folder / "tied", "tied llama")
    family(folder / "plain", "llama")
    family(folder / "mixtral", "mixtral")
    for place in ("tied", "plain"):
        ik.extract(folder / place / "base", folder / place / "instruct", folder / place / "residual")
    ik.extract(folder / "plain/base", folder / "plain/instruct", folder / "plain/damaged")
    with open(folder / "plain/damaged/residual.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    models = relatives(SIZES)
    for role, model in models.items():
        write_model(folder / "layouts" / role, model, config=SIZES.config())
    for role in ("instruct", "base"):
        fused = Layout(qkv="rows", mlp="gate up").of(models[role], SIZES)
        write_model(folder / f"layouts/fused {role}", fused, config=SIZES.config())
    for short, name in (("fp8", "fp8-block"), ("mxfp8", "mxfp8")):
        make, settings = ENCODED[name]
        stored: Tensors = {}
        for key, tensor in models["instruct"].items():
            stored |= make(key, tensor) if "_proj." in key else {key: tensor}
        config = SIZES.config() | {"quantization_config": settings}
        write_model(folder / f"layouts/{short} instruct", stored, config=config)
    for number, role in enumerate(("base", "instruct", "target")):
        pieces = {n: normal(s, i) + normal(s, 100 * number + i, scale=1e-3) for i, (n, s) in enumerate(SHAPES.items())}
        write_model(folder / "pieces" / role, pieces)
        write_model(folder / "wide" / role, {"0.weight": normal((512, 256), number, torch.float32)})
    ik.extract(folder / "pieces/base", folder / "pieces/instruct", folder / "pieces/residual")
    children = [forked(lambda rank=rank: run(rank, folder)) for rank in range(WORLD)]  # type: ignore[misc]
    for child in children:
        end_of(child)
    return folder


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("name", CHECKS)
def test_of_a_sharded_module(folder: Path, name: str) -> None:
    here = WORLD - (name == one_that_is_killed_fails_the_others.__name__)
    found = [folder / f"{name}-{rank}" for rank in range(here)]
    assert all(file.exists() for file in found), "an earlier one was waiting for another process"
    text = "\n".join(dict.fromkeys(file.read_text() for file in found)).strip()
    assert not text, text
