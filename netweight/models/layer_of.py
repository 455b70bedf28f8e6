"""The layer that does what one `aten` operator does with stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CONV = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}  # by axes of the input


def layer_of(
    target: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], dims: int
) -> nn.Module | None:
    """The layer of a call in a graph of torch.export, filled; None where no layer does the same.

    target: "torch.ops.aten.linear.default" and the like. tensors, plain: its arguments by name.
    dims: axes of its input.
    """
    name = target.removeprefix("torch.ops.aten.").removesuffix(".default")
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or not weight.is_floating_point():
        return None
    if name == "linear" and weight.ndim == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    elif name in CONV:
        layer = _conv(CONV[name], weight, bias is not None, plain)
    elif name == "batch_norm" and len(tensors) == 4 and plain.get("training") is False and dims in NORM:
        layer = NORM[dims](len(weight), plain["eps"], plain["momentum"])
    elif name == "layer_norm" and bias is not None:
        layer = nn.LayerNorm(plain["normalized_shape"], plain.get("eps", 1e-5))
    elif name == "embedding":
        layer = nn.Embedding(*weight.shape)
    else:
        return None
    state = {part: tensor for part, tensor in tensors.items() if part in layer.state_dict()}
    layer.load_state_dict(state, strict=False)
    return layer.to(weight.dtype)


def _conv(kind: type[nn.Module], weight: Tensor, bias: bool, plain: Mapping[str, Any]) -> nn.Module:
    groups = plain.get("groups", 1)
    return kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_each(plain.get("stride", 1)),
        padding=_each(plain.get("padding", 0)),
        dilation=_each(plain.get("dilation", 1)),
        groups=groups,
        bias=bias,
    )


def _each(value: int | list[int]) -> int | tuple[int, ...]:
    """One number for all axes, or one for each."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else tuple(value)
    return value
