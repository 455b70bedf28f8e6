"""Attention with joined query and key: the same function, its products, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.rewrite import residual, rewritten
from netweight.nn.qk_attention import Attention, JoinQueryKey, Product, joined, like, parted, uncertain
from netweight.nn.quantizer import FromMean, Levels, codes


def attention(width: int = 8, heads: int = 2, seed: int = 0) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Attention(width, heads)


@given(heads=st.sampled_from([1, 2, 4]), tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_is_softmax_attention_whether_joined_or_not(heads, tokens, seed):
    own = attention(8, heads, seed).double()
    x = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(seed)).double()
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (own.query(x), own.key(x), own.value(x))
    )
    wanted = nn.functional.scaled_dot_product_attention(q, k, v)
    wanted = own.output(wanted.transpose(1, 2).flatten(2))
    assert torch.allclose(own(x), wanted, atol=1e-12)
    assert torch.allclose(like(own)(x), wanted, atol=1e-12)
    model = nn.Sequential(own)
    assert residual(model, [JoinQueryKey("0")], x) <= 1e-9
    assert rewritten(model, [JoinQueryKey("0")])[0].product.weight.shape == (heads * 8, 8)


def test_products_lie_one_below_the_other():
    q, k = torch.randn(6, 6), torch.randn(6, 6)
    m = joined(q, k, 3)
    for h in range(3):
        part = slice(2 * h, 2 * h + 2)
        assert torch.allclose(m[6 * h : 6 * h + 6], q[part].T @ k[part], atol=1e-6)


def test_the_product_is_rounded_and_both_factors_learn():
    own = attention()
    before, chance = copy.deepcopy(own.state_dict()), torch.get_rng_state()
    new = like(own)
    new.product = Product(own, FromMean.stats(2))
    assert torch.equal(chance, torch.get_rng_state())
    x = torch.randn(2, 3, 8)
    m = joined(own.query.weight, own.key.weight, 2)
    assert torch.equal(new.product(x), nn.functional.linear(x, FromMean.stats(2)(m)))
    given_ = torch.randn(2, 3, 16)
    (new.product(x) * given_).sum().backward()
    g = given_.flatten(0, 1).T @ x.flatten(0, 1)  # to M, as it is
    for h in range(2):
        q, k = own.query.weight[4 * h : 4 * h + 4], own.key.weight[4 * h : 4 * h + 4]
        assert torch.allclose(own.query.weight.grad[4 * h : 4 * h + 4], k @ g[8 * h : 8 * h + 8].T, atol=1e-4)
        assert torch.allclose(own.key.weight.grad[4 * h : 4 * h + 4], q @ g[8 * h : 8 * h + 8], atol=1e-4)
    old = parted(new)
    assert all(torch.equal(t, before[name]) for name, t in old.state_dict().items())


def test_held_entries_pass_no_gradient():
    own = attention()
    module = Product(own, FromMean.stats(2))
    module.held = 0.2
    x, given_ = torch.randn(2, 3, 8), torch.randn(2, 3, 16)
    (module(x) * given_).sum().backward()
    m = module.joined().detach()
    g = (given_.flatten(0, 1).T @ x.flatten(0, 1)) * uncertain(m, FromMean.stats(2), 0.2)
    wanted = own.key.weight[:4] @ g[:8].T
    assert torch.allclose(own.query.weight.grad[:4], wanted, atol=1e-4)
    own.zero_grad()
    module.held = 0.0
    module(x).sum().backward()
    assert not own.query.weight.grad.any()


@given(bits=st.integers(1, 4), near=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_uncertain_is_near_a_threshold_between_two_levels(bits, near, seed):
    w = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)).double()
    rounding = FromMean.stats(bits)
    u = w / rounding.size(w) - 0.5
    low, high = rounding.levels.low, rounding.levels.high
    apart = torch.stack([(u - (i + 0.5)).abs() for i in range(low, high)]).amin(0)
    assert torch.equal(uncertain(w, rounding, near), apart <= near)
    by = 1e-3 * rounding.size(w)  # a code changes by so much only near a threshold
    moved = codes(w + by, rounding.size(w), rounding.levels) != codes(w, rounding.size(w), rounding.levels)
    assert not (moved & ~uncertain(w, rounding, 1.01e-3)).any()


def test_refused():
    assert Levels.mid_rise(2).count == 4
    with pytest.raises(DoesNotFit, match="a width of 8 is not a multiple of 3 heads"):
        Attention(8, 3)
    with pytest.raises(DoesNotFit, match=r"0: query and key cannot be joined \(a Linear\)"):
        JoinQueryKey("0").apply(nn.Sequential(nn.Linear(2, 2)))
    own = attention()
    own.key = nn.Linear(8, 8)
    with pytest.raises(DoesNotFit, match="it has a bias on query or key"):
        JoinQueryKey("0").apply(nn.Sequential(own))
