"""JLCM: gradients and moments against definitions, the search, groups, the laws, what it refuses."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.share.jlcm import (
    JLCM,
    adam_step,
    alike,
    ascending,
    jlcm,
    learnt,
    naive,
    orders,
    output_error,
    proximal,
    second_moments,
    summed,
)
from netweight.compression.share.kmeans import KMeans, kmeans
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.plan import Budget, Plan
from netweight.core.rewrite import residual, rewritten
from netweight.core.stored import take_apart
from netweight.core.task import Data, Task, outputs
from netweight.nn.codebook import Codebook
from netweight.pipeline import compress
from netweight.planning import uniform
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task

QUICK = JLCM(bits=2, groups=1, steps=60)


def tables(count: int, entries: int, seed: int) -> torch.Tensor:
    return torch.randn(count, entries, generator=torch.Generator().manual_seed(seed)).double().sort(1).values


@given(entries=st.integers(2, 16), seed=st.integers(0, 2**16))
def test_the_proximal_factor_has_the_sign_of_the_naive_one_and_falls_with_the_distance(entries, seed):
    C = tables(2, entries, seed)
    near, far = proximal(C), naive(C)
    assert torch.equal(near.sign(), far.sign()) and (near.diagonal(dim1=1, dim2=2) == 0).all()
    gap = C.diff(dim=1).mean(1)
    for t, m in ((t, m) for t in range(2) for m in range(entries)):
        apart, order = (C[t] - C[t, m]).abs().sort()
        pushes = near[t, m].abs()[order][apart > 0.1 * gap[t]]
        assert (pushes.diff() < 0).all()
    assert torch.allclose(naive(C)[1, 0, -1], C[1, -1] - C[1, 0])


def test_the_proximal_factor_by_hand():
    factor = proximal(torch.tensor([[0.0, 1.0, 3.0]]))  # the gap is 1.5
    assert torch.allclose(factor[0, 0], torch.tensor([0.0, 2.25, 0.75]))
    assert torch.allclose(factor[0, 2], torch.tensor([-0.75, -1.125, 0.0]))
    assert torch.allclose(proximal(torch.tensor([[0.0, 0.0, 1.0]]))[0, 0], torch.tensor([0.0, 0.0, 0.25]))
    assert torch.allclose(proximal(torch.tensor([[0.0, 0.01, 1.0]]))[0, 0, 1], torch.tensor(5.0))  # gap / 0.1


@given(seed=st.integers(0, 2**16), count=st.sampled_from([1, 3]))
def test_the_gradient_of_tables_is_that_of_the_gather(seed, count):
    g = torch.Generator().manual_seed(seed)
    W, x, x_small = (torch.randn(6, 5, generator=g).double() for _ in range(3))
    H, X = (x_small.T @ x_small)[None], (x.T @ x_small)[None]
    C = tables(count, 4, seed).requires_grad_()
    m, s = torch.randint(4, (6, 5), generator=g), torch.rand(6, 1, generator=g).double() + 0.5
    table = (torch.arange(6) % count)[:, None]

    def loss(C: torch.Tensor) -> torch.Tensor:
        return (x_small @ (s * C[table, m]).T - x @ W.T).square().sum()

    (by_autograd,) = torch.autograd.grad(loss(C), [C])
    target = W @ X
    error, gradient = output_error((s * C.detach()[table, m])[None], H, target)
    assert error == pytest.approx(float(loss(C.detach()) - (x @ W.T).square().sum()))
    found = summed(gradient[0] * s, C.detach(), table, m)
    assert torch.allclose(found, by_autograd)
    nudged = C.detach().clone()
    nudged[0, 1] += 1e-6
    assert float((loss(nudged) - loss(C.detach())) / 1e-6) == pytest.approx(
        float(found[0, 1]), rel=1e-3, abs=1e-3
    )


def test_one_second_moment_a_weight_keeps_the_proportions_of_its_pushes():
    push = torch.tensor([[3.0, -4.0, 0.0], [1.0, 1.0, 2.0]])
    state = [torch.zeros(2, 3), torch.zeros(2, 1)]
    first = adam_step(push, state, 0)
    assert torch.allclose(first, push / push.square().mean(1, keepdim=True).sqrt(), atol=1e-5)
    second = adam_step(-push, state, 1)  # momentum: (0.09 - 0.1) / (1 - 0.9^2) of the first
    assert torch.allclose(second, -0.01 / 0.19 * first, rtol=1e-3)
    alone = adam_step(push, [torch.zeros(2, 3), torch.zeros(2, 3)], 0)
    assert torch.allclose(alone, push.sign(), atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_tables_are_sorted_at_the_end_and_places_follow(own):
    weight, group_of = torch.zeros(3, 2), torch.tensor([1, 0, 1])
    C = torch.tensor([[2.0, -1.0, 0.5], [5.0, 4.0, 6.0]])[: 2 if own else 1]
    m = torch.tensor([[0, 1], [2, 2], [1, 0]])
    start = Codebook.of(m, C.sort(1).values, torch.tensor([1.0, 2.0]), group_of, weight)
    decoded = ascending(C, m, start, group_of, weight).decode()
    rows = group_of if own else torch.zeros_like(group_of)
    assert torch.equal(decoded, C[rows[:, None], m] * torch.tensor([[2.0], [1.0], [2.0]]))


@pytest.mark.parametrize("layer", ["0", "3", "7"])
def test_second_moments_are_those_of_both_networks(layer):
    net, task = tiny_model(), tiny_task()
    small = copy.deepcopy(net)
    with torch.no_grad():
        small[0].weight.mul_(0.9)
    H, X = second_moments(net, small, layer, task.calibration)
    module = net.get_submodule(layer)
    change = 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    x, x_small = (outputs(part[: int(layer)], task.calibration) for part in (net, small))
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.copy_(module.weight + change)
        expected = float((other(x_small) - module(x)).square().flatten(1).sum(1).mean())
        bias = 0.0 if module.bias is None else module.bias.reshape(-1, *[1] * (x.ndim - 2))
        whole = float((module(x) - bias).square().flatten(1).sum(1).mean())
    W = module.weight.detach().reshape(len(H), -1, H.shape[1])
    error, _ = output_error(other.weight.detach().reshape(W.shape), H, W @ X)
    assert error + whole == pytest.approx(expected, rel=1e-3)


def test_alike_by_hand_and_dead_rows_join_the_lowest():
    weight = torch.tensor([[5.0, 5.0], [0.0, 0.0], [0.1, 0.1], [4.0, 4.0], [0.1, 0.2]])
    assert alike(weight, 2).tolist() == [1, 0, 0, 1, 0]
    assert alike(weight, 1).tolist() == [0] * 5 and alike(torch.zeros(3, 2), 2).tolist() == [0, 0, 0]
    assert alike(torch.ones(3, 2), 2).tolist() == [0, 0, 0]


def chain() -> tuple[nn.Sequential, Task]:
    """Three Linear layers with rows of unequal size, and inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
        x = torch.randn(96, 12)
        with torch.no_grad():
            for layer in (net[0], net[2]):
                layer.weight.mul_(torch.exp(torch.randn(24, 1)))
    return net.eval(), Task(Data(x[:64]), Data(x[64:]), "mse")


def dependent() -> Data:
    """Inputs of which four directions carry all."""
    g = torch.Generator().manual_seed(0)
    return Data(torch.randn(64, 4, generator=g) @ torch.randn(4, 12, generator=g))


def error(net: nn.Module, change, data: Data) -> float:
    before = outputs(net, data)
    return float(
        (outputs(assemble(net, change, Plan()).model, data) - before).square().sum() / before.square().sum()
    )


def test_without_steps_and_groups_it_is_kmeans():
    model, task = tiny_model(), tiny_task()
    plain = kmeans(model, task, weighted(model), KMeans(3)).packed
    change = jlcm(model, task, weighted(model), JLCM(bits=3, groups=1, steps=0))
    assert not change.rewrites
    for layer, form in change.packed.items():
        mine, other = take_apart(form), take_apart(plain[layer])
        assert mine[1] == other[1] and all(torch.equal(mine[0][n], other[0][n]) for n in mine[0])


def test_learning_both_beats_entries_alone_and_these_beat_kmeans():
    net, task = chain()
    layers = weighted(net)
    start, entries, both = (
        error(
            net,
            jlcm(net, task, layers, dataclasses.replace(QUICK, steps=steps, mapping_rate=rate)),
            task.calibration,
        )
        for steps, rate in ((0, 0.0), (300, 0.0), (300, 0.05))
    )
    assert both < 0.5 * entries and entries < 0.9 * start
    slow = jlcm(net, task, layers, dataclasses.replace(QUICK, steps=300, rate=0.0)).packed["0"]
    assert torch.equal(slow.tables, kmeans(net, task, ["0"], KMeans(2)).packed["0"].tables)


def test_the_naive_search_jumps_and_the_proximal_one_steps():
    (net, _), x = chain(), dependent()
    before = kmeans(net, Task(x, x), ["0"], KMeans(4)).packed["0"].places()

    def moves(search: str) -> torch.Tensor:
        settings = JLCM(bits=4, groups=1, search=search, best=False, steps=100, mapping_rate=0.2)
        moved = (jlcm(net, Task(x, x), ["0"], settings).packed["0"].places() - before).abs()
        return moved[moved > 0].float()

    near, far = moves("proximal"), moves("naive")
    assert len(near) > 20 and len(far) > 10
    assert (near > 1).float().mean() < 0.1 and (far > 1).float().mean() > 0.8


@given(seed=st.integers(0, 2**16), own=st.booleans())
def test_the_best_iterate_is_never_worse_than_the_start(seed, own):
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(6, 8, generator=g), torch.randn(20, 8, generator=g)
    group_of, H = torch.arange(6) % 2, (x.T @ x)[None]
    start = Codebook.nearest(weight, 2, group_of, own_tables=own)
    settings = JLCM(bits=2, steps=5, rate=0.5, mapping_rate=5.0)  # far too fast

    def loss(form: Codebook) -> float:
        return float(((form.decode() - weight) @ x.T).square().sum())

    form = learnt(weight, start, group_of, H, H, settings)
    assert loss(form) <= loss(start) * (1 + 1e-3)
    assert torch.equal(form.scale, start.scale) and torch.equal(form.order, start.order)
    assert form.tables.shape == ((2, 4) if own else (1, 4))


def test_later_layers_make_up_for_earlier_ones():
    net, task = chain()
    layers = weighted(net)
    settings = dataclasses.replace(QUICK, steps=200)
    alone = {name: jlcm(net, task, [name], settings).packed[name] for name in layers}
    joined = jlcm(net, task, layers, settings)
    assert torch.equal(joined.packed["0"].decode(), alone["0"].decode())
    separate = dataclasses.replace(joined, packed=alone)
    assert error(net, joined, task.calibration) < 0.9 * error(net, separate, task.calibration)


@pytest.mark.parametrize("own", [False, True])
def test_groups_stand_side_by_side_where_they_may_and_help(own):
    net, task = chain()
    layers = weighted(net)
    settings = JLCM(bits=3, groups=4, tables=own, steps=0)
    change = jlcm(net, task, layers, settings)
    assert [rewrite.producers for rewrite in change.rewrites] == [("0",), ("2",)]
    assert residual(net, change.rewrites, task.test.x) <= 1e-12
    after = rewritten(net, change.rewrites)
    for layer in ("0", "2"):
        form = change.packed[layer]
        assert form.order is None and form.groups == 4 and len(form.decode().unique()) <= 4 * 8
        size = weight_of(after, layer).square().mean(1)
        edges = [0, *form.ends.tolist(), 24]
        parts = [size[i:j] for i, j in zip(edges, edges[1:])]
        assert all(a.max() < b.min() for a, b in zip(parts, parts[1:]))
    assert change.packed["4"].order is not None  # nothing reads it: its order is stored
    one = jlcm(net, task, layers, dataclasses.replace(settings, groups=1))
    assert error(net, change, task.test) < 0.6 * error(net, one, task.test)


def test_a_network_that_cannot_be_captured_stores_its_orders():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, _ = chain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) if x.sum() > -1e9 else x

    model, (_, task) = Branch().eval(), chain()
    change = jlcm(model, task, weighted(model), JLCM(bits=3, steps=0))
    assert not change.rewrites and change.packed["net.0"].order is not None
    assert change.packed["net.0"].order.dtype == torch.int16
    groups = {"net.0": alike(weight_of(model, "net.0"), 4)}
    assert orders(model, task.calibration, groups) == []
    ordered = jlcm(chain()[0], task, ["0"], JLCM(bits=3, steps=0)).packed["0"]
    assert change.packed["net.0"].bits() == ordered.bits() + 16 * 24


@pytest.mark.parametrize(
    "settings",
    [JLCM(bits=3, steps=6), JLCM(bits=2, groups=2, tables=True, steps=3), JLCM(bits=5, groups=1, steps=4)],
    ids=repr,
)
def test_laws(settings):
    check_compressor(jlcm, settings)


def test_laws_on_a_language_model():
    check_compressor(
        jlcm,
        JLCM(bits=3, steps=4),
        model=tiny_language_model(),
        task=tiny_text_task(),
        layers=["up", "down", "head"],
    )


def test_a_budget_is_kept():
    model, task = tiny_model(), tiny_task()
    small = compress(model, task, Budget(bits=4.5), method="jlcm")
    weights = sum(weight_of(model, layer).numel() for layer in weighted(model))
    assert 4 < small.bits() / weights <= 4.5
    assert {o.settings["bits"] for o in small.plan.choices.values()} == {4}
    assert uniform(model, Budget(bits=4), "jlcm").bits == 3  # 4 and the tables do not fit


def test_one_example_constant_inputs_and_dead_weights():
    net, task = chain()
    with torch.no_grad():
        net[2].weight[3:9] = 0.0
        net[4].weight.zero_()
    for x in (task.calibration.x[:1], torch.zeros(4, 12), torch.full((4, 12), 2.0)):
        change = jlcm(net, Task(Data(x), task.test), weighted(net), QUICK)
        assert not change.left and error(net, change, Data(x)) >= 0
        assert all(form.decode().isfinite().all() for form in change.packed.values())


def test_tiny_and_huge_weights_and_inputs_are_learnt_alike():
    net, settings = chain()[0][:1], dataclasses.replace(QUICK, steps=200)
    x = dependent()

    def ratio(net: nn.Module, x: Data) -> float:
        start, joint = kmeans(net, Task(x, x), ["0"], KMeans(2)), jlcm(net, Task(x, x), ["0"], settings)
        return error(net, joint, x) / error(net, start, x)

    with torch.no_grad():
        net[0].bias.zero_()
    plain = ratio(net, x)
    assert plain < 0.5
    for factor in (2.0**-40, 2.0**40):
        assert ratio(net, Data(factor * x.x)) == pytest.approx(plain, rel=1e-3)
        scaled = copy.deepcopy(net)
        with torch.no_grad():
            scaled[0].weight.mul_(factor)
        assert ratio(scaled, x) == pytest.approx(plain, rel=0.3)  # float32 scales in place of float16


def test_what_is_left_and_what_is_refused():
    net, task = chain()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.inf
    assert jlcm(net, task, ["0"], QUICK).left == {"0": "its weight holds NaN or Inf"}
    net, _ = chain()
    with torch.no_grad():
        net[0].weight.mul_(1e30)
    assert jlcm(net, task, ["0", "2"], QUICK).left == {"2": "its inputs on the calibration data overflow"}
    model = tiny_language_model()
    with pytest.raises(DoesNotFit, match="^embedding: the method cannot treat a Embedding"):
        jlcm(model, tiny_text_task(), ["embedding"], QUICK)
    unused = nn.Sequential(nn.Linear(12, 3))
    unused.spare = nn.Linear(12, 12)
    unused.forward = lambda x: unused[0](x)
    with pytest.raises(DoesNotFit, match="^spare: the layer is never called"):
        jlcm(unused, task, ["spare"], QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": 9},
        {"groups": 0},
        {"steps": -1},
        {"examples": 0},
        {"rate": -1.0},
        {"search": "far"},
    ],
    ids=repr,
)
def test_nonsense(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}={wrong[name]!r}"):
        JLCM(**wrong)


def test_only_the_examples_asked_for_are_seen():
    net, task = chain()
    few = jlcm(net, task, ["0"], dataclasses.replace(QUICK, examples=8)).packed["0"]
    same = jlcm(net, Task(task.calibration.take(8), task.test), ["0"], QUICK).packed["0"]
    assert torch.equal(few.decode(), same.decode())
    assert not torch.equal(few.decode(), jlcm(net, task, ["0"], QUICK).packed["0"].decode())
