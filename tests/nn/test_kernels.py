"""torch's low-bit product agrees with the packed layer as far as bfloat16 reaches, where it fits."""

import pytest
import torch
from torch import nn

from netweight.compression.prune.magnitude import Magnitude, magnitude
from netweight.compression.quantize.rtn import RTN, encode, rtn
from netweight.core.compressed import Change, assemble
from netweight.core.plan import Plan
from netweight.nn.fake import DynamicRounding
from netweight.nn.kernels import DECODE, INT4, LowBitLinear, applies, fast
from netweight.nn.layers import PackedLayer
from netweight.testing import tiny_task


def packed(outputs=32, inputs=128, bits=4, symmetric=False, group=32, bias=True) -> PackedLayer:
    layer = nn.Linear(inputs, outputs, bias=bias)
    return encode(layer.weight.detach(), RTN(bits, symmetric, group)).layer(layer)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("symmetric", "bias"), [(False, True), (True, False)])
def test_the_product_is_that_of_the_packed_layer(group, symmetric, bias):
    layer = packed(48, 256, 4, symmetric, group, bias)
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    y, expected = LowBitLinear(layer.form, layer.bias)(x).detach(), layer(x).detach()
    assert y.shape == expected.shape and y.dtype == x.dtype
    size = x.abs() @ layer.weight.abs().T  # what rounding errors are relative to
    assert ((y - expected).abs() <= 2.0**-6 * size + 2.0**-7 * expected.abs()).all()
    assert float((y - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("layer", "fits"),
    [
        (packed(), True),
        (packed(group=0), False),
        (packed(group=16), False),
        (packed(bits=3), False),
        (packed(outputs=24), False),
        (encode(torch.rand(32, 32, 1), RTN(group=32)).layer(nn.Conv1d(32, 32, 1)), False),
    ],
    ids=["fits", "rows", "short groups", "3 bits", "24 outputs", "convolution"],
)
def test_where_it_applies(layer, fits):
    assert applies(layer) is fits


def test_fast_swaps_what_fits_and_says_what_runs():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(8, 3))
    change = Change(
        {
            **rtn(model, tiny_task(), ["0", "2"], RTN(group=32)).packed,
            **magnitude(model, tiny_task(), ["3"], Magnitude()).packed,
        },
        activations={"2": DynamicRounding()},
    )
    small = assemble(model, change, Plan())
    quick, kernels = fast(small.model)
    assert kernels == {"0": INT4, "2.layer": INT4, "3": DECODE}
    assert isinstance(quick[0], LowBitLinear) and isinstance(quick[2].layer, LowBitLinear)
    assert isinstance(small.model[0], PackedLayer) and isinstance(quick[4], nn.Linear)
    x = torch.rand(4, 64)
    assert torch.allclose(quick(x), small(x), atol=0.02) and not torch.equal(quick(x), small(x))
