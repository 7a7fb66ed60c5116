"""The operations as torch.library operators: what torch checks of them, and that being traced changes no bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_same, sample
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ires_kernels as ik
from ires_kernels.tensors import launch

# torch's compiler and exporter warn of what they do themselves, such as using what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Skipping serialization:UserWarning"
)

OPERATORS = torch.ops.ires_kernels
ONE = {"rounding": "stochastic", "seed": 2**64 - 5, "stream": 2**63 + 7, "offset": 3}
MANY = {"rounding": "stochastic", "seed": 5, "stream": [1, 2**64 - 1, 3]}

# A call on (t, x, y), each a tensor or a list of three, in place or into a new result.
CALLS: dict[str, Callable[[Any, Any, Any, dict[str, Any]], Any]] = {
    "add_": lambda t, x, _y, o: ik.add_(t, x, 0.3, **o),
    "add_ two": lambda t, x, y, o: ik.add_(t, both(x, y), [0.3, -1.7], **o),
    "add_difference_": lambda t, x, y, o: ik.add_difference_(t, x, y, 0.7, **o),
    "scale_": lambda t, _x, _y, o: ik.scale_(t, -0.7, **o),
    "subtract": lambda t, x, _y, o: ik.subtract(t, x, dtype=torch.float16, **o),
    "subtract by default": lambda t, x, _y, o: ik.subtract(t, x, **o),
    "add": lambda t, x, _y, o: ik.add(t, x, 0.3, **o),
    "add two": lambda t, x, y, o: ik.add(t, both(x, y), 0.3, **o),
    "scale": lambda t, _x, _y, o: ik.scale(t, 3, **o),
    "add_difference": lambda t, x, y, o: ik.add_difference(t, x, y, 0.7, **o),
    "add_difference two": lambda t, x, y, o: ik.add_difference(t, both(x, y), both(y, t), [0.3, -1.7], **o),
    "add_difference_ two": lambda t, x, y, o: ik.add_difference_(t, both(x, y), y, 0.3, **o),
    "add out": lambda t, x, y, o: ik.add(t, x, 0.3, out=y, **o),
    "add out over t": lambda t, x, _y, o: ik.add(t, x, 0.3, out=t, **o),
    "subtract out over b": lambda t, x, _y, o: ik.subtract(t, x, out=x, **o),
}


def both(x: Any, y: Any) -> Any:
    return [x, y] if isinstance(x, Tensor) else [[r, s] for r, s in zip(x, y, strict=True)]


def operands(listed: bool) -> tuple[Any, Any, Any]:
    """(t, x, y) of mixed dtypes; the lists of mixed sizes, with a strided and an empty tensor."""
    dtypes = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    if not listed:
        t, x, y = (sample(dtype, 33, seed) for seed, dtype in enumerate(dtypes))
        return t, x, y
    columns = []
    for seed, dtype in enumerate(dtypes):
        wide = sample(dtype, 60, seed).view(6, 10)
        columns.append([sample(dtype, 7, seed + 10), wide.t(), sample(dtype, 0, seed)])
    t, x, y = columns
    return t, x, y


def flat(*values: Any) -> list[Tensor]:
    return [x for value in values for x in ([value] if isinstance(value, Tensor) else value)]


@pytest.fixture(autouse=True)
def compile_afresh() -> None:
    torch._dynamo.reset()


# As torch.library has it


def operator_calls() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)).to(dtype) for n in (4, 9)]

    t, x, y = (tensors(dtype, seed) for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)))
    random = {"rounding": "stochastic", "seed": -3, "stream": [4, -5], "offset": 6}
    arguments = {
        "subtract": (t, x),
        "add": (t, [x[0], y[0], x[1], y[1]], [0.5, 0.25]),
        "scale": (t, 0.5),
        "add_difference": (t, x, y, 0.5),
        "add_differences": (t, [x[0], y[0], x[1], y[1]], [y[0], y[0], y[1], x[1]], [0.5, 0.25]),
    }
    for (name, given), options in itertools.product(arguments.items(), ({}, random)):
        packet = getattr(OPERATORS, name)
        yield f"{name}, {len(options)} options", packet.default, given, {**options, "dtype": torch.bfloat16}
        yield f"{name}.out, {len(options)} options", packet.out, given, {**options, "outs": tensors(torch.float16, 3)}
        if name != "subtract":
            yield f"{name}_, {len(options)} options", getattr(OPERATORS, f"{name}_").default, given, options


OPERATOR_CALLS = list(operator_calls())


@pytest.mark.parametrize("case", OPERATOR_CALLS, ids=[case[0] for case in OPERATOR_CALLS])
def test_torch_finds_nothing_wrong_with_the_operators(case: Any) -> None:
    _, operator, arguments, options = case
    results = torch.library.opcheck(operator, arguments, options)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_schemas_declare_what_is_written() -> None:
    def written(operator: Any) -> list[str]:
        return [x.name for x in operator._schema.arguments if x.alias_info is not None and x.alias_info.is_write]

    for name in ("subtract", "add", "scale", "add_difference", "add_differences"):
        assert written(getattr(OPERATORS, name).default) == []
        assert written(getattr(OPERATORS, name).out) == ["outs"]
        if name != "subtract":
            assert written(getattr(OPERATORS, f"{name}_").default) == ["t"]


def test_operators_called_directly() -> None:
    t, x, y = operands(listed=True)
    integers = {"seed": -5, "stream": [1, -1, 3], "offset": -9}
    wanted = ik.add(t, both(x, y), [0.3, 0.1], rounding="stochastic", seed=2**64 - 5, stream=[1, 2**64 - 1, 3],
                    offset=2**64 - 9)  # fmt: skip
    row_major = [r for pair in zip(x, y, strict=True) for r in pair]
    for got, want in zip(OPERATORS.add(t, row_major, [0.3, 0.1], rounding="stochastic", **integers), wanted,
                         strict=True):  # fmt: skip
        assert_same(got, want, "add")
    assert OPERATORS.add_([], [], [1.0]) is None
    assert OPERATORS.scale([], 2.0) == []
    with pytest.raises(ValueError, match="add_: residual has 3 tensors for 3 targets of 2 alphas each"):
        OPERATORS.add_(t, x, [1.0, 2.0])
    with pytest.raises(ValueError, match="subtract: b has 1 entries, a has 3"):
        OPERATORS.subtract(t, x[:1])
    with pytest.raises(ValueError, match="a factor is nan, wanted a finite number"):
        OPERATORS.scale_(t, float("nan"))
    with pytest.raises(ValueError, match="rounding is 'up'"):
        OPERATORS.scale_(t, 2.0, rounding="up")
    with pytest.raises(RuntimeError, match=r"scale_: t\[1\] is t\[0\] again"):
        OPERATORS.scale_([t[0], t[0]], 2.0)


# Compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("listed", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_give_the_same_bits(name: str, listed: bool, rounding: str, backend: str) -> None:
    options: dict[str, Any] = {}
    if rounding == "stochastic":
        options = MANY if listed else ONE
    compare(lambda t, x, y: CALLS[name](t, x, y, options), listed, backend)


def compare(call: Callable[..., Any], listed: bool, backend: str) -> None:
    """Whatever the call returns, and all that it may have written, as without compilation, without a graph break."""
    eager, compiled = operands(listed), operands(listed)
    wanted = call(*eager)
    got = torch.compile(call, fullgraph=True, backend=backend)(*compiled)
    for before, after in zip(flat(wanted, *eager), flat(got, *compiled), strict=True):
        assert_same(after, before, "compiled")
        assert after.stride() == before.stride()


def chain(t: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Operations of torch around ours, on views, with results that are written again."""
    residual = ik.subtract(x, y)
    ik.scale_(residual, 0.5)
    rows = t[:32].view(4, 8)
    ik.add_([rows[0], rows[2]], [residual[:8] + 1, residual[8:16]], 0.3, **{**ONE, "stream": [1, 2]})
    ik.add_difference_(rows[3], rows[1], t[1:9] * 2, 0.7)
    return ik.add(t, [residual, residual.relu()], [1, 0.5]) + 1, rows.sum(0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_among_other_operations(backend: str) -> None:
    compare(chain, False, backend)


def test_inductor_writes_into_the_tensors_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of a target is made on the way: the memory the kernel gets is the caller's."""
    seen = []

    def watch(names: Any, inputs: Any, *rest: Any) -> None:
        seen.append([row[0].data_ptr() for row in inputs])
        in_place(names, inputs, *rest)

    t, x = ([sample(torch.bfloat16, n, seed + n) for n in (40, 7)] for seed in range(2))
    call = torch.compile(lambda t, x: ik.add_(t, x, 0.5), fullgraph=True, backend="inductor")
    call(t, x)
    in_place = launch.in_place
    monkeypatch.setattr(launch, "in_place", watch)
    call(t, x)
    assert seen == [[a.data_ptr() for a in t]]


def test_new_shapes_and_random_numbers_make_few_graphs() -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def call(t: Tensor, r: Tensor, step: int) -> Tensor:
        return ik.add_(t, r, 0.3, rounding="stochastic", seed=step, stream=2 * step, offset=3 * step)

    for n in range(3, 15):
        t, r = sample(torch.bfloat16, n, n), sample(torch.bfloat16, n, n + 1)
        wanted = ik.add(t, r, 0.3, rounding="stochastic", seed=n, stream=2 * n, offset=3 * n)
        assert_same(call(t, r, n), wanted, f"step {n}")
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        compare(lambda t, x, _y: ik.add_(t, x, 0.3), False, backend)
        compare(lambda t, x, y: ik.add_difference(t, x, y), True, backend)


def test_exported() -> None:
    class Merge(torch.nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            ik.scale_(t, 2.0)
            return ik.add(t, x, 0.5)

    t, x, _ = operands(listed=False)
    program = torch.export.export(Merge(), (t.clone(), x)).run_decompositions({})
    mine, wanted = t.clone(), t.clone()
    assert_same(program.module()(mine, x), Merge()(wanted, x), "result")
    assert_same(mine, wanted, "target")


# Errors


def test_gradients_are_refused_when_compiled_too() -> None:
    t, r = torch.ones(4), torch.ones(4, requires_grad=True)
    message = "add_: residual: requires grad, and these operations are not differentiable"
    for backend in ("eager", "aot_eager"):
        with pytest.raises(RuntimeError, match=message):
            torch.compile(lambda t, r: ik.add_(t, r), fullgraph=True, backend=backend)(t, r)
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.add_([t], [r], [1.0])
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        OPERATORS.scale_([r], 2.0)
    with pytest.raises(RuntimeError, match="subtract: b: requires grad"):
        OPERATORS.subtract([t], [r])
    assert t.tolist() == [1.0] * 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_parameters_may_be_changed_without_gradients(backend: str) -> None:
    weight, residual = torch.nn.Parameter(torch.ones(4)), torch.full((4,), 2.0)

    @torch.compile(fullgraph=True, backend=backend)
    def change(weight: Tensor, residual: Tensor) -> Tensor:
        with torch.no_grad():
            ik.add_(weight, residual, 0.5)
        return (weight * weight).sum()

    change(weight, residual).backward()
    assert weight.tolist() == [2.0] * 4
    assert weight.grad is not None
    assert weight.grad.tolist() == [4.0] * 4

    @torch.compile(fullgraph=True, backend=backend)
    def only_change(weight: Tensor, residual: Tensor) -> None:
        with torch.no_grad():
            ik.add_(weight, residual, 0.5)

    only_change(weight, residual)
    assert weight.tolist() == [3.0] * 4


def test_operands_are_checked_while_compiling() -> None:
    t = torch.ones(4)
    for call, message in (
        (lambda t: ik.add_(t, torch.ones(5)), r"add_: residual has shape \(5,\), t has \(4,\)"),
        (lambda t: ik.add_([t, t * 2], [t + 1, t.int()]), r"add_: residual\[1\] has dtype torch\.int32"),
        (lambda t: ik.scale_(t, 2.0, rounding="up"), "rounding is 'up'"),
        (lambda t: ik.scale_(t, float("inf")), "s is inf, wanted a finite number"),
        (lambda t: ik.scale_(t, 2.0, seed=-1), "seed is -1, wanted an integer"),
        (lambda t: ik.subtract(t, t, tally=ik.Tally()), "tally= counts as it runs"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(call, fullgraph=True, backend="eager")(t)
    assert t.tolist() == [1.0] * 4


def test_memory_is_checked_when_run() -> None:
    memory = torch.ones(9)
    call = torch.compile(lambda t, r: ik.add_(t, r), fullgraph=True, backend="eager")
    call(torch.ones(8), torch.ones(8))
    with pytest.raises(RuntimeError, match="t shares memory with residual and is not the same tensor"):
        call(memory[:8], memory[1:])
    assert memory.tolist() == [1.0] * 9
    call(memory, memory)
    assert memory.tolist() == [2.0] * 9


@pytest.mark.filterwarnings("ignore::UserWarning")  # that Dynamo cannot follow what runs after the break
def test_a_tally_counts_where_graphs_may_break() -> None:
    t, x, y = operands(listed=False)
    counted, wanted = ik.Tally(), ik.Tally()
    torch.compile(lambda: ik.add_difference(t, x, y, tally=counted), backend="eager")()
    ik.add_difference(t, x, y, tally=wanted)
    assert counted == wanted
    assert counted.elements == 33


# Seen by dispatch modes


def test_modes_see_the_operators() -> None:
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    t, x, y = operands(listed=False)
    wanted = ik.add_difference(t, x, y)
    with Log():
        assert ik.add_difference_(t, x, y) is t
        ik.subtract(t, x)
        ik.scale(t, 2.0, out=y)
    ours = [func for func in seen if func.namespace == "ires_kernels"]
    assert ours == [OPERATORS.add_difference_.default, OPERATORS.subtract.default, OPERATORS.scale.out]
    assert_same(t, wanted, "under a mode")


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_what_is_written(mode: str) -> None:
    t, x, y = operands(listed=True)
    eager = operands(listed=True)
    wanted = ik.add_difference_(eager[0], x, y, 0.7)
    fresh = operands(listed=True)
    graph = make_fx(lambda t, x, y: ik.add_difference_(t, x, y, 0.7), tracing_mode=mode)(*fresh)
    for got, want in zip(graph(t, x, y), wanted, strict=True):
        assert_same(got, want, mode)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        t, x = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
        assert ik.subtract(t, x).dtype == torch.float32
        assert ik.subtract([t], [x.double()])[0].dtype == torch.float64
        assert ik.add(t.t(), x.t(), dtype=torch.float16).stride() == (1, 3)
        assert ik.add_(t, [x, x]) is t
        with pytest.raises(ValueError, match=r"x has shape \(3, 2\), t has \(2, 3\)"):
            ik.add_difference_(t, x.t(), x)
    meta = torch.ones(3, device="meta")
    assert OPERATORS.add([meta], [meta], [1.0])[0].shape == (3,)


# Version counters, by which autograd knows that a tensor was changed


def test_version_counters_step_once() -> None:
    def steps(call: Callable[[], object], *tensors: Tensor) -> list[int]:
        before = [x._version for x in tensors]
        call()
        return [x._version - v for x, v in zip(tensors, before, strict=True)]

    t, x, y = operands(listed=True)
    for call in (lambda: ik.add_(t, x), lambda: ik.scale_(t, 2.0), lambda: ik.add_difference_(t, x, y)):
        assert steps(call, *t, *x, *y) == [1] * 3 + [0] * 6
        assert steps(torch.compile(call, fullgraph=True, backend="eager"), *t, *x, *y) == [1] * 3 + [0] * 6
    assert steps(lambda: ik.subtract(t, x, out=y), *t, *x, *y) == [0] * 6 + [1] * 3
    assert steps(lambda: ik.subtract(t, x), *t, *x) == [0] * 6
    assert steps(lambda: OPERATORS.add_(t, x, [1.0]), *t, *x) == [1] * 3 + [0] * 3
    assert steps(lambda: OPERATORS.scale.out(t, 2.0, outs=y), *t, *y) == [0] * 3 + [1] * 3
    assert all(n > 0 for n in steps(torch.compile(lambda: ik.scale_(t, 2.0), backend="aot_eager"), *t))


def test_a_change_between_forward_and_backward_is_noticed() -> None:
    weight = torch.ones(4, requires_grad=True)
    scale = torch.full((4,), 3.0)
    loss = (weight * scale).sum()
    OPERATORS.scale_([scale], 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
