"""Random words of calls: tensors of a list do not share them, on any backend; help explains where they come from."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch
from oracle import assert_same
from torch import Tensor

import ires_kernels as ik
from ires_kernels.tensors import ops

OPERATIONS = [ik.subtract, ik.add, ik.add_, ik.scale, ik.scale_, ik.add_difference, ik.add_difference_]
THIRD = torch.full((4096,), 1 / 3)
RANDOM: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 7}


def all_calls(x: list[Tensor] | Tensor, **options: Any) -> list[Any]:
    zero = [torch.zeros_like(each) for each in x] if isinstance(x, list) else torch.zeros_like(x)
    return [
        ik.subtract(x, zero, **options),
        ik.add(zero, x, 1.0, **options),
        ik.add(zero, [[each, each] for each in x] if isinstance(x, list) else [x, x], [0.25, 0.75], **options),
        ik.scale(x, 1.0, **options),
        ik.add_difference(zero, x, zero, 1.0, **options),
    ]


@pytest.mark.usefixtures("backend")
def test_tensor_k_of_a_list_draws_from_stream_plus_k() -> None:
    for first in (0, 5, 2**64 - 3):
        given = {} if not first else {"stream": first}
        for listed, *alone in zip(
            all_calls([THIRD.clone() for _ in range(3)], **RANDOM, **given),
            *(all_calls(THIRD, **RANDOM, stream=first + k) for k in range(3)),
            strict=True,
        ):
            for one, wanted in zip(listed, alone, strict=True):
                assert_same(one, wanted)
            for one, other in ((0, 1), (0, 2), (1, 2)):
                assert not torch.equal(listed[one], listed[other])


@pytest.mark.usefixtures("backend")
def test_in_place() -> None:
    listed = [torch.zeros(4096).bfloat16() for _ in range(2)]
    ik.add_(listed, [THIRD, THIRD], rounding="stochastic", stream=3)
    ik.add_difference_(listed, [THIRD] * 2, [torch.zeros(4096)] * 2, rounding="stochastic", stream=3)
    ik.scale_(listed, 1 / 3, rounding="stochastic", stream=3)
    for k, one in enumerate(listed):
        alone = torch.zeros(4096).bfloat16()
        ik.add_(alone, THIRD, rounding="stochastic", stream=3 + k)
        ik.add_difference_(alone, THIRD, torch.zeros(4096), rounding="stochastic", stream=3 + k)
        ik.scale_(alone, 1 / 3, rounding="stochastic", stream=3 + k)
        assert_same(one, alone)


def test_operators_of_torch_and_compiled_calls_draw_the_same() -> None:
    x = [THIRD.clone() for _ in range(3)]
    wanted = ik.scale(x, 1.0, **RANDOM)
    for got in (
        torch.ops.ires_kernels.scale(x, 1.0, **RANDOM),
        torch.compile(lambda x: ik.scale(x, 1.0, **RANDOM), backend="eager", fullgraph=True)(x),
    ):
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)


def test_a_stream_that_has_no_successor() -> None:
    x = [torch.ones(4), torch.ones(4)]
    with pytest.raises(ValueError, match=r"scale_: stream is 18446744073709551615, and 2 tensors count on .* 2\^64"):
        ik.scale_(x, 2.0, stream=2**64 - 1)
    assert [each.tolist() for each in x] == [[1.0] * 4] * 2
    assert ik.scale(x[:1], 2.0, stream=2**64 - 1)[0].tolist() == [2.0] * 4


def test_the_errors_of_a_list_do_not_line_up() -> None:
    """64 tensors of one call: the mean of their errors is an eighth of one's, as of independent ones."""
    x = torch.full((64, 4096), 1 + 0.3 * 2**-7)
    rounded = torch.stack(ik.scale(list(x), 1.0, **RANDOM)).double()
    errors = (rounded - x.double()) / 2**-7
    one, mean = errors.std().item(), errors.mean(0).std().item()
    assert one == pytest.approx(0.458, abs=0.01)  # sqrt(0.3 * 0.7)
    assert mean == pytest.approx(one / 8, rel=0.1)


@pytest.mark.usefixtures("backend")
def test_steps_with_one_seed_err_together_and_with_their_own_do_not() -> None:
    """64 updates of a tenth of a gap, as docs/numerics.md has it."""
    residual = torch.full((4096,), 0.1 * 2**-7)
    one, own = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    for step in range(64):
        ik.add_(one, residual, rounding="stochastic", seed=7)
        ik.add_(own, residual, rounding="stochastic", seed=step)
    gaps = [(each.double() - 1) * 2**7 for each in (one, own)]
    assert set(gaps[0].tolist()) == {0.0, 64.0}
    assert (gaps[0] == 64).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert gaps[1].mean().item() == pytest.approx(6.4, abs=0.15)
    assert gaps[1].std().item() == pytest.approx(2.4, abs=0.1)  # sqrt(64 * 0.1 * 0.9)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: str(operation.__name__))
def test_help_explains_every_option_and_its_example_is_true(operation: Any) -> None:
    text = inspect.getdoc(operation) or ""
    for name, parameter in inspect.signature(operation).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert f"\n{name:<12}" in text, name
    assert "stream + k" in text
    assert max(map(len, text.splitlines())) <= 120
    tests = doctest.DocTestFinder(recurse=False).find(operation, operation.__name__, globs=vars(ops))
    assert sum(len(test.examples) for test in tests) >= 1
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
