"""Distances between a student's scores and a teacher's, in closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.nn.distillation import Teacher, inner, matched, soft, softened


def scores(seed):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_softened_is_torchs_kl_of_the_teacher_from_the_student(temperature):
    s, t = scores(0).float(), scores(1).float()
    wanted = F.kl_div(
        F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean"
    )
    assert softened(s, t, temperature).item() == pytest.approx(wanted.item() * temperature**2, rel=1e-5)
    assert softened(t, t, temperature).item() == pytest.approx(0, abs=1e-6)


def test_at_high_temperature_it_matches_centred_scores():
    s, t = scores(0).float(), scores(1).float()
    d = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    assert softened(s, t, 50.0).item() == pytest.approx(d.square().mean(-1).mean().item() / 2, rel=0.02)


def test_soft_has_the_gradient_of_softened_and_none_for_the_teacher():
    s, t = scores(0).float().requires_grad_(), scores(1).float().requires_grad_()
    (a,) = torch.autograd.grad(soft(s, t), s)
    (b,) = torch.autograd.grad(softened(s, t), s)
    assert torch.allclose(a, b, atol=1e-7)
    for loss in (soft(s, t), softened(s, t), matched(s, t), inner([s], [t])):
        (none,) = torch.autograd.grad(loss, t, allow_unused=True)
        assert none is None


def test_matched_and_inner_by_hand():
    s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]])
    assert matched(s, t).item() == pytest.approx(0.25)
    assert inner([s, s], [t, s]).item() == pytest.approx(5000.0)
    with pytest.raises(ValueError):
        inner([s], [t, s])


def test_a_teacher_is_a_copy_that_does_not_learn():
    net = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.9))
    teacher = Teacher(net.train())
    x = scores(2).float()
    first = teacher(x)
    assert not first.requires_grad and torch.equal(first, teacher(x))
    nn.init.zeros_(net[0].weight)
    assert torch.equal(first, teacher(x)) and net.training
