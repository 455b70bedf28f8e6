"""Internal classifiers by hand, the rewrite that adds them, and networks that decide."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.compressed import weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.stored import put_together, take_apart
from netweight.models.resnet_cifar import architecture, in_parts
from netweight.nn.dynamic import Taken, dynamic_of
from netweight.nn.early_exit import EarlyExit, Together, first_exits
from netweight.nn.exits import AddExits, Mixed, Readers, internal_classifier, read
from netweight.testing import tiny_language_model, tiny_model, tiny_task

ADDING = AddExits(("2", "5"), ((16, 6, 6), (16, 3, 3)), 4)


def exited(doubt: str = "unsure") -> tuple[nn.Module, EarlyExit]:
    """(the network, what decides in it)"""
    model = tiny_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ADDING.apply(model)
    net = dynamic_of(model)
    net.doubt = doubt
    return model, net


def test_pools_are_mixed_by_hand():
    mixed, h = Mixed((2,)), torch.tensor([[[1.0, 3.0, -2.0, 0.0, 9.0]]])
    mixed.share.data.fill_(torch.logit(torch.tensor(0.25)))
    assert torch.allclose(mixed(h), torch.tensor([[[0.25 * 3 + 0.75 * 2, 0.75 * -1]]]))
    assert torch.equal(mixed.mix(mixed.both(h)), mixed(h))


@pytest.mark.parametrize(
    ("features", "reduced"),
    [
        ((5,), 5),
        ((5, 4), 20),
        ((5, 32), 20),
        ((3, 6, 6), 27),
        ((2, 7, 8), 2 * 3 * 4),
        ((2, 9, 4, 5), 2 * 3 * 4 * 2),
    ],
)
def test_a_classifier_reads_at_most_four_places_of_a_side(features, reduced):
    exit = internal_classifier(features, 7)
    assert exit(torch.rand(3, *features)).shape == (3, 7) and exit[-1].in_features == reduced
    with pytest.raises(DoesNotFit, match="one to three axes of places"):
        internal_classifier((1, 2, 2, 2, 2), 4)


def test_the_whole_network_computes_what_it_did_and_exits_are_added_once():
    model, net = exited()
    x = tiny_task().test.x
    assert torch.equal(model(x), tiny_model()(x)) and len(net.exits) == 3 and net.doubt == "unsure"
    before = copy.deepcopy(model.state_dict())
    ADDING.apply(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tensors, said = take_apart(ADDING)
    assert put_together(tensors, {**said, "features": [[16, 6, 6], [16, 3, 3]]}) == ADDING
    for after, features in [
        ((), ()),
        (("2",), ()),
        (("2",), ((0,),)),
        (("2",), ((1 << 30,),)),
        (("2",), ("ab",)),
    ]:
        with pytest.raises(BadInput):
            AddExits(after, features, 4)


def test_what_is_read_once_gives_what_the_exits_give():
    _, net = exited()
    x = tiny_task().test.x
    pooled = read(net, x)
    shapes = [tuple(h.shape[1:]) for h in pooled]
    assert shapes == [(2, 16, 3, 3), (16, 3, 3)]
    found = Readers(net, shapes)(torch.cat([h.flatten(1) for h in pooled], 1))
    assert torch.allclose(found, torch.stack(net.scores(x)[:-1]), atol=1e-6)


def test_nobody_leaves_at_q_1_everybody_at_q_0_and_later_with_a_higher_q():
    model, net = exited()
    x, before = tiny_task().test.x, None
    for q in (0.0, 0.26, 0.27, 0.28, 0.29, 0.3, 0.5, 1.0):
        net.limit(1 - q)
        routed = net.route(x)
        assert before is None or (routed.exit >= before).all()
        before = routed.exit
        if q == 0.0:
            assert not routed.exit.any() and torch.equal(Taken(net)(x), net.until(0)(x))
    assert (before == 2).all() and torch.equal(Taken(net)(x), model(x))


def test_decisions_say_who_leaves_and_effort_is_highest_where_all_classes_are_alike():
    model, net = exited()
    x = tiny_task().test.x
    sure = torch.stack([z.softmax(1).amax(1) for z in net.scores(x)[:-1]])
    net.limit(1 - float(sure.median().detach()))
    made = net.decisions(x)
    assert torch.equal(first_exits(net.scores(x), net.limits, "unsure") == 2, ~made.saves.any(1))
    assert 0 < made.saves.float().mean() < 1 and made.effort.shape == (16, 2) and (made.effort < 0).all()
    for z, effort in zip(net.scores(x), made.effort.T):
        uniform = -nn.functional.cross_entropy(z, torch.full_like(z, 0.25), reduction="none")
        assert torch.allclose(effort, uniform + torch.tensor(4.0).log(), atol=1e-6)
    for exit in net.exits[:-1]:
        nn.init.zeros_(exit[-1].weight), nn.init.zeros_(exit[-1].bias)
    assert net.decisions(x).effort.abs().max() < 1e-6
    alone = EarlyExit([model], [nn.Identity()])
    assert alone.decisions(x).saves.shape == (16, 0)


def test_no_method_is_asked_to_pack_what_the_whole_network_does_not_run():
    model, net = exited()
    names = weighted(model)
    assert len(names) == len(weighted(tiny_model())) == 4 and all(".stages." in name for name in names)
    assert len(weighted(net.until(0))) == 2


def test_fewer_exits_are_those_of_the_network():
    _, net = exited()
    net.limit([0.1, 0.2])
    x = tiny_task().test.x
    some = net.fewer([1])
    assert some.limits.tolist() == [0.2] and torch.equal(some(x), net(x))
    assert torch.equal(some.scores(x)[0], net.scores(x)[1]) and torch.equal(net.fewer([])(x), net(x))
    assert torch.equal(Together(net)(x), torch.stack(net.scores(x)))
    for kept in ([2], [1, 0], [0, 0], [-1]):
        with pytest.raises(BadInput, match="give some of 0 to 1"):
            net.fewer(kept)


def test_what_decides_is_found_or_it_is_said_that_nothing_does():
    model, net = exited()
    assert dynamic_of(net) is net and dynamic_of(nn.Sequential(model)) is net
    for other in (tiny_model(), tiny_language_model(), nn.Flatten()):
        with pytest.raises(DoesNotFit, match="it runs the same parts for every input"):
            dynamic_of(other)


def test_a_resnet_in_parts_is_the_same_network():
    model, x = architecture(20).eval(), torch.rand(2, 3, 32, 32)
    cut = in_parts(model)
    assert torch.equal(cut(x), model(x)) and [*dict(cut.named_children())][::5] == ["stem", "block5", "mean"]
