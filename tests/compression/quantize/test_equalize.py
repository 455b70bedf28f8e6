"""Equalization: equal ranges at the end, the same function, planted imbalance undone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.equalize import Equalize, balance, balanced, equalize, pads, through
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_TENSOR, Grid, nearest
from netweight.core.plan import Plan
from netweight.core.plant import imbalance
from netweight.core.rewrite import FoldBatchNorm, Scale, Unclip, residual, rewritten
from netweight.core.sites import Site, column_ranges, foldable, sites
from netweight.core.task import Data, Task, outputs
from netweight.testing import check_compressor, tiny_model, tiny_task


def test_balance_by_hand():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, -1.0], [1.0, -2.0], [0.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[2.0, 0.0, 5.0], [-1.0, 8.0, 1.0]]))
    assert balance(model, Site("0", ("2",))).tolist() == [2.0, 0.5, 1.0]  # a dead channel stays


@given(seed=st.integers(0, 2**16), spread=st.floats(0, 2))
def test_ranges_agree_on_both_sides_and_the_function_stays(seed, spread):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)).eval()
    pairs = [Site("0", ("2",)), Site("2", ("4",))]
    hard = rewritten(model, imbalance(model, pairs, spread=spread, seed=seed))
    even = rewritten(hard, [])
    rewrites = balanced(even, pairs, 100)
    assert residual(hard, rewrites, torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))) <= 1e-9
    again = rewritten(hard, rewrites)
    for pair in pairs:
        rows = weight_of(even, pair.producer).abs().amax(1)
        assert torch.allclose(rows, column_ranges(even, pair.consumers[0]), rtol=1e-3)
        assert torch.allclose(weight_of(again, pair.producer), weight_of(even, pair.producer), rtol=1e-4)


def test_planted_imbalance_is_undone():
    model, task = tiny_model(), tiny_task()
    folded = rewritten(model, [FoldBatchNorm(*pair) for pair in foldable(model, task.calibration)])
    pairs = [site for site in sites(folded, task.calibration) if not site.norm(folded)]
    hard = rewritten(folded, imbalance(folded, pairs, spread=2.0))
    before = outputs(hard, task.test)

    def error(change) -> float:
        return float((outputs(assemble(hard, change, Plan({})).model, task.test) - before).pow(2).mean())

    even = equalize(hard, task, weighted(hard), Equalize(6))
    assert [type(rewrite) for rewrite in even.rewrites] == [Scale, Scale]
    grid = Grid(6, True, PER_TENSOR)
    near = rewritten(hard, [])
    for layer in weighted(hard):
        near.get_submodule(layer).weight = nn.Parameter(nearest(weight_of(hard, layer), grid))
    rounded = float((outputs(near, task.test) - before).pow(2).mean())
    assert error(even) < 0.1 * rounded


def test_norms_are_folded_first():
    model, task = tiny_model(), tiny_task()
    change = equalize(model, task, weighted(model), Equalize())
    assert [type(rewrite) for rewrite in change.rewrites] == [FoldBatchNorm] * 2 + [Scale] * 2
    assert residual(model, change.rewrites, task.test.x) <= 1e-9


def mobile(seed: int = 0, padding: int = 1) -> tuple[nn.Sequential, Task]:
    """Convolution 1 x 1, depthwise, 1 x 1 with ReLU6 between: the block of MobileNet V2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=padding, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 4, 1), nn.ReLU6(),
        )  # fmt: skip
        for norm in (model[1], model[4]):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.5, 0.5)
    data = Data(torch.rand(20, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))
    return model.eval(), Task(data, data)


def test_a_depthwise_triple_ends_at_the_cube_root_and_relu6_becomes_relu():
    model, task = mobile()
    layers = weighted(model)
    change = equalize(model, task, layers, Equalize(8))
    assert [type(r) for r in change.rewrites] == [Unclip] * 2 + [FoldBatchNorm] * 2 + [Scale] * 2
    assert {r.activation for r in change.rewrites if isinstance(r, Unclip)} == {
        "2",
        "5",
    }  # the last reads none
    folded = rewritten(model, [r for r in change.rewrites if isinstance(r, FoldBatchNorm)])
    even = rewritten(model, change.rewrites)
    ranges = [
        weight_of(folded, "0").flatten(1).abs().amax(1),
        weight_of(folded, "3").flatten(1).abs().amax(1),
    ]
    ranges.append(column_ranges(folded, "6"))
    root = (ranges[0] * ranges[1] * ranges[2]).pow(1 / 3)
    assert torch.allclose(weight_of(even, "0").flatten(1).abs().amax(1), root, rtol=1e-3)
    assert torch.allclose(weight_of(even, "3").flatten(1).abs().amax(1), root, rtol=1e-3)
    assert torch.allclose(column_ranges(even, "6"), root, rtol=1e-3)
    small = task.test.x * 0.1  # no value comes near 6
    assert torch.allclose(even(small), model(small), atol=1e-5)
    kept = equalize(model, task, layers, Equalize(8, relu6=False))
    assert [type(r) for r in kept.rewrites] == [FoldBatchNorm] * 2
    part = equalize(model, task, ["3", "6"], Equalize(8))
    assert [r.activation for r in part.rewrites if isinstance(r, Unclip)] == ["5"]


def high_bias() -> tuple[nn.Sequential, Task]:
    model, task = mobile()
    model[4].bias.data.copy_(torch.linspace(-1, 6, 8))
    model[4].weight.data.uniform_(0.1, 0.2)
    with torch.no_grad():
        model[4].running_mean.copy_(nn.Sequential(*model[:4])(task.test.x).mean((0, 2, 3)))
    return model, task


def test_a_high_bias_goes_on_to_the_next_layer_and_the_range_shrinks():
    model, task = high_bias()
    layers = weighted(model)
    change = equalize(model, task, layers, Equalize(8, activation_bits=8))
    stays = equalize(model, task, layers, Equalize(8, activation_bits=8, absorb=False))
    assert set(change.biases) == {"3", "6"} and not stays.biases  # the reader of 0 pads with zeros
    scale = next(r.scale for r in change.rewrites if isinstance(r, Scale) and r.producer == "3")
    net = rewritten(model, change.rewrites)
    c = (model[4].bias - 3 * model[4].weight.abs()).clamp(min=0).detach() / scale
    assert (c > 0).sum() >= 4
    assert torch.allclose(change.biases["3"], net.get_submodule("3").bias - c, atol=1e-5)
    more = weight_of(net, "6")[:, :, 0, 0] @ c
    assert torch.allclose(change.biases["6"], net.get_submodule("6").bias + more, atol=1e-5)
    moved = rewritten(model, change.rewrites)
    for layer, bias in change.biases.items():
        moved.get_submodule(layer).bias = nn.Parameter(bias)
    exact = (nn.Sequential(*net[:4])(task.test.x) - c[:, None, None]).amin() >= 0
    assert exact or torch.allclose(
        moved(task.test.x), net(task.test.x), atol=0.05 * float(net(task.test.x).detach().std())
    )
    assert change.activations["6"].scale < 0.8 * stays.activations["6"].scale


def test_a_constant_through_grouped_convolutions():
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    c = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    expected = layer(c.float()[None, :, None, None].expand(1, 4, 3, 3))[0, :, 0, 0]
    assert torch.allclose(through(layer, c).float(), expected, atol=1e-5)
    assert pads(nn.Conv2d(1, 1, 3, padding=1)) and not pads(nn.Conv2d(1, 1, 3)) and not pads(nn.Linear(2, 2))
    assert not pads(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))


@pytest.mark.parametrize(
    "settings",
    [Equalize(4, symmetric=False, group=0), Equalize(4, group=0, activation_bits=8, range="mse")],
    ids=repr,
)
def test_laws(settings):
    check_compressor(equalize, settings)


def test_laws_of_a_network_with_relu6():
    model, task = mobile(padding=0)
    check_compressor(equalize, Equalize(4, group=-1, activation_bits=8), model=model, task=task)


def test_refuses_what_cannot_be_captured_and_nonsense():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x

    data = Data(torch.ones(2, 2))
    with pytest.raises(DoesNotFit, match="Branch"):
        equalize(Branch(), Task(data, data), ["layer"], Equalize())
    for wrong in ({"rounds": 0}, {"activation_bits": 1}, {"range": "entropy"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Equalize(**wrong)
    with pytest.raises(DoesNotFit, match="^1: a ReLU is not a ReLU6"):
        rewritten(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), [Unclip("1")])
