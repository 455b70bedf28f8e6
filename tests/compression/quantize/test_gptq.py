"""GPTQ against the paper's update in its slow form, its theorems, RTN, the laws of its room, and nonsense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.gptq import GPTQ, encode, encoded, factor, gptq, order_of
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.quantize.rtn import encode as round_to_nearest
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.moments import moments
from netweight.core.plan import Plan
from netweight.core.task import Data, Task
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def problem(seed: int, rows: int = 4, d: int = 12, examples: int = 40, n: int = 1):
    """A weight and Gram matrices of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, examples, d, generator=g).double() @ torch.randn(n, d, d, generator=g).double()
    x *= torch.logspace(-1, 1, d).double()[torch.randperm(d, generator=g)]
    return torch.randn(n * rows, d, generator=g), x.mT @ x / examples


def loss(code, weight, gram) -> float:
    change = (code.decode() - weight).double().reshape(len(gram), -1, gram.shape[-1])
    return float((change @ gram * change).sum())


def optimal_brain_quantizer(weight: torch.Tensor, H: torch.Tensor, s: GPTQ) -> torch.Tensor:
    """Frantar et al., equations 2 and 3: after each column the inverse Hessian loses it by elimination."""
    d = len(H)
    H = H + s.damping * H.diagonal().mean() * torch.eye(d).double()
    order = sorted(range(d), key=lambda j: (-float(H[j, j]), j)) if s.act_order else range(d)
    grid = round_to_nearest(weight, RTN(s.bits, s.symmetric, s.group))
    scale, zero = grid.scale.double().clone(), grid.zeros().double().clone()
    per = d // scale.shape[1]
    W, inverse, result = weight.double().clone(), H.inverse(), torch.empty_like(weight).double()
    low, high = grid.grid.levels
    for j in order:
        if s.group and not s.act_order and j % per == 0:
            fresh = round_to_nearest(W[:, j : j + per].float(), RTN(s.bits, s.symmetric))
            scale[:, j // per], zero[:, j // per] = fresh.scale[:, 0].double(), fresh.zeros()[:, 0].double()
        z, step = zero[:, j // per], scale[:, j // per]
        result[:, j] = (((W[:, j] / step).round() + z).clamp(low, high) - z) * step
        e = (W[:, j] - result[:, j]) / inverse[j, j]
        W -= e[:, None] * inverse[j]
        W[:, j] = result[:, j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0.0, 0.0
        inverse[j, j] = 1.0  # out of play
    return result.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_follows_the_paper_step_by_step(act_order, group, symmetric):
    for seed in range(6):
        weight, gram = problem(seed)
        chosen = GPTQ(3, symmetric, group, damping=0.05, act_order=act_order, block=5)
        expected = optimal_brain_quantizer(weight, gram[0], chosen)
        assert torch.allclose(encode(weight, gram, chosen).decode(), expected, atol=1e-6)


def test_defaults():
    assert GPTQ() == GPTQ(4, False, 0, 0.01, True, 128)
    weight, gram = problem(0, d=300)
    assert torch.equal(encode(weight, gram, GPTQ()).decode(), encode(weight, gram, GPTQ(block=1)).decode())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(2, 8),
    act_order=st.booleans(),
    group=st.sampled_from([-1, 0, 4]),
)
def test_diagonal_inputs_give_rounding_to_nearest(seed, bits, act_order, group):
    weight, _ = problem(seed)
    gram = torch.rand(1, 12, generator=torch.Generator().manual_seed(seed)).double().diag_embed()
    gram[0, 3, 3] = 0  # never active
    chosen = GPTQ(bits, seed % 2 == 0, group, act_order=act_order)
    expected = round_to_nearest(weight, RTN(bits, seed % 2 == 0, group))
    code = encode(weight, gram, chosen)
    assert torch.equal(code.codes, expected.codes) and torch.equal(code.scale, expected.scale)
    assert torch.equal(code.decode(), expected.decode()) and code.bits() == expected.bits()
    assert torch.equal(encode(weight, gram * 0, chosen).decode(), expected.decode())  # all inputs are zero


@given(
    seed=st.integers(0, 2**16),
    block=st.integers(1, 20),
    group=st.sampled_from([0, 3, 6]),
    act_order=st.booleans(),
)
@settings(max_examples=40)
def test_blocks_do_not_matter(seed, block, group, act_order):
    weight, gram = problem(seed, n=2)
    one, other = (
        encode(weight, gram, GPTQ(4, group=group, act_order=act_order, block=b)) for b in (block, 12)
    )
    assert torch.equal(one.decode(), other.decode())


def test_order_of_the_inputs_does_not_matter_with_act_order():
    weight, gram = problem(3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = encode(weight[:, order], gram[:, order][:, :, order], GPTQ(3))
    assert torch.equal(shuffled.decode(), encode(weight, gram, GPTQ(3)).decode()[:, order])


def test_groups_of_a_convolution_are_problems_of_their_own():
    weight, gram = problem(4, n=3)
    together = encode(weight, gram, GPTQ(3)).decode()
    alone = [encode(w, h[None], GPTQ(3)).decode() for w, h in zip(weight.split(4), gram)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_factor_is_unit_triangular_and_makes_the_damped_matrix_in_that_order(damping):
    _, gram = problem(5, n=2)
    order = order_of(gram, True)
    assert not torch.equal(order[0], order[1])
    H = gram + damping * torch.diag_embed(gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(2, 12))
    H = torch.stack([one[i][:, i] for one, i in zip(H, order)])
    R = factor(gram, order, damping).double()
    assert torch.equal(R, R.triu()) and (R.diagonal(dim1=1, dim2=2) == 1).all()
    within = torch.linalg.solve(R, torch.linalg.solve(R, H).mT)
    D = within.diagonal(dim1=1, dim2=2)
    assert (D > 0).all() and torch.allclose(within, D.diag_embed(), atol=1e-4 * float(D.max()))
    U = torch.linalg.cholesky(H.inverse(), upper=True)  # of the paper
    assert torch.allclose(R.inverse() * U.diagonal(dim1=1, dim2=2)[..., None], U, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_span_a_line_are_damped_until_they_can_be_treated(damping):
    weight, _ = problem(6)
    x = torch.ones(1, 12, 1).double()
    gram = torch.cat([x @ x.mT, torch.zeros(1, 12, 12).double()])
    code = encode(torch.cat([weight, weight]), gram, GPTQ(3, damping=damping))
    nearest = round_to_nearest(torch.cat([weight, weight]), RTN(3))
    assert code.decode().isfinite().all()
    assert loss(code, torch.cat([weight, weight]), gram) < 0.3 * loss(
        nearest, torch.cat([weight, weight]), gram
    )
    assert torch.equal(code.decode()[4:], nearest.decode()[4:])


def test_sums_that_rounding_made_indefinite_are_damped_until_they_can_be_treated():
    weight, gram = problem(7)
    gram -= 0.02 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(12).double()
    assert torch.linalg.eigvalsh(gram).min() < 0
    assert encode(weight, gram, GPTQ(damping=1e-6)).decode().isfinite().all()


def test_error_on_the_calibration_inputs_is_far_below_rounding():
    ratios = []
    for seed in range(10):
        weight, gram = problem(seed, rows=16, d=48, examples=200)
        nearest = loss(round_to_nearest(weight, RTN(3)), weight, gram)
        ratios.append(loss(encode(weight, gram, GPTQ(3)), weight, gram) / nearest)
    assert sum(ratios) / 10 < 0.45 and max(ratios) < 0.7


def test_layers_with_one_input_are_rounded_as_if_alone():
    weight, gram = problem(8)
    other, third = problem(9, rows=7)[0], problem(10, rows=1)[0]
    for chosen in (GPTQ(3), GPTQ(3, True, -1), GPTQ(4, False, 4), GPTQ(3, False, 4, act_order=False)):
        together = encoded({"a": weight, "b": other, "c": third}, gram, chosen)
        for name, w in {"a": weight, "b": other, "c": third}.items():
            alone = encode(w, gram, chosen)
            assert (
                torch.equal(together[name].decode(), alone.decode()) and together[name].bits() == alone.bits()
            )


def chain(seed: int, depth: int = 6, width: int = 24) -> tuple[nn.Sequential, Data]:
    """Linear layers in a row with inputs of few directions: each layer's error is input of the next."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    for layer in model:
        layer.weight.data = torch.randn(width, width, generator=g) / width**0.5
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -1.5, width)[:, None]
    return model.eval(), Data(torch.randn(400, width, generator=g) @ mix, batch=100)


def off(model: nn.Sequential, change, data: Data) -> float:
    """Relative squared error of the outputs."""
    small = assemble(model, change, Plan()).plain()
    with torch.no_grad():
        return float((small(data.x) - model(data.x)).square().sum() / model(data.x).square().sum())


def test_sequential_rounds_the_first_layer_alike_and_later_ones_for_what_they_then_read():
    model, data = chain(0)
    task = Task(data, data, "mse")
    one, other = (gptq(model, task, weighted(model), GPTQ(3, sequential=s)).packed for s in (False, True))
    assert torch.equal(one["0"].decode(), other["0"].decode())
    twin = chain(0)[0]
    for layer in weighted(model):
        seen = moments(twin, data.batched(100), [layer])[layer]
        expected = encode(weight_of(model, layer), seen.gram.float(), GPTQ(3))
        same = (other[layer].integers() == expected.integers()).float().mean()
        assert same > 0.99  # sums of other order
        assert layer == "0" or not torch.equal(one[layer].decode(), other[layer].decode())
        twin.get_submodule(layer).weight.data = other[layer].decode()
    alone = gptq(model, task, ["3"], GPTQ(3, sequential=True)).packed["3"]
    assert torch.equal(alone.decode(), gptq(model, task, ["3"], GPTQ(3)).packed["3"].decode())


@pytest.mark.parametrize(("bits", "depth", "most"), [(2, 8, 0.8), (3, 4, 1.0)])
def test_sequential_is_better_on_a_deep_chain_on_the_whole(bits, depth, most):
    plain, sequential = [], []
    for seed in range(16):
        model, data = chain(seed, depth)
        task = Task(data, data, "mse")
        for errors, settings_ in ((plain, GPTQ(bits)), (sequential, GPTQ(bits, sequential=True))):
            errors.append(off(model, gptq(model, task, weighted(model), settings_), data))
    assert sum(sequential) < most * sum(plain)


def test_moments_that_are_there_already_give_the_same():
    model, data = chain(1)
    task, layers = Task(data, data, "mse"), weighted(model)
    walked = gptq(model, task, layers, GPTQ(3)).packed
    moments(model, data, layers)
    for layer, form in gptq(model, task, layers, GPTQ(3)).packed.items():
        assert (form.integers() == walked[layer].integers()).float().mean() > 0.99


@pytest.mark.parametrize(
    "chosen",
    [
        GPTQ(),
        GPTQ(3, True, 8),
        GPTQ(3, sequential=True),
        GPTQ(3, False, 8, act_order=False, block=12),
        GPTQ(2, group=-1),
    ],
    ids=repr,
)
def test_laws_and_layers(chosen):
    check_compressor(gptq, chosen)
    check_compressor(gptq, chosen, model=tiny_language_model(), task=tiny_text_task())
    model, task = tiny_model(), tiny_task()
    layers = weighted(model)
    seen = moments(model, task.calibration, layers)
    if chosen.sequential:
        return
    for layer, form in gptq(model, task, layers, chosen).packed.items():
        assert torch.equal(form.decode(), encode(weight_of(model, layer), seen[layer].gram, chosen).decode())


def test_every_layer_is_better_than_rounded():
    model, task = tiny_model(), tiny_task()
    layers = weighted(model)
    one, other = gptq(model, task, layers, GPTQ(3)).packed, rtn(model, task, layers, RTN(3)).packed
    for layer, seen in moments(model, task.calibration, layers).items():
        weight = weight_of(model, layer)
        assert seen.error(one[layer].decode() - weight) < 0.7 * seen.error(other[layer].decode() - weight)


def test_a_layer_whose_inputs_are_zero_is_rounded():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    task = Task(Data(torch.rand(5, 4)), Data(torch.rand(5, 4)))
    form = gptq(model, task, ["1"], GPTQ()).packed["1"]
    assert torch.equal(form.decode(), round_to_nearest(weight_of(model, "1"), RTN()).decode())


def test_what_cannot_be_treated_and_nonsense():
    model = tiny_model()
    model[9].weight.data[0, 0] = torch.nan
    assert "its weight" in gptq(model, tiny_task(), ["9"], GPTQ()).left["9"]
    model[3].weight.data[0, 0] = torch.nan  # what comes after it sees NaN
    assert "its inputs" in gptq(model, tiny_task(), ["7"], GPTQ()).left["7"]
    with pytest.raises(DoesNotFit, match="^embedding: "):
        gptq(tiny_language_model(), tiny_text_task(), ["embedding"], GPTQ())
    with pytest.raises(DoesNotFit, match="^0: .*ConvTranspose1d"):
        gptq(nn.Sequential(nn.ConvTranspose1d(2, 2, 1)), tiny_task(), ["0"], GPTQ())
    with pytest.raises(DoesNotFit, match="^7: rows of 144 .* group=7"):
        gptq(tiny_model(), tiny_task(), ["7"], GPTQ(group=7))
    nonsense = [{"bits": 9}, {"group": -2}, {"damping": -0.1}, {"damping": float("inf")}, {"block": 0}]
    for values in nonsense:
        with pytest.raises(ValueError, match=repr(*values.values())):
            GPTQ(**values)
