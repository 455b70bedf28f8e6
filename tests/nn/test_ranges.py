"""Ranges of inputs against their definitions, the KL divergence bin by bin, and nonsense."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.task import Data
from netweight.nn.fake import StaticRounding
from netweight.nn.ranges import BINS, HOW, divergences, input_ranges, kl_shares, moving

LAYER = ["0"]


def net(inputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 2)).eval()


def by_definition(h: torch.Tensor, i: int, levels: int) -> float:
    P, tail, Q = h[:i].clone(), h[i:].sum(), torch.zeros(i, dtype=torch.float64)
    P[-1] += tail
    levels = min(levels, i)
    for k in range(levels):
        a, b = k * i // levels, (k + 1) * i // levels
        filled = P[a:b] > 0
        if filled.any():
            Q[a:b] = torch.where(filled, h[a:b].sum() / filled.sum(), 0.0)
    if Q.sum() == 0:
        return math.inf
    P, Q = P / P.sum(), Q / Q.sum()
    on = P > 0
    return math.inf if (Q[on] == 0).any() else float((P[on] * (P[on] / Q[on]).log()).sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), levels=st.sampled_from([2, 8, 128, 200, 400]), gaps=st.floats(0, 0.95))
def test_divergences_are_their_definition(seed, levels, gaps):
    g = torch.Generator().manual_seed(seed)
    h = torch.randint(1, 9, (2, 300), generator=g).double() * (torch.rand(2, 300, generator=g) > gaps)
    h[:, -1] = 1
    tried, found = divergences(h, levels)
    assert tried[0] == 128 and tried[-1] == 300
    for row in range(2):
        for place in (0, 1, 60, len(tried) - 1):
            expected = by_definition(h[row], int(tried[place]), levels)
            assert float(found[row, place]) == pytest.approx(expected, abs=1e-9)


@given(levels=st.sampled_from([2, 8, 64, 128]), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_a_histogram_that_the_levels_hold_exactly_has_no_divergence_and_is_not_clipped(levels, seed):
    steps = torch.randint(1, 50, (levels,), generator=torch.Generator().manual_seed(seed)).double()
    h = steps.repeat_interleave(BINS // levels)[None]
    tried, found = divergences(h, levels)
    assert float(found[0, -1]) == pytest.approx(0, abs=1e-9)
    assert float(kl_shares(h, levels)) == 1.0
    assert float(kl_shares(torch.zeros(1, BINS), levels)) == 1.0  # nothing was seen


def test_kl_clips_a_thin_tail_and_keeps_a_thick_one():
    thin = torch.zeros(1, BINS)
    thin[0, :512], thin[0, -1] = torch.linspace(1000, 1, 512), 1.0
    assert 0.2 < float(kl_shares(thin, 16)) < 0.3
    thick = torch.full((1, BINS), 10.0)
    assert float(kl_shares(thick, 128)) == 1.0


def test_ranges_by_hand():
    x = torch.tensor([[-1.0, 0, 0, 2.0], [0, 0, 0, 4.0], [-3.0, 0, 1.0, 1.0], [0, 0, 0, 0]])
    data = Data(x, batch=1)
    assert input_ranges(net(), data, LAYER)["0"] == (-3.0, 4.0)
    found = input_ranges(net(), data, LAYER, "moving average")["0"]
    low, high = -1.0, 2.0
    for lo, hi in ((0, 4), (-3, 1), (0, 0)):
        low, high = 0.9 * low + 0.1 * lo, 0.9 * high + 0.1 * hi
    assert found == pytest.approx((low, high))
    # six values are not 0: |x| = 1 1 1 2 3 4, and half of them are at most 1
    found = input_ranges(net(), data, LAYER, "percentile", share=0.5)["0"]
    assert found == pytest.approx((-1.0, 1.0), abs=4 / BINS + 1e-6)
    assert input_ranges(net(), data, LAYER, "percentile", share=1.0)["0"] == (-3.0, 4.0)


def test_zeros_after_a_relu_do_not_count():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(50, 4, generator=g) + 0.1
    alone = Data(x, batch=20)
    among = Data(torch.cat([x, torch.zeros(500, 4)]), batch=20)
    for how in ("percentile", "mse", "kl"):
        one, other = (input_ranges(net(), data, LAYER, how, bits=4, share=0.8) for data in (alone, among))
        assert one["0"] == pytest.approx(other["0"])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), norm=st.sampled_from([1.0, 2.0, 2.4]))
def test_the_range_of_least_error_is_no_worse_than_min_max(seed, bits, norm):
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed)) ** 3
    data = Data(x, batch=77)

    def error(how: str) -> float:
        ends = input_ranges(net(), data, LAYER, how, bits=bits, norm=norm)["0"]
        return float((StaticRounding.of(*ends, bits).module()(x) - x).abs().double().pow(norm).sum())

    assert error("mse") <= error("min-max") * 1.02  # values are counted as the middles of their bins


@pytest.mark.parametrize("how", HOW)
def test_every_range_holds_zero_scales_with_the_inputs_and_lies_within_min_max(how):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)) + 3
    one = input_ranges(net(), Data(x, batch=16), LAYER, how, bits=4)["0"]
    eight = input_ranges(net(), Data(8 * x, batch=16), LAYER, how, bits=4)["0"]
    assert one[0] <= 0 <= one[1] and eight == pytest.approx((8 * one[0], 8 * one[1]))
    assert min(0.0, float(x.min())) <= one[0] and one[1] <= float(x.max()) + 1e-6
    dead = input_ranges(net(), Data(torch.zeros(5, 4)), LAYER, how)["0"]
    assert dead == (0.0, 0.0)
    assert torch.equal(StaticRounding.of(*dead, 8).module()(torch.zeros(3)), torch.zeros(3))


def test_the_model_is_left_as_it_was_and_nonsense_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1)).train()
    input_ranges(model, Data(torch.ones(3, 4)), ["2"], "kl")
    assert model.training and not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="range='entropy'"):
        input_ranges(net(), Data(torch.ones(3, 4)), LAYER, "entropy")
    broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(DoesNotFit, match="^1: its inputs hold NaN"):
        input_ranges(broken, Data(torch.ones(3, 4)), ["1"])
    model.add_module("aside", nn.Linear(2, 2))
    model.forward = lambda x: model[2](x)  # type: ignore[method-assign]
    with pytest.raises(DoesNotFit, match="^aside: the layer is never called"):
        input_ranges(model, Data(torch.ones(3, 4)), ["aside"])


def test_moving_average_of_one_value_is_it():
    assert moving([3.0]) == 3.0
