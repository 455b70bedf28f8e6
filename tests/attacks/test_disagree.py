"""Disagreements of two linear networks, whose regions are known, and of a network with itself."""

import copy

import pytest
import torch
from torch import nn

from netweight.attacks.disagree import disagree
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import L2, Box, Linf


class Threshold(nn.Module):
    """Class 1 where the sum of the inputs is above `at`."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (0, sum - at)."""
        score = x.flatten(1).sum(1) - self.at
        return torch.stack([torch.zeros_like(score), score], 1)


def test_they_part_exactly_between_their_thresholds():
    """The compressed one leaves class 0 above 0.3, the original above 0.5: parted near (0.3, 0.5]."""
    x, within = torch.linspace(-1, 1, 201)[:, None], Linf(0.1)
    original, compressed = Threshold(0.5), Threshold(0.3)
    found = disagree(original, compressed, x, within)
    assert within.contains(found.points, x).all()
    below, above = (x[:, 0] > 0.201) & (x[:, 0] <= 0.5), x[:, 0] > 0.501
    assert found.hit[below].all() and not found.hit[above].any() and not found.hit[x[:, 0] < 0.199].any()
    clean = (x[:, 0] > 0.301) & (x[:, 0] < 0.499)
    assert torch.equal(found.points[clean], x[clean])  # they part there already
    kept, left = original(found.points).argmax(1), compressed(found.points).argmax(1)
    assert torch.equal(found.hit, (kept == original(x).argmax(1)) & (left != kept))


def test_the_original_has_to_keep_its_class():
    """Above 0.5 the compressed network changes below 0.3, where the original has changed long before."""
    x = torch.tensor([[0.6]])
    assert not disagree(Threshold(0.5), Threshold(0.3), x, Linf(1.0)).hit.any()
    assert disagree(Threshold(0.3), Threshold(0.5), x, Linf(0.2)).hit.all()


@pytest.mark.parametrize("within", [Linf(0.3), L2(0.5), Box(-1.0, 1.0)], ids=str)
def test_a_narrow_gap_is_found_and_a_network_agrees_with_itself(within):
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g)
    x = torch.randn(60, 4, generator=g).clamp(-1, 1)
    near = copy.deepcopy(model)
    near[2].bias.data += torch.tensor([0.02, -0.02, 0.0])
    found = disagree(model, near, x, within)
    parted = int((model(x).argmax(1) != near(x).argmax(1)).sum())
    assert found.hit.sum() >= parted + 10
    assert within.contains(found.points, x).all()
    assert not disagree(model, model, x, within).hit.any()


def test_seed_modes_and_the_global_state():
    model, other = nn.Sequential(nn.Dropout(0.9), Threshold(0.5)).train(), Threshold(0.3)
    other.eval()
    x, before = torch.zeros(20, 3), torch.get_rng_state()
    runs = [disagree(model, other, x, L2(0.1), steps=2, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].points, runs[1].points) and not torch.equal(runs[0].points, runs[2].points)
    assert model.training and not other.training and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(disagree(model, other, x, L2(0.1), restarts=0).points, x)


def test_refuses_tokens_and_networks_of_different_tasks():
    with pytest.raises(DoesNotFit, match="whole numbers; attack embeddings"):
        disagree(nn.Identity(), nn.Identity(), torch.zeros(2, 3, dtype=torch.long), Linf(0.1))
    with pytest.raises(DoesNotFit, match=r"they give \(2, 4\) and \(2, 5\)"):
        disagree(nn.Linear(3, 4), nn.Linear(3, 5), torch.zeros(2, 3), Linf(0.1))
    with pytest.raises(DoesNotFit, match="class scores"):
        disagree(nn.Linear(3, 1), nn.Linear(3, 1), torch.zeros(2, 3), Linf(0.1))
