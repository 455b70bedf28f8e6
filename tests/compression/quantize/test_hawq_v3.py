"""HAWQ-V3: the laws, exact programmes, grids that integers can keep, tuning, bad input, the command line."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from netweight import pipeline
from netweight.compression.quantize import hawq_v3 as file
from netweight.compression.quantize.hawq_v3 import HAWQV3, ceilings, hawq_v3, options, positions, rounding
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit, ImpossibleBudget
from netweight.core.plan import Budget, Plan
from netweight.core.rewrite import FoldBatchNorm, residual, rewritten
from netweight.core.task import Data, Task, outputs
from netweight.core.ties import in_order
from netweight.evidence.cost import multiply_adds
from netweight.nn.simulated import Simulated
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task

FAST = {"probes": 1, "examples": 8}
LAYERS = ["0", "3", "7", "9"]


def widths(change):
    return [form.bits_per_code for form in change.packed.values()]


@pytest.mark.parametrize(
    "settings",
    [
        HAWQV3(**FAST),
        HAWQV3((4,), activation_bits="weights", epochs=1, rate=1e-2, **FAST),
        HAWQV3((2, 3, 4, 8), None, None, symmetric=False, fraction=0.3, epochs=1, **FAST),
    ],
    ids=["default", "tuned", "weights alone"],
)
def test_laws(settings):
    check_compressor(hawq_v3, settings)


def test_laws_on_a_language_model_with_its_table():
    model = tiny_language_model()
    layers = weighted(model, embeddings=True)
    check_compressor(hawq_v3, HAWQV3(**FAST), model=model, task=tiny_text_task(), layers=layers)
    change = hawq_v3(model, tiny_text_task(), layers, HAWQV3(**FAST))
    assert change.activations.keys() == set(weighted(model)) and "embedding" in change.packed
    bits = {name: form.bits_per_code for name, form in change.packed.items()}
    assert bits["query"] == bits["key"] == bits["value"] == 8 and bits["head"] == 8  # first, tied; last


def test_norms_are_folded_and_inputs_and_biases_lie_on_grids_that_integers_keep():
    model, task = tiny_model(), tiny_task()
    change = hawq_v3(model, task, LAYERS, HAWQV3((4,), activation_bits="weights", **FAST))
    assert [type(rewrite) for rewrite in change.rewrites] == [FoldBatchNorm] * 2
    assert residual(model, change.rewrites, task.test.x) <= 1e-9
    assert widths(change) == [8, 4, 4, 8]  # the first and the last have 8 bits
    assert [change.activations[layer].bits for layer in LAYERS] == [8, 4, 4, 8]
    for layer in LAYERS:
        form, step = change.packed[layer], change.activations[layer].scale
        assert float(change.activations[layer].zero) == 0  # inputs in [0, 1] or after ReLU
        steps = change.biases[layer].double() / (form.scale.reshape(-1).double() * step.double())
        assert ((steps - steps.round()).abs() < 1e-3 + 1e-6 * steps.abs()).all() and steps.abs().max() > 1
        assert form.zero is None and form.group == 0


def test_ranges_by_hand():
    unsigned, signed, dead = rounding(0.0, 5.1, 8), rounding(-6.35, 2.0, 8), rounding(0.0, 0.0, 4)
    assert (float(unsigned.scale), float(unsigned.zero)) == (pytest.approx(0.02), 0)
    assert (float(signed.scale), float(signed.zero)) == (pytest.approx(0.05), 128)
    assert float(dead.scale) == pytest.approx(1 / 15)
    assert float(rounding(-1.0, 7.0, 4).module()(torch.tensor(-7.0))) == pytest.approx(-7.0)


def test_ranges_are_moving_averages_for_the_width_of_the_layer(monkeypatch):
    asked = []
    real = file.input_ranges

    def spied(net, data, layers, how="min-max", *, bits=8):
        asked.append((tuple(layers), how, bits))
        return real(net, data, layers, how, bits=bits)

    monkeypatch.setattr(file, "input_ranges", spied)
    settings = HAWQV3((4,), activation_bits="weights", range="mse", **FAST)
    hawq_v3(tiny_model(), tiny_task(), LAYERS, settings)
    assert asked[1:] == [(("0", "9"), "mse", 8), (("3", "7"), "mse", 4)]
    hawq_v3(tiny_model(), tiny_task(), LAYERS, HAWQV3((4,), **FAST))
    assert asked[-1] == (tuple(LAYERS), "moving average", 8)


@pytest.mark.parametrize("limit", ["size", "bops"])
def test_fraction_0_is_all_narrow_and_1_all_wide(limit):
    model, task = tiny_model(), tiny_task()
    for fraction, expected in ((0.0, [8, 4, 4, 8]), (1.0, [8, 8, 8, 8])):
        how = HAWQV3(limit=limit, fraction=fraction, activation_bits="weights", **FAST)
        assert widths(hawq_v3(model, task, LAYERS, how)) == expected


def table(settings):
    model, task = tiny_model(), tiny_task()
    net = rewritten(model, [])
    sharp = {"0": 3.0, "3": 2.0, "7": 0.5, "9": 1.0}
    return options(net, sharp, in_order(net, task.calibration.x[:1], LAYERS), settings)


@pytest.mark.parametrize("limit", ["size", "bops"])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.75])
def test_the_programme_is_brute_force(limit, fraction):
    settings = HAWQV3((2, 3, 4, 8), None, 8, limit=limit, fraction=fraction)
    priced = table(settings)
    groups = [[option for option in priced if option.layer == layer] for layer in LAYERS]
    name = "bits" if limit == "size" else limit
    ends = [sum(of(o.cost[name] for o in group) for group in groups) for of in (min, max)]
    ceiling = ends[0] + fraction * (ends[1] - ends[0])
    least = min(
        sum(o.distortion for o in plan)
        for plan in itertools.product(*groups)
        if sum(o.cost[name] for o in plan) <= ceiling
    )
    bits = file.chosen(priced, [], settings)
    assert sum(o.distortion for o in priced if o.settings["bits"] == bits[o.layer]) == pytest.approx(least)


def test_omega_and_costs_are_their_definitions():
    model, x = tiny_model(), tiny_task().calibration.x[:1]
    macs = multiply_adds(model, x)
    for option in table(HAWQV3((4, 8), None, 8)):
        weight, bits = weight_of(model, option.layer), option.settings["bits"]
        rows = weight.flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
        moved = float(((rows / scale).round() * scale - rows).double().square().sum())
        sharp = {"0": 3.0, "3": 2.0, "7": 0.5, "9": 1.0}[option.layer]
        assert option.distortion == pytest.approx(sharp * moved, rel=1e-4)
        assert option.cost["bits"] == bits * weight.numel() + 16 * len(weight)
        assert option.cost["bops"] == pytest.approx(
            macs[option.layer] * option.cost["bits"] / weight.numel() * 8
        )


@pytest.mark.parametrize(
    "module, x",
    [
        (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), dilation=(1, 2), groups=2), torch.rand(1, 4, 7, 8)),
        (nn.Conv1d(2, 3, 3, padding="same"), torch.rand(1, 2, 9)),
        (nn.Conv3d(1, 2, (1, 2, 3), padding=(0, 1, 2)), torch.rand(1, 1, 3, 4, 5)),
        (nn.Linear(3, 2), torch.rand(1, 5, 3)),
    ],
)
def test_positions(module, x):
    places = module(x)[0].numel() // len(module.weight)
    assert positions(module, x) == places


def test_latency_is_measured_and_limited(monkeypatch):
    monkeypatch.setattr(file, "seconds", lambda layer, x: float(layer.form.bits_per_code))
    priced = table(HAWQV3(limit="latency", ends=None))
    assert [option.cost["latency"] for option in priced] == [8.0, 4.0] * 4
    assert ceilings(priced, HAWQV3(limit="latency", fraction=0.25)) == Budget(latency=20.0)
    assert ceilings(priced, HAWQV3(mean_bits=3.0, latency=7.0)) == Budget(bits=3.0, latency=7.0)
    assert "latency" not in table(HAWQV3())[0].cost


def test_negative_and_missing_traces_count_as_the_least(monkeypatch):
    model, task = tiny_model(), tiny_task()
    sharp = {"0": 144.0, "3": -5.0, "7": float("nan"), "9": 256.0}
    seen = []

    def spied(net, data, layers, *, most, seed):
        seen.append((data.batch, most, seed))
        return {layer: sharp[layer] for layer in layers}

    monkeypatch.setattr(file, "settled", spied)
    settings = HAWQV3(probes=3, seed=7)
    found = file.per_weight(model, task.calibration, LAYERS, settings)
    assert seen == [(16, 3, 7)]
    a, d = 144.0 / model[0].weight.numel(), 256.0 / model[9].weight.numel()
    assert found == pytest.approx({"0": a, "3": min(a, d), "7": min(a, d), "9": d})
    sharp.update(dict.fromkeys(sharp, -1.0))
    assert set(file.per_weight(model, task.calibration, LAYERS, settings).values()) == {1.0}
    assert set(file.per_weight(model, task.calibration, LAYERS, HAWQV3((4,))).values()) == {1.0}
    assert len(seen) == 2  # with one width there is nothing to choose and nothing is probed


class Branches(nn.Module):
    """A convolution and a shortcut read one tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.main = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.down = nn.Conv2d(8, 8, 1, stride=2)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.main(x) + self.down(x)).mean((2, 3)))


def test_a_downsampling_layer_has_the_bits_of_the_one_beside_it(monkeypatch):
    model, task = Branches().eval(), tiny_task()
    monkeypatch.setattr(file, "per_weight", lambda *a: {"first": 1.0, "main": 1e-9, "down": 1e3, "last": 1.0})
    rounded = hawq_v3(model, task, weighted(model), HAWQV3(activation_bits="weights", fraction=0.9))
    assert widths(rounded) == [8, 4, 4, 8]
    assert rounded.activations["main"].bits == rounded.activations["down"].bits == 4
    alone = hawq_v3(model, task, weighted(model), HAWQV3(activation_bits=None, fraction=0.9))
    assert widths(alone) == [8, 4, 8, 8] and not alone.activations and not alone.biases


def test_tuning_lowers_the_loss_and_is_what_is_packed(monkeypatch):
    model, task = tiny_model(), tiny_task()
    settings = HAWQV3((3,), None, 4, epochs=20, rate=5e-2, batch=8, **FAST)
    judge = Task(task.train, task.train, "loss").judge

    def loss(net):
        return float(judge.of(outputs(net, task.train), task.train.y).mean())

    plain = hawq_v3(model, task, LAYERS, dataclasses.replace(settings, epochs=0))
    tuned = hawq_v3(model, task, LAYERS, settings)
    small = assemble(model, tuned, Plan()).model
    assert loss(small) < 0.8 * loss(assemble(model, plain, Plan()).model)
    assert tuned.activations["3"].scale == plain.activations["3"].scale  # ranges are frozen
    made = {}
    real = file.tuned
    monkeypatch.setattr(file, "tuned", lambda *a: made.setdefault("net", real(*a)))
    hawq_v3(model, task, LAYERS, settings)
    for layer in LAYERS:
        simulated = Simulated(made["net"].get_submodule(layer), settings.grid(3), tuned.activations[layer])
        file.replace(made["net"], layer, simulated)
    assert torch.equal(outputs(made["net"], task.calibration), outputs(small, task.calibration))


def test_distillation_needs_no_labels():
    model, task = tiny_model(), tiny_task()
    bare = Task(Data(task.calibration.x, batch=10), task.test)
    settings = HAWQV3((3,), None, 4, epochs=20, rate=5e-2, batch=8, **FAST)
    before = outputs(model, bare.calibration).softmax(-1)

    def apart(change):
        after = outputs(assemble(model, change, Plan()).model, bare.calibration).softmax(-1)
        return float((after - before).abs().mean())

    plain = hawq_v3(model, bare, LAYERS, dataclasses.replace(settings, epochs=0))
    assert apart(hawq_v3(model, bare, LAYERS, settings)) < 0.7 * apart(plain)
    labelled = [hawq_v3(model, task, ["9"], dataclasses.replace(settings, distil=d)) for d in (0.0, 1.0)]
    assert not torch.equal(labelled[0].packed["9"].codes, labelled[1].packed["9"].codes)


def test_what_cannot_be_treated_is_left_or_refused():
    model, task = tiny_model(), tiny_task()
    nn.init.constant_(model[9].weight, float("nan"))
    change = hawq_v3(model, task, LAYERS, HAWQV3(**FAST))
    assert change.left.keys() == {"9"} and "NaN" in change.left["9"]
    model = tiny_model()
    nn.init.constant_(model[3].weight, float("inf"))
    change = hawq_v3(model, task, LAYERS, HAWQV3(**FAST))
    assert change.left.keys() == {"3", "7", "9"} and "inputs" in change.left["7"]
    model = Branches().eval()
    model.unused = nn.Linear(4, 4)
    change = hawq_v3(model, task, weighted(model), HAWQV3(**FAST))
    assert change.left == {"unused": "it is never called on the calibration data"}
    with pytest.raises(DoesNotFit, match="BatchNorm2d"):
        hawq_v3(tiny_model(), task, ["1"], HAWQV3(**FAST))
    with pytest.raises(ImpossibleBudget, match="bits=2 cannot be met: the smallest possible is bits="):
        hawq_v3(tiny_model(), task, LAYERS, HAWQV3(mean_bits=2.0, **FAST))


def test_dead_and_constant_channels_and_one_constant_example():
    model = tiny_model()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[7].weight[2:] = 0.25
        model[3].weight.zero_()
    one = Data(torch.full((1, 4, 7, 7), 0.5), torch.zeros(1, dtype=torch.int64))
    change = hawq_v3(model, Task(one, one), LAYERS, HAWQV3(**FAST))
    small = assemble(model, change, Plan())
    assert not change.left and outputs(small.model, one).isfinite().all()
    assert torch.allclose(outputs(small.model, one), outputs(model, one), atol=0.15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": ()}, {"bits": (1, 4)}, {"ends": 9}, {"activation_bits": "same"}, {"activation_bits": 17},
        {"limit": "energy"}, {"fraction": 1.5}, {"probes": 0}, {"examples": 0}, {"batch": 0}, {"epochs": -1},
        {"rate": 0.0}, {"range": "widest"}, {"distil": 2.0}, {"decay": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="need|give"):
        HAWQV3(**wrong)


@pytest.mark.parametrize(
    "budget", [Budget(bits=4.5), Budget(share=0.3), Budget(bops=1e6), Budget(latency=9.0)]
)
def test_a_budget_of_any_kind_is_kept_and_the_plan_says_what_was_chosen(budget):
    model, task = tiny_model(), tiny_task()
    small = pipeline.compress(model, task, budget, method="hawq-v3")
    chosen = {layer: option.settings["bits"] for layer, option in small.plan.choices.items()}
    assert chosen == {layer: (form.bits_per_code,) for layer, form in small.packed.items()}
    weights = sum(weight_of(model, layer).numel() for layer in LAYERS)
    if budget.bits:
        assert 4 < small.bits() / weights <= 4.5
    if budget.bops:
        macs = multiply_adds(model, task.test.x[:1])
        bops = sum(macs[n] * f.bits() / weight_of(model, n).numel() * 8 for n, f in small.packed.items())
        assert 7e5 < bops <= 1e6
    with pytest.raises((ImpossibleBudget, BadInput), match="smallest possible"):
        pipeline.compress(model, task, Budget(bits=1.0), method="hawq-v3")


def test_a_budget_frees_the_ends_and_narrow_widths():
    how = HAWQV3((4, 8), ends=8).within(Budget(bits=3.0, size=100, bops=5.0, latency=0.5), 64.0)
    assert (how.bits, how.ends, how.beside) == ((2, 3, 4, 8), None, 64.0)
    assert (how.mean_bits, how.size, how.bops, how.latency) == (3.0, 100, 5.0, 0.5)
