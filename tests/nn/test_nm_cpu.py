"""Block-shared products against masked dense ones, and the layer that looks its patterns up now and then."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn import nm_cpu
from netweight.nn.nm_cpu import (
    BlockLinear,
    Quickest,
    backward_product,
    forward_product,
    kept_rows,
    quickest,
    training_pass,
    ways,
)
from netweight.nn.nm_sparse import INPUTS, OUTPUTS, Pattern, SparseLayer, mask, masked


@given(
    block=st.sampled_from([1, 2, 8]),
    pattern=st.sampled_from([(1, 4), (2, 8), (8, 8)]),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_masked_weight(block, pattern, seed):
    g, how = torch.Generator().manual_seed(seed), Pattern(*pattern, block)
    weight = torch.randn(16, 24, generator=g, dtype=torch.float64)
    x, dy = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (24, 16))
    before, after = (kept_rows(weight, how, axis) for axis in (INPUTS, OUTPUTS))
    assert before.shape == (16 // block, 24 * how.keep // how.of)
    assert torch.allclose(forward_product(weight, before, x), masked(weight, mask(weight, how, INPUTS)) @ x)
    wanted = masked(weight, mask(weight, how, OUTPUTS)).t() @ dy
    assert torch.allclose(backward_product(weight, after, dy), wanted)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (16,)])
def test_the_layer_is_the_masked_one_and_its_gradients_too(shape):
    torch.manual_seed(0)
    like, x = nn.Linear(16, 8), torch.randn(shape, requires_grad=True)
    again, other = copy.deepcopy(like), x.detach().clone().requires_grad_()
    fast, slow = BlockLinear(like, Pattern(2, 8, 4)).train(), SparseLayer(again, Pattern(2, 8, 4))
    y, wanted = fast(x), slow(other)
    assert torch.allclose(y, wanted, atol=1e-6)
    dy = torch.randn(y.shape)
    y.backward(dy)
    wanted.backward(dy)
    assert torch.allclose(x.grad, other.grad, atol=1e-6)
    assert torch.allclose(like.weight.grad, again.weight.grad, atol=1e-5)
    assert torch.allclose(like.bias.grad, again.bias.grad, atol=1e-5)
    assert torch.equal(fast.weight, slow.weight) and torch.equal(fast.kept(), slow.kept())


def test_with_blocks_of_one_row_it_is_the_element_wise_mask():
    like = nn.Linear(16, 8)
    assert torch.equal(BlockLinear(like, Pattern()).kept(), mask(like.weight, Pattern(), INPUTS))


def test_patterns_are_looked_up_every_few_updates_and_values_are_never_old():
    torch.manual_seed(0)
    layer, x = (
        BlockLinear(nn.Linear(16, 8, bias=False), Pattern(2, 8, 4), refresh=3).train(),
        torch.randn(2, 16),
    )
    seen = []
    for _ in range(7):
        with torch.no_grad():
            layer.like.weight.copy_(torch.randn(8, 16))
        y = layer(x)
        seen.append(layer.kept())
        assert torch.allclose(y, x @ layer.weight.t(), atol=1e-6)
        assert torch.equal(layer.weight, masked(layer.like.weight.detach(), seen[-1]))
    same = [torch.equal(a, b) for a, b in zip(seen, seen[1:])]
    assert same == [True, True, False, True, True, False]
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert int(layer.age) == 7
    assert {"before", "after", "age"} <= layer.state_dict().keys()


def test_low_precision_and_inputs_that_need_no_gradient():
    layer = BlockLinear(nn.Linear(16, 8), Pattern(2, 8, 4)).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.like.weight.grad.dtype == torch.float32


def test_ways_take_the_same_number_of_steps_and_leave_gradients(monkeypatch):
    seen = []
    monkeypatch.setattr(nm_cpu, "training_pass", lambda layer, x, dy: seen.append((type(layer), x, dy)))
    for some in ways(8, 16, 4, [Pattern(block=4)], refresh=2).values():
        some()
    kinds = [kind for kind, _, _ in seen]
    assert kinds == [nn.Linear] * 2 + [BlockLinear] * 2
    assert torch.equal(seen[0][1], seen[2][1]) and torch.equal(seen[0][2], seen[2][2])
    assert seen[0][1].is_contiguous() and seen[2][1].t().is_contiguous()  # each as it likes it
    monkeypatch.undo()
    layer, x, dy = seen[2][0](nn.Linear(16, 8), Pattern(block=4)), seen[2][1], seen[2][2]
    training_pass(layer, x, dy)
    first = x.grad.clone()
    training_pass(layer, x, dy)
    assert torch.equal(x.grad, first) and layer.like.weight.grad is not None


def test_dense_is_chosen_where_it_is_the_fastest(monkeypatch):
    clock, slow = [0.0], {0: 2.0, 32: 4.0, 64: 1.0}
    monkeypatch.setattr(nm_cpu.time, "process_time", lambda: clock[0])

    def made(*args: object) -> dict:
        return {b: lambda b=b: clock.__setitem__(0, clock[0] + slow[b]) for b in slow}

    monkeypatch.setattr(nm_cpu, "ways", made)
    assert quickest(64, 64, 8, turns=1) == Quickest(64, 2.0)
    slow[64] = 3.0
    assert quickest(64, 64, 8, turns=1) == Quickest(0, 1.0)


def test_mistakes_are_said():
    with pytest.raises(DoesNotFit, match="up: its 8 outputs and 16 inputs are not multiples of the block 3"):
        BlockLinear(nn.Linear(16, 8), Pattern(block=3), name="up")
    with pytest.raises(DoesNotFit, match="layer: it is no Linear layer"):
        BlockLinear(nn.Conv2d(8, 8, 1), Pattern())
    with pytest.raises(BadInput, match="refresh=0"):
        BlockLinear(nn.Linear(8, 8), Pattern(), refresh=0)
