"""PowerNorm: gradients against autograd, running statistics by hand, bounded estimates, padding, folding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import Change, Compressed, assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.plan import Plan
from netweight.core.rewrite import residual, rewritten
from netweight.nn import power_norm
from netweight.nn.power_norm import LayerScale, PowerNorm, moved, padded, unwatched
from netweight.nn.power_rewrites import FoldPowerNorm, InsertPowerNorm, folds, norms_of, place_of
from netweight.verification.bounds import bounds

seeds = st.integers(0, 2**16)


def rows(seed: int = 0, n: int = 7, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_of(d: int = 4, **options) -> PowerNorm:
    norm = PowerNorm(d, **{"groups": 0, **options}).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, d))
        norm.bias.copy_(torch.linspace(-1, 1, d))
    return norm


def gradient(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (norm(x) * weight).sum().backward()
    assert x.grad is not None
    return x.grad


@given(seed=seeds, kind=st.sampled_from(["pn", "pn-v"]))
def test_pn_v_and_the_warm_up_are_what_autograd_gives(seed, kind):
    x, weight = rows(seed), rows(seed + 1)
    norm = norm_of(kind=kind, warmup=10 if kind == "pn" else 0)
    found = gradient(norm, x, weight)
    free = x.clone().requires_grad_()
    y = free / (free.square().mean(0) + 1e-5).sqrt() * norm.weight.detach() + norm.bias.detach()
    assert torch.allclose(norm_of(kind=kind, warmup=10)(x), y, atol=1e-12)
    (y * weight).sum().backward()
    assert torch.allclose(found, free.grad, atol=1e-10)
    assert torch.allclose(norm.bias.grad, weight.sum(0))
    assert torch.allclose(norm.weight.grad, (weight * (y - norm.bias) / norm.weight).sum(0))


@given(seed=seeds)
def test_pn_with_the_batchs_own_statistics_is_pn_v(seed):
    x, weight = rows(seed), rows(seed + 1)
    norm, exact = norm_of(warmup=0), norm_of(kind="pn-v", warmup=0)
    s = (x.square().mean(0) + norm.eps).sqrt()
    norm.power.copy_(x.square().mean(0))
    norm.correction.copy_((weight * norm.weight * x / s).mean(0).detach())
    assert torch.allclose(gradient(norm, x, weight), gradient(exact, x, weight), atol=1e-10)


def test_a_step_of_pn_by_hand():
    """psi^2 and nu of before the batch are used, and move on afterwards."""
    norm = norm_of(d=1, warmup=0, forward_decay=0.8, backward_decay=0.7, eps=1e-12)
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(3.0)
        norm.power.fill_(4.0)
        norm.correction.fill_(0.5)
    x = torch.tensor([[2.0], [4.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [3.0]], dtype=torch.float64)  # dL/dy; g = 2, 6; z = 1, 2
    assert norm(x).flatten().tolist() == pytest.approx([5.0, 7.0])
    norm.power.fill_(4.0)
    found = gradient(norm, x, weight)
    assert found.flatten().tolist() == pytest.approx([(2 - 0.5) / 2, (6 - 1.0) / 2])
    assert norm.power.item() == pytest.approx(0.8 * 4 + 0.2 * 10)
    assert norm.correction.item() == pytest.approx(0.5 * (1 - 0.3 * 2.5) + 0.3 * 7)
    assert int(norm.step) == 2


def test_the_warm_up_averages_all_batches():
    norm = norm_of(warmup=3)
    for seed in range(3):
        norm(rows(seed))
    wanted = torch.stack([rows(seed).square().mean(0) for seed in range(3)]).mean(0)
    assert torch.allclose(norm.power, wanted)
    norm(rows(3))
    assert torch.allclose(norm.power, 0.9 * wanted + 0.1 * rows(3).square().mean(0))


def test_on_constant_inputs_the_estimate_settles_at_what_it_estimates():
    x, weight = rows(0), rows(1)
    norm = norm_of(warmup=0)
    for _ in range(400):
        gradient(norm, x, weight)
    z = x / (norm.power + norm.eps).sqrt()
    wanted = (weight * norm.weight * z).mean(0) / z.square().mean(0)
    assert torch.allclose(norm.correction, wanted, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, start=st.floats(-3, 3), low=st.floats(0.05, 1))
def test_the_estimate_stays_bounded(seed, start, low):
    """c <= Gamma <= 1 / (1 - s) keeps |nu| <= max(|nu_0|, max |Lambda| / c)."""
    g = torch.Generator().manual_seed(seed)
    gammas = low + (10 - low) * torch.rand(1000, generator=g).double()
    lambdas = torch.randn(1000, generator=g).double()
    nu, most = torch.tensor(start).double(), max(abs(start), float(lambdas.abs().max()) / low)
    for gamma, both in zip(gammas, lambdas):
        nu = moved(nu, gamma, both, 0.9)
        assert abs(float(nu)) <= most * (1 + 1e-12)


@given(seed=seeds, factor=st.floats(0.1, 10))
def test_pn_v_does_not_see_the_scale(seed, factor):
    x = rows(seed)
    norm = norm_of(kind="pn-v", eps=1e-12)
    assert torch.allclose(norm(x), norm(factor * x), atol=1e-6)


def test_layer_scale_by_hand():
    x = torch.tensor([[3.0, 4.0, 6.0, 8.0]])
    root = 12.5**0.5
    assert LayerScale(2, 1e-12)(x)[0].tolist() == pytest.approx([3 / root, 4 / root, 3 / root, 4 / root])
    whole = (x.square().mean() + 1e-5).sqrt()
    assert torch.allclose(LayerScale(1, 1e-5)(x), x / whole)
    norm = PowerNorm(4, groups=2, kind="pn-v")
    assert torch.allclose(norm(x.repeat(2, 1)), torch.ones(2, 4), atol=1e-4)


@given(seed=seeds, kind=st.sampled_from(["pn", "pn-v"]))
def test_padding_changes_nothing(seed, kind):
    x, weight = rows(seed, 6), rows(seed + 1, 6)
    alone, beside = (norm_of(kind=kind, warmup=1) for _ in range(2))
    kept = torch.tensor([[True, True, False, True, False], [True, True, False, False, True]])
    wide, far = rows(seed + 2, 10).reshape(2, 5, 4), rows(seed + 3, 10).reshape(2, 5, 4)
    wide[kept], far[kept] = x, weight
    for _ in range(3):
        found = gradient(alone, x, weight)
        with padded(beside, kept):
            among = gradient(beside, wide, far)
        assert torch.allclose(among[kept], found, atol=1e-10)
        assert (among[~kept] == 0).all()
        assert torch.allclose(alone.power, beside.power)
        assert torch.allclose(alone.correction, beside.correction)
    assert beside.kept is None
    with padded(beside, kept[:, :4]), pytest.raises(DoesNotFit, match="a mask of 8 tokens does not fit 10"):
        beside(wide)


@pytest.mark.parametrize("kind", ["pn", "pn-v"])
def test_a_second_pass_leaves_statistics_alone(kind):
    norm = norm_of(kind=kind, warmup=1)
    gradient(norm, rows(0), rows(1))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with unwatched(norm):
        second = gradient(norm, rows(2), rows(3))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    assert torch.allclose(second, gradient(norm, rows(2), rows(3)))
    assert not torch.equal(before["power"], norm.power)


def test_evaluation_does_not_see_the_batch():
    norm = norm_of(groups=2, warmup=2)
    for seed in range(5):
        gradient(norm, rows(seed), rows(seed + 1))
    norm.eval()
    whole = norm(rows(9))
    assert torch.allclose(whole[2:3], norm(rows(9)[2:3]))
    z = LayerScale(2, 1e-5)(rows(9))
    assert torch.allclose(whole, norm.weight * z / (norm.power + 1e-5).sqrt() + norm.bias)
    assert int(norm.step) == 5


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 3)])
def test_features_on_axis_1_are_those_on_the_last(shape):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    first, last = norm_of(axis=1, warmup=1), norm_of(warmup=1)
    for training in (True, True, False):
        first.train(training)
        last.train(training)
        a, b = gradient(first, x, weight), gradient(last, x.movedim(1, -1), weight.movedim(1, -1))
        assert torch.allclose(a, b.movedim(-1, 1), atol=1e-12)
        assert torch.allclose(first(x), last(x.movedim(1, -1)).movedim(-1, 1))


def test_low_precision_keeps_its_statistics():
    norm = PowerNorm(4, warmup=0)
    x = rows(0, 64).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert norm.power.dtype == norm.correction.dtype == torch.float32


def test_a_step_that_overflows_is_not_remembered():
    norm = norm_of(warmup=0)
    gradient(norm, rows(0), rows(1))
    before = norm.correction.clone()
    far = rows(1)
    far[0, 1] = torch.inf
    gradient(norm, rows(0), far)
    assert norm.correction.isfinite().all()
    assert norm.correction[1] == before[1]
    assert norm.correction[0] != before[0]


@pytest.mark.parametrize("kind", ["pn", "pn-v"])
def test_means_are_over_the_rows_of_all_processes(kind, monkeypatch):
    """Two processes with the same rows: each has the gradient of its own loss, twice that of the mean."""
    x, weight = rows(0), rows(1)
    alone, one = norm_of(kind=kind, warmup=1), norm_of(kind=kind, warmup=1)
    for _ in range(3):
        whole = gradient(alone, torch.cat([x, x]), torch.cat([weight, weight]) / 2)
        with monkeypatch.context() as patch:
            patch.setattr(power_norm, "processes", lambda: 2)
            patch.setattr(power_norm.dist, "all_reduce", lambda values: values.mul_(2))
            own = gradient(one, x, weight)
        assert torch.allclose(own / 2, whole[:7], atol=1e-12)
        assert torch.allclose(one.correction, alone.correction, atol=1e-12)
        assert torch.allclose(one.power, alone.power)


# Rewrites ------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = PowerNorm(4, groups=groups), PowerNorm(4, groups=groups)
        self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm1(x)
        return self.head(self.norm2(x + self.query(h) * self.key(h)))


def stirred(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        for norm in model.modules():
            if isinstance(norm, PowerNorm):
                norm.weight.data.uniform_(0.5, 2)
                norm.bias.data.uniform_(-1, 1)
                norm.power.uniform_(0.3, 3)
    return model


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_folding_is_exact(groups):
    model, x = stirred(lambda: PreNorm(groups)), rows(3).float()
    found = folds(model, x)
    assert found == [FoldPowerNorm("norm1", ("key", "query")), FoldPowerNorm("norm2", ("head",))]
    assert residual(model, found, x) <= 1e-9
    after = rewritten(model, found)
    assert torch.allclose(after(x), model(x), atol=1e-5)
    assert not any(isinstance(module, PowerNorm) for module in after.modules())
    assert isinstance(after.norm1, LayerScale if groups else nn.Identity)


class Shared(nn.Module):
    """A norm that a sum reads too, one that reads itself out, and one whose reader is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (PowerNorm(4) for _ in range(3))
        self.inner, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.norm1(x)
        h = h + self.inner(h)
        h = self.twice(self.norm3(h)) + self.twice(x)
        return self.norm2(h)


class Both(nn.Module):
    """What the norm gives is an output of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = PowerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(x)
        return h, self.head(h)


class Tied(nn.Module):
    """Two layers with one weight, of which one reads the norm: folded, it would be stored twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.other = PowerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.one(self.norm(x)) + self.other(x)


@pytest.mark.parametrize("make", [Shared, Both, Tied])
def test_norms_that_something_else_reads_stay(make):
    assert folds(stirred(make), rows().float()) == []


def test_a_folded_network_is_saved_and_loaded(tmp_path):
    model, x = stirred(PreNorm), rows(3).float()
    small = assemble(model, Change({}, folds(model, x)), Plan())
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=stirred(PreNorm, 1))
    assert torch.equal(back.model(x), small.model(x))


def test_norms_are_replaced_with_what_they_learnt():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6), nn.RMSNorm(6)
    )
    with torch.no_grad():
        model[4].weight.fill_(2.0)
        model[1].bias.fill_(3.0)
    change = InsertPowerNorm(norms_of(model, ()), "pn-v", 2, 5, 0.8, 0.7)
    assert change.norms == ("1", "4", "5")
    after = copy.deepcopy(model)
    change.apply(after)
    assert [(n.axis, n.features, n.kind, n.warmup) for n in (after[1], after[4])] == [
        (1, 4, "pn-v", 5),
        (-1, 6, "pn-v", 5),
    ]
    assert isinstance(after[1].scale, nn.Identity)
    assert after[4].scale.groups == 2
    assert (after[4].weight == 2).all()
    assert (after[1].bias == 3).all()
    assert (after[4].forward_decay, after[4].backward_decay) == (0.8, 0.7)
    same = after[4]
    change.apply(after)
    assert after[4] is same
    assert norms_of(model, ("5",)) == ("5",)


def test_bounds_hold():
    model, x = stirred(PreNorm), rows(3).float()
    box = bounds(model, x[:2], Linf(0.02))
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        y = model(Linf(0.02).sample(x[:2], g))
        assert (box.lower <= y + 1e-5).all()
        assert (y <= box.upper + 1e-5).all()


def test_bad_input():
    for options, kind, sentence in (
        ({"kind": "pnv"}, BadInput, "unknown kind of power norm 'pnv'; did you mean 'pn-v'"),
        ({"groups": 3}, DoesNotFit, "groups=3: layer scale takes groups that divide the 4 features"),
        ({"groups": -1}, DoesNotFit, "groups=-1"),
        ({"groups": 1, "axis": 1}, DoesNotFit, "the last axis"),
        ({"forward_decay": 1.0}, BadInput, "decays 1.0 and 0.9"),
        ({"eps": 0.0}, BadInput, "eps=0.0"),
        ({"warmup": -1}, BadInput, "warmup=-1"),
    ):
        with pytest.raises(kind, match=sentence):
            PowerNorm(4, **options)
    norm = PowerNorm(4)
    with pytest.raises(DoesNotFit, match=r"inputs of \(3, 5\) do not have 4 features"):
        norm(torch.ones(3, 5))
    with pytest.raises(DoesNotFit, match="at least two tokens"):
        norm(torch.ones(1, 4))
    assert norm.eval()(torch.ones(1, 4)).shape == (1, 4)
    with pytest.raises(DoesNotFit, match="0: a Linear is no power norm"):
        FoldPowerNorm("0", ()).apply(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(DoesNotFit, match="1: a norm of 4 features folds into no such layer"):
        FoldPowerNorm("0", ("1",)).apply(nn.Sequential(PowerNorm(4), nn.ReLU()))
    with pytest.raises(DoesNotFit, match="it has no norm to replace"):
        norms_of(nn.Sequential(nn.Linear(2, 2)), ())
    with pytest.raises(BadInput, match="unknown norm '7'"):
        norms_of(nn.Sequential(nn.LayerNorm(2)), ("7",))
    with pytest.raises(DoesNotFit, match="x: a GroupNorm is no norm over one axis"):
        place_of(nn.GroupNorm(1, 2), "x")
