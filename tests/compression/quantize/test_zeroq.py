"""ZeroQ: what is made fits the norms, no data is read, bits go where it hurts, the laws, and nonsense."""

import pytest
import torch
from torch import nn

from netweight.compression.quantize.zeroq import ZeroQ, distance, distilled, mixed, sensitivity, units, zeroq
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.plan import Plan
from netweight.core.task import Data, Task, outputs
from netweight.nn.normalize import Normalize
from netweight.nn.packed import Affine
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task

FEW = ZeroQ(steps=40, examples=8)


def taught(seed: int = 0) -> tuple[nn.Module, Task]:
    """A network whose norms have seen smooth images."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(64, 3, 3, 3, generator=g)
    x = nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            Normalize([0.5] * 3, [0.15] * 3), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None),
            nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
        model.train()(x)
    data = Data(x, low=0.0, high=1.0, batch=16)
    return model.eval(), Task(data, data)


def test_distance_by_hand():
    x = torch.tensor(
        [[[1.0, 3.0], [2.0, 2.0]], [[0.0, 0.0], [4.0, 8.0]]]
    )  # 2 examples, 2 channels, 2 positions
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    means = ((2 - 1) ** 2 + 0 + (0 - 1) ** 2 + (6 - 2) ** 2) / 4
    deviations = (0 + 0 + 1 + 2**2) / 4
    assert float(distance(x, mean, std)) == pytest.approx(means + deviations, rel=1e-2)
    flat = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # no positions: the batch
    assert float(distance(flat, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0]))) == pytest.approx(
        0, abs=1e-5
    )


def misfit(model: nn.Module, x: torch.Tensor) -> float:
    total = 0.0
    for place in (1, 4):
        norm = model[place + 1]
        seen = nn.Sequential(*model[: place + 1])(x)
        total += float(distance(seen, norm.running_mean, norm.running_var.sqrt()).detach())
    return total


def test_what_is_made_fits_the_norms_and_reads_no_data():
    model, task = taught()
    blind = Data(torch.zeros_like(task.calibration.x), low=0.0, high=1.0)
    made = distilled(model, blind, FEW)
    start = distilled(model, blind, ZeroQ(steps=1, rate=1e-9, examples=8))
    assert made.x.shape == (8, 3, 12, 12) and made.y is None and made.x.min() >= 0 and made.x.max() <= 1
    assert misfit(model, made.x) < 0.4 * misfit(model, start.x)
    assert torch.equal(made.x, distilled(model, blind, FEW).x)
    assert not torch.equal(made.x, distilled(model, blind, ZeroQ(steps=40, examples=8, seed=1)).x)
    assert len(distilled(model, blind, ZeroQ(steps=1, examples=40)).x) == 40  # more than one batch
    assert all(p.grad is None for p in model.parameters())


def test_units_of_the_start():
    model, task = taught()
    mean, std = units(model, task.calibration)
    assert torch.equal(mean, model[0].mean) and torch.equal(std, model[0].std)
    mean, std = units(tiny_model(), tiny_task().calibration)
    assert float(mean) == 0.5 and float(std) == pytest.approx(12**-0.5)
    assert units(tiny_model(), Data(torch.ones(1, 1)))[1] == 1


def test_ranges_are_near_those_of_data_and_the_function_stays():
    model, task = taught()
    layers = weighted(model)
    change = zeroq(model, task, layers, ZeroQ(8, steps=60))
    seen: dict[str, float] = {}
    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _m, args, layer=layer: seen.setdefault(layer, float(args[0].abs().max())) and None
        )
        for layer in layers
    ]
    outputs(model, task.calibration.take(16))
    for hook in hooks:
        hook.remove()
    for layer in layers[:2]:
        made = change.activations[layer].scale * 255
        assert 0.3 * seen[layer] < float(made) < 4 * seen[layer]
    before = outputs(model, task.test)
    after = outputs(assemble(model, change, Plan({})).model, task.test)
    assert float((after - before).pow(2).mean().sqrt()) < 0.3 * float(before.std())


def test_sensitivity_is_the_divergence_of_predictions():
    model, task = taught()
    data = task.calibration
    omega = sensitivity(model, data, weighted(model), 2, ZeroQ())
    p = outputs(model, data).double().softmax(-1)
    rounded = Affine.nearest(weight_of(model, "4"), ZeroQ().grid(2)).decode()
    with torch.no_grad():
        kept = model[4].weight.clone()
        model[4].weight.copy_(rounded)
        q = outputs(model, data).double().softmax(-1)
        model[4].weight.copy_(kept)
    assert omega["4"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    finer = sensitivity(model, data, weighted(model), 8, ZeroQ())
    assert all(0 <= finer[layer] < omega[layer] for layer in omega)


def test_mixed_bits_store_no_more_and_are_no_worse():
    model, task = taught()
    layers, settings = weighted(model), ZeroQ(4)
    widths = mixed(model, task.calibration, layers, settings)

    def stored(bits: dict[str, int]) -> int:
        return sum(Affine.nearest(weight_of(model, n), settings.grid(b)).bits() for n, b in bits.items())

    def omega(bits: dict[str, int]) -> float:
        return sum(sensitivity(model, task.calibration, [n], b, settings)[n] for n, b in bits.items())

    even = dict.fromkeys(layers, 4)
    assert stored(widths) <= stored(even) and omega(widths) <= omega(even) * (1 + 1e-9)
    three = mixed(model, task.calibration, layers, ZeroQ(3))
    assert set(three.values()) <= {2, 3, 4, 8} and stored(three) <= stored(dict.fromkeys(layers, 3))
    change = zeroq(model, task, layers, ZeroQ(3, mixed=True, steps=5, activation_bits=None))
    assert not change.activations and len(change.packed) == 3


@pytest.mark.parametrize(
    "settings",
    [
        ZeroQ(4, steps=2),
        ZeroQ(3, False, 8, None, mixed=True, steps=2, examples=3),
        ZeroQ(8, range="kl", steps=2),
    ],
    ids=repr,
)
def test_laws(settings):
    check_compressor(zeroq, settings)


def test_refuses_networks_without_norms_token_ids_and_nonsense():
    with pytest.raises(DoesNotFit, match="batch norms .* the network has none"):
        zeroq(
            nn.Sequential(nn.Linear(4, 2)),
            Task(Data(torch.ones(2, 4)), Data(torch.ones(2, 4))),
            ["0"],
            ZeroQ(),
        )
    with pytest.raises(DoesNotFit, match="token ids"):
        zeroq(tiny_language_model(), tiny_text_task(), ["up"], ZeroQ())
    model = tiny_model()
    nn.init.constant_(model[9].weight, float("nan"))
    change = zeroq(model, tiny_task(), ["7", "9"], ZeroQ(steps=1))
    assert set(change.packed) == {"7"} and "NaN" in change.left["9"]
    for wrong in (
        {"steps": 0},
        {"rate": 0},
        {"examples": 0},
        {"bits": 1},
        {"activation_bits": 17},
        {"range": "x"},
    ):
        with pytest.raises(ValueError, match="need"):
            ZeroQ(**wrong)
