"""Attacks on networks that decide: what is found, that it lies in the set, and what costs nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.attacks.deepsloth import deepsloth
from netweight.attacks.early import Early, early, fooled, into, out_of, penalty
from netweight.attacks.pgd import pgd
from netweight.attacks.routed import routed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import L1, L2, Box, Linf, WeightLinf
from netweight.nn.dynamic import Taken, dynamic_of
from netweight.nn.early_exit import EarlyExit
from netweight.nn.exits import AddExits
from netweight.testing import tiny_model, tiny_text_task

PIXELS = Box(0.0, 1.0)


def plane(q: float = 0.8) -> EarlyExit:
    """Two inputs: the exit looks at the first, the end at the second; both are sure far from 0.5."""
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        for layer, column in ((first, 0), (last, 1)):
            layer.weight.zero_()
            layer.weight[:, column] = torch.tensor([-10.0, 10.0])
            layer.bias.copy_(torch.tensor([5.0, -5.0]))
    return EarlyExit([nn.Identity(), nn.Identity()], [first, last], 1 - q, "unsure").eval()


def exited(doubt: str = "unsure") -> tuple[nn.Module, EarlyExit]:
    """(a network with two early exits, what decides in it)"""
    model = tiny_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AddExits(("2", "5"), ((16, 6, 6), (16, 3, 3)), 4).apply(model)
    net = dynamic_of(model)
    net.doubt = doubt
    return model, net


def spread(count: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))


def both_classes() -> tuple[torch.Tensor, torch.Tensor]:
    x = spread()
    x = x[(x[:, 0] > 0.5) == (x[:, 1] > 0.5)]
    return x, (x[:, 1] > 0.5).long()


# The early attack -----------------------------------------------------------------------------------------


def test_the_shortest_way_crosses_the_exit_and_leaves_the_end_alone():
    net, (x, y) = plane(), both_classes()
    near = (x[:, 0] - 0.5).abs() < 0.3  # farther away the exit is so sure that its slope vanishes
    x, y = x[near], y[near]
    found = early(net, x, None, PIXELS, steps=400, how=Early(c=20.0, alpha=0.0))
    assert found.hit.all() and PIXELS.contains(found.points, x).all()
    assert (net.exits[0](found.points).argmax(1) != y).all() and (net(found.points).argmax(1) == y).all()
    far = (found.points - x).norm(dim=1)
    assert torch.allclose(far, (x[:, 0] - 0.5).abs(), atol=0.08)
    assert (found.points[:, 1] - x[:, 1]).abs().max() < 0.01
    assert torch.equal(early(net, x, None, PIXELS, steps=5).points, early(net, x, y, PIXELS, steps=5).points)


def test_fooled_and_unsure_is_passed_but_sure_is_wrong_as_it_is_run():
    net, (x, y) = plane(), both_classes()
    plain = early(net, x, None, PIXELS, steps=300)
    assert plain.hit.all() and (Taken(net)(plain.points).argmax(1) == y).float().mean() > 0.9
    sure = early(net, x, None, PIXELS, steps=300, how=Early(sure=True))
    assert sure.hit.all() and (Taken(net)(sure.points).argmax(1) != y).all()
    assert (sure.points - x).norm() > (plain.points - x).norm()
    net.limit(0.0)  # nobody leaves early: the network is never wrong
    assert not early(net, x, None, PIXELS, steps=60, how=Early(sure=True)).hit.any()


def test_without_a_weight_it_stays_where_it_is():
    net, (x, _) = plane(), both_classes()
    found = early(net, x, None, PIXELS, steps=50, how=Early(c=0.0))
    assert not found.hit.any() and torch.allclose(found.points, x, atol=1e-4)
    near = early(net, x, None, PIXELS, steps=50, how=Early(c=1e-6)).points
    assert torch.allclose(near, x, atol=1e-3)


def test_what_is_found_already_is_its_own_point():
    net, x = plane(), spread()
    y = net(x).argmax(1)
    split = net.exits[0](x).argmax(1) != y
    found = early(net, x, None, PIXELS, steps=3)
    assert torch.equal(found.points[split], x[split]) and found.hit[split].all() and split.any()
    wrong = early(net, x[:5], 1 - y[:5], PIXELS, steps=3)  # another class than the end's is never kept
    assert not wrong.hit.any()


def test_the_objective_by_hand():
    net, x, y = plane(), torch.tensor([[0.6, 0.7]]), torch.tensor([1])
    p, last = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-4))
    value = p - 3 * (2 * last - 1)
    assert penalty(net, net.scores(x), y, Early(alpha=3)).item() == pytest.approx(value, abs=1e-5)
    sure = value + 0.8 + 0.02 - (1 - p)
    assert penalty(net, net.scores(x), y, Early(alpha=3, sure=True)).item() == pytest.approx(sure, abs=1e-5)
    assert not fooled(net, net.scores(x), y) and fooled(net, net.scores(torch.tensor([[0.4, 0.7]])), y)


@settings(max_examples=25, deadline=None)
@given(a=st.floats(-5, 5), width=st.floats(0, 10), w=st.floats(-100, 100), place=st.floats(0.001, 0.999))
def test_tanh_stays_in_the_box_and_comes_back(a, width, w, place):
    lower = torch.tensor(a)
    upper = lower + width
    assert lower <= out_of(torch.tensor(w), lower, upper) <= upper
    s = (lower + (upper - lower) * place).clamp(lower, upper)
    assert torch.allclose(out_of(into(s, lower, upper), lower, upper), s, atol=1e-4)
    assert out_of(into(lower, lower, upper), lower, upper) <= lower + 1e-4 * max(width, 1)


# In the set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [Linf(0.2, 0, 1), L2(0.25, 0, 1), L1(0.3, 0, 1), PIXELS], ids=str)
@pytest.mark.parametrize("attack", [early, routed, deepsloth])
def test_points_lie_in_the_set_to_the_last_bit_and_are_what_hit_says(attack, within):
    net, x = plane(), torch.cat([spread(40), torch.tensor([[0.0, 1.0], [1.0, 1.0]])])
    found = attack(net, x, None, within, steps=30, restarts=2, seed=1)
    again = attack(net, x, None, within, steps=30, restarts=2, seed=1)
    assert torch.equal(found.points, again.points) and torch.equal(found.hit, again.hit)
    assert within.contains(found.points, x).all() and found.hit.any()
    y, z = Taken(net)(x).argmax(1), net(x).argmax(1)
    wanted = {
        early: fooled(net, net.scores(found.points), z),
        routed: Taken(net)(found.points).argmax(1) != y,
        deepsloth: net.route(found.points).exit == 1,
    }
    assert torch.equal(found.hit, wanted[attack])


def test_a_larger_set_holds_more():
    net, (x, _) = plane(), both_classes()
    for attack in (early, routed, deepsloth):
        shares = [
            attack(net, x, None, Linf(eps, 0, 1), steps=60).hit.float().mean() for eps in (0.05, 0.2, 0.6)
        ]
        assert shares[0] < shares[1] < shares[2] or shares[-1] == shares[-2] == 1
    near = (x[:, 0] - 0.5).abs() < 0.19
    assert early(net, x, None, Linf(0.2, 0, 1), steps=200).hit[near].all()


# Along the way taken, and the cost ------------------------------------------------------------------------


def test_parts_behind_the_exit_are_not_run():
    model, net = exited()
    x, seen = torch.rand(20, 4, 7, 7, generator=torch.Generator().manual_seed(3)), []
    net.stages[1].register_forward_hook(lambda *_: seen.append(1))
    net.limit(1.0)  # everybody leaves at the first exit
    first = routed(model, x, None, Linf(0.05, 0, 1), steps=5)
    assert not seen
    alone = pgd(net.until(0), x, None, Linf(0.05, 0, 1), steps=5)
    assert torch.equal(first.points, alone.points) and torch.equal(first.hit, alone.hit)
    net.limit(0.0)  # nobody leaves: the attack on the static network
    last = routed(model, x, None, Linf(0.05, 0, 1), steps=5)
    static = pgd(tiny_model(), x, None, Linf(0.05, 0, 1), steps=5)
    assert torch.equal(last.points, static.points) and torch.equal(last.hit, static.hit) and seen


def test_a_sloth_costs_the_whole_network_where_doubt_is_near():
    net, x = plane(), spread()
    limit = 0.5 + math.log(4) / 20  # |x_1 - 0.5| at which the exit is as sure as 0.8
    within = Linf(0.2, 0, 1)
    found = deepsloth(net, x, None, within, steps=60)
    away = (x[:, 0] - 0.5).abs() - (limit - 0.5)
    assert found.hit[away < 0.19].all() and not found.hit[away > 0.2].any()
    own = net.route(x).exit == 1
    assert torch.equal(found.points[own], x[own]) and own.any()
    net.limit(0.0)
    assert deepsloth(net, x, None, within, steps=1).hit.all()
    net.limit(1.0)
    assert not deepsloth(net, x, None, within, steps=5).hit.any()


# What does not fit ----------------------------------------------------------------------------------------


def test_what_makes_no_sense():
    x, tokens = torch.rand(3, 4, 7, 7), tiny_text_task().test.x
    for attack in (early, routed, deepsloth):
        with pytest.raises(DoesNotFit, match="Sequential: it runs the same parts for every input"):
            attack(tiny_model(), x, None, PIXELS)
        with pytest.raises(DoesNotFit, match="whole numbers"):
            attack(plane(), tokens, None, PIXELS)
        with pytest.raises(DoesNotFit, match="no set of inputs"):
            attack(plane(), spread(), None, WeightLinf(0.1))
    alone = EarlyExit([tiny_model()], [nn.Identity()])
    with pytest.raises(DoesNotFit, match="on early exits, and it has none"):
        early(alone, x, None, PIXELS)
    assert deepsloth(alone, x, None, PIXELS).hit.all()
    by_entropy, _ = exited("entropy")
    with pytest.raises(DoesNotFit, match="exits that leave by entropy"):
        early(by_entropy, x, None, PIXELS, how=Early(sure=True))
    for wrong in (
        {"c": -1.0},
        {"alpha": -1.0},
        {"rate": 0.0},
        {"rounds": -1},
        {"slack": -0.1},
        {"c": math.nan},
    ):
        with pytest.raises(BadInput, match="give a rate above 0"):
            Early(**wrong)


def test_modes_and_weights_stay_as_they_are():
    model, net = exited()
    model.train()
    net.stages[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    for attack in (early, routed, deepsloth):
        attack(model, torch.rand(3, 4, 7, 7), None, PIXELS, steps=2)
    assert modes == [part.training for part in model.modules()] and dynamic_of(model) is net
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
