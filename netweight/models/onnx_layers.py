"""Nodes of an ONNX file that become layers: Conv, ConvTranspose, Gemm, MatMul, BatchNormalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netweight.models.onnx_ops import spread
from netweight.models.onnx_shapes import Unreadable

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def layer_of(
    op: str, settings: Mapping[str, Any], x: Tensor, weights: Sequence[Tensor | None]
) -> tuple[nn.Module, list[int] | None] | None:
    """The layer of a node, and the padding that has to come before it; None where it is no layer.

    x: an example of its input. weights: its other inputs, None where they depend on the input of the network.
    Raises `Unreadable` for settings that torch has no layer for.
    """
    if not weights or any(w is None for w in weights):
        return None
    tensors = [w for w in weights if w is not None]
    match op:
        case "Conv":
            return conv(settings, tensors)
        case "ConvTranspose":
            return transposed(settings, tensors), None
        case "Gemm" if not settings.get("transA", 0):
            return gemm(settings, tensors), None
        case "MatMul" if tensors[0].ndim == 2 and x.ndim > 1:
            return linear(tensors[0].T, None), None
        case "BatchNormalization":
            return batch_norm(settings, tensors, x.ndim), None
    return None


def filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with these parameters."""
    layer.weight = nn.Parameter(weight.clone().contiguous())
    layer.bias = None if bias is None else nn.Parameter(bias.clone().contiguous())
    return layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """x W^T + b."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return filled(layer, weight, bias)


def gemm(settings: Mapping[str, Any], tensors: Sequence[Tensor]) -> nn.Module:
    """alpha x B + beta C."""
    weight = settings.get("alpha", 1.0) * (tensors[0] if settings.get("transB", 0) else tensors[0].T)
    bias = None
    if len(tensors) > 1:
        bias = settings.get("beta", 1.0) * tensors[1]
        if bias.ndim > 1 and bias.numel() != bias.shape[-1]:
            raise Unreadable("a summand with rows of its own is not read")
        bias = bias.reshape(-1).expand(len(weight))
    return linear(weight, bias)


def conv(settings: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[nn.Module, list[int] | None]:
    """A convolution; different padding on both sides comes before it."""
    weight, bias = tensors[0], tensors[1] if len(tensors) > 1 else None
    rank = weight.ndim - 2
    pads = spread(settings, rank)
    same = pads[:rank] == pads[rank:]
    groups = settings.get("group", 1)
    layer = CONV[rank](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(settings.get("strides", [1] * rank)),
        padding=tuple(pads[:rank]) if same else 0,
        dilation=tuple(settings.get("dilations", [1] * rank)),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    before = None if same else [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
    return filled(layer, weight, bias), before


def transposed(settings: Mapping[str, Any], tensors: Sequence[Tensor]) -> nn.Module:
    """A transposed convolution."""
    weight, bias = tensors[0], tensors[1] if len(tensors) > 1 else None
    rank = weight.ndim - 2
    pads = spread(settings, rank)
    if pads[:rank] != pads[rank:] or "output_shape" in settings:
        raise Unreadable("different padding on both sides, or output_shape, is not read")
    groups = settings.get("group", 1)
    layer = TRANSPOSED[rank](
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=tuple(settings.get("strides", [1] * rank)),
        padding=tuple(pads[:rank]),
        output_padding=tuple(settings.get("output_padding", [0] * rank)),
        groups=groups,
        bias=bias is not None,
        dilation=tuple(settings.get("dilations", [1] * rank)),
        device="meta",
    )
    return filled(layer, weight, bias)


def batch_norm(settings: Mapping[str, Any], tensors: Sequence[Tensor], rank: int) -> nn.Module:
    """With the stored statistics."""
    scale, shift, mean, var = tensors
    if settings.get("training_mode", 0):
        raise Unreadable("a batch norm in training mode is not read")
    layer = NORM[rank](len(scale), eps=settings.get("epsilon", 1e-5), device="meta")
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return filled(layer, scale, shift).eval()
