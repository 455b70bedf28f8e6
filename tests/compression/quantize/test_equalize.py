"""Equalization: equal ranges at the end, the same function, planted imbalance undone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.equalize import Equalize, balance, balanced, equalize
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_TENSOR, Grid, nearest
from netweight.core.plan import Plan
from netweight.core.plant import imbalance
from netweight.core.rewrite import FoldBatchNorm, Scale, residual, rewritten
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


def test_laws():
    check_compressor(equalize, Equalize(4, symmetric=False, group=0))


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
    with pytest.raises(ValueError, match="rounds=0"):
        Equalize(rounds=0)
