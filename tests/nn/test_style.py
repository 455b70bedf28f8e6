"""Styles by their equations, the gradients of learnt spreads, and layers that do nothing in evaluation."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn import style
from netweight.nn.style import (
    DSU,
    AdvStyle,
    MixStyle,
    Style,
    by_batch,
    mixed,
    moved,
    noise_like,
    restyled,
    spread_of,
    style_of,
)

SHAPES = st.sampled_from([(3, 2, 5), (4, 3, 4, 5), (2, 2, 3, 2, 4)])


def features(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=dtype) + 1


def noise(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (*x.shape[:2], *[1] * (x.ndim - 2))
    return Style(*(torch.randn(shape, generator=generator, dtype=x.dtype) for _ in range(2)))


def turns(monkeypatch, *values):
    """What the layers draw next to decide what they do."""
    rest = iter(values)
    monkeypatch.setattr(style, "drawn", lambda: next(rest))


def layer(x, k=1.0):
    made = AdvStyle(x.shape[1], k).to(x.dtype).train()
    made.begin(x)
    return made


def test_a_style_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]], [[0.0, 2.0, 4.0], [1.0, 1.0, 1.0]]])
    found = style_of(x)
    assert found.mean.flatten().tolist() == [2.0, 6.0, 2.0, 1.0]
    assert found.deviation.flatten().tolist() == pytest.approx([1, math.sqrt(3), 2, 1e-3], rel=1e-5)
    spread = spread_of(found)
    assert spread.mean.shape == (1, 2, 1)
    assert spread.mean.flatten().tolist() == pytest.approx([1e-3, 5 / math.sqrt(2)], rel=1e-5)
    assert spread.deviation[0, 0].item() == pytest.approx(1 / math.sqrt(2), rel=1e-5)
    half = mixed(found, torch.tensor([1, 0]), torch.tensor([0.25, 1.0])[:, None, None])
    assert half.mean.flatten().tolist() == [2.0, 0.25 * 6 + 0.75, 2.0, 1.0]
    far = moved(found, Style(torch.ones(1, 2, 1), 2 * torch.ones(1, 2, 1)), Style(*[torch.ones(2, 2, 1)] * 2))
    assert torch.equal(far.mean, found.mean + 1) and torch.equal(far.deviation, found.deviation + 2)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_what_comes_out_has_the_style_that_was_asked_for(shape, seed):
    x = features(shape, seed)
    now = style_of(x)
    to = moved(now, spread_of(now), noise(x, seed + 1))
    out = style_of(restyled(x, now, to))
    torch.testing.assert_close(out.mean, to.mean)
    torch.testing.assert_close(out.deviation, to.deviation.abs(), rtol=1e-4, atol=2e-3)  # may be mirrored
    torch.testing.assert_close(restyled(x, now, now), x, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_a_batch_in_another_order_gives_that_order(shape, seed):
    x, e = features(shape, seed), noise(features(shape), seed)
    other = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))

    def out(x, e):
        now = style_of(x)
        return restyled(x, now, moved(now, spread_of(now), e))

    torch.testing.assert_close(
        out(x[other], Style(e.mean[other], e.deviation[other])), out(x, e)[other], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("made", [MixStyle(1.0), DSU(1.0), AdvStyle(3)], ids=lambda m: type(m).__name__)
def test_evaluation_is_the_identity_and_training_is_not(made):
    x = features((4, 3, 5))
    assert made.eval()(x) is x
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert any(not torch.equal(made.train()(x), x) for _ in range(8))
        chance = torch.get_rng_state()
        first = [made(x) for _ in range(4)]
        torch.set_rng_state(chance)
        assert all(torch.equal(a, made(x)) for a in first)


@pytest.mark.parametrize("made", [MixStyle(0.0), DSU(0.0)], ids=["mixstyle", "dsu"])
def test_no_chance_no_change(made):
    x = features((4, 3, 5))
    assert all(made.train()(x) is x for _ in range(5))


def test_a_third_each(monkeypatch):
    x = features((4, 3, 6))
    made = layer(x)
    for value, wanted in ((0.0, "x"), (0.33, "x"), (0.34, "learnt"), (0.66, "learnt"), (0.67, "batch")):
        turns(monkeypatch, value)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            out = made(x)
            torch.manual_seed(0)
            now = style_of(x)
            spread = Style(made.mean_spread[:, None], made.deviation_spread[:, None])
            learnt = restyled(x, now, moved(now, spread, noise_like(now)))
            torch.manual_seed(0)
            assert torch.equal(out, {"x": x, "learnt": learnt, "batch": by_batch(x)}[wanted])
    made.mean_spread.data *= 2  # DSU and what was learnt are no longer the same
    turns(monkeypatch, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(made(x), learnt)


def test_half_the_batches_and_a_third_of_them():
    x = features((2, 2, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for made, share in ((DSU(), 0.5), (MixStyle(), 0.5), (AdvStyle(2), 2 / 3)):
            changed = sum(not torch.equal(made.train()(x), x) for _ in range(400)) / 400
            assert abs(changed - share) < 0.08


def test_the_first_batch_sets_the_spreads_and_no_other(monkeypatch):
    x, made = features((6, 3, 4, 4)), AdvStyle(3).double().train()
    assert not made.begun
    turns(monkeypatch, 0.0, 0.0)
    made(x)
    spread = spread_of(style_of(x))
    assert torch.equal(made.mean_spread, spread.mean.flatten()) and made.begun
    assert torch.equal(made.deviation_spread, spread.deviation.flatten())
    made(2 * x)
    assert torch.equal(made.mean_spread, spread.mean.flatten())
    again = AdvStyle(3).double().train()
    again.load_state_dict(made.state_dict())
    turns(monkeypatch, 0.0)
    again(3 * x)
    assert torch.equal(again.mean_spread, made.mean_spread)


def test_no_spread_gives_x_back(monkeypatch):
    x = features((4, 3, 5, 5), dtype=torch.float32)
    made = layer(x)
    for part in made.parameters():
        part.data.zero_()
    turns(monkeypatch, 0.5)
    assert (made(x) - x).abs().max() < 1e-5


@pytest.mark.parametrize("k", [1.0, 10.0, -0.5, 0.0])
def test_spreads_are_pushed_against_the_loss_and_features_are_not(monkeypatch, k):
    """Against finite differences: -k times the slope for S, the slope itself for x."""
    x = features((3, 2, 4)).requires_grad_()
    weights, made = features((3, 2, 4), 5), layer(x.detach(), k)

    def value(x):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return (made(x).sin() * weights).sum()

    turns(monkeypatch, *[0.5] * 50)
    value(x).backward()
    for part in made.parameters():
        for index in range(2):
            with torch.no_grad():
                part[index] += 1e-5
                up = value(x)
                part[index] -= 2e-5
                slope = (up - value(x)) / 2e-5
                part[index] += 1e-5
            assert part.grad[index].item() == pytest.approx(-k * slope.item(), rel=1e-5, abs=1e-7)
    with torch.no_grad():
        e = torch.zeros_like(x)
        e[1, 1, 2] = 1e-5
        slope = (value(x + e) - value(x - e)) / 2e-5
    assert x.grad[1, 1, 2].item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("turn", [0.1, 0.9])
def test_spreads_without_a_part_have_a_gradient_of_zero(monkeypatch, turn):
    x = features((3, 2, 4)).requires_grad_()
    made = layer(x.detach())
    turns(monkeypatch, turn)
    made(x).square().sum().backward()
    assert all(torch.equal(part.grad, torch.zeros_like(part)) for part in made.parameters())
    assert x.grad.abs().min() > 0
    if turn < 0.5:
        assert torch.equal(x.grad, 2 * x.detach())


def test_one_step_of_the_optimizer_raises_the_loss_in_the_spreads(monkeypatch):
    x, y = features((32, 2, 6), dtype=torch.float32), torch.arange(32) % 2
    made, head = layer(x), nn.Linear(12, 2)

    def value():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return nn.functional.cross_entropy(head(made(x).flatten(1)), y)

    turns(monkeypatch, *[0.5] * 2)
    before = value()
    before.backward()
    torch.optim.SGD(made.parameters(), 1e-2).step()
    assert value() > before


def test_mixed_styles_are_between_those_of_two_rows_and_have_no_gradient():
    x = features((16, 3, 6)).requires_grad_()
    made = MixStyle(1.0).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = made(x)
        torch.manual_seed(1)
        made(x + 0)
    means = style_of(x).mean
    found = style_of(out).mean
    assert (found <= means.amax(0) + 1e-9).all() and (found >= means.amin(0) - 1e-9).all()
    assert not torch.allclose(found, means)
    (slope,) = torch.autograd.grad(
        out.sum(), x
    )  # (x - mu) / sigma * sigma' + mu', styles held: sigma' / sigma
    ratio = (style_of(out).deviation / style_of(x).deviation).expand_as(x)
    torch.testing.assert_close(slope, ratio, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(dtype=st.sampled_from([torch.float16, torch.bfloat16]), value=st.sampled_from([0.1, 0.5, 0.9]))
def test_half_precision_is_computed_in_float32(dtype, value):
    x = features((4, 2, 5), dtype=torch.float32).to(dtype)
    flat = torch.cat([x, torch.full_like(x, 0.5)])  # no deviation at all
    made = AdvStyle(2).train()
    made.begin(flat)
    with pytest.MonkeyPatch.context() as patch:
        turns(patch, value)
        out = made(flat)
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: MixStyle(1.5), BadInput, "p=1.5, alpha=0.1: a chance from 0 to 1"),
        (lambda: MixStyle(alpha=0.0), BadInput, "alpha=0.0"),
        (lambda: DSU(-0.1), BadInput, "p=-0.1: a chance lies between 0 and 1"),
        (lambda: AdvStyle(0), BadInput, "channels=0"),
        (lambda: AdvStyle(2, math.nan), BadInput, "k=nan"),
        (lambda: AdvStyle(2)(torch.rand(3, 2)), DoesNotFit, r"shape \(3, 2\): expected b 2 \*places"),
        (lambda: AdvStyle(2)(torch.rand(3, 4, 5)), DoesNotFit, r"expected b 2 \*places"),
        (lambda: AdvStyle(2)(torch.rand(1, 2, 5)), DoesNotFit, "the styles of one example do not vary"),
        (lambda: DSU(1.0)(torch.rand(1, 2, 5)), DoesNotFit, "batches of two examples or more"),
        (lambda: DSU(1.0)(torch.rand(4, 2, 1, 1)), DoesNotFit, r"shape \(4, 2, 1, 1\) have no style"),
        (lambda: MixStyle(1.0)(torch.rand(4, 2)), DoesNotFit, "two places or more"),
    ],
)  # fmt: skip
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("made", [MixStyle(1.0), DSU(1.0), AdvStyle(3)], ids=lambda m: type(m).__name__)
def test_on_cuda(made):
    x, made = features((4, 3, 5), dtype=torch.float32).cuda(), copy.deepcopy(made).cuda().train()
    assert all(made(x).device == x.device for _ in range(6))
