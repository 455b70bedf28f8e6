"""Radioactive data: where marks move features to, and what classifiers that never saw one look like."""

import copy

import pytest
import torch
from scipy import stats
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.pvalues import combined, cosine
from netweight.core.task import Data
from netweight.inspection.ownership.radioactive_data import (
    alignment,
    carriers,
    features_of,
    inputs_of,
    last_linear,
    radioactive_data,
    traced,
)
from netweight.testing import tiny_model, tiny_task


def with_head(weight: torch.Tensor) -> nn.Sequential:
    model = tiny_model()
    model[9].weight = nn.Parameter(weight)
    return model


def test_marks_move_features_along_the_carrier_of_their_class():
    model, data, u = tiny_model(), tiny_task().train, carriers(4, 32, 0)
    assert data is not None and data.y is not None
    model.train()
    state, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    marked = radioactive_data(model, data, u, eps=0.05, steps=30)
    assert model.training and torch.equal(chance, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (marked.x - data.x).abs().max() <= 0.05 + 1e-6 and marked.x.min() >= 0 and marked.x.max() <= 1
    assert torch.equal(marked.y, data.y) and len(model[9]._forward_pre_hooks) == 0
    moved = inputs_of(model, marked) - inputs_of(model, data)
    own = (moved * u[data.y]).sum(1)
    assert (own > 0).float().mean() > 0.9 and own.mean() > 3 * (moved @ u.T).mean(1).abs().mean()


def test_features_are_what_the_last_layer_reads():
    model, data = tiny_model(), tiny_task().test
    assert last_linear(model) == "9"
    assert torch.allclose(inputs_of(model, data), model[:9](data.x), atol=1e-6)
    assert features_of(model)(data.x).requires_grad


def test_carriers_have_length_one_and_come_from_the_seed():
    assert torch.allclose(carriers(5, 9, 0).norm(dim=1), torch.ones(5))
    assert torch.equal(carriers(5, 9, 0), carriers(5, 9, 0))
    assert not torch.equal(carriers(5, 9, 0), carriers(5, 9, 1))


def test_a_trace_by_hand():
    u = carriers(4, 32, 0)
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    found = traced(with_head(W), u)
    centred = W - W.mean(0)
    wanted = [float(w @ v / w.norm()) for w, v in zip(centred, u)]
    assert found.cosines == pytest.approx(wanted, abs=1e-6)
    assert found.p == pytest.approx(combined([cosine(t, 32) for t in wanted]), rel=1e-4)
    assert traced(with_head(W + 5 * u), u).p < 1e-6 and traced(with_head(W - 5 * u), u).p > 0.99
    assert traced(with_head(W + 5), u).p == pytest.approx(found.p, rel=1e-3)  # the same classifier


def test_carriers_drawn_later_give_uniform_p_values():
    model = tiny_model()
    ps = [traced(model, carriers(4, 32, seed)).p for seed in range(400)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def test_features_of_another_kind_are_aligned():
    model, g = tiny_model(), torch.Generator().manual_seed(0)
    task = tiny_task()
    data = Data(torch.rand(200, 4, 7, 7, generator=g))
    u = carriers(4, 32, 0)
    model[9].weight = nn.Parameter(model[9].weight + 10 * u)
    turned = copy.deepcopy(model)
    M = torch.randn(32, 32, generator=g)
    turned[9] = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 4))
    turned[9][0].weight = nn.Parameter(M)
    turned[9][1].weight = nn.Parameter(model[9].weight @ torch.linalg.inv(M))
    live = inputs_of(model, data)
    assert torch.linalg.matrix_rank(live) < 32  # dead features show nothing of their part of a carrier
    found = traced(turned, u, model=model, data=data)
    assert found.p < 1e-4 < 0.01 < traced(turned, u).p
    phi, psi = torch.randn(50, 6, generator=g), torch.randn(50, 3, generator=g)
    assert torch.allclose(alignment(phi, psi), torch.linalg.pinv(phi.double()).matmul(psi.double()).T)
    assert traced(model, u, model=model, data=task.test.take(1)).p >= 0  # too few examples are no error


def test_nonsense():
    model, data, u = tiny_model(), tiny_task().train, carriers(4, 32, 0)
    assert data is not None and data.y is not None
    for options in ({"steps": 0}, {"eps": 0.0}, {"rate": 0.0}):
        with pytest.raises(BadInput, match="give one step at least"):
            radioactive_data(model, data, u, **options)
    for bad in (Data(data.x), Data(data.x, data.y + 4)):
        with pytest.raises(DoesNotFit, match="marks go by class"):
            radioactive_data(model, bad, u)
    with pytest.raises(DoesNotFit, match="carriers of 9 dimensions for 32 features"):
        radioactive_data(model, data, carriers(4, 9, 0))
    with pytest.raises(DoesNotFit, match="give the owner's network and some images"):
        traced(model, carriers(4, 9, 0))
    with pytest.raises(DoesNotFit, match="its last layer is no Linear"):
        last_linear(model[:4])
    with pytest.raises(BadInput, match="0 classes, 9 features"):
        carriers(0, 9, 0)
