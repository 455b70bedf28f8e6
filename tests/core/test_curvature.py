"""Traces against the full Hessian, and against autograd's own."""

import torch
from torch import nn

from netweight.core import curvature
from netweight.core.curvature import settled, traces
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


class Two(nn.Module):
    """One weight w: logits w x and -w x."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.idle = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        self.idle(x)
        z = self.layer(x)
        return torch.cat([z, -z], 1)


def test_one_probe_is_exact_for_a_diagonal_hessian_and_unused_layers_have_none():
    g = torch.Generator().manual_seed(0)
    seen = Data(torch.randn(7, 1, generator=g), torch.randint(0, 2, (7,), generator=g), 3)
    model = Two()
    found = traces(model, seen, ["layer", "idle"], probes=1)
    assert abs(found["layer"] - full(model, seen, "layer")) < 1e-5 and found["idle"] == 0
    once = settled(model, seen, ["layer", "idle"], most=100)
    assert abs(once["layer"] - found["layer"]) < 1e-6


def test_probing_stops_when_the_mean_has_settled_or_the_probes_are_spent(monkeypatch):
    asked = []

    def spied(model, data, layers, *, probes, seed):
        asked.append((probes, seed))
        return {"0": 10.0 + 8 / len(asked) ** 3, "1": 1.0}

    monkeypatch.setattr(curvature, "traces", spied)
    found = settled(net(), data(), ["0", "1"], most=100, tolerance=0.1, seed=5)
    assert asked == [(4, 5), (4, 9), (4, 13), (4, 17)]  # means 18, 14.5, 13.1, 12.3: the last moved by 6 %
    assert abs(found["0"] - (10 + (8 + 1 + 8 / 27 + 8 / 64) / 4)) < 1e-9 and found["1"] == 1
    asked.clear()
    settled(net(), data(), ["0", "1"], most=6, tolerance=0.0)
    assert asked == [(4, 0), (2, 4)]


def test_attention_has_a_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, x):
            q = self.project(x)[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0].mean(1)

    g = torch.Generator().manual_seed(0)
    seen = Data(torch.randn(4, 5, 8, generator=g), torch.randint(0, 8, (4,), generator=g))
    assert traces(Attention(), seen, ["project"], probes=1)["project"] != 0
