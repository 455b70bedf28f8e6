"""Magnitude pruning against a hand example, its definition, the laws of its room, and nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.compression.prune.magnitude import Magnitude, largest, magnitude
from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def test_default_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model[0].weight.data = torch.tensor([[1.0, -3.0, 1.0], [0.5, -1.0, 2.0]])
    form = magnitude(model, tiny_task(), ["0"], Magnitude()).packed["0"]
    assert form.decode().tolist() == [[1.0, -3.0, 0.0], [0.0, 0.0, 2.0]]  # of the three ones the first stays
    assert form.bits() == 3 * 32 + 8


@given(
    share=st.integers(0, 99),
    shape=st.sampled_from([(100,), (5, 4), (2, 3, 3, 3)]),
    seed=st.integers(0, 2**16),
)
def test_mask_is_the_definition(share, shape, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # makes ties
    kept = largest(weight, share / 100)
    count = weight.numel() - round(share * weight.numel() / 100)
    values = weight.flatten().tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert kept.shape == weight.shape
    assert kept.flatten().nonzero().flatten().tolist() == sorted(ranked[:count])


@pytest.mark.parametrize("settings", [Magnitude(), Magnitude(0.9), Magnitude(0.29)], ids=repr)
def test_laws_and_exact_counts(settings):
    check_compressor(magnitude, settings)
    check_compressor(
        magnitude, settings, model=tiny_language_model(), task=tiny_text_task(), layers=["embedding", "up"]
    )
    model = tiny_model()
    for layer, form in magnitude(model, tiny_task(), weighted(model), settings).packed.items():
        weight = weight_of(model, layer)
        assert int((form.decode() == 0).sum()) == round(settings.sparsity * weight.numel())
        assert torch.equal(form.decode(), weight * largest(weight, settings.sparsity))


def test_left_and_nonsense():
    model = tiny_model()
    model[9].weight.data[0, 0] = torch.nan
    assert "NaN" in magnitude(model, tiny_task(), ["9"], Magnitude()).left["9"]
    with pytest.raises(DoesNotFit, match="^1: .*BatchNorm2d"):
        magnitude(tiny_model(), tiny_task(), ["1"], Magnitude())
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"sparsity={sparsity}"):
            Magnitude(sparsity)
