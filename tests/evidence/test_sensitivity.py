"""What the planner is told: costs as stored, distortions as each measure is defined."""

import math

import pytest
import torch
from torch import nn

from netweight.compression.prune.nm_magnitude import NMMagnitude, nm_magnitude
from netweight.compression.quantize.rtn import RTN, encode, rtn
from netweight.core.compressed import Change, assemble
from netweight.core.curvature import traces
from netweight.core.errors import BadInput
from netweight.core.plan import Plan
from netweight.core.task import Data, Task, outputs
from netweight.evidence import sensitivity
from netweight.evidence.sensitivity import Candidate, options
from netweight.testing import tiny_language_model, tiny_text_task

CANDIDATES = [Candidate("rtn", rtn, RTN(bits=b)) for b in (2, 4, 8)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval().requires_grad_(False)


@pytest.fixture
def task():
    g = torch.Generator().manual_seed(1)
    data = Data(torch.randn(40, 6, generator=g), torch.randint(0, 3, (40,), generator=g), batch=16)
    return Task(data, data)


def changed(model, layer, bits):
    form = encode(model.get_submodule(layer).weight.detach(), RTN(bits=bits))
    return assemble(model, Change({layer: form}), Plan({})).model


def by_bits(found, layer):
    return {o.settings["bits"]: o for o in found if o.layer == layer and o.method == "rtn"}


def test_output_error_is_that_of_the_layer_on_its_inputs(model, task):
    x = model[:2](task.calibration.x)
    for bits, option in by_bits(
        options(model, task, ["0", "2"], CANDIDATES, distortion="output"), "2"
    ).items():
        weight = model[2].weight
        moved = x @ (changed(model, "2", bits)[2].weight - weight).T
        assert option.distortion == pytest.approx(
            float(moved.square().sum() / (x @ weight.T).square().sum()), rel=1e-4
        )


def test_network_distortion_changes_one_layer_alone(model, task):
    whole = outputs(model, task.calibration)
    for bits, option in by_bits(
        options(model, task, ["0", "2"], CANDIDATES, distortion="network"), "0"
    ).items():
        moved = outputs(changed(model, "0", bits), task.calibration) - whole
        assert option.distortion == pytest.approx(float(moved.square().mean()), rel=1e-5)


def moved_by(model, task, layer, form):
    p = outputs(model, task.calibration).double().log_softmax(-1)
    small = assemble(model, Change({layer: form}), Plan({})).model
    return float((p.exp() * (p - outputs(small, task.calibration).double().log_softmax(-1))).sum(-1).mean())


def test_divergence_is_that_of_two_options_of_the_method_and_follows_the_output_error(model, task):
    errors = by_bits(options(model, task, ["2"], CANDIDATES, distortion="output"), "2")
    found = by_bits(options(model, task, ["2"], CANDIDATES, distortion="kl"), "2")
    near = sorted(errors, key=lambda b: abs(math.log(errors[b].distortion / 0.01)))[:2]
    units = [
        moved_by(model, task, "2", encode(model[2].weight.detach(), RTN(bits=b))) / errors[b].distortion
        for b in near
    ]
    assert units[0] != pytest.approx(units[1], rel=1e-3)  # or the mean would be untested
    for bits in errors:
        wanted = errors[bits].distortion * math.sqrt(units[0] * units[1])
        assert found[bits].distortion == pytest.approx(wanted, rel=1e-6)


def test_another_method_on_the_layer_does_not_change_the_price_of_the_first(model, task):
    pruned = Candidate("nm-magnitude", nm_magnitude, NMMagnitude(keep=1, of=4))
    alone = by_bits(options(model, task, ["2"], CANDIDATES), "2")
    both = by_bits(options(model, task, ["2"], [pruned, *CANDIDATES]), "2")
    assert {b: o.distortion for b, o in alone.items()} == {b: o.distortion for b, o in both.items()}


def test_a_method_whose_references_move_no_example_is_not_free():
    """Saturated outputs hide small errors on calibration data: no reason to round that layer to nothing."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).eval().requires_grad_(False)
    model[0].weight.data = torch.tensor([[9.0, 0.1, 0.1, 0.1], [-9.0, 0.1, 0.1, 0.1]])
    data = Data(torch.tensor([[1000.0, 1, 1, 1], [1000.0, 2, 0, 1]]), torch.tensor([0, 0]))

    def flipped(model_, task_, layers, settings):
        return Change({"0": encode(-model_[0].weight.detach(), RTN(bits=8))})

    wrong = Candidate("awq", flipped, RTN(bits=8))
    found = options(model, Task(data, data), ["0"], [*CANDIDATES, wrong])
    assert moved_by(model, Task(data, data), "0", encode(model[0].weight.detach(), RTN(bits=4))) == 0
    assert all(o.distortion > 0 for o in found if o.method != "keep")


def test_curvature_is_trace_per_weight_times_half_the_squared_change(model, task):
    sharp = traces(model, task.calibration, ["2"])["2"]
    for bits, option in by_bits(options(model, task, ["2"], CANDIDATES, distortion="curvature"), "2").items():
        moved = float((changed(model, "2", bits)[2].weight - model[2].weight).double().square().sum())
        assert option.distortion == pytest.approx(max(sharp, 0) / 24 * moved / 2, rel=1e-6)


def test_costs_are_counted_and_latency_only_on_demand(model, task):
    found = options(model, task, ["0"], CANDIDATES, distortion="output")
    for bits, option in by_bits(found, "0").items():
        form = encode(model[0].weight.detach(), RTN(bits=bits))
        assert option.cost == {"bits": form.bits(), "weights": 48.0, "bops": form.bits() * 32.0}
    (keep,) = [o for o in found if o.method == "keep"]
    assert keep.cost == {"bits": 48 * 32.0, "weights": 48.0, "bops": 48 * 32.0 * 32} and keep.distortion == 0
    timed = options(model, task, ["0"], CANDIDATES, distortion="output", timed=True)
    assert all(0 < o.cost["latency"] < 1 for o in timed)


def test_a_candidate_that_does_not_fit_is_no_option_and_unknown_measures_are_refused(model, task):
    pruned = Candidate(
        "nm-magnitude", nm_magnitude, NMMagnitude(keep=2, of=4)
    )  # 6 inputs are no multiple of 4
    found = options(model, task, ["0", "2"], [pruned], distortion="output")
    assert [(o.layer, o.method) for o in found] == [("0", "keep"), ("2", "nm-magnitude"), ("2", "keep")]
    with pytest.raises(BadInput, match="did you mean 'network'"):
        options(model, task, ["0"], CANDIDATES, distortion="netwrk")


def test_texts_are_priced_on_few_tokens(monkeypatch):
    model, data = tiny_language_model(), tiny_text_task().calibration
    tokens = data.x.shape[1]
    assert len(sensitivity.few(model, data, 4)) == 4
    monkeypatch.setattr(sensitivity, "POSITIONS", 3 * tokens - 1)
    assert len(sensitivity.few(model, data, 4)) == 3
    images = Data(torch.rand(8, 6))
    assert len(sensitivity.few(nn.Linear(6, 3), images, 5)) == 5
