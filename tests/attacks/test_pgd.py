"""PGD against linear networks, whose worst points are known, and against the law that points stay inside."""

import pytest
import torch
from torch import nn

from netweight.attacks.pgd import pgd
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import L1, L2, BitFlips, Linf
from netweight.core.victim import margin


def linear(seed: int = 0, classes: int = 3, inputs: int = 6) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
    model[1].weight.data, model[1].bias.data = torch.randn(classes, inputs, generator=g), torch.zeros(classes)
    return model


def inputs(count: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 2, 3, generator=torch.Generator().manual_seed(seed))


def worst_margin(model: nn.Module, x: torch.Tensor, y: torch.Tensor, within) -> torch.Tensor:
    """max over the set and over j != y of z_j - z_y, exact for a linear network."""
    weight = model[1].weight.detach()
    slopes = (weight[None] - weight[y][:, None]).reshape(len(x), len(weight), *x.shape[1:])
    return within.support(slopes, x).scatter(1, y[:, None], -torch.inf).amax(1)


@pytest.mark.parametrize("within", [Linf(0.2), Linf(0.25, 0.0, 1.0), L2(0.4), L1(0.6)], ids=repr)
def test_a_linear_network_is_broken_exactly_where_it_can_be(within):
    model, x = linear(seed=3, classes=2), inputs()
    y = model(x).argmax(1)
    y[:5] = 1 - y[:5]
    worst = worst_margin(model, x, y, within)
    found = pgd(model, x, y, within)
    assert within.contains(found.points, x).all()
    assert torch.equal(found.hit, model(found.points).argmax(1) != y)
    clear = worst.abs() > 0.02
    assert (
        torch.equal(found.hit[clear], (worst > 0)[clear]) and clear.sum() > 30 and 10 <= found.hit.sum() <= 30
    )
    assert found.hit[:5].all() and torch.equal(found.points[:5], x[:5])  # wrong before anything moved
    held = ~found.hit
    reached = margin(model(found.points), y)[held]
    assert (reached <= worst[held] + 1e-5).all() and (worst[held] - reached).max() < 0.02


def test_more_classes_never_break_what_cannot_be_broken():
    model, x, within = linear(), inputs(), L2(0.4)
    y = model(x).argmax(1)
    found, possible = pgd(model, x, y, within), worst_margin(model, x, y, within) > 0
    assert not (found.hit & ~possible).any() and found.hit.sum() >= 0.7 * possible.sum() > 4


def test_margin_by_hand():
    scores = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, 0.0]])
    assert margin(scores, torch.tensor([1, 2, 0])).tolist() == [-2.0, 2.0, 0.0]


def test_without_labels_its_own_prediction_is_attacked():
    model, x = linear(), inputs()
    found, same = pgd(model, x, None, Linf(0.1)), pgd(model, x, model(x).argmax(1), Linf(0.1))
    assert torch.equal(found.hit, same.hit) and torch.equal(found.points, same.points)
    assert not pgd(model, x, None, Linf(0.0)).hit.any()


def test_seed_modes_gradients_and_the_global_state():
    model, x = nn.Sequential(nn.Dropout(0.9), *linear()), inputs()
    model.train()
    y, before = linear()(x).argmax(1), torch.get_rng_state()
    first, second = (pgd(model, x, y, L2(0.05), steps=0, seed=0) for _ in range(2))
    assert torch.equal(first.points, second.points) and torch.equal(first.hit, second.hit)
    assert not torch.equal(first.points, pgd(model, x, y, L2(0.05), steps=0, seed=1).points)
    assert model.training and model[0].training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters()) and not first.points.requires_grad


class Folded(nn.Module):
    """Wrong only in a narrow valley at one end of the set; the slope elsewhere leads away from it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class 1 where x < -0.9."""
        x = x.flatten(1).sum(1)
        return torch.stack([torch.where(x < -0.9, -1.0, 1.0 + 0 * x), -0.1 * x.abs()], 1)


def test_restarts_and_steps_are_used():
    x, y, within = torch.zeros(200, 1), torch.zeros(200, dtype=torch.long), Linf(1.0)
    shares = [pgd(Folded(), x, y, within, steps=1, restarts=n).hit.float().mean().item() for n in (0, 1, 30)]
    assert shares[0] == 0 < shares[1] < 0.5 < shares[2]
    model, x = linear(), inputs()
    y = model(x).argmax(1)
    worst = [margin(model(pgd(model, x, y, L2(0.05), steps=n).points), y).mean() for n in (0, 1, 40)]
    assert worst[0] < worst[1] <= worst[2] + 1e-6


def test_refuses_what_has_no_small_changes_or_no_classes():
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(DoesNotFit, match="whole numbers; attack embeddings"):
        pgd(tokens, torch.zeros(2, 3, dtype=torch.long), None, Linf(0.1))
    with pytest.raises(DoesNotFit, match=r"class scores `b classes`, but the network gives \(2, 2, 4\)"):
        pgd(nn.Linear(3, 4), torch.zeros(2, 2, 3), None, Linf(0.1))
    with pytest.raises(DoesNotFit, match="class scores"):
        pgd(nn.Linear(3, 1), torch.zeros(2, 3), None, Linf(0.1))
    with pytest.raises(DoesNotFit, match="bitflips=2 is no set of inputs"):
        pgd(nn.Linear(3, 4), torch.zeros(2, 3), None, BitFlips(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_runs_on_the_device_of_the_model():
    model, x = linear().cuda(), inputs()
    found = pgd(model, x, None, Linf(0.1, 0.0, 1.0))
    assert found.points.is_cuda and Linf(0.1, 0.0, 1.0).contains(found.points, x.cuda()).all()
    assert torch.equal(found.hit.cpu(), pgd(model.cpu(), x, None, Linf(0.1, 0.0, 1.0)).hit)
