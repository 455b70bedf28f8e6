"""Traces against the full Hessian, and against autograd's own."""

import torch
from torch import nn

from netweight.core.curvature import traces
from netweight.core.task import Data, token_loss


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data(labels=True):
    g = torch.Generator().manual_seed(1)
    return Data(
        torch.randn(12, 3, generator=g), torch.randint(0, 2, (12,), generator=g) if labels else None, 5
    )


def full(model, of, layer):
    def loss(weight):
        out = torch.func.functional_call(model, {f"{layer}.weight": weight}, (of.x,))
        return token_loss(out, of.y).mean()

    weight = model.get_submodule(layer).weight.detach()
    size = weight.numel()
    return float(torch.autograd.functional.hessian(loss, weight).reshape(size, size).trace())


def test_many_probes_reach_the_trace_of_the_full_hessian():
    model, seen = net(), data()
    found = traces(model, seen, ["0", "2"], probes=2000)
    for layer in ("0", "2"):
        assert abs(found[layer] - full(model, seen, layer)) < 0.05 * abs(full(model, seen, layer)) + 0.01


def test_same_seed_same_traces_and_the_model_is_untouched():
    model = net()
    before = [p.clone() for p in model.parameters()]
    assert traces(model, data(), ["0"], seed=3) == traces(model, data(), ["0"], seed=3)
    assert traces(model, data(), ["0"], seed=3) != traces(model, data(), ["0"], seed=4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_without_labels_the_own_predictions_are_the_target():
    model, unlabelled = net(), data(labels=False)
    own = Data(unlabelled.x, model(unlabelled.x).argmax(-1), 5)
    assert traces(model, unlabelled, ["2"]) == traces(model, own, ["2"])
