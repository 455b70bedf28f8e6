"""The model of SAT: its formulas by hand, what must not get slower, and that parts add up."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput
from netweight.core.graph import capture, layer_macs
from netweight.inspection.accelerator import (
    Accelerator,
    Layer,
    Product,
    bound,
    compute_cycles,
    estimate,
    joules,
    layer_parts,
    layers_of,
    weight_bytes,
)
from netweight.models.resnet_cifar import architecture
from netweight.nn.nm_sparse import Pattern, Sides
from netweight.testing import tiny_language_model, tiny_model

DENSE = Sides(forward=False, backward=False)
CONV = Layer("conv", 64, 128, 16 * 16, 32 * 32, 9, 1, 64 * 128 * 9, True)
sizes = st.integers(1, 3000)


def test_cycles_by_hand():
    chip, product = Accelerator(), Product(100, 70, 40, 3, False)
    assert compute_cycles(product, chip, "output") == 3 * (4 * 2 * 35) + 72
    assert compute_cycles(product, chip, "weight") == 3 * (2 * 2 * 100) + 72
    sparse = replace(product, sparse=True)
    assert compute_cycles(sparse, chip, "output") == 3 * (4 * 2 * 9) + 72
    assert compute_cycles(sparse, chip, "weight") == 3 * (1 * 2 * 100) + 72
    assert compute_cycles(product, replace(chip, interleave=2), "output") == 3 * (4 * 2 * 35) * 4 + 72
    assert compute_cycles(replace(product, m=5), chip, "weight") == 3 * (2 * 2 * 32) + 72


def test_a_layer_by_hand():
    chip = Accelerator(bandwidth=1e9)
    dense = {part.product: part for part in layer_parts(CONV, 2, chip, DENSE)}
    assert set(dense) == {"FF", "BP", "WU", "elementwise", "update"}
    macs = 2 * 256 * 64 * 9 * 128
    assert dense["FF"].macs == dense["WU"].macs == macs
    assert dense["BP"].macs == 2 * 1024 * 128 * 3 * 64  # 9 / 4 of the taps, rounded up
    found = {part.product: part for part in layer_parts(CONV, 2, chip, Sides())}
    assert found["FF"].macs == macs / 4 and found["WU"] == dense["WU"]
    assert found["FF"].cycles == 16 * 4 * 72 + 72
    x, y, w = 2 * 2 * 64 * 1024, 2 * 2 * 128 * 256, 64 * 128 * 9
    assert dense["FF"].dram == x + y + 2 * w
    assert found["FF"].dram == x + y + 0.25 * 19 / 8 * w
    assert dense["WU"].dram == x + y
    assert dense["update"].dram == (16 + 2) * w and found["update"].dram == (16 + 2 * 0.25 * 19 / 8) * w
    assert dense["elementwise"].dram == 5 * y
    assert found["choice"].cycles == w / 32
    later = {p.product: p for p in layer_parts(CONV, 2, replace(chip, pregenerated=False), Sides())}
    assert later["choice"].cycles == 2 * w / 32
    assert later["FF"].dram == dense["FF"].dram and later["update"].dram == dense["update"].dram
    fed = 2 * (512 * 576 * 4 + 576 * 128 * 16) + 4 * 512 * 128
    assert dense["FF"].sram == fed and found["FF"].sram == fed - 2 * 0.75 * 576 * 128 * 16
    assert weight_bytes(Accelerator(keep=1, of=4), True) == 0.25 * 18 / 8


def test_memory_is_the_limit_where_it_is_slower():
    (part, *_) = layer_parts(CONV, 2, Accelerator(bandwidth=1.0), DENSE)
    assert part.cycles == part.dram
    fast = layer_parts(CONV, 2, Accelerator(bandwidth=2.0), DENSE)[0]
    assert fast.cycles == part.cycles / 2


def test_which_side_is_sparse_says_what_is_cheaper():
    def cost(sides: Sides) -> dict:
        return {p.product: p for p in layer_parts(CONV, 64, Accelerator(), sides)}

    dense, ste, sdgp = cost(DENSE), cost(Sides(backward=False)), cost(Sides(False, False, True))
    assert ste["BP"] == dense["BP"] and ste["FF"].cycles < dense["FF"].cycles
    assert sdgp["FF"] == dense["FF"] and sdgp["BP"].cycles < dense["BP"].cycles
    assert sdgp["BP"].dram == dense["BP"].dram  # the gradient is made N:M on its way in
    alone = replace(CONV, sparse=False)
    assert layer_parts(alone, 64, Accelerator(), Sides()) == layer_parts(alone, 64, Accelerator(), DENSE)


@given(m=sizes, k=sizes, n=sizes, sparse=st.booleans())
def test_products_need_no_less_than_their_macs_and_sparse_ones_no_more_than_dense(m, k, n, sparse):
    chip, product = Accelerator(), Product(m, k, n, 1, sparse)
    done = product.macs * (0.25 if sparse else 1.0)
    for flow in ("output", "weight"):
        assert compute_cycles(product, chip, flow) >= done / (32 * 32 * 2)
        dense = compute_cycles(replace(product, sparse=False), chip, flow)
        assert compute_cycles(replace(product, sparse=True), chip, flow) <= dense


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 64}, {"columns": 64}, {"bandwidth": 192.0}, {"interleave": 16}, {"lanes": 64},
        {"of": 16}, {"elementwise": 4}, {"hertz": 400e6},
    ],
    ids=str,
)  # fmt: skip
def test_more_of_anything_is_never_slower(change):
    layers = layers_of(architecture(20).eval(), torch.zeros(1, 3, 32, 32))
    for chip in (Accelerator(), Accelerator(bandwidth=8.0), Accelerator(interleave=2)):
        more = estimate(layers, 64, replace(chip, **change))
        assert more.seconds <= estimate(layers, 64, chip).seconds


@pytest.mark.parametrize(
    "change", [{"interleave": 1}, {"pregenerated": False}, {"scheduled": False}], ids=str
)
def test_each_measure_helps(change):
    layers = layers_of(architecture(20).eval(), torch.zeros(1, 3, 32, 32))
    assert estimate(layers, 64, Accelerator(**change)).cycles > estimate(layers, 64).cycles


def test_large_products_reach_n_over_m_and_no_step_its_bound():
    chip = Accelerator(bandwidth=1e12, lanes=2**40)
    large = Product(2**14, 2**13, 2**10, 1, True)
    ratio = compute_cycles(large, chip, "output") / compute_cycles(
        replace(large, sparse=False), chip, "output"
    )
    assert ratio == pytest.approx(0.25, rel=1e-3)
    square = Layer("l", 2**12, 2**12, 2**12, 2**12, 1, 1, 2**24, True)
    speed = estimate([square], 1, chip, DENSE).cycles / estimate([square], 1, chip).cycles
    assert bound(Pattern()) == 2.0 and speed == pytest.approx(2.0, rel=1e-2) and speed <= 2.0
    assert bound(Pattern(2, 4)) == 1.5 and bound(Pattern(), DENSE) == 1.0


def test_energy_adds_up_over_parts_and_is_the_formula():
    layers = layers_of(tiny_model(), torch.zeros(1, 4, 7, 7))
    chip = Accelerator(static=3.0)
    whole = estimate(layers, 8, chip)
    assert whole.joules == pytest.approx(sum(estimate([layer], 8, chip).joules for layer in layers))
    part = whole.parts[0]
    wanted = part.macs * 2e-12 + part.sram * 1.25e-12 + part.dram * 160e-12 + 3 * part.cycles / 200e6
    assert joules(part, chip) == pytest.approx(wanted)
    assert whole.how.startswith("modelled") and whole.seconds == whole.cycles / 200e6


def test_layers_are_read_off_the_network():
    model, x = tiny_model(), torch.zeros(1, 4, 7, 7)
    first, second, third, last = layers_of(model, x, Pattern(2, 4))
    assert (first.name, first.inputs, first.outputs, first.taps) == ("0", 4, 16, 4)
    assert (first.places_in, first.places, first.weights) == (49, 36, 256)
    assert (second.matrices, second.inputs, second.outputs, second.places) == (2, 8, 8, 9)
    assert [layer.sparse for layer in (first, second, third, last)] == [True, True, True, True]
    assert [layer.sparse for layer in layers_of(model, x)] == [False, True, True, False]
    assert [layer.sparse for layer in layers_of(model, x, sparse=["7"])] == [False, False, True, False]
    counts = layer_macs(capture(model, x))
    for layer in (first, second, third, last):
        assert layer.matrices * layer.places * layer.inputs * layer.taps * layer.outputs == counts[layer.name]


def test_products_of_activations_are_dense_and_per_example():
    model, x = tiny_language_model(), torch.zeros(1, 6, dtype=torch.int64)
    layers = layers_of(model, x)
    found = [layer for layer in layers if not layer.weights]
    assert len(found) == 2 and not any(layer.sparse for layer in found)
    parts = layer_parts(found[0], 5, Accelerator(), Sides())
    assert [part.product for part in parts] == ["FF", "BP", "WU"]
    one = layer_parts(found[0], 1, Accelerator(), Sides())
    assert parts[0].macs == 5 * one[0].macs == 5 * math.prod((6, 6, 16))


def test_mistakes_are_said():
    with pytest.raises(BadInput, match="sizes, clock and bandwidth are above 0"):
        Accelerator(rows=0)
    with pytest.raises(BadInput, match="keep=9, of=8"):
        Accelerator(keep=9)
    with pytest.raises(BadInput, match="1 layers, batch 0"):
        estimate([CONV], 0)
    with pytest.raises(BadInput, match="ReLU: it has no product"):
        layers_of(nn.ReLU(), torch.zeros(1, 3))
