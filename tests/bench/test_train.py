"""The training bench: the same places in all networks, all of them learn, and what its answer says."""

import pytest
import torch
import torch.nn.functional as F

from netweight.bench import train
from netweight.models.resnet_cifar import architecture
from netweight.nn.quantized import inner_layers

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return architecture(20)


@pytest.mark.parametrize("name", [n for n in train.MAKERS if n not in ("plain", "Brevitas")])
def test_weights_and_inputs_of_all_inner_layers_are_rounded_and_trained(plain, name):
    network = train.MAKERS[name](plain).train()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(network(x), torch.tensor([0, 1, 2, 3])).backward()
    places = inner_layers(plain)
    assert len(places) == 18
    for place in places:
        layer = network.get_submodule(place)
        assert layer.like.weight.grad.abs().sum() > 0
        rounded = layer.weight if name == "ours" else layer.of_weight(layer.like.weight)
        assert 2 < len(rounded.unique()) <= 16
        inputs = layer.input_rounding if name == "ours" else layer.of_input
        assert 2 < len(inputs(9 * x).unique()) <= 16
        if name != "torch.ao, averages":
            steps = [p for n, p in layer.named_parameters() if n.endswith(("step", "scale"))]
            assert len(steps) == 2 and all(p.grad.abs().sum() > 0 for p in steps)


def test_the_answer_holds_the_medians_of_neighbouring_turns(monkeypatch):
    seconds = {
        "plain": [1.0, 2.0, 4.0],
        "ours": [1.5, 3.5, 6.4],
        "torch.ao, learnt": [2.0, 3.5, 6.0],
        "torch.ao, averages": [1.0, 1.0, 1.0],
        train.MASKS: [0.04, 0.1, 0.4],
    }
    monkeypatch.setattr(train, "measured", lambda turns, batch: seconds)
    found = train.bench()
    assert "Brevitas is not installed: pip install 'netweight[peers]'" in found["missing"]
    rows = {row["step"]: row for row in found["rows"]}
    assert (rows["ours"]["cpu_seconds"], rows["ours"]["over_plain"]) == (3.5, 1.6)
    bars = {bar["name"]: (bar["measured"], bar["reached"]) for bar in found["bars"]}
    assert bars == {
        "ours / plain": (1.6, True),
        "N:M masks / plain": (0.05, True),
        "ours / torch.ao, learnt": (1.0, True),
    }
    assert rows["N:M masks"]["over_plain"] == 0.05
    seconds["ours"], seconds[train.MASKS] = [1.7, 3.6, 6.4], [0.04, 0.11, 0.4]
    assert not any(bar["reached"] for bar in train.bench()["bars"])
    seconds["Brevitas"] = [4.0, 4.0, 4.0]
    assert train.bench()["missing"] == "" and train.bench()["bars"][-1]["name"] == "ours / Brevitas"


def test_masks_are_of_all_inner_layers_in_both_directions(plain, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "mask", lambda weight, pattern, axis: seen.append((weight.shape, axis)))
    train.masks(plain)()
    shapes = [plain.get_submodule(name).weight.shape for name in inner_layers(plain)]
    assert seen == [(shape, axis) for shape in shapes for axis in (train.INPUTS, train.OUTPUTS)]


def test_a_step_moves_the_weights_and_threads_are_put_back(plain):
    threads = torch.get_num_threads()
    found = train.bench(turns=1, batch=4)
    assert torch.get_num_threads() == threads
    assert all(row["cpu_seconds"] > 0 for row in found["rows"])
    network = train.ours(plain)
    before = network.layer1[0].conv1.like.weight.detach().clone()
    train.stepper(network.train(), torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))()
    assert not torch.equal(network.layer1[0].conv1.like.weight, before)
    assert torch.equal(plain.layer1[0].conv1.weight, before)
