"""Products of packed codes in ONNX Runtime give what the packed network gives."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from netweight.compression.quantize.rtn import RTN, encode, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.plan import Plan
from netweight.deployment.matmulnbits import block_of, blocks, two_a_byte
from netweight.deployment.onnx import export
from netweight.testing import tiny_language_model, tiny_task


class Wide(nn.Module):
    """Rows of 96 inputs, a bias, and one matrix read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.both = nn.Linear(96, 48), nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x):
        x = torch.relu(self.second(self.first(x)))
        return self.both(torch.relu(self.both(x)))


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    "settings",
    [RTN(4), RTN(3, group=16), RTN(4, symmetric=True, group=-1), RTN(2, symmetric=True), RTN(4, group=48)],
    ids=repr,
)
@pytest.mark.parametrize("axes", [2, 3])
def test_products_are_those_of_the_packed_network(tmp_path, settings, axes):
    model = Wide().eval()
    small = assemble(model, rtn(model, tiny_task(), weighted(model), settings), Plan())
    x = torch.randn(*(5, 7)[: axes - 1], 96, generator=torch.Generator().manual_seed(0))
    made = export(small, tmp_path / "net.onnx", x, low_bit_products=True)
    assert made.same and made.largest_difference < 1e-5
    counts = operators(tmp_path / "net.onnx")
    fit = 0 if settings.group == 48 else 2  # blocks are powers of two; a matrix read twice is left as it is
    assert counts.count("MatMulNBits") == fit
    assert counts.count("DequantizeLinear") == 3 - fit


def test_a_language_model_multiplies_codes(tmp_path):
    model = tiny_language_model()
    small = assemble(model, rtn(model, tiny_task(), weighted(model), RTN(4, group=16)), Plan())
    made = export(small, tmp_path / "net.onnx", torch.randint(0, 12, (2, 6)), low_bit_products=True)
    assert made.same and made.integer_weights == made.packed_weights == 7
    counts = operators(tmp_path / "net.onnx")
    assert counts.count("MatMulNBits") == 7 and "Transpose" in counts  # the one of attention stays


def test_five_bits_and_kernels_are_left_to_other_operators():
    assert block_of(encode(torch.randn(4, 64), RTN(5))) == 0
    assert block_of(encode(torch.randn(4, 64, 3), RTN(4))) == 0
    assert block_of(encode(torch.randn(4, 40), RTN(4))) == 0
    assert block_of(encode(torch.randn(4, 64), RTN(4))) == 64
    assert block_of(encode(torch.randn(4, 96), RTN(4))) == 32
    assert block_of(encode(torch.randn(4, 64), RTN(4, group=16))) == 16


@pytest.mark.parametrize("settings", [RTN(4, group=16), RTN(3), RTN(4, group=-1), RTN(2, symmetric=True)])
def test_blocks_decode_to_the_weight(settings):
    form = encode(torch.randn(3, 48, generator=torch.Generator().manual_seed(1)), settings)
    block = block_of(form)
    codes, scale, zero = (part.numpy() for part in blocks(form, block))
    whole = np.stack([codes & 15, codes >> 4], -1).reshape(3, 48 // block, block).astype(np.float32)
    zeros = np.stack([zero & 15, zero >> 4], -1).reshape(3, -1)[:, : 48 // block, None].astype(np.float32)
    assert ((whole - zeros) * scale[..., None]).reshape(3, 48).tolist() == form.decode().tolist()


def test_the_first_of_two_codes_is_the_low_one():
    assert two_a_byte(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[33, 15]]
