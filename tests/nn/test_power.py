"""Power grids: their algebra, a = 1 against the uniform grid, the search, cells, and rounding of inputs."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core import grid
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, in_groups
from netweight.core.perturbation import Linf
from netweight.core.stored import put_together, take_apart
from netweight.nn.fake import StaticRounding
from netweight.nn.power import (
    Power,
    PowerRounding,
    from_codes,
    golden,
    least_error,
    levels,
    scale_of,
    spread,
    to_codes,
)
from netweight.testing import check_form
from netweight.verification.bounds import bounds

EXPONENTS = st.floats(0.25, 1.5)
SEEDS = st.integers(0, 2**16)


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    weight = torch.tensor([[4.0, -1.0, 0.1, 0.0], [-4.0, 2.0, 1.5, -0.2]])
    form = Power.nearest(weight, 3, -1, 0.5)  # q = 3: codes round(3 sqrt(w / 4)), levels 4 (n / 3)^2
    assert form.integers().tolist() == [[3, -2, 0, 0], [-3, 2, 2, -1]]
    whole = torch.tensor([[9.0, -4.0, 0.0, 0.0], [-9.0, 4.0, 4.0, -1.0]]) * 4 / 9
    assert torch.allclose(form.decode(), whole, rtol=1e-3)  # the scale is a float16
    assert form.bits() == 8 * 3 + 16 + 32
    rows = Power.nearest(weight, 3, 0, 0.5)
    assert rows.scale.shape == (2, 1) and (form.bits_per_code, form.q) == (3, 3)


@given(bits=st.integers(2, 8), group=st.sampled_from([-1, 0, 4]), seed=SEEDS)
def test_exponent_one_is_symmetric_rounding_to_the_last_bit(bits, group, seed):
    for weight in (weights(seed, 4, 8), (weights(seed, 4, 8) * 4).round() / 8):  # the second has ties
        form = Power.nearest(weight, bits, group, 1.0)
        assert torch.equal(form.decode(), grid.nearest(weight, Grid(bits, True, group)))


@given(exponent=EXPONENTS, seed=SEEDS)
def test_the_map_keeps_products_and_its_inverse_undoes_it(exponent, seed):
    x, y = weights(seed, 2, 9).double().unbind()

    def phi(value: torch.Tensor, a: float = exponent) -> torch.Tensor:
        return spread(value, a, 1)

    assert torch.allclose(phi(x * y), phi(x) * phi(y), rtol=1e-12)
    assert torch.allclose(phi(phi(x), 1 / exponent), x, rtol=1e-9)
    u = spread(x, exponent, 7)
    assert torch.allclose(spread(u, 1 / exponent, 7), x, rtol=1e-9)
    assert spread(torch.tensor(7.0), exponent, 7).item() == pytest.approx(7)


@given(exponent=EXPONENTS, bits=st.integers(2, 8), power=st.integers(-8, 8), seed=SEEDS)
def test_codes_do_not_depend_on_the_size_of_the_weight(exponent, bits, power, seed):
    weight = weights(seed, 3, 8)
    form, other = (Power.nearest(w, bits, 0, exponent) for w in (weight, weight * 2.0**power))
    assert torch.equal(form.codes, other.codes)
    assert torch.allclose(other.decode(), form.decode() * 2.0**power, rtol=1e-3)


@given(exponent=EXPONENTS, bits=st.integers(2, 8))
def test_levels_rise_evenly_in_the_domain_of_the_codes(exponent, bits):
    q = 2 ** (bits - 1) - 1
    found = levels(exponent, q)
    assert len(found) == 2 * q + 1 and found[q] == 0 and torch.equal(found, -found.flip(0))
    assert torch.allclose(spread(found, exponent, q), torch.arange(-q, q + 1.0), rtol=1e-5)
    assert found[-1].item() == pytest.approx(q, rel=1e-6)


@given(exponent=EXPONENTS, bits=st.integers(2, 8), group=st.sampled_from([-1, 0, 4]), seed=SEEDS)
def test_laws_of_a_stored_form(exponent, bits, group, seed):
    weight = weights(seed, 16, 4, 2) ** 3
    check_form(Power.nearest(weight, bits, group, exponent), weight)


@given(exponent=EXPONENTS, bits=st.integers(2, 6), seed=SEEDS)
def test_the_cell_holds_what_rounds_to_the_codes_and_little_else(exponent, bits, seed):
    weight = weights(seed, 6, 8)
    form = Power.nearest(weight, bits, 0, exponent)
    lower, upper = form.cell()
    assert ((lower <= weight) & (weight <= upper)).all()
    assert ((lower <= form.decode()) & (form.decode() <= upper)).all()
    inside = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = lower.clamp(min=-9), upper.clamp(max=9)
    step = (high - low).clamp(min=1e-3)
    point = torch.minimum(torch.maximum(low + inside * step, low + 1e-3 * step), high - 1e-3 * step)
    assert torch.equal(form.project(point.float()).codes, form.codes)
    for corner, outwards in ((lower, -1), (upper, 1)):
        beyond = (corner + outwards * 2e-3 * step).float()
        changed = form.project(beyond).integers() != form.integers()
        assert (changed == corner.isfinite()).all()


def error(weight: torch.Tensor, bits: int, exponent: float | None) -> float:
    return float((Power.nearest(weight, bits, -1, exponent).decode() - weight).double().square().sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_the_exponent_found_has_the_least_error_and_no_slope(bits):
    weight = weights(1, 64, 512)
    groups = in_groups(weight, -1)
    found = least_error(groups, scale_of(groups, bits), 2 ** (bits - 1) - 1)
    least = error(weight, bits, found)
    for exponent in torch.linspace(0.2, 1.2, 201).tolist():
        assert error(weight, bits, exponent) >= least * (1 - 1e-4)
    h = 0.05
    slope, away = error(weight, bits, found + h) - error(weight, bits, found - h), error(weight, bits, 1.0)
    assert abs(slope) < 0.05 * (away - least)
    assert 0.3 < found < 0.8  # bell-shaped: more levels near 0
    assert float(Power.nearest(weight, bits).exponent) == pytest.approx(found)


def test_flat_weights_want_an_even_grid():
    weight = torch.linspace(-1, 1, 4096)[None]
    assert float(Power.nearest(weight, 4).exponent) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_more_bits_never_hurt(seed):
    weight = weights(seed, 8, 64)
    errors = [error(weight, bits, None) for bits in range(2, 9)]
    assert all(after <= before for before, after in zip(errors, errors[1:]))


@pytest.mark.parametrize("seed", range(20))
def test_the_search_is_never_worse_than_an_even_grid(seed):
    weight = weights(seed, 4, 16) ** 3
    assert error(weight, 3, None) <= error(weight, 3, 1.0) * (1 + 1e-9)


@given(place=st.floats(-3, 3))
def test_golden_section(place):
    assert golden(lambda x: (x - place) ** 2, -3, 3, 1e-4) == pytest.approx(place, abs=1e-4)
    assert golden(lambda x: abs(x), -3, -1, 1e-4) == -1
    assert golden(lambda x: -abs(x), -1, 2, 1e-4) == 2


def test_a_large_weight_is_searched_on_a_part():
    weight = weights(0, 600, 1000)  # more than SAMPLE
    assert float(Power.nearest(weight, 4).exponent) == pytest.approx(
        float(Power.nearest(weight[:200], 4).exponent), abs=0.06
    )


def test_zeros_constants_tiny_and_half_precision():
    for weight in (torch.zeros(3, 8), torch.full((3, 8), -0.5), weights(0, 3, 8) * 1e-9):
        decoded = Power.nearest(weight, 8, 0).decode()
        assert torch.allclose(decoded, weight, rtol=1e-3, atol=float(weight.abs().max()) / 100)
    mixed = torch.cat([torch.zeros(1, 8), weights(0, 1, 8)])
    assert (Power.nearest(mixed, 3, 0).decode()[0] == 0).all()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_form(Power.nearest(weights(0, 8, 16).to(dtype), 4, 0), weights(0, 8, 16).to(dtype))


def test_a_group_that_does_not_divide_and_files_that_lie():
    with pytest.raises(DoesNotFit, match="^fc: rows of 8"):
        Power.nearest(weights(0, 2, 8), 4, 3, None, "fc")
    form = Power.nearest(weights(0, 2, 8), 4)
    for wrong in (
        {"exponent": torch.tensor(-1.0)},
        {"exponent": torch.tensor(torch.nan)},
        {"exponent": torch.ones(2)},
        {"scale": torch.ones(2, 1)},
        {"bits_per_code": 3},
        {"shape": (2, 9)},
        {"dtype": "int8"},
    ):
        with pytest.raises(ValueError):
            dataclasses.replace(form, **wrong)


# Inputs --------------------------------------------------------------------------------------------------


def test_inputs_by_hand():
    rounding = PowerRounding.of(0.0, 9.0, 0.5, 2)  # codes 0 .. 3, levels n^2
    x = torch.tensor([-1.0, 0.2, 0.3, 2.2, 2.3, 6.2, 6.3, 50.0])
    assert rounding.integers(x).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.allclose(rounding.module()(x), torch.tensor([0, 0, 1, 1, 4, 4, 9, 9.0]))
    signed = PowerRounding.of(-4.0, 9.0, 0.5, 3)  # codes -3 .. 3
    assert signed.integers(-x).tolist() == [1, 0, -1, -1, -2, -2, -3, -3]
    assert torch.allclose(signed.module()(-x), -torch.tensor([-1, 0, 1, 1, 4, 4, 9, 9.0]))
    assert (rounding.q, rounding.signed, signed.q, signed.signed) == (3, False, 3, True)


@given(exponent=EXPONENTS, bits=st.integers(2, 8), signed=st.booleans(), seed=SEEDS)
def test_rounded_inputs_are_the_levels_of_their_codes(exponent, bits, signed, seed):
    rounding = PowerRounding.of(-2.0 if signed else 0.0, 2.0, exponent, bits)
    x = 2 * weights(seed, 40)
    codes = rounding.integers(x)
    assert codes.min() >= (-rounding.q if signed else 0) and codes.max() <= rounding.q
    values = from_codes(codes[None], rounding.scale[None], float(rounding.exponent), rounding.q)[0]
    y = rounding.module()(x)
    assert torch.allclose(y, values, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounding.integers(y), codes) and torch.equal(rounding.module()(y), y)
    assert rounding.module()(torch.zeros(1)) == 0
    if signed:  # the grid of weights
        own = to_codes(x[None], rounding.scale[None], float(rounding.exponent), rounding.q)[0]
        assert ((own - codes).abs() <= 1).all() and (own == codes).float().mean() > 0.9


def test_exponent_one_is_static_rounding():
    x = weights(3, 200)
    even, power = StaticRounding.of(0.0, 2.0, 4).module(), PowerRounding.of(0.0, 2.0, 1.0, 4).module()
    assert torch.equal(power(x), even(x))


def test_gradients_pass_inside_and_stop_outside():
    for low, wanted in ((-1.0, [0.0, 1.0, 1.0, 1.0, 0.0]), (0.0, [0.0, 0.0, 1.0, 1.0, 0.0])):
        x = torch.tensor([-2.0, -0.3, 0.1, 0.9, 5.0], requires_grad=True)
        PowerRounding.of(low, 1.0, 0.6, 3).module()(x).sum().backward()
        assert x.grad.tolist() == wanted
    x = torch.zeros(1, requires_grad=True)  # an infinite slope of |x|^a at 0 would show here
    PowerRounding.of(-1.0, 1.0, 0.6, 3).module()(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("method", ["ibp", "crown"])
@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_proven_bounds_are_the_rounded_ends(method, low):
    module = PowerRounding.of(low, 2.0, 0.6, 4).module()
    x = torch.linspace(-2.5, 2.5, 41)[:, None]
    proven = bounds(module, x, Linf(0.3), method=method)
    assert (proven.lower <= module(x - 0.3)).all() and (proven.upper >= module(x + 0.3)).all()
    assert torch.allclose(proven.lower.float(), module(x - 0.3), atol=1e-3)
    assert torch.allclose(proven.upper.float(), module(x + 0.3), atol=1e-3)


def test_input_rounding_is_stored_and_refuses_nonsense():
    rounding = PowerRounding.of(0.0, 3.0, 0.7, 4)
    again = put_together(*take_apart(rounding))
    assert torch.equal(again.module()(weights(0, 9)), rounding.module()(weights(0, 9)))
    assert isinstance(rounding.module(), nn.Module) and rounding.module().state_dict() == {}
    assert PowerRounding.of(0.0, 0.0, 0.5).scale == 1  # inputs that are all zero
    for wrong in ({"bits": 1}, {"bits": 9}, {"scale": torch.tensor(0.0)}, {"exponent": torch.tensor(0.0)}):
        with pytest.raises(ValueError):
            dataclasses.replace(rounding, **wrong)
