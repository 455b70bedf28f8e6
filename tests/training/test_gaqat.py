"""GAQAT: disorder, what is left out and when, its two ends, and the network that goes on from here."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from netweight import pipeline
from netweight.cli.main import app
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.domains import in_equal_shares
from netweight.deployment import exports
from netweight.nn.quantized import quantized
from netweight.nn.quantizer import Levels
from netweight.nn.quantizer import rounded as to_levels
from netweight.testing import check_settings, tiny_model, tiny_task
from netweight.training import gaqat as module
from netweight.training.checkpoint import Checkpoint, fingerprint
from netweight.training.gaqat import (
    GAQAT,
    Watch,
    disorder,
    gaqat,
    groups,
    loss,
    rounded,
    selective,
    steps_of,
    weights_of,
)
from netweight.training.loop import Diverged, Hooks, Training, train
from netweight.training.sam import sagm
from netweight.verification.bounds import bounds

HOW = Training(4, batch=9, rate=2e-3, decay=0.1)
BRIEF = Training(2, batch=9, rate=2e-3, decay=0.1)
SHORT = GAQAT(3, window=3, below=0.6, rho=0.2)
NAMES = ["3 weight", "3 input", "7 weight", "7 input"]


def task() -> Task:
    """The tiny images, whose labels can be learnt; every third is of another domain."""
    plain = tiny_task()
    assert plain.train is not None
    x = plain.train.x
    y = (x[:, 0].mean((1, 2)) > 0.5).long() + 2 * (x[:, 1, :3].mean((1, 2)) > 0.5).long()
    data = Data(x, y, 10, "tiny", low=0.0, high=1.0, domain=torch.arange(len(x)) % 3)
    return Task(data.take(16), plain.test, train=data)


def fitted(settings: GAQAT, passes=None, how: Training = HOW) -> tuple[nn.Module, Watch]:
    """The rounded network and what was watched, by GAQAT or by these passes."""
    data = task().train
    order = in_equal_shares(data.domain, how.batch)
    network = rounded(tiny_model(), data.x[order(torch.Generator().manual_seed(0))[0]], settings)
    watch = Watch([*steps_of(network)], settings.window)
    hooks = Hooks(groups(settings), order, passes or selective(watch, settings), state=watch)
    train(network, data, loss, how, hooks=hooks)
    return network, watch


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_disorder_by_hand():
    g = torch.tensor(
        [[1.0, 2.0, 0.0], [-1.0, 3.0, 0.0], [2.0, 1.0, -1.0], [-3.0, 9.0, -1.0], [1.0, 9.0, 1.0]]
    )
    assert disorder(g).tolist() == [1.0, 0.0, 0.5]


@given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=2, max_size=30), size=st.floats(1e-3, 1e3))
def test_disorder_is_a_share_of_turns_whatever_sizes_and_signs(signs, size):
    g = torch.tensor(signs, dtype=torch.float64)
    turns = sum(a != b for a, b in zip(signs, signs[1:])) / (len(signs) - 1)
    assert disorder(g).item() == pytest.approx(turns)
    assert disorder(-size * g) == disorder(g) == disorder(g.flip(0))


def test_what_is_watched_by_hand():
    watch = Watch(["a", "b"], 3)
    for task_, smooth in (([1, 1], [1, -1]), ([-1, 2], [-1, -9]), ([1, 1], [2, 1])):
        watch.see(2 * torch.tensor(task_).float(), 2 * torch.tensor(smooth).float(), scale=2.0)
    watch.decide(0.5)  # turns: 1 of a, 0 of b
    assert watch.frozen.tolist() == [False, True]
    notes = watch.notes()
    assert notes["steps"]["a"] == {
        "task": 1.0, "smooth": pytest.approx(4 / 3), "conflict": 0.0, "opposed": 0.0, "frozen": 0.0,
        "thawed": 0, "disorder": 1.0,
    }  # fmt: skip
    b = notes["steps"]["b"]
    assert (b["conflict"], b["opposed"], b["frozen"], b["disorder"]) == (pytest.approx(2 / 3), 1.0, 0.0, 0.0)
    for value in (1.0, -1.0, 1.0):  # watched while it is left out; only these three count now
        watch.see(torch.tensor([1.0, value]), torch.tensor([1.0, 1.0]))
    watch.decide(0.5)
    assert watch.frozen.tolist() == [True, False] and watch.thawed.tolist() == [0, 1]
    assert watch.notes()["steps"]["b"]["frozen"] == 0.5 and watch.notes()["windows"] == 2
    assert watch.notes()["steps"]["b"]["opposed"] == 0.5  # sums are of a window alone
    assert json.dumps(watch.notes())


def test_each_layer_between_the_first_and_the_last_is_rounded_by_lsq():
    network = rounded(tiny_model(), task().train.x, GAQAT(3))
    assert [*steps_of(network)] == NAMES
    levels = [(q.weight_rounding.levels, q.input_rounding.levels) for q in quantized(network).values()]
    assert [(w.low, w.high, i.low, i.high) for w, i in levels] == [(-4, 3, 0, 7)] * 2  # after ReLU
    signed = quantized(rounded(tiny_model(), task().train.x - 1, GAQAT(3, layers=("0",))))["0"]
    assert signed.input_rounding.levels.low == -4
    rest, steps = groups(GAQAT(faster=7.0))(network)
    assert {id(p) for p in steps["params"]} == {id(p) for p in steps_of(network).values()}
    assert (steps["factor"], steps["weight_decay"]) == (7.0, 0.0)
    assert len(rest["params"]) + 4 == len([*network.parameters()]) and "weight_decay" not in rest


def test_r_0_is_sagm_and_r_above_1_leaves_every_task_gradient_out():
    settings = GAQAT(3, window=3, below=0.0, rho=0.2)
    network, watch = fitted(settings, how=BRIEF)
    other, _ = fitted(settings, sagm(0.2, settings.alpha, weights_of), BRIEF)
    assert same(network, other) and not watch.held.any()
    _, watch = fitted(GAQAT(3, window=3, below=1.01, rho=0.2), how=BRIEF)
    assert watch.held.tolist() == [int(watch.seen) - 3] * 4 and watch.thawed.tolist() == [0] * 4


@pytest.mark.parametrize("step", [0, 2])  # the last of a window is as the window was
def test_the_gradient_of_a_step_is_both_or_that_of_flatness_alone(step):
    given_ = []

    class Scaler:
        def get_scale(self):
            return 1.0

    class Run:
        scaler = Scaler()

    data, run = task().train, Run()
    run.model = rounded(tiny_model(), data.x, SHORT)
    steps = steps_of(run.model)

    def once():
        for p in run.model.parameters():
            p.grad = None
        F.cross_entropy(run.model.train()(data.x), data.y).backward()
        given_.append({name: p.grad.clone() for name, p in run.model.named_parameters()})
        return torch.zeros(())

    watch = Watch(NAMES, 3)
    watch.frozen[1] = True
    sizes = [p.detach().clone() for p in steps.values()]
    selective(watch, SHORT)(run, once, type("At", (), {"step": step})())
    task_, smooth = given_
    names = {id(p): name for name, p in run.model.named_parameters()}
    for index, p in enumerate(steps.values()):
        name = names[id(p)]
        wanted = smooth[name] if index == 1 else task_[name] + smooth[name]
        assert torch.equal(p.grad, wanted) and task_[name] != smooth[name]
        assert watch.size[:, index].tolist() == [abs(task_[name].item()), abs(smooth[name].item())]
        assert torch.equal(p.detach(), sizes[index])
    assert torch.equal(run.model[9].weight.grad, task_["9.weight"] + smooth["9.weight"])
    assert watch.frozen.tolist() == ([False, True, False, False] if step == 0 else [True] * 4)


@given(value=st.floats(0.15, 2.0), step=st.floats(0.2, 1.0))
def test_the_gradient_of_a_step_is_that_of_the_straight_through_loss(value, step):
    """d/ds of (x / s + c) s with the residual c = round(x / s) - x / s held, inside; of the end outside."""
    k = round(value / step)
    if abs(value / step - math.floor(value / step) - 0.5) < 1e-3:
        return
    s = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    to_levels(torch.tensor([value], dtype=torch.float64), s, Levels.signed(4)).sum().backward()
    held = k - value / step
    wanted = held if value / step <= 7 else 7.0
    assert s.grad.item() == pytest.approx(wanted, abs=1e-9)


def test_gradients_come_and_go_and_weights_always_move():
    network, watch = fitted(SHORT)
    assert 0 < watch.held.sum() < watch.seen * 4 and watch.thawed.any()
    assert int(watch.seen) == 16 and int(watch.windows) == 5  # 11 of the largest domain, 3 a step
    other, _ = fitted(GAQAT(3, window=3, below=0.0, rho=0.2))
    assert not same(network, other)
    moving, _ = fitted(GAQAT(3, window=3, below=0.6, rho=0.2, move_steps=True))
    assert not same(network, moving)


def test_the_same_comes_twice_and_nothing_given_is_changed():
    model, data = tiny_model(), task()
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (gaqat(model, data.blind(), HOW, SHORT) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance) and not first.model.training
    assert first.losses == second.losses and first.notes == second.notes
    network, watch = fitted(SHORT)
    assert torch.equal(outputs(network, data.train), outputs(first.network().model, data.train))
    assert first.notes == watch.notes() and first.losses[-1] < first.losses[0]
    check_settings(SHORT)


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    place, whole = tmp_path / "run.pt", gaqat(tiny_model(), task(), HOW, SHORT)
    real, calls = module.loss, iter(range(100))

    def stops(*args):
        if next(calls) == 21:  # in the second pass of a step of the third epoch
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        gaqat(tiny_model(), task(), HOW, SHORT, keep=Checkpoint(place))
    monkeypatch.setattr(module, "loss", real)
    resumed = Checkpoint(place, resume=True)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        gaqat(tiny_model(), task(), HOW, GAQAT(3, window=3, below=0.5, rho=0.2), keep=resumed)
    other = task()
    moved = Task(
        other.calibration, other.test, train=Data(other.train.x, other.train.y, domain=torch.arange(32) % 2)
    )
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        gaqat(tiny_model(), moved, HOW, SHORT, keep=resumed)
    assert len({fingerprint(tiny_model(), each.train, HOW, "") for each in (other, moved)}) == 2
    again = gaqat(tiny_model(), task(), HOW, SHORT, keep=resumed)
    assert again.losses == whole.losses and again.notes == whole.notes
    assert torch.equal(again.network()(task().train.x), whole.network()(task().train.x))


def test_the_network_flows_on(tmp_path):
    model = small_model()
    x = torch.rand(24, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    data = Data(x, torch.arange(24) % 3, low=0.0, high=1.0, domain=torch.arange(24) // 12)
    given_ = Task(data.take(8), data.take(8), train=data)
    settings = GAQAT(3, window=2, layers=("0", "3"))
    small = gaqat(model, given_, Training(1, batch=8), settings).network()
    assert [*small.packed] == ["0", "3"] and all(form.grid.bits == 3 for form in small.packed.values())
    small.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(loaded(x), small(x)) and torch.equal(small.plain()(x), small(x))
    rows = pipeline.compare(model, loaded, given_, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, given_, "onnx", tmp_path / "model.onnx")["same"]


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3),
        ).eval()  # fmt: skip


def test_the_command_line_takes_domains_from_a_file(tmp_path):
    data = digits.train().take(160)
    place, out = tmp_path / "seen.npz", tmp_path / "small"
    arrays = {"x": data.x.numpy(), "y": data.y.numpy()}
    words = [
        "train",
        "digits-cnn",
        "--data",
        str(place),
        "--method",
        "gaqat",
        "--epochs",
        "1",
        "--batch",
        "8",
    ]
    words += ["--set", "bits=3", "--set", "window=2", "--out", str(out), "--json"]
    np.savez(place, **arrays)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "gaqat needs the domain of each example; give a .npz file with an array domain" in done.stderr
    np.savez(place, **arrays, domain=np.array(["street", "studio"])[np.arange(160) % 2])
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["examples"] == 40 and said["notes"]["windows"] >= 2
    assert [*said["notes"]["steps"]] == ["4 weight", "4 input", "8 weight", "8 input"]
    assert pipeline.load(out)(data.x[:2]).shape == (2, 10)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: GAQAT(bits=1), BadInput, "bits=1: weights and inputs take from 2 to 8 bits"),
        (lambda: GAQAT(bits=9), BadInput, "bits=9"),
        (lambda: GAQAT(window=1), BadInput, "window=1: turns are counted over 2 steps or more"),
        (lambda: GAQAT(below=math.nan), BadInput, "below=nan"),
        (lambda: GAQAT(faster=0.0), BadInput, "faster=0.0"),
        (lambda: GAQAT(rho=-1.0), BadInput, "rho=-1.0"),
        (lambda: gaqat(tiny_model(), tiny_task(), HOW), DoesNotFit, "gaqat needs the domain of each example"),
        (
            lambda: gaqat(tiny_model(), Task(Data(torch.rand(4, 4, 7, 7)), tiny_task().test), HOW),
            DoesNotFit,
            "training needs examples with class numbers",
        ),
        (lambda: gaqat(tiny_model(), task(), Training(1, 2)), BadInput, "no example of each of 3 domains"),
        (
            lambda: gaqat(nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), task(), HOW),
            DoesNotFit,
            "it has no Linear or Conv layer between its first and its last",
        ),
        (
            lambda: gaqat(tiny_model(), task(), HOW, GAQAT(layers=("3", "1"))),
            DoesNotFit,
            "1: a BatchNorm2d is not rounded by gaqat",
        ),
        (lambda: gaqat(tiny_model(), task(), HOW, GAQAT(layers=("33",))), DoesNotFit, "33: there is no such"),
        (
            lambda: gaqat(tiny_model(), task(), Training(4, 9, 1e30, optimizer="sgd"), SHORT),
            Diverged,
            "training diverged in epoch 1",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
