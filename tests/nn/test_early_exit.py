"""Early exits: who leaves where by hand and by definition, routed and not, and what it costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import macs
from netweight.core.task import Data
from netweight.nn.early_exit import (
    DOUBTS,
    EarlyExit,
    all_scores,
    at_exits,
    branch,
    early,
    entropy,
    first_exits,
    largest_limit,
    parts,
    stages_of,
    unsure,
    work,
)
from netweight.testing import tiny_language_model, tiny_model, tiny_task

TOP = math.log(4)


def three_exits(doubt: str = "entropy") -> EarlyExit:
    """Vectors of 6 to 4 classes, an exit behind each of two hidden layers and at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Linear(a, 5), nn.ReLU()) for a in (6, 5, 5)]
        return EarlyExit(stages, [nn.Linear(5, 4) for _ in stages], 0.0, doubt).eval()


def vectors(count: int = 40, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_doubt_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -200.0, -200.0], [500.0, 0.0, 0.0, 0.0]])
    assert entropy(logits).tolist() == pytest.approx([math.log(4), math.log(2), 0.0], abs=1e-6)
    assert unsure(logits).tolist() == pytest.approx([0.75, 0.5, 0.0], abs=1e-6)


@given(seed=st.integers(0, 2**20), classes=st.integers(2, 20), size=st.floats(0, 1e4))
def test_doubt_lies_between_none_and_the_top(seed, classes, size):
    logits = size * torch.randn(5, classes, generator=torch.Generator().manual_seed(seed))
    for doubt in DOUBTS.values():
        found = doubt.of(logits)
        assert (found >= 0).all() and (found <= doubt.top(classes) + 1e-6).all()


@pytest.mark.parametrize("doubt", DOUBTS)
def test_no_limit_is_the_whole_network_and_the_top_the_first_exit(doubt):
    net, x = three_exits(doubt), vectors()
    x[0] = 0
    for out in net.exits:  # equal scores: as doubtful as can be
        nn.init.zeros_(out.bias)
    for stage in net.stages:
        nn.init.zeros_(stage[0].bias)
    whole = net.route(x)
    assert torch.equal(whole.logits, net(x)) and whole.exit.unique().tolist() == [2]
    net.limit(DOUBTS[doubt].top(4))
    first = net.route(x)
    assert torch.equal(first.logits, net.until(0)(x)) and not first.exit.any()
    net.limit([0.0, math.inf])
    assert torch.equal(net.route(x).logits, net.until(1)(x))


@given(a=st.floats(0, TOP), b=st.floats(0, TOP), seed=st.integers(0, 100))
def test_routed_is_the_definition(a, b, seed):
    net, x = three_exits(), vectors(12, seed)
    net.limit([a, b])
    routed, scores = net.route(x), net.scores(x)
    for row in range(len(x)):
        place = next((k for k, t in enumerate((a, b)) if entropy(scores[k][row : row + 1]) < t), 2)
        if min(abs(entropy(scores[k][row : row + 1]) - t) for k, t in enumerate((a, b))) < 1e-5:
            continue  # rounding decides
        assert routed.exit[row] == place == first_exits(scores, [a, b])[row]
        assert torch.allclose(routed.logits[row], scores[place][row], atol=1e-5)
    assert torch.equal(at_exits(scores, torch.ones(12).long()), scores[1])


def test_a_stage_sees_only_who_stays():
    net, x, seen = three_exits(), vectors(), []
    doubt = entropy(net.scores(x)[0]).detach()
    net.limit([float(doubt.median()), 0.0])
    for stage in net.stages:
        stage.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    net.route(x)
    stay = int((doubt >= doubt.median()).sum())
    assert seen == [40, stay, stay] and 0 < stay < 40
    seen.clear()
    net.limit(TOP)
    net.route(x)
    assert seen == [40]


def test_work_adds_up():
    net, x = three_exits(), vectors(3)
    counts = work(parts(net, x))
    assert counts == (6 * 5 + 5 * 4, 6 * 5 + 5 * 4 + 25 + 20, 6 * 5 + 5 * 4 + 2 * (25 + 20))
    passed = sum(macs(out, torch.zeros(1, 5)) for out in net.exits)
    assert counts[-1] == macs(net, x) + passed - 20 and passed == 60
    net.exits[-1] = nn.Identity()
    assert work(parts(net, x))[-1] == counts[-1] - 20


def test_limits_travel_with_the_weights_and_the_mode_is_kept():
    net, other = three_exits(), three_exits()
    net.limit([0.1, 0.2])
    other.load_state_dict(net.state_dict())
    assert other.limits.tolist() == [0.1, 0.2]
    net.train()
    scores = all_scores(net, Data(vectors(), None, 7))
    assert net.training and len(scores) == 3 and not scores[0].requires_grad
    assert torch.allclose(scores[1], net.scores(vectors())[1], atol=1e-6)


def test_the_largest_limit_is_the_largest():
    y = torch.tensor([0, 0, 1, 1])
    last = torch.tensor([[9.0, 0], [9, 0], [0, 9], [9, 0]])  # three right
    exit = torch.tensor([[4.0, 0], [2, 0], [1.5, 0], [0, 1]])  # by doubt: right, right, wrong, right
    doubts = entropy(exit)
    assert doubts.tolist() == sorted(doubts.tolist())
    found = largest_limit([exit, last], y, 0.0)
    assert found == pytest.approx(math.log(2))  # the last example makes up for the third
    y[3] = 0
    assert largest_limit([exit, last], y, 0.0) == pytest.approx(doubts[2].item())  # two leave
    assert largest_limit([exit, last], y, 0.25) == pytest.approx(doubts[3].item())
    assert largest_limit([exit, last], y, 0.5) == pytest.approx(math.log(2))
    assert largest_limit([-exit, last], y, 0.0) == pytest.approx(doubts[0].item())  # nobody


def test_a_sequential_is_cut_where_it_is_told():
    model, x = tiny_model(), tiny_task().test.x
    assert early(model) == "2"
    parts = stages_of(model, ["2", "6"])
    assert [len(part) for part in parts] == [3, 4, 3] and parts[0][0] is model[0]
    for part in parts:
        x = part(x)
    assert torch.equal(x, model(tiny_task().test.x))
    for after in (["9"], ["nowhere"]):
        with pytest.raises(DoesNotFit, match=f"{after[0]}: no exit can lie behind it"):
            stages_of(model, after)
    with pytest.raises(BadInput, match="each part once, in the order"):
        stages_of(model, ["6", "2"])
    with pytest.raises(DoesNotFit, match="TinyLanguageModel: exits lie between the parts"):
        stages_of(tiny_language_model(), ["embedding"])
    for lacking in (tiny_language_model(), nn.Sequential(nn.Flatten(), nn.Linear(196, 4))):
        with pytest.raises(DoesNotFit, match="between two parts of an nn.Sequential that have weights"):
            early(lacking)


@pytest.mark.parametrize("features", [(5,), (5, 6), (5, 6, 7), (5, 4, 3, 2), (5, 1, 3)])
def test_branches_of_features_of_any_shape(features):
    found = branch(features, 4, 3)(torch.rand(2, *features))
    assert found.shape == (2, 4)
    wide = [layer for layer in branch(features, 4, 3) if hasattr(layer, "out_channels")]
    assert [layer.out_channels for layer in wide] == ([3] if len(features) > 1 else [])


def test_what_makes_no_sense():
    with pytest.raises(DoesNotFit, match="one to three axes of places"):
        branch((1, 2, 2, 2, 2), 4, 3)
    with pytest.raises(BadInput, match="2 stages and 1 exits: give one exit behind each"):
        EarlyExit([nn.Identity(), nn.Identity()], [nn.Identity()])
    with pytest.raises(BadInput, match="did you mean 'entropy'"):
        EarlyExit([nn.Identity()], [nn.Identity()], doubt="entropi")
    for limits in ([0.1], [0.1, -1.0], [0.1, math.nan]):
        with pytest.raises(BadInput, match="give 2 numbers from 0 on"):
            three_exits().limit(limits)
