"""Buckets by hand and by their definition, gradients in closed form, stored as they are trained."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput
from netweight.nn.buckets import (
    Buckets,
    InBuckets,
    OnPoints,
    drawn,
    in_buckets,
    on_levels,
    places,
    scaled,
)
from netweight.nn.codebook import table_of
from netweight.nn.quantized import Roundings, attach, finished
from netweight.testing import check_form, tiny_model, tiny_task


def values(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*shape or (6, 11), generator=torch.Generator().manual_seed(seed))


def by_definition(weight: torch.Tensor, levels: np.ndarray, bucket: int) -> np.ndarray:
    """Each weight on the nearest of its bucket's levels, one after the other; ties to an even place."""
    flat = weight.flatten().numpy().astype(np.float64)
    found = np.empty_like(flat)
    size = bucket or len(flat)
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        low = part.min()
        wide = np.float64(np.float32(part.max()) - np.float32(low))
        wide = 1.0 if wide < 1e-10 else wide
        for place, v in enumerate(part):
            away = abs((v - low) / wide - levels)
            found[start + place] = (
                low + wide * levels[min(range(len(levels)), key=lambda k: (away[k], k % 2))]
            )
    return found.reshape(weight.shape)


def test_two_bits_by_hand():
    weight = torch.tensor([[0.0, 3.0, 1.4, 2.5], [1.5, -1.0, 7.0, 7.0]])
    form = Buckets.nearest(weight, 2, 3)  # runs 0 3 1.4 | 2.5 1.5 -1 | 7 7
    assert form.integers().tolist() == [0, 3, 1, 3, 2, 0, 0, 0]
    assert form.width.tolist() == [3, 3.5, 1] and form.least.tolist() == [0, -1, 7]
    assert torch.allclose(form.decode(), torch.tensor([[0.0, 3.0, 1.0, 2.5], [4 / 3, -1.0, 7.0, 7.0]]))
    assert form.bits() == 2 * 8 + 3 * 64  # what fills up the last bucket is not stored
    assert (
        form.huffman_bits() == 3 * 64 + 4 * 1 + 2 * 2 + 1 * 3 + 1 * 3
    )  # 0 four times, 3 twice, 1 and 2 once


def test_half_goes_to_the_even_level():
    assert Buckets.nearest(torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0]]), 2, 0).integers().tolist() == [
        0,
        0,
        2,
        2,
        3,
    ]


@given(bits=st.integers(1, 8), bucket=st.sampled_from([0, 1, 4, 7, 66, 256]), seed=st.integers(0, 99))
def test_uniform_levels_are_the_definition_and_within_half_a_step(bits, bucket, seed):
    weight = values(seed)
    form, levels = Buckets.nearest(weight, bits, bucket), np.linspace(0, 1, 2**bits)
    assert np.allclose(form.decode().numpy(), by_definition(weight, levels, bucket), atol=1e-6)
    width = in_buckets(weight, bucket).amax(1) - in_buckets(weight, bucket).amin(1)
    step = width.repeat_interleave(bucket or 66)[:66].reshape(6, 11) / (2**bits - 1)
    assert ((form.decode() - weight).abs() <= step / 2 + 1e-6).all()  # nothing is lost as the levels grow


@given(
    k=st.integers(2, 20),
    bucket=st.sampled_from([0, 5, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_points_are_the_definition_and_forms_keep_the_laws(k, bucket, dtype, seed):
    weight = values(seed, 24, 30).to(dtype)
    points = torch.rand(k, generator=torch.Generator().manual_seed(seed)).sort().values
    form = Buckets.nearest(weight, 0, bucket, points)
    if dtype == torch.float32:
        assert np.allclose(
            form.decode().numpy(), by_definition(weight, points.double().numpy(), bucket), atol=1e-5
        )
    assert form.bits_per_code == math.ceil(math.log2(k))
    if bucket != 5:
        check_form(form, weight)
        check_form(Buckets.nearest(weight, 4, bucket), weight)


def test_scaling_and_back_is_the_identity():
    weight = values()
    u, width, least = scaled(weight, 8)
    assert u.min() == 0 and abs(u.max() - 1) < 1e-6
    back = u * width.double().repeat_interleave(8)[:66] + least.double().repeat_interleave(8)[:66]
    assert (back - weight.flatten()).abs().max() < 1e-6


@pytest.mark.parametrize("bucket", [0, 4])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e20])
def test_a_constant_bucket_survives(bucket, value):
    weight = torch.full((3, 4), value)
    assert torch.equal(Buckets.nearest(weight, 4, bucket).decode(), weight)
    points = OnPoints(weight, 4, bucket)
    assert torch.equal(points.stored(weight).decode(), weight)


def test_random_rounding_has_the_mean_of_the_value():
    u, count = torch.tensor([0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0], dtype=torch.float64), 4000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([drawn(u, 2) for _ in range(count)]).double()
    assert (draws - u * 3).abs().max() < 1 + 1e-9 and draws.max() <= 3
    error = (u * 3).frac() * (1 - (u * 3).frac())
    z = (draws.mean(0) - u * 3).abs() / (error / count).sqrt().clamp(min=1e-9)
    assert (z < 4).all()


def test_random_only_while_training():
    rounding, weight = InBuckets(2, 16, stochastic=True), values()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(rounding(weight), rounding(weight))
    assert torch.equal(rounding.eval()(weight), rounding.stored(weight).decode())


# Gradients -----------------------------------------------------------------------------------------------


def test_gradients_to_the_weight():
    weight, g = (values(1) * 0.7).requires_grad_(), values(2)
    assert (weight.abs() > 1).any()
    InBuckets(2, 16)(weight).backward(g)
    assert torch.equal(weight.grad, g)
    weight.grad = None
    cut = InBuckets(2, 16, "truncated")(weight)
    cut.backward(g)
    assert torch.equal(weight.grad, g * (weight.abs() <= 1))
    assert torch.equal(cut, InBuckets(2, 16)(weight.clamp(-1, 1)))


@pytest.mark.parametrize("bucket", [0, 16])
def test_the_exact_gradient_goes_through_the_width(bucket):
    """g, plus at the largest of each bucket sum g (q - u), minus that at the least (as the paper's code)."""
    weight, g = values(3).requires_grad_(), values(4)
    value = InBuckets(2, bucket, "exact")(weight)
    assert torch.equal(value, InBuckets(2, bucket)(weight))
    value.backward(g)
    wanted = g.flatten().clone().double()
    u = scaled(weight, bucket)[0]
    moved = (u * 3).round() / 3 - u
    for start in range(0, 66, bucket or 66):
        part = slice(start, start + (bucket or 66))
        total = (g.flatten()[part].double() * moved[part]).sum()
        flat = weight.detach().flatten()[part]
        wanted[start + int(flat.argmax())] += total
        wanted[start + int(flat.argmin())] -= total
    assert torch.allclose(weight.grad.flatten().double(), wanted, atol=1e-5)
    assert not torch.allclose(weight.grad, g, atol=1e-3)


def test_the_gradient_of_points_is_that_of_finite_differences():
    weight, g = values(5), values(6).double()
    rounding = OnPoints(weight, 5, 16)
    (rounding(weight).double() * g).sum().backward()
    u, width, least = scaled(weight, 16)
    points, codes = rounding.points.detach().double(), places(u, 0, rounding.points)

    def total(p: torch.Tensor) -> float:
        return float((on_levels(codes, width, least, 0, p, 16) * g.flatten()).sum())

    for j in range(5):
        moved = torch.zeros(5, dtype=torch.float64)
        moved[j] = 1e-4
        slope = (total(points + moved) - total(points - moved)) / 2e-4
        by_formula = (width.double().repeat_interleave(16)[:66] * g.flatten())[codes == j].sum()
        assert rounding.points.grad[j].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)
        assert slope == pytest.approx(by_formula.item(), rel=1e-4, abs=1e-4)


def test_points_begin_at_quantiles_or_equally_far_apart():
    weight = values(7)
    u = scaled(weight, 16)[0].numpy()
    assert np.allclose(
        OnPoints(weight, 5, 16).points.detach(), np.percentile(u, [0, 25, 50, 75, 100]), atol=1e-6
    )
    assert OnPoints(weight, 5, 16, quantiles=False).points.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_trained_to_the_weights_points_come_to_lloyd_max():
    weight = values(8, 40, 20)
    rounding = OnPoints(weight, 4, 0)
    optimizer = torch.optim.SGD(rounding.parameters(), lr=2e-5)
    for _ in range(400):
        optimizer.zero_grad()
        (rounding(weight) - weight).square().sum().backward()
        optimizer.step()
        rounding.sort()
    u = scaled(weight, 0)[0]
    best = table_of(u, 4)
    assert torch.allclose(rounding.points.detach().double(), best, atol=5e-3)


def test_sorting_puts_points_in_order():
    rounding = OnPoints(values(), 4, 0)
    rounding.points.data = torch.tensor([0.9, 0.1, 0.5, 0.3])
    rounding.sort()
    assert rounding.points.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.9])


# In networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda layer: InBuckets(3, 100),
    lambda layer: InBuckets(4, 0, "truncated"),
    lambda layer: OnPoints(layer.weight.detach(), 6, 100),
])  # fmt: skip
def test_what_is_packed_computes_what_was_trained(make):
    model = attach(tiny_model(), lambda name, layer: Roundings(make(layer))).eval()
    plain, change = finished(model)
    x = tiny_task().test.x
    from netweight.core.compressed import assemble
    from netweight.core.plan import Plan

    assert len(change.packed) == 4 and all(isinstance(form, Buckets) for form in change.packed.values())
    assert torch.equal(assemble(plain, change, Plan()).model(x), model(x))


def test_stays_on_its_device_and_takes_embeddings():
    table = nn.Embedding(9, 4)
    form = Buckets.nearest(table.weight.detach(), 4, 8)
    assert torch.equal(form.layer(table)(torch.tensor([3])), form.decode()[3:4])


def test_nonsense_is_refused():
    for make, sentence in [
        (lambda: InBuckets(0, 4), "bits=0: a weight takes from 1 to 8"),
        (lambda: InBuckets(9, 4), "bits=9"),
        (lambda: InBuckets(4, -1), "bucket=-1: give the weights of a bucket, or 0"),
        (lambda: InBuckets(4, 4, "exakt"), "did you mean 'exact'"),
        (lambda: OnPoints(values(), 1, 4), "points=1: a tensor takes from 2 to 256"),
        (lambda: OnPoints(values(), 4, -2), "bucket=-2"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            make()
    from dataclasses import replace

    form = Buckets.nearest(values(), 2, 16)
    on = Buckets.nearest(values(), 0, 16, torch.tensor([0.0, 0.4, 1.0]))
    for broken in [
        lambda: replace(form, width=form.width[:1]),
        lambda: replace(form, width=-form.width),
        lambda: replace(form, least=form.least * math.nan),
        lambda: replace(form, bits_per_code=9),
        lambda: replace(form, codes=form.codes[:-1]),
        lambda: replace(form, dtype="int8"),
        lambda: replace(on, points=on.points.flip(0)),
        lambda: replace(on, points=on.points[:2]),
        lambda: replace(on, points=None, codes=on.codes[:3]),
    ]:
        with pytest.raises(ValueError):
            broken()
    past = Buckets.nearest(values(), 2, 16)
    with pytest.raises(ValueError, match="a code lies past the 3 points"):
        replace(past, points=torch.tensor([0.0, 0.4, 1.0]))
