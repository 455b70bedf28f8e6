"""LPGNAS: draws, gates and L_q against their formulas, the search's two sides, stops, sizes and mistakes."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight import pipeline
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.data.graphs import judged, sbm, whole
from netweight.deployment import exports
from netweight.models.graph_block import Choice, GraphNetwork, by_hand
from netweight.models.graph_parts import FLOAT, KEPT, Parts, bits_of, each_block, weight_bits
from netweight.models.graph_sums import ACTIVATIONS
from netweight.nn.fixed_point import Fixed
from netweight.nn.quantizer import FromLargest
from netweight.reproduce.lpgnas import reproduce
from netweight.search import lpgnas as module
from netweight.search.lpgnas import (
    LPGNAS,
    Design,
    annealed,
    best_of,
    designs,
    fitted,
    likeliest,
    lpgnas,
    searched,
)
from netweight.search.supernet import AHEAD, Options, Pick, Supernet
from netweight.testing import tiny_model
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Diverged, Training
from netweight.training.nodes import Best
from netweight.training.trained import Trained
from netweight.verification.bounds import bounds

WEIGHTS, FORMATS = LPGNAS().weights, LPGNAS().formats
HOW = Training(6, rate=0.01, seed=1)
SHORT = LPGNAS(beta=0.5, epochs=8, base=8, rate=0.05, designs=2)


def supernet(seed: int = 0, blocks: int = 2) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Supernet(sbm(), Options(8, WEIGHTS, FORMATS), blocks, 0.5)
        for kind in ("architecture", "roundings"):
            for logits in net.logits(kind):
                nn.init.normal_(logits)
    return net.eval()


def small_task() -> Task:
    return judged(sbm())


def on(x: torch.Tensor, y: torch.Tensor | None) -> Task:
    """The small task with other nodes to train on."""
    task = small_task()
    return Task(task.calibration, task.test, train=Data(x, y))


@given(
    whole_=st.integers(1, 8),
    fraction=st.integers(0, 8),
    k=st.integers(-(2**15), 2**15),
    by=st.floats(-0.49, 0.49),
)
def test_fixed_point_is_its_formula_and_keeps_its_own_numbers(whole_, fraction, k, by):
    if not 2 <= whole_ + fraction <= 16:
        return
    form, most = Fixed(whole_, fraction), 2 ** (whole_ + fraction - 1)
    inside = min(max(k, -most), most - 1)
    x = torch.tensor((inside + by) / 2**fraction)
    assert form(x).item() == inside / 2**fraction == form(form(x)).item()
    assert torch.equal(form(x), form.stored().module()(x))
    beyond = torch.tensor(2.0**whole_, requires_grad=True)
    found = form(beyond)
    found.backward()
    assert found.item() == (most - 1) / 2**fraction and beyond.grad.item() == 0


def test_weights_by_their_largest():
    x = torch.tensor([[0.8, -0.33, 0.04, 0.0]], requires_grad=True)
    y = FromLargest(4)(x)
    step = torch.tensor(0.1).half().float().item()
    assert torch.allclose(y, torch.tensor([[7.0, -3.0, 0.0, 0.0]]) * step)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 4))


@given(seed=st.integers(0, 999), noise=st.floats(0.0, 1.0), temperature=st.floats(0.1, 1.0))
@settings(max_examples=15, deadline=None)
def test_draws_are_distributions_and_the_largest_runs(seed, noise, temperature):
    net = supernet(seed % 3)
    for picks in net.draw(torch.Generator().manual_seed(seed), noise, temperature):
        for pick in picks.values():
            assert pick.p.sum().item() == pytest.approx(1, abs=1e-5) and pick.index == int(pick.p.argmax())
            assert not pick.p.requires_grad and pick.gate() == 1.0


def test_without_noise_the_likeliest_runs_and_noise_is_gumbels():
    net = supernet()
    for block, picks in zip(net.blocks, net.draw(None, 0.0, 1e-3)):
        for kind in (block.architecture, block.roundings):
            for name, logits in kind.items():
                assert picks[name].index == int(logits.argmax()) and picks[name].p.max() > 0.99
    draw = torch.Generator().manual_seed(0)
    logits = net.blocks[0].architecture["aggregate"]
    drawn = torch.tensor([net.draw(draw, 1.0, 1.0)[0]["aggregate"].index for _ in range(400)])
    shares = torch.bincount(drawn, minlength=3) / 400  # Gumbel noise draws in proportion to the softmax
    assert torch.allclose(shares, logits.softmax(0), atol=0.08)


def test_gates_and_shares_have_the_value_of_one_path_and_the_gradient_of_the_softmax():
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    pick = Pick(2, logits.softmax(0))
    assert pick.gate().item() == 1 and pick.shares().tolist() == pytest.approx([0, 0, 1])
    (by_gate,) = torch.autograd.grad(pick.gate(), logits, retain_graph=True)
    p = pick.p.detach()
    assert torch.allclose(by_gate, p[2] * (torch.eye(3)[2] - p))
    values = torch.tensor([3.0, 5.0, 7.0])
    (by_shares,) = torch.autograd.grad(pick.shares() @ values, logits)
    assert torch.allclose(by_shares, p * (values - p @ values), atol=1e-6)


@pytest.mark.parametrize("decision", ["attention", "aggregate", "skip"])
def test_an_option_that_would_have_been_better_gains_on_the_one_that_runs(decision):
    net, nodes = supernet(blocks=1), torch.arange(240)
    logits = net.blocks[0].architecture
    logits["aggregate"].data = torch.tensor([5.0, 0.0, 0.0])
    for rounding in net.blocks[0].roundings.values():
        rounding.data = torch.arange(len(rounding), dtype=torch.float32)  # the most bits
    told = 0
    for runs, wanted in itertools.permutations(range(len(logits[decision])), 2):
        logits[decision].data.zero_()
        logits[decision].data[wanted] = 1e-4
        target = net(nodes, net.draw(None, 0.0, 1.0))
        logits[decision].data.zero_()
        logits[decision].data[runs] = 1e-4
        off = net(nodes, net.draw(None, 0.0, 1.0, ("architecture",))) - target.detach()
        (found,) = torch.autograd.grad(off.square().sum(), logits[decision])
        if off.abs().max() > 0.05:  # else rounding alone tells one from the other
            assert found[runs] > found[wanted], (runs, wanted)
            told += 1
    assert told >= 2


def test_activations_count_by_what_each_gives():
    net = supernet()
    logits, values = net.blocks[0].architecture["activation"], dict(zip(ACTIVATIONS, torch.randn(8)))
    picks = net.draw(None, 0.0, 1.0, ("architecture",))[0]
    given = net.blocks[0].chosen("activation", picks, values.__getitem__)
    assert given.item() == pytest.approx(list(values.values())[int(logits.argmax())].item())
    p, y = logits.detach().softmax(0), torch.stack(list(values.values()))
    (found,) = torch.autograd.grad(given, logits)
    assert torch.allclose(found, p * (y - p @ y), atol=1e-6)
    hard = net.draw(None, 0.0, 1.0)[0]
    ran = []
    net.blocks[0].chosen("activation", hard, ran.append)  # one path where nobody asks for a gradient
    assert ran == [list(ACTIVATIONS)[int(logits.argmax())]]


def test_the_supernet_computes_the_network_that_it_draws():
    net, nodes = supernet().double(), torch.arange(240)  # float32 would move numbers over a rounding edge
    for seed in range(12):
        picks = net.draw(torch.Generator().manual_seed(seed), 3.0, 1.0)
        soft = net.draw(torch.Generator().manual_seed(seed), 3.0, 1.0, ("architecture", "roundings"))
        with torch.no_grad():
            one = net(nodes, picks)
        assert torch.allclose(net(nodes, soft).detach(), one, atol=1e-6)
        choices = net.choices(picks)
        parts = [block.parts(each) for block, each in zip(net.blocks, picks)]
        model = GraphNetwork(net.graph, choices).double()
        before = 96
        for block, mixed, choice in zip(model.blocks, net.blocks, choices):
            out = block.linear.weight.shape[0]
            block.linear.weight.data = mixed.linear.data[:out, :before].clone()
            block.bias.data = mixed.bias.data[: len(block.bias)].clone()
            if block.shortcut is not None:
                block.shortcut.weight.data = mixed.shortcut.data[: len(block.bias), :before].clone()
            for name, vector in (("left", mixed.left), ("right", mixed.right)):
                if hasattr(block, name):
                    layer = getattr(block, name)
                    layer.weight.data = vector.data[:out].reshape(layer.weight.shape).clone()
            before = choice.width
        with torch.no_grad():
            found = module.rounded(model, parts).eval()(nodes)
        assert torch.allclose(found, one, atol=1e-6), (choices, parts)


def test_l_q_at_the_end_is_the_size_of_what_is_found():
    for seed in range(6):
        net = supernet(seed)
        design, picks = likeliest(net), net.draw(None, 0.0, 1e-4)
        counts = each_block(net.graph, design.choices)
        numbers = {
            k: sum(c for each in counts for n, c in each.items() if (n in KEPT) is k) for k in (True, False)
        }
        bits = {True: weight_bits(net.graph, design.choices, design.parts)}
        bits[False] = sum(
            count * bits_of(name, getattr(part, name))
            for each, part in zip(counts, design.parts)
            for name, count in each.items()
            if name not in KEPT
        )
        wanted = sum(bits[kind] / (FLOAT * numbers[kind]) for kind in (True, False))
        assert net.share(picks).item() == pytest.approx(wanted, rel=1e-4)


def test_the_gradient_of_l_q_is_its_slope():
    net = supernet().double()
    picks = net.draw(None, 0.0, 1.0, ("roundings",))
    logits = net.blocks[0].roundings["input"]
    (found,) = torch.autograd.grad(net.share(picks), logits)
    for m in range(len(logits)):
        sides = []
        for by in (1e-4, -1e-4):
            moved = copy.deepcopy(net)
            moved.blocks[0].roundings["input"].data[m] += by
            sides.append(moved.share(moved.draw(None, 0.0, 1.0)).item())
        assert found[m].item() == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-3)


def test_more_numbers_cost_more():
    net = supernet()
    picks = net.draw(None, 0.0, 1.0, ("architecture",))
    for block, name, bigger in itertools.chain(
        [(0, "width", 3), (0, "skip", 1), (1, "heads", 3), (1, "skip", 1)]
    ):
        logits = net.blocks[block].architecture[name]
        (found,) = torch.autograd.grad(net.share(picks), logits, retain_graph=True)
        assert found[bigger] > 0 > found[0]


def test_eta_and_tau_fall_and_roundings_come_last():
    found = [annealed(epoch, LPGNAS(epochs=11)) for epoch in range(11)]
    assert found[0] == (1.0, 1.0) and found[-1] == pytest.approx((0.0, 0.1))
    assert all(a > b for a, b in itertools.pairwise(found))
    assert [module.rounds(epoch, LPGNAS(epochs=8)) for epoch in range(5)] == [False] * 3 + [True] * 2


def test_each_kind_of_logits_waits_for_its_epoch_and_weights_are_moved_by_training_nodes_alone():
    task, model = small_task(), by_hand("gcn", sbm())
    off = LPGNAS(epochs=4, base=8, architecture_from=1.0, roundings_from=1.0)
    net, _ = searched(model, task, HOW, off)
    assert not any(logits.any() for logits in net.logits("architecture"))
    start = torch.tensor([0.0, 0.0, 0.0, AHEAD])
    assert all(torch.equal(block.roundings["linear"], start) for block in net.blocks)
    other = Data(task.calibration.x.flip(0), task.calibration.y)  # wrong classes for validation
    same, _ = searched(model, Task(other, task.test, train=task.train), HOW, off)
    assert torch.equal(same.blocks[0].linear, net.blocks[0].linear)
    some, _ = searched(model, task, HOW, LPGNAS(epochs=4, base=8, architecture_from=0.5, roundings_from=1.0))
    assert any(logits.any() for logits in some.logits("architecture"))
    assert all(torch.equal(block.roundings["linear"], start) for block in some.blocks)
    # decay pulls on weights, not on logits
    _, moved = module.groups(net, 2.0)
    assert moved["weight_decay"] == 0 and moved["factor"] == 2.0
    assert {id(p) for p in moved["params"]} == {id(p) for k in module.KINDS for p in net.logits(k)}


def test_more_beta_fewer_bits():
    task, model = small_task(), by_hand("gcn", sbm())
    sizes = []
    for beta in (0.0, 30.0):
        net, _ = searched(model, task, HOW, LPGNAS(beta=beta, epochs=40, base=8, rate=0.1))
        sizes.append(likeliest(net).told(net.graph)["weight_bits"])
    assert sizes[1] < sizes[0] / 2


def test_designs_are_the_likeliest_and_others_that_are_no_larger():
    net = supernet()
    found = designs(net, 5, 3)
    sizes = [weight_bits(net.graph, design.choices, design.parts) for design in found]
    assert found[0] == likeliest(net) and len(found) == 5 and max(sizes) == sizes[0]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert designs(net, 5, 3) == found != designs(net, 5, 4) and designs(net, 1, 3) == found[:1]
    with torch.no_grad():
        for kind in module.KINDS:
            for logits in net.logits(kind):
                logits.mul_(1e6)  # nothing else is likely
    assert designs(net, 5, 3) == found[:1]


def test_the_design_that_is_best_on_validation_nodes_is_kept():
    net = supernet()
    made = designs(net, 4, 0)
    fits = [Trained(nn.Identity(), None, (), {"validation_accuracy": v}) for v in (0.5, 0.8, 0.7, 0.8)]
    assert best_of(made, lambda design, number: fits[number]) == (made[1], fits[1])


def test_the_best_weights_are_kept():
    model = GraphNetwork(sbm(), (Choice(width=4, activation="none"),), dropout=0.0)
    best, data = Best(model), small_task().calibration
    best.look(model, data)
    first = copy.deepcopy(model.state_dict())
    logits = model.eval()(data.x)
    flipped = Data(data.x, logits.argmin(1))  # nothing is right: never better
    with torch.no_grad():
        model.blocks[0].linear.weight.neg_()
    other = Best(model)
    other.look(model, Data(data.x, model(data.x).argmax(1)))
    assert other.score[0] == 1
    best.score[0] = 2.0
    best.look(model, flipped)
    best.put_back(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in first.items())


def test_the_same_comes_twice_and_stops_change_nothing(tmp_path, monkeypatch):
    model, task = by_hand("gcn", sbm()), small_task()
    before = copy.deepcopy(model.state_dict())
    wholly = lpgnas(model, task.blind(), HOW, SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    place, real = tmp_path / "run.pt", module.F.cross_entropy
    for stop in (9, 10, 14):  # in the search, in the training of the first design, of the second
        calls = itertools.count()

        def stops(*args, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(module.F, "cross_entropy", stops)
        with pytest.raises(KeyboardInterrupt):
            lpgnas(model, task, HOW, SHORT, keep=Checkpoint(place, resume=True))
        monkeypatch.setattr(module.F, "cross_entropy", real)
    again = lpgnas(model, task, HOW, SHORT, keep=Checkpoint(place, resume=True))
    assert again.losses == wholly.losses and again.notes == wholly.notes
    nodes = task.test.x
    assert torch.equal(again.network()(nodes), wholly.network()(nodes))
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        lpgnas(by_hand("gcn", sbm(1)), judged(sbm(1)), HOW, SHORT, keep=Checkpoint(place, resume=True))


def test_the_network_flows_on(tmp_path):
    graph, task = sbm(), small_task()
    design = Design(
        (Choice("gcn", "sum", "relu", 8), Choice("gcn", "sum", "none", 1, 1, True)),
        (
            Parts("ternary", "8", "8", "4.4", "4.4", "1.7", "8.8"),
            Parts("4", "8", "8", "4.4", "4.4", "1.7", "8.8"),
        ),
    )
    trained = fitted(graph, design, task, Training(30, rate=0.02))
    small, nodes = trained.network(), task.test.x
    assert (small(nodes).argmax(1) == task.test.y).float().mean() > 0.6
    small.save(tmp_path / "small")
    loaded = pipeline.load(tmp_path / "small")
    assert torch.equal(loaded(nodes), small(nodes))
    rows = pipeline.compare(by_hand("gcn", graph), small, task).rows
    assert any(row.question == "average" for row in rows)
    features = whole(graph)
    assert torch.allclose(small(features.x)[0, nodes], small(nodes), atol=1e-4)
    proven = bounds(small.plain(), features.x, Linf(0.001), method="ibp")
    assert (proven.lower <= small(features.x)).all() and (small(features.x) <= proven.upper).all()
    shifted = small((features.x + 0.001).clamp(0, 1))
    assert (proven.lower <= shifted).all() and (shifted <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    one = Task(features, features)
    assert exports.export(small, one, "onnx", tmp_path / "model.onnx")["same"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: LPGNAS(beta=-1.0), BadInput, "beta=-1.0"),
        (lambda: LPGNAS(beta=math.nan), BadInput, "beta=nan"),
        (lambda: LPGNAS(base=12), BadInput, "base=12: up to 8 heads have to divide it"),
        (lambda: LPGNAS(architecture_from=0.6, roundings_from=0.5), BadInput, "the second not below"),
        (lambda: LPGNAS(designs=0), BadInput, "designs=0: one is trained at least"),
        (lambda: LPGNAS(weights=("5",)), BadInput, "unknown rounding of weights '5'"),
        (lambda: LPGNAS(weights=()), BadInput, "name one rounding each at least"),
        (lambda: LPGNAS(formats=("0.4",)), BadInput, "0.4: a fixed-point number has a sign"),
        (lambda: LPGNAS(formats=("8",)), BadInput, "'8' is no fixed-point format"),
        (lambda: LPGNAS(formats=("9.8",)), BadInput, "9.8: a fixed-point number has a sign and from 2 to 16"),
        (lambda: lpgnas(tiny_model(), small_task(), HOW), DoesNotFit, "it holds no graph"),
        (
            lambda: lpgnas(by_hand("gcn", sbm()), Task(small_task().test, small_task().test), HOW),
            DoesNotFit,
            "needs nodes to train on beside those that validate",
        ),
        (
            lambda: lpgnas(by_hand("gcn", sbm()), on(whole(sbm()).x, None), HOW),
            DoesNotFit,
            "examples are numbers of nodes with a class each",
        ),
        (
            lambda: lpgnas(
                by_hand("gcn", sbm()),
                on(torch.tensor([240]), torch.tensor([0])),
                HOW,
            ),
            DoesNotFit,
            "sbm has nodes 0 to 239 alone",
        ),
        (
            lambda: lpgnas(
                by_hand("gcn", sbm()),
                on(torch.tensor([0]), torch.tensor([-1])),
                HOW,
            ),
            DoesNotFit,
            "sbm has classes 0 to 3 alone",
        ),
        (
            lambda: lpgnas(by_hand("gcn", sbm()), small_task(), Training(4, 9, 1e30, optimizer="sgd"), SHORT),
            Diverged,
            "training diverged",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_the_quick_reproduction_reaches_its_bars():
    claim = reproduce(seed=0, quick=True)
    assert claim.bars and all(bar.passed for bar in claim.bars), claim.bars
