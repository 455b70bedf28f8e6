"""Packed Linear layers through torch's own low-bit product on the CPU, where one applies.

`fast(small)` swaps each packed Linear that `_weight_int4pack_mm_for_cpu` can run (4-bit codes, groups of
32, 64, 128 or 256 inputs, outputs a multiple of 16) for a `LowBitLinear` and says for every packed layer
what runs it.

The kernel is fast in bfloat16 alone (its float32 path is slower than a plain product), so inputs and scales
are rounded to bfloat16: outputs differ from the stored network's by about 2^-8 of their size. Evidence is
therefore taken on the stored network, and only latency rows use this one and say so.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from netweight.core.compressed import replace
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import Affine

DECODE, INT4 = "decoded on each call", "torch int4 product, bfloat16 inputs"
GROUPS, OUTPUTS = (32, 64, 128, 256), 16  # what the CPU kernel takes


class LowBitLinear(nn.Module):
    """x W^T + b with W as 4-bit codes, in bfloat16; gives the dtype of x."""

    def __init__(self, form: Affine, bias: Tensor | None) -> None:
        super().__init__()
        codes, scale, zero = form.integers().int(), form.scale.float(), form.zeros().float()
        offsets = (2 ** (form.bits_per_code - 1) - zero) * scale
        self.group = form.group
        self.outputs = form.shape[0]
        self.register_buffer("codes", torch._convert_weight_to_int4pack_for_cpu(codes, 1), persistent=False)
        both = torch.stack([scale, offsets], -1).transpose(0, 1).contiguous()
        self.register_buffer("scale_and_offset", both.bfloat16(), persistent=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`*b in` -> `*b out`."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scale_and_offset)
        y = y.reshape(*x.shape[:-1], self.outputs).to(x.dtype)
        return y if self.bias is None else y + self.bias


def applies(layer: PackedLayer) -> bool:
    """Whether torch's 4-bit CPU product can run this packed layer."""
    form = layer.form
    return (
        isinstance(layer.like, nn.Linear)
        and isinstance(form, Affine)
        and form.bits_per_code == 4
        and form.group in GROUPS
        and form.shape[0] % OUTPUTS == 0
        and form.codes.device.type == "cpu"
    )


def fast(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a network with packed layers that runs them as fast as torch can, and what runs each
    layer."""
    model = copy.deepcopy(model)
    kernels: dict[str, str] = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLayer):
            kernels[name] = INT4 if applies(layer) else DECODE
            if applies(layer):
                replace(model, name, LowBitLinear(layer.form, layer.bias))
    return model, kernels
