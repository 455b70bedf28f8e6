"""Masks by definition, and rules by their own equations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core import pruning
from netweight.core.errors import DoesNotFit
from netweight.core.pruning import lamp_scores, largest, surviving

RULES = ("uniform", "uniform_plus", "erk", "global_magnitude", "lamp")


def weights(seed=0, scales=(1.0, 3.0, 0.2)):
    g = torch.Generator().manual_seed(seed)
    shapes = [(4, 2, 3, 3), (16, 20), (5, 16)]
    return {f"{i}": torch.randn(s, generator=g) * k for i, (s, k) in enumerate(zip(shapes, scales))}


@given(count=st.integers(0, 60), seed=st.integers(0, 2**16))
def test_a_mask_keeps_exactly_the_largest_and_the_first_of_equals(count, seed):
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # makes ties
    values = weight.flatten().tolist()
    ranked = sorted(range(60), key=lambda i: (-abs(values[i]), i))
    assert largest(weight, count).flatten().nonzero().flatten().tolist() == sorted(ranked[:count])


def test_surviving_is_not_shifted_by_rounding():
    assert [surviving(100, s) for s in (0.9, 0.29, 0.0)] == [10, 71, 100]
    assert surviving(7, 0.5) == 3


@given(rule=st.sampled_from(RULES), share=st.integers(0, 80), seed=st.integers(0, 2**16))
def test_no_rule_keeps_too_many_or_more_than_a_layer_has(rule, share, seed):
    found = weights(seed)
    counts = getattr(pruning, rule)(found, share / 100)
    total = sum(w.numel() for w in found.values())
    assert list(counts) == list(found)
    assert all(0 <= counts[layer] <= w.numel() for layer, w in found.items())
    assert surviving(total, share / 100) - len(found) < sum(counts.values()) <= surviving(total, share / 100)


def test_rules_by_their_equations():
    found = weights()
    sizes = {layer: w.numel() for layer, w in found.items()}  # 72, 320, 80: 472
    assert pruning.uniform(found, 0.75) == {"0": 18, "1": 80, "2": 20}
    plus = pruning.uniform_plus(found, 0.75)  # 118 in all: 72 whole, then 46 / 400 of the rest, at least 16
    assert plus == {"0": 72, "1": 30, "2": 16}
    dense = pruning.erk(found, 0.75)
    raw = {layer: sum(w.shape) / w.numel() for layer, w in found.items()}
    free = [dense[layer] / sizes[layer] / raw[layer] for layer in found if dense[layer] < sizes[layer]]
    assert max(free) / min(free) == pytest.approx(1, rel=0.05)
    everything = torch.cat([w.flatten().abs() for w in found.values()])
    mark = everything.sort(descending=True).values[117]
    assert pruning.global_magnitude(found, 0.75) == {
        layer: int((w.abs() >= mark).sum()) for layer, w in found.items()
    }


def test_erk_keeps_small_layers_whole():
    found = {"small": torch.randn(4, 4), "large": torch.randn(100, 100)}
    counts = pruning.erk(found, 0.5)
    assert counts["small"] == 16 and sum(counts.values()) == surviving(10016, 0.5)


def test_lamp_by_hand_and_blind_to_the_scale_of_a_layer():
    assert lamp_scores(torch.tensor([1.0, -2.0, 0.0])).tolist() == [1.0, 0.2, 0.0]
    assert lamp_scores(torch.zeros(2)).tolist() == [0.0, 0.0]
    assert pruning.lamp(weights(), 0.7) == pruning.lamp(weights(scales=(100.0, 3.0, 0.2)), 0.7)
    assert pruning.global_magnitude(weights(), 0.7) != pruning.global_magnitude(
        weights(scales=(100.0, 3.0, 0.2)), 0.7
    )
    assert all(count >= 1 for count in pruning.lamp(weights(), 0.97).values())  # a score of 1 in each layer


def test_uniform_plus_says_where_it_cannot():
    with pytest.raises(DoesNotFit, match="0, 2: uniform\\+ keeps 88 weights there, more than the 47"):
        pruning.uniform_plus(weights(), 0.9)
    assert sum(pruning.uniform_plus({"0": torch.randn(4, 4)}, 0.75).values()) == 4
