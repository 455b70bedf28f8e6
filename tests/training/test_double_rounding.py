"""Training at several widths: turns and rates, mixed widths, the search, resuming, and what comes out."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit, ImpossibleBudget
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs, token_loss
from netweight.evidence import widths as evidence
from netweight.nn.switch_norm import SwitchNorms
from netweight.nn.switchable import switched, widths_of
from netweight.pipeline import compare
from netweight.testing import check_form, tiny_model, tiny_task
from netweight.training import double_rounding as dr
from netweight.training import loop
from netweight.training.checkpoint import Checkpoint
from netweight.training.double_rounding import (
    DoubleRounding,
    assigned,
    costs,
    double_rounding,
    eta,
    in_turn,
    neighbours,
)
from netweight.training.loop import Moment, Training
from netweight.training.trained import Trained
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=8, rate=5e-3)
TASK = tiny_task()


def trained(how: Training = HOW, *, keep=None, **own) -> Trained:
    return double_rounding(tiny_model(), TASK.blind(), how, DoubleRounding(**own), keep=keep)


def state(found: Trained) -> list[torch.Tensor]:
    forms = found.change.packed.values()
    return [*found.model.state_dict().values(), *(t for f in forms for t in (f.codes, f.step))]


def same(a: Trained, b: Trained) -> bool:
    return a.losses == b.losses and all(torch.equal(x, y) for x, y in zip(state(a), state(b)))


@pytest.fixture(scope="module")
def usual() -> Trained:
    return trained()


def test_it_trains_a_copy_and_twice_the_same(usual):
    model = tiny_model()
    before = [p.clone() for p in model.state_dict().values()]
    again = double_rounding(model, TASK.blind(), HOW)
    assert same(usual, again)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
    assert list(usual.change.packed) == ["3", "7"]  # neither the first nor the last layer
    assert usual.change.packed["3"].widths == (8, 6, 4, 2)
    assert widths_of(usual.network()) == {"3": 8, "7": 8}
    assert not same(usual, trained(dataclasses.replace(HOW, seed=1)))
    for form, name in zip(usual.change.packed.values(), ("3", "7")):
        check_form(form, usual.model.get_submodule(name).weight)


@pytest.mark.parametrize(
    "own",
    [
        {"scaling": "none"}, {"scaling": "literal"}, {"together": True}, {"distil": 1.0}, {"mixed": 1.0},
        {"floor": True}, {"inputs": False}, {"bits": (4, 3, 2)}, {"layers": ("3",)},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_is_heard(usual, own):
    found = trained(**own)
    assert not same(usual, found)
    bits = own.get("bits", (8, 6, 4, 2))
    assert list(found.notes["step gradients"]) == [str(b) for b in bits]
    assert all(value > 0 for value in found.notes["step gradients"].values())
    small = found.network()
    for b in bits:
        out = outputs(switched(small, dict.fromkeys(widths_of(small), b)).model, TASK.test)
        assert out.isfinite().all()


def test_each_width_steps_at_once_with_a_rate_of_its_own(monkeypatch):
    """The rates that the optimizer is given, against the formula."""
    seen, how = [], Training(epochs=1, batch=16, rate=1e-2, decay=0.1)

    def watched(self, run, at):
        before(self, run, at)
        layers = dr.layers_of(run.model)
        g = sum(min(abs(float(layer.step.grad)), 1.0) for layer in layers.values()) / len(layers)
        widths = {layer.width for layer in layers.values()}
        rest, steps = run.optimizer.param_groups
        seen.append((widths, g, rest["lr"], steps["lr"], rest["weight_decay"], steps["weight_decay"]))

    before = dr.Turn.before
    monkeypatch.setattr(dr.Turn, "before", watched)
    for scaling in ("adaptive", "literal", "none"):
        seen.clear()
        trained(how, scaling=scaling)
        assert [widths for widths, *_ in seen] == [{8}, {6}, {4}, {2}] * 2
        for (bits,), g, rate, own, decay, none in seen:
            by = {8: 1, 6: 0.1, 4: 0.01, 2: 0.001}[bits]
            wanted = {"adaptive": by * 1e-2 * (1 - g), "literal": by * max(1e-2 - g, 0), "none": 1e-2}
            assert (rate, decay, none) == (1e-2, 0.1, 0.0)
            assert own == pytest.approx(wanted[scaling])
    seen.clear()
    trained(how, together=True)
    assert [own for *_, own, _, _ in seen] == [1e-2] * 2  # one step for all widths


def test_rates_fall_by_the_width():
    assert [eta(fewer) for fewer in range(7)] == pytest.approx([1, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001])


def test_all_widths_together_add_up_their_gradients(monkeypatch):
    """One step of SGD on all widths moves a weight by the sum of the gradients that each width has alone."""
    how, alone = Training(epochs=1, batch=32, rate=1e-3, optimizer="sgd"), []
    real = dr.use

    def watched(net, norms, widths):
        real(net, norms, widths)
        if net.training:
            copied = copy.deepcopy(net)
            token_loss(copied(TASK.train.x), TASK.train.y).mean().backward()
            alone.append((set(widths.values()), copied.get_submodule("0").weight.grad))

    monkeypatch.setattr(dr, "use", watched)
    found = trained(how, together=True)
    assert [widths for widths, _ in alone] == [{8}, {6}, {4}, {2}]
    moved = found.model.get_submodule("0").weight - tiny_model().get_submodule("0").weight
    assert torch.allclose(moved, -1e-3 * sum(gradient for _, gradient in alone), rtol=1e-3, atol=1e-7)
    sizes = found.notes["step gradients"]
    assert sizes["2"] > sizes["8"] > 0


def test_one_example_left_over_joins_the_batch_before_it():
    data, net = TASK.train.rows(slice(0, 17)), trained().model
    generator = torch.Generator().manual_seed(0)
    rows = in_turn(data, 8, net, 2)(generator)
    assert [len(some) for some in rows] == [8, 8, 9, 9]
    assert all(torch.equal(a, b) for a, b in zip(rows[::2], rows[1::2]))
    assert sorted(torch.cat(rows[::2]).tolist()) == list(range(17))
    assert [len(some) for some in in_turn(data, 8, nn.Linear(2, 2), 1)(generator)] == [8, 8, 1]


def test_mixed_widths_have_norms_for_pairs_and_traces():
    found = trained(mixed=0.5)
    (norms,) = found.change.rewrites
    assert norms.pairs
    assert len(norms.keys) == 16
    assert set(found.notes["traces"]) == {"3", "7"}
    small = found.network()
    other = switched(small, {"3": 2, "7": 6})
    assert outputs(other.model, TASK.test).isfinite().all()


def test_layers_draw_widths_by_their_traces_and_more_often_as_time_goes_on():
    norms = SwitchNorms.of({}, (8, 6, 4, 2), 8, pairs=True)
    turn = dr.Turn(norms, DoubleRounding(mixed=0.8), 4, {"flat": 1.0, "steep": 3.0})
    turn.bits = 2

    def shares(epoch: int) -> dict[str, list[float]]:
        at = Moment(0, epoch, 1, torch.Generator().manual_seed(0))
        draws = [turn.drawn(["flat", "steep"], at) for _ in range(4000)]
        return {name: [sum(d[name] == b for d in draws) / 4000 for b in (8, 6, 4, 2)] for name in draws[0]}

    for epoch, sigma in ((0, 0.2), (3, 0.8)):
        found = shares(epoch)
        for name, odds in (("flat", (5, 5, 5, 5)), ("steep", (8, 6, 4, 2))):
            wanted = [sigma * part / 20 + (1 - sigma) * (b == 2) for part, b in zip(odds, (8, 6, 4, 2))]
            assert found[name] == pytest.approx(wanted, abs=0.03)
    turn.settings = DoubleRounding()
    assert shares(3) == {"flat": [0, 0, 0, 1], "steep": [0, 0, 0, 1]}


def test_the_highest_width_teaches_the_others():
    turn = dr.Turn(SwitchNorms.of({}, (8, 2), 8), DoubleRounding((8, 2), distil=0.5), 1, {})
    net, x, y = nn.Linear(3, 4), torch.rand(5, 3), torch.tensor([0, 1, 2, 3, 0])
    at = Moment(0, 0, 1, torch.Generator())
    plain = nn.functional.cross_entropy(net(x), y)
    taught = net(x).detach()
    assert torch.allclose(turn.loss()(net, x, y, at), plain)
    turn.bits, net = 2, nn.Linear(3, 4)
    p, q = taught.log_softmax(1), net(x).log_softmax(1)
    wanted = nn.functional.cross_entropy(net(x), y) + 0.5 * (p.exp() * (p - q)).sum(1).mean()
    assert torch.allclose(turn.loss()(net, x, y, at), wanted)


def test_stopped_and_resumed_gives_the_same(tmp_path, monkeypatch):
    keep, real = Checkpoint(tmp_path / "run.pt", resume=True), loop.store
    whole = trained(mixed=0.7)

    def stops(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(mixed=0.7, keep=keep)
    monkeypatch.setattr(loop, "store", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        trained(mixed=0.6, keep=keep)
    found = trained(mixed=0.7, keep=keep)
    assert same(whole, found)
    assert whole.notes == found.notes


def test_the_network_flows_on(tmp_path, usual):
    model, small = tiny_model(), usual.network()
    small.save(tmp_path / "small")
    back = switched(Compressed.load(tmp_path / "small", like=model), {"3": 4, "7": 4})
    proof = compare(model, back, TASK, within=Linf(0.01))
    assert {row.question for row in proof.rows} >= {"average", "worst found", "worst possible"}
    at = [row for row in proof.rows if row.quantity.startswith("accuracy at")]
    assert [row.quantity for row in at] == [f"accuracy at {b} bits" for b in (8, 6, 4, 2)]
    assert at[2].compressed == proof["accuracy"].compressed  # it runs at 4 bits now
    assert at[2].low <= at[2].compressed <= at[2].high
    assert (
        evidence.rows(
            model, Compressed(model, small.plan, dataclasses.replace(small.change, packed={})), TASK
        )
        == []
    )
    x = TASK.test.x[:2]
    box = bounds(back.plain(), x, Linf(0.01))
    assert (box.lower <= back.model(x) + 1e-4).all()
    assert (back.model(x) <= box.upper + 1e-4).all()
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from netweight.deployment.onnx import export

    assert export(back, tmp_path / "net.onnx", x).same


# The search ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=5, max_size=5), st.integers(10, 40)
)
@settings(max_examples=30, deadline=None)
def test_the_best_widths_are_those_of_brute_force(rows, total):
    bits = (8, 4, 2)
    table = {str(i): dict(zip(bits, row)) for i, row in enumerate(rows)}
    found = assigned(table, total / 5)
    every = [w for w in itertools.product(bits, repeat=5) if sum(w) <= total]
    best = min(sum(table[str(i)][b] for i, b in enumerate(w)) for w in every)
    assert sum(found.values()) <= total
    assert sum(table[name][b] for name, b in found.items()) == pytest.approx(best)


def test_costs_are_the_errors_weighted_by_the_traces(usual):
    small, traces = usual.network(), {"3": 2.0, "7": -1.0}
    table = costs(usual.model, small, traces, (8, 2))
    weight = usual.model.get_submodule("3").weight
    decoded = switched(small, {"3": 2, "7": 2}).packed["3"].decode()
    wanted = 2.0 / weight.numel() * float((decoded - weight).double().square().sum())
    assert table["3"][2] == pytest.approx(wanted)
    assert table["3"][8] < table["3"][2]
    assert set(table["7"].values()) == {0.0}  # a negative estimate of a trace counts as none
    assert neighbours({"a": 8, "b": 2}, (8, 2)) == [{"a": 2, "b": 2}, {"a": 8, "b": 8}]
    with pytest.raises(ImpossibleBudget):
        assigned(table, 1.5)


@pytest.mark.parametrize(
    "own",
    [{"bits": ()}, {"bits": (8, 1)}, {"bits": (9, 8)}, {"bits": (2, 8)}, {"bits": (8, 8)}, {"mixed": 1.5},
     {"distil": -1.0}, {"scaling": "adaptiv"}],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_exist(own):
    with pytest.raises(BadInput):
        DoubleRounding(**own)


def test_bad_input():
    unlabelled = Task(Data(TASK.train.x, None), TASK.test)
    with pytest.raises(DoesNotFit, match="class numbers"):
        double_rounding(tiny_model(), unlabelled, HOW)
    with pytest.raises(DoesNotFit, match="no layers between the first and the last"):
        double_rounding(nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), TASK, HOW)
    with pytest.raises(BadInput, match="at least two examples a step"):
        trained(Training(epochs=1, batch=1))
    with pytest.raises(DoesNotFit, match="1: a BatchNorm2d"):
        trained(layers=("1",))
    broken = tiny_model()
    broken[3].weight.data[0] = float("nan")
    with pytest.raises(loop.Diverged):
        double_rounding(broken, TASK, HOW)
