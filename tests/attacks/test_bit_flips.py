"""Bit flips: exactly k bits of the codes, the network that they give, and harm beyond that of chance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.attacks.bit_flips import bit_flips, memory, with_memory
from netweight.compression.prune.magnitude import Magnitude, magnitude
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Compressed, assemble, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.flips import BitFlips
from netweight.core.perturbation import Linf
from netweight.core.plan import Plan
from netweight.testing import tiny_model, tiny_task


def rounded(bits: int = 4, symmetric: bool = False) -> Compressed:
    model = tiny_model()
    change = rtn(model, tiny_task(), weighted(model), RTN(bits=bits, symmetric=symmetric))
    return assemble(model, change, Plan({}))


@given(st.integers(0, 6), st.integers(2, 8), st.booleans())
@settings(max_examples=10, deadline=None)
def test_exactly_k_bits_and_a_network_that_agrees_with_its_memory(k, bits, symmetric):
    small, data = rounded(bits, symmetric), tiny_task().calibration
    before = memory(small)
    found = bit_flips(small, data.x[:16], None, BitFlips(k))
    assert torch.equal(memory(small), before)  # the network itself stays
    assert BitFlips(k).contains(found.points, before) and (
        k == 0 or not BitFlips(k - 1).contains(found.points, before)
    )
    again = with_memory(small, found.points)
    assert torch.equal(memory(again), found.points)
    assert torch.equal(again(data.x[:4]), again.plain()(data.x[:4]))
    if k == 0:
        assert torch.equal(again(data.x), small(data.x))


def test_the_loss_rises_far_beyond_random_flips():
    small, data = rounded(), tiny_task().test

    def loss(net: Compressed) -> float:
        return torch.nn.functional.cross_entropy(net(data.x), data.y).item()

    within, generator = BitFlips(8), torch.Generator().manual_seed(0)
    found = bit_flips(small, data.x, data.y, within)
    chance = [loss(with_memory(small, within.sample(memory(small), generator))) for _ in range(10)]
    assert loss(with_memory(small, found.points)) > max(chance) > 0.5 * loss(small)
    assert torch.equal(found.points, bit_flips(small, data.x, data.y, within).points)
    few = bit_flips(small, data.x, data.y, BitFlips(2))
    assert loss(small) < loss(with_memory(small, few.points)) < loss(with_memory(small, found.points))


def test_one_flip_is_the_best_of_all_in_a_network_of_one_layer():
    """With one small layer every bit can be tried: the first-order choice is close to the best of all."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    g = torch.Generator().manual_seed(0)
    model[1].weight.data = torch.randn(2, 4, generator=g)
    x = torch.rand(50, 1, 2, 2, generator=g)
    small = assemble(model, rtn(model, tiny_task(), ["1"], RTN(bits=4)), Plan({}))
    y = small(x).argmax(1)

    def loss(bytes_: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(with_memory(small, bytes_)(x), y).item()

    start = memory(small)
    flips = []
    for byte in range(start.shape[1]):
        for bit in range(8):
            other = start.clone()
            other[0, byte] ^= 1 << bit
            flips.append(loss(other))
    found = loss(bit_flips(small, x, y, BitFlips(1)).points)
    assert sorted(flips, reverse=True).index(pytest.approx(found)) < 0.2 * len(flips)


def test_bad_input():
    with pytest.raises(DoesNotFit, match="give bitflips=10"):
        bit_flips(rounded(), tiny_task().test.x, None, Linf(0.1))
    model = tiny_model()
    pruned = assemble(model, magnitude(model, tiny_task(), weighted(model), Magnitude()), Plan({}))
    with pytest.raises(DoesNotFit, match="no bits to flip"):
        bit_flips(pruned, tiny_task().test.x, None, BitFlips(1))
