"""N:M pruning against a hand example, its definition, the laws of its room, and nonsense."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.compression.prune.nm_magnitude import NMMagnitude, encode, nm_magnitude
from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def by_definition(weight: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    pruned = torch.zeros_like(weight)
    for out, *kernel in itertools.product(*map(range, (len(weight), *weight.shape[2:]))):
        row, target = weight[out, :, *kernel], pruned[out, :, *kernel]
        for start in range(0, len(row), of):
            ranked = sorted((-abs(row[j].item()), j) for j in range(start, start + of))
            for _, j in ranked[:keep]:
                target[j] = row[j]
    return pruned


def test_default_by_hand():
    weight = torch.tensor([[0.1, -3.0, 0.2, 0.5, 1.0, 1.0, 1.0, 1.0]])  # the second group is all ties
    code = encode(weight.half(), NMMagnitude().keep, NMMagnitude().of)
    assert code.decode().tolist() == [[0.0, -3.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0]]
    assert code.bits() == 2 * 36


@given(pair=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5), (40, 256)]), seed=st.integers(0, 2**16))
def test_code_is_the_definition_with_ascending_places(pair, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 2 * pair[1], 2, generator=g).round(decimals=1)  # rounding makes ties
    code = encode(weight, *pair)
    assert torch.equal(code.decode(), by_definition(weight, *pair))
    assert (code.places.int().diff(dim=1) > 0).all()


@pytest.mark.parametrize("settings", [NMMagnitude(), NMMagnitude(keep=1, of=4)], ids=repr)
def test_layers_follow_the_definition_and_the_laws(settings):
    check_compressor(nm_magnitude, settings)
    check_compressor(nm_magnitude, settings, model=tiny_language_model(), task=tiny_text_task())
    model = tiny_model()
    for layer, code in nm_magnitude(model, tiny_task(), weighted(model), settings).packed.items():
        assert torch.equal(code.decode(), by_definition(weight_of(model, layer), settings.keep, settings.of))


def test_refuses_what_does_not_fit_and_nonsense():
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 3), torch.nn.ConvTranspose1d(4, 4, 1), torch.nn.Linear(4, 4)
    )
    with pytest.raises(DoesNotFit, match="0: 6 inputs are not a multiple of 4"):
        nm_magnitude(model, tiny_task(), ["0"], NMMagnitude())
    with pytest.raises(DoesNotFit, match="^1: .*ConvTranspose1d"):
        nm_magnitude(model, tiny_task(), ["1"], NMMagnitude())
    model[2].weight.data[0, 0] = torch.nan
    assert "NaN" in nm_magnitude(model, tiny_task(), ["2"], NMMagnitude()).left["2"]
    assert encode(torch.arange(256.0)[None], 1, NMMagnitude(keep=1, of=256).of).places.tolist() == [[255]]
    for keep, of in [(0, 4), (4, 4), (5, 4), (2, 257)]:
        with pytest.raises(ValueError, match=f"keep={keep}, of={of}"):
            NMMagnitude(keep=keep, of=of)
