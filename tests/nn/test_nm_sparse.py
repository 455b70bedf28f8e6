"""N:M masks by their definition, and layers whose three products are each checked against dense autograd."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.nm_sparse import (
    INPUTS,
    OUTPUTS,
    Pattern,
    Sides,
    SparseLayer,
    mask,
    masked,
    misfit,
    sparse_gradient,
    stored,
)

PATTERNS = [(1, 2), (2, 4), (2, 8), (4, 4), (3, 8)]
KINDS = [
    nn.Linear(16, 8),
    nn.Linear(16, 8, bias=False),
    nn.Conv1d(16, 8, 3, padding="same"),
    nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2, bias=False),
    nn.Conv2d(8, 16, (3, 2), padding=(1, 0), dilation=2, padding_mode="circular"),
    nn.Conv3d(8, 8, 2, stride=(1, 2, 1)),
]


def by_definition(weight: torch.Tensor, keep: int, of: int, axis: int) -> torch.Tensor:
    w = weight if axis == INPUTS else weight.transpose(0, 1)
    found = torch.zeros_like(w, dtype=torch.bool)
    for out, *kernel in itertools.product(*map(range, (len(w), *w.shape[2:]))):
        row = w[out, :, *kernel]
        for start in range(0, len(row), of):
            ranked = sorted((-abs(row[j].item()), j) for j in range(start, start + of))
            for _, j in ranked[:keep]:
                found[out, j, *kernel] = True
    return found if axis == INPUTS else found.transpose(0, 1)


def of(kind: nn.Module, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A copy with random weights (float64), and inputs for it."""
    g = torch.Generator().manual_seed(seed)
    layer = copy.deepcopy(kind).double()
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    channels = getattr(layer, "in_channels", None)
    shape = (3, 5, layer.in_features) if channels is None else (3, channels, *[6] * (layer.weight.ndim - 2))
    return layer, torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()


@given(
    pattern=st.sampled_from(PATTERNS),
    axis=st.sampled_from([INPUTS, OUTPUTS]),
    seed=st.integers(0, 2**16),
    kernel=st.sampled_from([(), (2,), (2, 1)]),
)
def test_a_mask_is_the_definition_and_ties_go_to_the_lower_place(pattern, axis, seed, kernel):
    g = torch.Generator().manual_seed(seed)
    shape = [3, 3, *kernel]
    shape[axis] = 2 * pattern[1]
    weight = torch.randn(shape, generator=g).round(decimals=1)  # rounding makes ties
    found = mask(weight, Pattern(*pattern), axis)
    assert torch.equal(found, by_definition(weight, *pattern, axis))
    order = torch.randperm(3, generator=g)
    assert torch.equal(mask(weight.index_select(1 - axis, order), Pattern(*pattern), axis),
                       found.index_select(1 - axis, order))  # fmt: skip


@given(seed=st.integers(0, 2**16), axis=st.sampled_from([INPUTS, OUTPUTS]))
def test_a_block_shares_the_pattern_of_its_largest_sums_of_squares(seed, axis):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    found = mask(weight, Pattern(2, 8, 4), axis)
    w, kept = (weight, found) if axis == INPUTS else (weight.t(), found.t())
    for start in range(0, 16, 4):
        assert (kept[start : start + 4] == kept[start]).all()
        sums = w[start : start + 4].square().sum(0)
        for group in (slice(0, 8), slice(8, 16)):
            assert kept[start, group].sum() == 2
            assert sums[group][kept[start, group]].min() >= sums[group][~kept[start, group]].max()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("sides", [Sides(), Sides(backward=False), Sides(forward=False)], ids=repr)
def test_each_product_takes_the_weight_that_it_should(kind, sides):
    like, x = of(kind)
    pattern = Pattern(2, 4)
    y = SparseLayer(like, pattern, sides)(x)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    w = like.weight.detach()
    w_f = masked(w, mask(w, pattern, INPUTS)) if sides.forward else w
    w_b = masked(w, mask(w, pattern, OUTPUTS)) if sides.backward else w_f

    def dense(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        other, again = copy.deepcopy(like), x.detach().clone().requires_grad_()
        other.weight.data = weight.clone()
        other.weight.grad = None
        out = other(again)
        out.backward(dy)
        return out.detach(), again.grad, other.weight.grad

    assert torch.allclose(y, dense(w_f)[0])
    assert torch.allclose(x.grad, dense(w_b)[1])
    assert torch.allclose(like.weight.grad, dense(w)[2])  # dense, and of every weight
    if like.bias is not None:
        axis = -1 if isinstance(like, nn.Linear) else 1
        assert torch.allclose(like.bias.grad, dy.movedim(axis, 0).flatten(1).sum(1))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("sides", [Sides(), Sides(backward=False), Sides(gradients=True, backward=False)])
def test_all_of_all_is_the_dense_layer_bit_for_bit(kind, sides):
    (like, x), (plain, again) = of(kind), of(kind)
    y, wanted = SparseLayer(like, Pattern(4, 4), sides)(x), plain(again)
    assert torch.equal(y, wanted)
    dy = torch.ones_like(y)
    y.backward(dy)
    wanted.backward(dy)
    assert torch.allclose(x.grad, again.grad, rtol=1e-13)
    assert torch.allclose(like.weight.grad, plain.weight.grad, rtol=1e-13)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=repr)
def test_gradients_are_sparse_on_the_way_to_the_input_alone(kind):
    (like, x), (plain, again) = of(kind), of(kind)
    layer = SparseLayer(like, Pattern(2, 8), Sides(False, False, True))
    y = layer(x)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    axis = -1 if isinstance(like, nn.Linear) else 1
    flat = dy.movedim(axis, -1)
    kept = mask(flat.reshape(-1, flat.shape[-1]), Pattern(2, 8), INPUTS).reshape(flat.shape).movedim(-1, axis)
    pruned = dy * kept
    if axis == 1:  # the scale of SDGP: sums of |dy| over the places stay
        pruned = (
            pruned * dy.abs().sum((2, 3), keepdim=True) / pruned.abs().sum((2, 3), keepdim=True).clamp(1e-9)
        )
        assert torch.allclose(sparse_gradient(dy, Pattern(2, 8)), pruned)
    out = plain(again)
    assert torch.equal(y, out)
    (wanted,) = torch.autograd.grad(out, again, pruned, retain_graph=True)
    assert torch.allclose(x.grad, wanted)
    assert torch.allclose(like.weight.grad, torch.autograd.grad(out, plain.weight, dy)[0])


def test_what_is_stored_is_the_masked_weight_and_its_bits_are_counted():
    weight = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0))
    kept = mask(weight, Pattern(2, 8), INPUTS)
    form = stored(weight, kept, 8)
    assert torch.equal(form.decode(), masked(weight, kept))
    assert form.bits() == 8 * 2 * 3 * 2 * (32 + 3)
    none = torch.zeros(1, 4)  # zeros are kept too: every group has as many places
    assert stored(none, mask(none, Pattern(2, 4), INPUTS), 4).places.tolist() == [[0, 1]]


def test_images_without_a_batch_evaluation_and_low_precision():
    like, x = of(KINDS[3])
    layer = SparseLayer(like, Pattern(2, 8))
    assert torch.allclose(layer(x[0]), layer(x)[0])
    with torch.no_grad():
        assert torch.allclose(layer(x), F.conv2d(x, layer.weight, None, 2, 1, 1, 2))
    single, x = SparseLayer(nn.Linear(16, 8), Pattern(2, 8)), torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert single.like.weight.grad.dtype == x.grad.dtype == torch.float32
    wanted = masked(single.like.weight, mask(single.like.weight, Pattern(2, 8), OUTPUTS)).sum(0)
    assert torch.allclose(x.grad[0], wanted, atol=0.02)


def test_products_are_counted_in_dense_ones():
    assert sum(Sides().products(Pattern(2, 8))) == 1.5
    assert sum(Sides(backward=False).products(Pattern(2, 8))) == 2.25  # W_F' is not N:M where BP sums
    assert sum(Sides(False, False, True).products(Pattern(2, 4))) == 2.5
    assert sum(Sides(False, False).products(Pattern())) == 3.0


def test_mistakes_are_said():
    for keep, each in [(0, 4), (5, 4), (2, 257)]:
        with pytest.raises(BadInput, match=f"keep={keep}, of={each}"):
            Pattern(keep, each)
    with pytest.raises(BadInput, match="block=0"):
        Pattern(block=0)
    with pytest.raises(DoesNotFit, match="does not divide into groups of 8 along axis 1"):
        mask(torch.zeros(8, 12), Pattern())
    with pytest.raises(DoesNotFit, match="up: its 12 inputs are not a multiple of 8; leave it out"):
        SparseLayer(nn.Linear(12, 8), Pattern(), name="up")
    cases = {
        "its 12 outputs are not a multiple of 8": (nn.Conv2d(16, 24, 1, groups=2), Pattern()),
        "not multiples of the block 3": (nn.Linear(8, 8), Pattern(block=3)),
        "a ReLU has no N:M product": (nn.ReLU(), Pattern()),
        "the attention around it": (nn.MultiheadAttention(8, 2).out_proj, Pattern()),
    }
    for words, (layer, pattern) in cases.items():
        assert words in misfit(layer, pattern, Sides())
    assert misfit(nn.Conv2d(16, 12, 1), Pattern(), Sides(backward=False)) == ""
    assert misfit(nn.Conv2d(3, 16, 1), Pattern(), Sides(forward=False)) == ""
