"""Double rounding: one set of codes at every width, gradients in closed form, the stored form's laws."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput
from netweight.core.stored import put_together, take_apart
from netweight.nn.double_rounding import (
    DoubleRounded,
    WidthRounding,
    check_widths,
    double_rounded,
    shifted,
    size_of,
)
from netweight.nn.fake import fake_round
from netweight.nn.quantizer import Levels, rounded
from netweight.nn.switch_norm import SwitchNorm, SwitchNorms
from netweight.testing import check_form

PAIRS = [(high, bits) for high in (8, 7, 4, 2) for bits in range(2, high + 1)]


def weights(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*shape or (6, 4, 3, 3), generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize(("high", "bits"), PAIRS)
def test_the_second_rounding_is_the_nearest_and_halves_go_up(high, bits):
    top, by = 1 << (high - 1), high - bits
    codes = torch.arange(-top, top)
    wanted = [min((2 * code + (1 << by)) // (2 << by), (1 << (bits - 1)) - 1) for code in codes.tolist()]
    assert shifted(codes.to(torch.int8), by, bits).tolist() == wanted
    assert shifted(codes.float(), by, bits).tolist() == wanted  # while it is trained: the same
    assert shifted(codes, by, bits, floor=True).tolist() == [code >> by for code in codes.tolist()]
    if bits == high:
        assert wanted == codes.tolist()


@given(seed=st.integers(0, 2**16), pair=st.sampled_from(PAIRS), step=st.floats(2**-14, 0.5))
def test_the_stored_codes_give_what_was_trained_bit_for_bit(seed, pair, step):
    high, bits = pair
    weight, widths = weights(seed), tuple(dict.fromkeys(pair))
    size = size_of(torch.tensor(step))
    form = DoubleRounded.of(weight, size, widths, bits)
    trained = double_rounded(weight, size, high, bits)
    assert torch.equal(form.decode(), trained)
    levels = Levels.signed(high)
    inside = (weight / size >= levels.low) & (weight / size <= levels.high)
    inside &= weight / (size * 2 ** (high - bits)) <= 2 ** (bits - 1) - 1
    error = (trained - weight)[inside].abs()
    assert (error <= size * (1 + 2 ** (high - bits)) / 2 * (1 + 1e-5)).all()
    if bits == high:
        assert torch.equal(trained, rounded(weight, size, levels))  # plain quantization
    every = torch.arange(levels.low, levels.high + 1) * size  # the levels at any width are among these
    assert torch.isin(trained, every).all()


@pytest.mark.parametrize("bits", [8, 5, 2])
def test_gradients_in_closed_form(bits):
    weight, step = weights(1).requires_grad_(), torch.tensor(0.004).requires_grad_()
    g = weights(2)
    double_rounded(weight, step, 8, bits, factor=0.5).backward(g)
    size = 0.004 * 2 ** (8 - bits)
    u, levels = weight.detach() / size, Levels.signed(bits)
    inside = (u >= levels.low) & (u <= levels.high)
    assert inside.any() and (~inside).any()
    low = shifted((weight.detach() / 0.004).round().clamp(-128, 127), 8 - bits, bits)
    by_step = torch.where(inside, low - u, u.clamp(levels.low, levels.high))
    assert torch.equal(weight.grad, g * inside)
    assert torch.allclose(step.grad, 0.5 * 2 ** (8 - bits) * (g * by_step).sum(), rtol=1e-4)


def test_away_from_the_roundings_it_is_the_derivative_in_the_step():
    weight, g = weights(3).double(), weights(4).double()
    step = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    (double_rounded(weight, step, 8, 3) * g).sum().backward()
    low = double_rounded(weight, step.detach(), 8, 3) / (step.detach() * 32)
    inside = (weight / 0.32 >= -4) & (weight / 0.32 <= 3)
    by_hand = torch.where(inside, low * 32 - weight / 0.01, low * 32)  # d/ds of code s 2^D, W fixed inside
    assert torch.allclose(step.grad, (g * by_hand).sum())


def test_a_step_below_zero_counts_by_its_size():
    step = torch.tensor(-0.25, requires_grad=True)
    size = size_of(step)
    size.backward()
    assert (float(size.detach()), float(step.grad)) == (0.25, -1.0)
    assert float(size_of(torch.tensor(0.0))) > 0
    assert float(size_of(torch.tensor(0.1))) == float(torch.tensor(0.1).half())


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("floor", [False, True])
def test_the_form_keeps_the_laws(bits, floor):
    weight = weights(5)
    form = DoubleRounded.of(weight, torch.tensor(0.005), (8, 6, 4, 2), bits, floor)
    check_form(form, weight)
    assert form.bits() == 8 * weight.numel() + 16  # one byte a weight at every width, one float16 step
    assert len(form.decode().unique()) <= 2**bits
    smaller = DoubleRounded.of(weight, torch.tensor(0.05), (4, 3, 2), 2, floor)
    check_form(smaller, weight)
    assert smaller.bits() == 4 * weight.numel() + 16


def test_a_form_that_does_not_fit_is_refused():
    form = DoubleRounded.of(weights(6), torch.tensor(0.01), (8, 4), 8)
    tensors, plain = take_apart(form)
    for changed in ({"width": 6}, {"widths": [4, 8]}, {"widths": [8, 1]}, {"shape": [6, 4]}, {"dtype": "no"}):
        with pytest.raises(BadInput):
            put_together(tensors, {**plain, **changed})
    with pytest.raises(BadInput):
        put_together({**tensors, "codes": tensors["codes"][:-1]}, plain)
    for widths, width in (((), 8), ((8, 8), 8), ((9, 8), 8), ((8, 4), 2)):
        with pytest.raises(ValueError, match="widths go from 8 down to 2"):
            check_widths(widths, width)


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_have_a_step_for_each_width(signed):
    rounding = WidthRounding(torch.tensor([0.01, 0.1, 0.5]), (8, 4, 2), 4, signed)
    x = weights(7) * 10
    levels = Levels.signed(4) if signed else Levels.unsigned(4)
    assert torch.equal(rounding.module()(x), rounded(x, torch.tensor(0.1), levels))
    two = dataclasses.replace(rounding, width=2)
    assert two.bits == 2
    zero = torch.tensor(2.0 if signed else 0.0)
    assert torch.equal(two.module()(x), fake_round(x, torch.tensor(0.5), zero, 2))
    with pytest.raises(ValueError, match="not one for each"):
        WidthRounding(torch.ones(2), (8, 4, 2), 8)


def test_a_switch_norm_is_the_norm_in_use():
    norm = nn.BatchNorm2d(4)
    switch, x = SwitchNorm(norm, ("8", "2")), weights(8, 5, 4, 3, 3) + 1
    before = norm.eval()(x)
    assert torch.equal(switch.eval()(x), before)
    switch.train().use("2")
    switch(x)  # its own statistics move, nobody else's
    assert torch.equal(switch.norms["8"].running_mean, torch.zeros(4))
    assert not torch.equal(switch.norms["2"].running_mean, torch.zeros(4))
    assert not torch.equal(switch.eval()(x), before)
    switch.use("8")
    assert torch.equal(switch(x), before)
    with pytest.raises(BadInput, match="unknown set of a batch norm '4'"):
        switch.use("4")
    with pytest.raises(ValueError, match="LayerNorm has no batch statistics"):
        SwitchNorm(nn.LayerNorm(3), ("8",))


def test_norms_follow_the_widths_of_the_layers_before_them():
    fed = {"n1": ("a", ""), "n2": ("b", "a")}
    norms, pairs = SwitchNorms.of(fed, (8, 2), 8), SwitchNorms.of(fed, (8, 2), 8, pairs=True)
    assert (norms.keys, norms.now) == (("8", "2"), ("8", "8"))
    assert norms.at({"a": 8, "b": 2}).now == ("8", "2")
    assert pairs.keys == ("8_8", "8_2", "2_8", "2_2")
    assert pairs.at({"a": 8, "b": 2}).now == ("8_8", "8_2")
    model = nn.ModuleDict({"n1": nn.BatchNorm1d(3), "n2": nn.BatchNorm1d(3)})
    x = weights(9, 4, 3)
    before = model["n2"].eval()(x)
    norms.apply(model)
    assert torch.equal(model["n2"].eval()(x), before)  # an exact change of form
    norms.at({"a": 2, "b": 2}).apply(model)  # again: only the keys change
    assert (model["n1"].now, type(model["n1"].norms["8"])) == ("2", nn.BatchNorm1d)
    with pytest.raises(ValueError, match="a set that it does not have"):
        dataclasses.replace(norms, now=("8", "4"))
    with pytest.raises(ValueError, match="not as many"):
        dataclasses.replace(norms, now=("8",))
