"""The quick variant of the reproduction reaches its bars; what its helpers count."""

import pytest
import torch
from torch import nn

from netweight.attacks.pgd import pgd
from netweight.attacks.routed import routed
from netweight.core.perturbation import Linf
from netweight.nn.dynamic import Taken
from netweight.nn.early_exit import EarlyExit
from netweight.reproduce.dynn import evaluations, leaving, reproduce, share, transfer


def two(q: float) -> EarlyExit:
    """An exit that sees the first input alone, and an end behind one more layer that sees both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = EarlyExit([nn.Linear(2, 2), nn.Linear(2, 2)], [nn.Identity(), nn.Identity()], 1 - q, "unsure")
    with torch.no_grad():
        net.stages[0].weight.copy_(torch.tensor([[-6.0, 0.0], [6.0, 2.0]]))
        net.stages[0].bias.copy_(torch.tensor([3.0, -4.0]))
        net.stages[1].weight.copy_(torch.eye(2))
        net.stages[1].bias.zero_()
    return net.eval()


def test_the_quick_variant_reaches_its_bars():
    found = [reproduce(seed=seed, quick=True) for seed in range(2)]
    assert all(bar.passed for claim in found for bar in claim.bars) and found[0].figures != found[1].figures


def test_shares_and_where_examples_leave():
    yes = torch.tensor([True, False, True, False])
    assert share(yes) == 0.5 and share(yes, torch.tensor([True, True, False, False])) == 0.5
    assert share(yes, ~yes) == 0 and str(share(yes, yes & ~yes)) == "nan"
    scores = [torch.tensor([[2.0, 0.0], [0.1, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])]
    assert leaving(scores, (0,), 0.8).argmax(1).tolist() == [0, 1]
    assert leaving(scores, (), 0.8).argmax(1).tolist() == [1, 1]


def test_parts_are_counted_for_each_example_that_goes_through():
    x = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    counted = {}
    for q in (0.0, 1.0):
        net = two(q)
        y = Taken(net)(x).argmax(1)
        arms = {"static": (net, pgd), "dynamic": (net, routed)}
        counted[q] = evaluations(arms, (nn.Linear,), x, y, (0.5, 1.0))
        assert all(not part._forward_pre_hooks for part in net.modules())
    assert counted[1.0]["dynamic"] == counted[1.0]["static"]
    static, dynamic = counted[0.0]["static"], counted[0.0]["dynamic"]  # the same classes at both ends
    assert dynamic["fooled"] == static["fooled"] > 0.5
    assert dynamic["per success"] == pytest.approx(static["per success"] / 2)
    seen = static["0.5000"], static["1.0000"]
    assert min(seen) <= static["per success"] <= max(seen)


def test_transfer_is_a_share_of_what_is_fooled_itself():
    net, x = two(0.8), torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    points, found = transfer(net, Taken(net), x, y, Linf(0.3, 0, 1), 0)
    assert Linf(0.3, 0, 1).contains(points, x).all() and found["images"] == 40
    assert found["static to dynamic"] == found["dynamic to static"] == 1 and found["gap"] == 0
    assert found["static fooled"] == share(net(points).argmax(1) != y)
