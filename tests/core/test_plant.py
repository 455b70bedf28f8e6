"""Plants leave the function as it is, and make it as hard as they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.plant import Mixing, imbalance, mixing, outliers
from netweight.core.rewrite import residual, rewritten
from netweight.core.sites import Site, sites
from netweight.testing import tiny_model, tiny_task

MODEL, DATA = tiny_model(), tiny_task().calibration


@pytest.fixture(scope="module")
def places() -> list[Site]:
    return sites(MODEL, DATA)


@given(seed=st.integers(0, 2**16), factor=st.sampled_from([3.0, 16.0, 0.1]))
def test_the_function_stays(places, seed, factor):
    plants = outliers(MODEL, places, factor=factor, share=0.2, seed=seed)
    plants += imbalance(MODEL, places, spread=1.5, seed=seed)
    assert residual(MODEL, plants, DATA.x[:4]) <= 1e-9


def test_outliers_are_as_many_and_as_large_as_asked(places):
    (plant,) = outliers(MODEL, places[:1], factor=16, share=0.25)
    norm = places[0].producer
    ratio = weight_of(rewritten(MODEL, [plant]), norm) / weight_of(MODEL, norm)
    assert sorted(ratio.tolist()) == pytest.approx([1.0] * 12 + [16.0] * 4)
    scales = [outliers(MODEL, places[:1], seed=seed)[0].scale for seed in (1, 2)]
    assert not torch.equal(*scales)


def test_imbalance_has_the_spread():
    model = nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Linear(4000, 2))
    (plant,) = imbalance(model, [Site("0", ("2",))], spread=1.5)
    assert plant.scale.log().std().item() == pytest.approx(1.5, rel=0.05)


class Heads(nn.Module):
    """Attention with fixed weights: tokens mix, heads do not."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.output = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.value(x).unflatten(-1, (2, 4)).transpose(1, 2)
        mix = torch.softmax(torch.arange(9.0, dtype=x.dtype).reshape(3, 3).sin(), -1)
        return self.output((mix @ heads).transpose(1, 2).flatten(2))


def test_mixing_leaves_attention_as_it_is_and_has_the_condition():
    model = Heads()
    plant = mixing("value", "output", heads=2, width=4, condition=30, seed=3)
    assert torch.linalg.cond(plant.matrix).tolist() == pytest.approx([30, 30])
    assert residual(model, [plant], torch.randn(2, 3, 8)) <= 1e-9
    assert not torch.equal(weight_of(rewritten(model, [plant]), "value"), weight_of(model, "value"))


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="share=0"):
        outliers(tiny_model(), [], share=0)
    with pytest.raises(DoesNotFit, match="value: 8 rows are not the 3 x 4"):
        Mixing("value", "output", torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)).apply(Heads())
