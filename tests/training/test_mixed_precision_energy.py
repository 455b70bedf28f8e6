"""Mixed precision: what it leaves alone, loss scaling, the trial that chooses, the network that goes on."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.inspection.meters import Energy, Part
from netweight.reproduce import mixed_precision_energy as reproduction
from netweight.training import distributed
from netweight.training import mixed_precision_energy as module
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, begin, train
from netweight.training.mixed_precision_energy import (
    MixedPrecisionEnergy,
    compared,
    hardware,
    loss,
    metered,
    mixed_precision_energy,
    saves,
)
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=16, rate=0.02)
SHORT = MixedPrecisionEnergy(repeats=2, steps=2, warm=1)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


def task(count: int = 48) -> Task:
    x = torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0].mean((1, 2)) > 0.5).long() + (x[:, 1, 2, 2] > 0.5).long()
    data = Data(x, y, low=0.0, high=1.0)
    return Task(data.take(16), data, train=data)


def taking(monkeypatch, **joules: float) -> list[tuple[str, int]]:
    """Every metered run takes what is given for its precision, one part in a thousand more each time."""
    count, seen = itertools.count(), []

    def run(model, data, how, *, steps, warm):
        seen.append((how.precision, how.seed))
        used = joules[how.precision] * (1 + 1e-3 * next(count))
        return Energy((Part("CPU", used, True, "metered"),), 2.0, 1.0), copy.deepcopy(model)

    monkeypatch.setattr(module, "metered", run)
    return seen


# Precision ------------------------------------------------------------------------------------------------


def trained(how: Training, hooks: Hooks | None = None) -> tuple[nn.Module, tuple[float, ...]]:
    model = network()
    return model, train(model, task().train, loss, how, hooks=hooks or Hooks())


def test_float32_is_the_plain_step():
    model, losses = trained(HOW)
    plain, data = network().train(), task().train
    optimizer, generator = torch.optim.Adam(plain.parameters(), 0.02), torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.randperm(48, generator=generator).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_passes_are_in_few_bits_and_weights_and_loss_are_not(precision):
    kinds = []
    model = network()
    model[3].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    losses = train(model, task().train, loss, replace(HOW, precision=precision))
    assert set(kinds) == {getattr(torch, precision)}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses == pytest.approx(trained(HOW)[1], rel=0.02) and losses != trained(HOW)[1]


def gradients(scale: float) -> list[torch.Tensor]:
    """Of one step in float32 through a scaler."""
    model, data = network(), task().train
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    at = Moment(0, 0, 1, torch.Generator())
    scaler.scale(loss(model, data.x, data.y, at)).backward()
    scaler.unscale_(optimizer)
    return [p.grad for p in model.parameters()]


def test_a_power_of_two_scales_without_a_trace():
    assert all(torch.equal(a, b) for a, b in zip(gradients(1.0), gradients(2.0**16)))


def test_a_gradient_that_is_not_finite_skips_its_step_alone_and_halves_the_scale():
    weights, scales = [], []

    def before(run: Running, at: Moment) -> None:
        assert at.step > 0 or run.scaler.get_scale() == 2.0**16
        weights.append(run.model[3].weight.detach().clone())

    def passes(run: Running, once, at: Moment) -> torch.Tensor:
        found = once()
        if at.step == 1:
            run.model[3].weight.grad[0, 0] = math.inf
        return found

    def after(run: Running, at: Moment) -> None:
        scales.append(run.scaler.get_scale())

    trained(replace(HOW, epochs=2, precision="float16"), Hooks(passes=passes, before=before, after=after))
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [True, False, True, True, True]
    assert scales == [2.0**16] + [2.0**15] * 5
    scaler = begin(network(), replace(HOW, precision="float16"), Hooks()).scaler
    assert (scaler.get_growth_interval(), scaler.get_growth_factor()) == (2000, 2.0)


# The trial ------------------------------------------------------------------------------------------------


def test_the_lower_precision_is_chosen_where_it_takes_less(monkeypatch):
    seen = taking(monkeypatch, float32=2.0, bfloat16=1.0)
    settings = MixedPrecisionEnergy(repeats=4, intensity=56.0)
    found = mixed_precision_energy(network(), task().blind(), replace(HOW, seed=7), settings)
    assert found.notes["precision"] == "bfloat16"
    plain = train(network(), task().train, loss, replace(HOW, seed=7, precision="bfloat16"))
    assert found.losses == plain
    order = [precision for precision, _ in seen]
    assert sorted(seen) == [(p, 7 + r) for p in ("bfloat16", "float32") for r in range(4)]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    told = json.loads(json.dumps(found.notes, allow_nan=False))
    assert told["trial"]["energy"]["ratio"] == pytest.approx(0.5, rel=0.01)
    assert told["trial"]["joules_per_step"]["low"][0] == pytest.approx(1 / 20, rel=0.01)
    assert told["energy"]["joules"] > 0 and told["energy"]["known"] in ("modelled", "measured")
    assert told["energy"]["grams_per_kwh"] == 56 and told["hardware"]["ratio"] > 0


def test_float32_stays_where_nothing_is_certain(monkeypatch):
    for low in (2.0, 3.0):  # the same, and more
        taking(monkeypatch, float32=2.0, bfloat16=low)
        found = mixed_precision_energy(network(), task().blind(), HOW, MixedPrecisionEnergy(repeats=4))
        assert found.notes["precision"] == "float32" and found.losses == trained(HOW)[1]


def test_what_saves():
    def runs(*joules: float) -> list[Energy]:
        return [Energy((Part("CPU", j, True, ""),), 1.0, 1.0) for j in joules]

    found = compared(runs(2.0, 2.1, 2.2), runs(1.9, 2.0, 2.0))
    assert 0.01 < found.joules.p < 0.2
    assert saves(found, 0.2) and not saves(found, 0.01)
    assert not saves(compared(runs(1.0, 1.01), runs(3.0, 3.01)), 0.05)
    assert found.watts == found.joules  # of runs of one second


def test_a_run_is_metered_after_it_is_warm(monkeypatch):
    meters = []

    class Watch:
        def __init__(self, device):
            self.seen, self.energy = [], Energy((), 0.0, 0.0)
            meters.append(self)

        def begin(self):
            self.seen.append(("begin", len(batches)))

        def end(self):
            self.seen.append(("end", len(batches)))

    monkeypatch.setattr(module, "Meter", Watch)
    batches, model = [], network()
    model.register_forward_hook(lambda m, i, o: batches.append(len(i[0])))
    before = copy.deepcopy(model.state_dict())
    _, copied = metered(model, task().train, HOW, steps=4, warm=2)
    assert meters[0].seen == [("begin", 2), ("end", 6)] and batches == [16] * 6
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not torch.equal(copied[3].weight, model[3].weight)
    metered(model, task().train, replace(HOW, batch=1000), steps=1, warm=1)
    assert batches[6:] == [48, 48]


def test_a_real_trial_runs_and_leaves_the_model_as_it_was():
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = mixed_precision_energy(model, task().blind(), HOW, SHORT)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    runs = found.notes["trial"]["joules_per_step"]
    assert all(len(joules) == 2 and min(joules) > 0 for joules in runs.values())
    assert found.losses[-1] < found.losses[0] and not found.model.training


@pytest.mark.parametrize("joules", [1.0, 4.0])  # bfloat16 is chosen, and is not
def test_a_stopped_run_goes_on_in_its_precision_to_the_same_numbers(tmp_path, monkeypatch, joules):
    settings, place = MixedPrecisionEnergy(repeats=3), tmp_path / "run.pt"
    taking(monkeypatch, float32=2.0, bfloat16=joules)
    whole = mixed_precision_energy(network(), task(), HOW, settings)
    real, calls = F.cross_entropy, iter(range(100))

    def stops(z, y):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(z, y)

    monkeypatch.setattr(F, "cross_entropy", stops)
    with pytest.raises(KeyboardInterrupt):
        mixed_precision_energy(network(), task(), HOW, settings, keep=Checkpoint(place))
    monkeypatch.setattr(F, "cross_entropy", real)
    seen = taking(monkeypatch, float32=1.0, bfloat16=3.0 - joules / 2)  # a trial would say otherwise
    again = mixed_precision_energy(network(), task(), HOW, settings, keep=Checkpoint(place, True))
    assert again.losses == whole.losses and again.notes["precision"] == whole.notes["precision"]
    assert not seen and "trial" not in again.notes
    state = whole.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())
    for other in (replace(settings, repeats=4), replace(settings, low="float16")):
        with pytest.raises(BadInput, match="of other weights, data or settings"):
            mixed_precision_energy(network(), task(), HOW, other, keep=Checkpoint(place, True))
    place.write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        mixed_precision_energy(network(), task(), HOW, settings, keep=Checkpoint(place, True))


# The rest -------------------------------------------------------------------------------------------------


def test_the_hardware_is_read_and_timed(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("flags : fpu avx512_bf16 amx_tile\n")
    found = hardware(torch.device("cpu"), 32, about)
    assert found["bfloat16"] and found["named"] == ["avx512_bf16"] and found["ratio"] > 0
    about.write_text("flags : fpu avx512f avx512_bf161\n")
    assert not hardware(torch.device("cpu"), 32, about)["bfloat16"]
    assert not hardware(torch.device("cpu"), 32, tmp_path / "nowhere")["bfloat16"]


def test_the_network_flows_on(tmp_path):
    data = task()
    small = mixed_precision_energy(network(), data.blind(), HOW, SHORT).network()
    small.save(tmp_path / "small")
    loaded, x = Compressed.load(tmp_path / "small", like=network()), data.test.x
    assert torch.equal(loaded(x), small(x)) and torch.equal(small.plain()(x), small(x))
    rows = pipeline.compare(network(), loaded, data, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, data, "onnx", tmp_path / "model.onnx")["same"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: MixedPrecisionEnergy(low="float32"), BadInput, "unknown lower precision 'float32'"),
        (lambda: MixedPrecisionEnergy(low="int8"), BadInput, "unknown lower precision 'int8'"),
        (lambda: MixedPrecisionEnergy(repeats=1), BadInput, "repeats=1.*a comparison needs two runs"),
        (lambda: MixedPrecisionEnergy(warm=0), BadInput, "warm=0"),
        (lambda: MixedPrecisionEnergy(level=1.0), BadInput, "level=1.0"),
        (lambda: MixedPrecisionEnergy(pue=0.0), BadInput, "PUE 0.0"),
        (lambda: run(replace(HOW, precision="bfloat16")), BadInput, "chooses one; .* low=bfloat16"),
        (lambda: run(HOW, unlabelled()), DoesNotFit, "training needs examples with class numbers"),
    ],
)
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def run(how: Training, data: Task | None = None) -> None:
    mixed_precision_energy(network(), data or task(), how, SHORT)


def unlabelled() -> Task:
    data = Data(torch.rand(4, 2, 5, 5))
    return Task(data, data)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(DoesNotFit, match="energy is compared in one process"):
        run(HOW)


def test_the_quick_reproduction_reaches_its_bars():
    claim = reproduction.reproduce(quick=True)
    assert [bar.name for bar in claim.bars] == [
        "accuracy, float32 and bfloat16, apart",
        "net energy of twice the steps, from 2.0",
    ]
    for bar in claim.bars:
        assert bar.passed, bar
    cell = claim.figures["batch 64, width 512"]
    assert cell["known"] in ("modelled", "measured") and 0 < cell["float32"]["joules a step"] < 100
    assert 0 < cell["bfloat16"]["watts"] < 1000
    json.dumps(claim.figures, allow_nan=False)
