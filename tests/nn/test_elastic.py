"""Elastic inputs against their definition, number by number, and what is stored of them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.core.stored import put_together, take_apart
from netweight.nn.elastic import Elastic, ElasticRounding, Fixed, fixed, levels_of, signs

KINDS = [(2, True), (2, False), (1, True), (1, False)]


def level(x: float, a: float, floor: float, bits: int, signed: bool) -> float:
    if signed and bits == 1:
        return a if x >= 0 else -a
    low, high = (-1, 1) if signed else (0, bits)
    return a * min(max(round((x - floor) / a), low), high) + floor


def numbers(seed: int, count: int = 40) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2
    x[:3] = torch.tensor([0.0, 1.5, -1.5])
    return x


@pytest.mark.parametrize(("bits", "signed"), KINDS)
@settings(deadline=None)  # the first call in a process is slow
@given(seed=st.integers(0, 2**16), a=st.sampled_from([0.25, 0.5, 1.0]))
def test_values_and_gradients_are_the_definition(bits, signed, seed, a):
    rounding, x = Elastic(bits, signed=signed), numbers(seed).requires_grad_()
    rounding.begin(x)
    with torch.no_grad():
        rounding.step.fill_(a)
    floor = float(x.detach().min()) if bits == 2 and not signed else 0.0
    y = rounding(x)
    wanted = [level(v, a, floor, bits, signed) for v in x.tolist()]
    assert torch.allclose(y, torch.tensor(wanted), atol=1e-6)
    g = torch.randn(len(x), generator=torch.Generator().manual_seed(seed + 1))
    y.backward(g)
    low, high = (-1, 1) if signed else (0, bits)
    u = [(v - floor) / a for v in x.tolist()]
    inside = torch.tensor([low <= each <= high for each in u])
    assert torch.equal(x.grad, g * inside)
    by_a = [
        math.copysign(1, v + 1e-30) if signed and bits == 1
        else low if each < low else high if each > high else round(each) - each
        for v, each in zip(x.tolist(), u)
    ]  # fmt: skip
    factor = 1 / math.sqrt(len(x) * high)
    assert float(rounding.step.grad) == pytest.approx(
        factor * float((g * torch.tensor(by_a)).sum()), abs=1e-4
    )


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_it_begins_where_it_is_said_and_only_once(bits, signed):
    rounding, x = Elastic(bits, signed=signed), numbers(1)
    rounding.eval()(x)
    start = float(bits) if signed else 4 / math.sqrt(2**bits - 1)
    assert float(rounding.step.detach()) == pytest.approx(start * float(x.abs().mean()))
    rounding(x * 10)
    copy.deepcopy(rounding)(x * 10)
    assert float(rounding.step.detach()) == pytest.approx(start * float(x.abs().mean()))
    again = Elastic(bits, signed=signed)
    again.load_state_dict(rounding.state_dict())
    assert torch.equal(again.eval()(x), rounding(x))


def test_signs_begin_where_the_squared_error_is_least():
    x, rounding = numbers(2), Elastic(1)
    x = x[x != 0]
    error = (x - rounding.eval()(x)).square().sum()
    a = float(rounding.step.detach())
    for other in (0.5 * a, 0.9 * a, 1.1 * a, 2 * a):
        assert error < (x - other * x.sign()).square().sum()


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_what_is_stored_gives_the_same_bit_for_bit(bits, signed):
    rounding = Elastic(bits, signed=signed)
    rounding(numbers(2).abs() - 0.2 if not signed else numbers(2))
    stored = rounding.eval().stored()
    x = numbers(3).requires_grad_()
    module = stored.module()
    assert isinstance(module, Fixed) and not module.state_dict()
    assert torch.equal(module(x), rounding(x))
    assert len(module(x).unique()) <= len({level(v, 1.0, 0.0, bits, signed) for v in (-9.0, 0.0, 1.0, 9.0)})
    assert torch.equal(put_together(*take_apart(stored)).module()(x), module(x))
    module(x).sum().backward()
    assert 0 < float(x.grad.sum()) < len(x)


def test_one_example_does_not_change_anothers_result_in_evaluation():
    rounding, x = Elastic(2, signed=False), numbers(4).reshape(4, 10)
    rounding(x)
    before = float(rounding.floor)
    rounding(x - 1)  # the running smallest number follows slowly
    assert float(rounding.floor) == pytest.approx(before - 0.1)
    rounding.eval()
    assert torch.equal(rounding(x)[:1], rounding(x[:1]))
    assert float(rounding.floor) == pytest.approx(before - 0.1)
    assert (rounding(x) >= rounding.floor).all()


def test_a_step_never_gets_to_zero():
    rounding = Elastic(2)
    rounding(torch.zeros(3))
    with torch.no_grad():
        rounding.step.fill_(-1.0)
    assert rounding(torch.ones(3)).isfinite().all() and float(rounding.size().detach()) > 0


def test_zero_counts_as_positive_and_gradients_of_signs_stop_at_the_step():
    x, a = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True), torch.tensor(1.0)
    y = signs(x, a, 1.0)
    assert y.tolist() == [-1, -1, 1, 1, 1]
    assert fixed(x, 2 * a, torch.tensor(0.0), levels_of(1, signed=True)).tolist() == [-1, -1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_bad_input():
    with pytest.raises(BadInput, match="bits=3: elastic inputs take 1 or 2 bits"):
        Elastic(3)
    good = torch.tensor(1.0)
    for step, floor, low, high in ((good, good, 1, 1), (-good, good, 0, 1), (good, good / 0, 0, 1)):
        with pytest.raises(ValueError, match="levels from"):
            ElasticRounding(step, floor, low, high, False)
