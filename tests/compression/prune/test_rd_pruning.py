"""Rate-distortion pruning: curves by definition, the best plan of all, the laws of its room, and nonsense."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.compression.prune.rd_pruning import (
    RDPruning,
    allocation,
    curves,
    kept,
    macs_per_weight,
    pays,
    rd_pruning,
)
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.core.pruning import largest, surviving
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.models.digits_cnn import digits_cnn
from netweight.reproduce.rd_pruning import dynamic_programme
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def data():
    return tiny_task().calibration


def weights_of(model):
    return {layer: weight_of(model, layer) for layer in weighted(model)}


class Beside(nn.Module):
    """Two layers that move outputs of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


def with_kept(model, counts):
    small = copy.deepcopy(model)
    for layer, count in counts.items():
        weight = weight_of(model, layer)
        small.get_submodule(layer).weight.data = weight * largest(weight, count)
    return small


@pytest.mark.parametrize("worst", [False, True])
def test_curves_are_their_definition(model, data, worst):
    weights = weights_of(model)
    found = curves(model, data, weights, 5, worst=worst)
    whole = outputs(model, data)
    for layer, weight in weights.items():
        assert found[layer][0] == 0.0 and len(found[layer]) == 6
        for count, value in zip(kept(weight, 5)[1:], found[layer][1:]):
            moved = (outputs(with_kept(model, {layer: count}), data) - whole).square().mean(1)
            assert value == pytest.approx(float(moved.max() if worst else moved.mean()), rel=1e-4)


def test_the_last_step_empties_a_layer_and_what_is_zero_costs_nothing():
    weight = torch.arange(100.0).reshape(10, 10)
    assert kept(weight, 4) == [100, 75, 50, 25, 0]  # one is zero already, but 99 and a mask take more
    weight[:5] = 0
    assert kept(weight, 5) == [50, 50, 50, 40, 20, 0]
    assert kept(torch.zeros(10, 10), 2) == [0, 0, 0]
    assert pays(weight, 96) and not pays(weight, 97)  # 97 * 32 bits and 13 bytes of mask


@settings(max_examples=30, deadline=None)
@given(share=st.integers(0, 95), seed=st.integers(0, 2**16), points=st.integers(1, 5))
def test_the_plan_is_the_best_of_all_and_the_papers_programme_agrees(share, seed, points):
    g = torch.Generator().manual_seed(seed)
    weights = {f"{i}": torch.randn(n, 4, generator=g) for i, n in enumerate((20, 35, 10))}
    found = {layer: [0.0, *torch.rand(points, generator=g).double().cumsum(0).tolist()] for layer in weights}
    counts = allocation(weights, found, share / 100)
    grids = {layer: kept(weight, points) for layer, weight in weights.items()}
    budget = surviving(260, share / 100)
    assert sum(counts.values()) <= budget and all(counts[layer] in grids[layer] for layer in weights)
    sums = [
        sum(found[layer][k] for layer, k in zip(weights, picks))
        for picks in itertools.product(range(points + 1), repeat=3)
        if sum(grids[layer][k] for layer, k in zip(weights, picks)) <= budget
    ]
    mine = sum(found[layer][grids[layer].index(counts[layer])] for layer in weights)
    assert mine == pytest.approx(min(sums), abs=1e-12)
    assert dynamic_programme(found, grids, budget) == pytest.approx(min(sums), abs=1e-12)


def test_sums_are_exact_where_changes_are_orthogonal():
    torch.manual_seed(0)
    model = Beside()
    data = Data(torch.randn(20, 3))
    weights = weights_of(model)
    found = curves(model, data, weights, 3)
    both = {layer: kept(weight, 3)[2] for layer, weight in weights.items()}
    moved = (outputs(with_kept(model, both), data) - outputs(model, data)).square().mean()
    assert found["a"][2] + found["b"][2] == pytest.approx(float(moved), rel=1e-5)


@pytest.mark.parametrize(
    "how",
    [RDPruning(0.8, 10, 10), RDPruning(0.5, 5, 10, worst=True, counted="macs")],
    ids=repr,
)
def test_laws(how):
    check_compressor(rd_pruning, how)


def test_laws_with_embeddings():
    layers = ["embedding", "query", "up", "head"]
    how = RDPruning(0.9, 5, 5)
    check_compressor(rd_pruning, how, model=tiny_language_model(), task=tiny_text_task(), layers=layers)


def test_rounds_nest_and_reach_their_sparsity_with_a_step_to_spare_at_most():
    model, task = digits_cnn(), Task(digits.calibration(), digits.test())
    before = {layer: torch.ones_like(w).bool() for layer, w in weights_of(model).items()}
    total = sum(w.numel() for w in weights_of(model).values())
    net = model
    for sparsity in (0.1, 0.5, 0.75, 0.95):
        change = rd_pruning(net, task.blind(), weighted(net), RDPruning(sparsity, points=20, examples=100))
        net = assemble(net, change, Plan()).plain()
        masks = {layer: w != 0 for layer, w in weights_of(net).items()}
        alive = sum(int(mask.sum()) for mask in masks.values())
        step = max(mask.numel() for mask in before.values()) / 20 + 4
        assert surviving(total, sparsity) - step <= alive <= surviving(total, sparsity)
        assert set(change.left) == {layer for layer, mask in masks.items() if mask.all()}
        assert all((mask <= before[layer]).all() for layer, mask in masks.items())
        before = masks


def test_one_layer_is_pruned_to_the_share_without_data(model):
    blind = Task(None, None)
    form = rd_pruning(model, blind, ["7"], RDPruning(0.87)).packed["7"]
    weight = weight_of(model, "7")
    assert torch.equal(form.decode(), weight * largest(weight, surviving(weight.numel(), 0.87)))


def test_macs_weigh_layers_by_their_positions(model, data):
    weights = weights_of(model)
    each = macs_per_weight(model, data, weights)
    assert each["0"] == 36.0 and each["3"] == 9.0 and each["7"] == each["9"] == 1.0
    counts = {
        way: rd_pruning(model, tiny_task(), weighted(model), RDPruning(0.5, counted=way))
        for way in ("weights", "macs")
    }
    left = {}
    for way, change in counts.items():
        pruned = weights_of(assemble(model, change, Plan()).plain())
        left[way] = sum(int(w.count_nonzero()) * each[layer] for layer, w in pruned.items())
    total = sum(w.numel() * each[layer] for layer, w in weights.items())
    assert left["macs"] <= 0.5 * total < left["weights"]


def test_hard_weights_and_nonsense(model):
    model[7].weight.data.zero_()
    model[0].weight.data[1] = 0.0
    change = rd_pruning(model, tiny_task(), ["0", "3", "7"], RDPruning(0.6, 5))
    assert int(change.packed["7"].decode().count_nonzero()) == 0 and not set(change.left) & {"7"}
    model[9].weight.data[0, 0] = torch.nan
    assert "NaN" in rd_pruning(model, tiny_task(), ["7", "9"], RDPruning(0.6)).left["9"]
    with pytest.raises(BadInput, match="the network's outputs are not finite"):
        rd_pruning(model, tiny_task(), ["0", "7", "9"], RDPruning(0.6))
    with pytest.raises(DoesNotFit, match="^1: .*BatchNorm2d"):
        rd_pruning(tiny_model(), tiny_task(), ["1"], RDPruning())
    with pytest.raises(DoesNotFit, match='^embedding: .*counted="weights"'):
        rd_pruning(tiny_language_model(), tiny_text_task(), ["embedding", "up"], RDPruning(counted="macs"))
    for bad in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"points": 0}, {"examples": 0}):
        with pytest.raises(ValueError, match=f"got .*{next(iter(bad.values()))}"):
            RDPruning(**bad)
    with pytest.raises(BadInput, match="did you mean 'weights'"):
        RDPruning(counted="weight")


def test_layers_that_do_not_matter_are_emptied(model):
    model[9].weight.data.zero_()
    change = rd_pruning(model, tiny_task(), ["0", "3", "7"], RDPruning(0.99, 4))
    assert all(len(form.values) == 0 for form in change.packed.values()) and not change.left


def test_little_data_and_constant_data():
    model, x = tiny_model(), tiny_task().calibration.x
    for data in (Data(x[:1]), Data(torch.full_like(x, 0.5))):
        change = rd_pruning(model, Task(data, data), weighted(model), RDPruning(0.5, 4))
        alive = sum(
            int(w.count_nonzero()) for w in weights_of(assemble(model, change, Plan()).plain()).values()
        )
        assert alive <= 0.5 * sum(w.numel() for w in weights_of(model).values())
