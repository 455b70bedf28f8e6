"""The operators of ONNX that a network file may use, as functions of tensors.

`OPERATORS[name](settings, *inputs)`: settings are the attributes of the node, and `opset`, the version of the
operator set. Inputs named in `STATIC` come as Python numbers or lists, because they decide shapes; an input
that is left out is None. Sources: the operator definitions of ONNX, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from netweight.models.onnx_shapes import (
    Settings,
    Unreadable,
    concat,
    constant_of_shape,
    expand,
    flatten,
    gather,
    one_hot,
    pad,
    reshape,
    shape_of,
    slice_,
    split,
    squeeze,
    tile,
    transpose,
    unsqueeze,
)

DTYPES = {  # onnx.TensorProto.DataType
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


# Arithmetic ------------------------------------------------------------------------------------------------


def divide(a: Settings, x: Tensor, y: Tensor) -> Tensor:
    """Whole numbers are cut towards 0."""
    whole = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


def power(a: Settings, x: Tensor, exponent: Any) -> Tensor:
    """x to a power, in the dtype of x."""
    return torch.pow(x, exponent).to(x.dtype)


def gemm(a: Settings, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    """alpha x y + beta z, x and y transposed where asked for."""
    x, y = (x.mT if a.get("transA", 0) else x), (y.mT if a.get("transB", 0) else y)
    product = a.get("alpha", 1.0) * (x @ y)
    return product if z is None else product + a.get("beta", 1.0) * z


def reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction over `axes`, all of them by default."""

    def reduce(a: Settings, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        axes = a.get("axes") if axes is None else axes
        if not axes:
            if a.get("noop_with_empty_axes", 0):
                return x
            axes = range(x.ndim)
        return function(x, tuple(axes), keepdim=bool(a.get("keepdims", 1)))

    return reduce


def arg(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The place of an extreme, the first one of equals."""

    def place(a: Settings, x: Tensor) -> Tensor:
        if a.get("select_last_index", 0):
            raise Unreadable("the last of equal places is not read")
        return function(x, dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))

    return place


def pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of two tensors, for any number of them."""

    def fold(a: Settings, first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    return fold


def cast(a: Settings, x: Tensor) -> Tensor:
    """To another dtype."""
    if a["to"] not in DTYPES:
        raise Unreadable(f"a cast to type {a['to']} is not read")
    return x.to(DTYPES[a["to"]])


def dequantize(a: Settings, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(codes - zero) scale; one scale for all, for each entry of an axis, or for each block of it."""
    axis = a.get("axis", 1)
    if scale.ndim == 1 and scale.numel() > 1:
        shape = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]
        scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    elif a.get("block_size", 0):
        scale = scale.repeat_interleave(a["block_size"], axis)
        zero = None if zero is None else zero.repeat_interleave(a["block_size"], axis)
    return (codes.to(scale.dtype) - (0 if zero is None else zero.to(scale.dtype))) * scale


def quantize(a: Settings, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """round(x / scale) + zero within the type of zero (uint8 without one); whole numbers, kept floating."""
    kind = torch.iinfo(torch.uint8 if zero is None else zero.dtype)
    zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
    if scale.numel() > 1:
        shape = [-1 if i == a.get("axis", 1) % x.ndim else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((x / scale).round() + zero).clamp(kind.min, kind.max)


def trilu(a: Settings, x: Tensor, diagonal: int | None = None) -> Tensor:
    """The upper or lower triangle."""
    return torch.triu(x, diagonal or 0) if a.get("upper", 1) else torch.tril(x, diagonal or 0)


# Layers ----------------------------------------------------------------------------------------------------


def softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """softmax or log_softmax; before version 13 of the operators over all axes from `axis` on."""

    def along(a: Settings, x: Tensor) -> Tensor:
        if a["opset"] >= 13:
            return function(x, dim=a.get("axis", -1))
        return function(flatten({"axis": a.get("axis", 1)}, x), dim=1).reshape(x.shape)

    return along


def spread(a: Settings, rank: int) -> list[int]:
    """The padding before each axis, then after each; `auto_pad` other than NOTSET and VALID is not read."""
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unreadable(f"auto_pad={a['auto_pad']} is not read; write the padding out")
    return list(a.get("pads", [0] * (2 * rank)))


def pool(kind: str) -> Callable[..., Tensor]:
    """max_pool or avg_pool in 1 to 3 dimensions."""

    def pooled(a: Settings, x: Tensor) -> Tensor:
        size = list(a["kernel_shape"])
        rank = len(size)
        pads, stride = spread(a, rank), a.get("strides", [1] * rank)
        before, after = pads[:rank], pads[rank:]
        include = bool(a.get("count_include_pad", 0))
        if before != after:
            if kind == "avg" and not include:
                raise Unreadable("an average pool with different padding on both sides is not read")
            x = pad({}, x, [0, 0, *before, 0, 0, *after], -torch.inf if kind == "max" else 0.0)
            before = [0] * rank
        ceil = bool(a.get("ceil_mode", 0))
        if kind == "max":
            dilation = a.get("dilations", [1] * rank)
            return getattr(F, f"max_pool{rank}d")(x, size, stride, before, dilation, ceil)
        return getattr(F, f"avg_pool{rank}d")(x, size, stride, before, ceil, include)

    return pooled


def layer_norm(a: Settings, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Over the axes from `axis` on."""
    shape = x.shape[a.get("axis", -1) % x.ndim :]
    return F.layer_norm(x, shape, scale, bias, a.get("epsilon", 1e-5))


def clip(a: Settings, x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Between low and high."""
    low, high = a.get("min", low), a.get("max", high)
    return x if low is None and high is None else x.clamp(low, high)


def convolution(a: Settings, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """With a weight that depends on the input."""
    raise Unreadable("a convolution needs a stored weight")


def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that has no settings."""
    return lambda a, *inputs: function(*inputs)


STATIC: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "OneHot": (1,),
    "Gather": (1,),
    "Pow": (1,),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceSumSquare": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 2, 3),
    "Clip": (1, 2),
    "ConstantOfShape": (0,),
    "Trilu": (1,),
}
LOOSE = frozenset(
    ["Gather", "Pow"]
)  # a static input that may depend on the input of the network all the same

OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Abs": of(torch.abs),
    "Add": of(torch.add),
    "And": of(torch.logical_and),
    "ArgMax": arg(torch.argmax),
    "ArgMin": arg(torch.argmin),
    "AveragePool": pool("avg"),
    "Cast": cast,
    "Ceil": of(torch.ceil),
    "Clip": clip,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Conv": convolution,
    "ConvTranspose": convolution,
    "Cos": of(torch.cos),
    "DequantizeLinear": dequantize,
    "Div": divide,
    "Dropout": lambda a, x, *rest: x,
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Equal": of(torch.eq),
    "Erf": of(torch.erf),
    "Exp": of(torch.exp),
    "Expand": expand,
    "Flatten": flatten,
    "Floor": of(torch.floor),
    "Gather": gather,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": gemm,
    "GlobalAveragePool": lambda a, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda a, x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
    "Greater": of(torch.gt),
    "GreaterOrEqual": of(torch.ge),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": of(F.hardswish),
    "Identity": lambda a, x: x,
    "InstanceNormalization": lambda a, x, w, b: F.instance_norm(
        x, None, None, w, b, eps=a.get("epsilon", 1e-5)
    ),
    "LayerNormalization": layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Less": of(torch.lt),
    "LessOrEqual": of(torch.le),
    "Log": of(torch.log),
    "LogSoftmax": softmax(F.log_softmax),
    "MatMul": of(torch.matmul),
    "Max": pairwise(torch.maximum),
    "MaxPool": pool("max"),
    "Min": pairwise(torch.minimum),
    "Mish": of(F.mish),
    "Mul": of(torch.mul),
    "Neg": of(torch.neg),
    "Not": of(torch.logical_not),
    "OneHot": one_hot,
    "Or": of(torch.logical_or),
    "PRelu": lambda a, x, slope: x.clamp(min=0) + slope * x.clamp(max=0),
    "Pad": pad,
    "Pow": power,
    "QuantizeLinear": quantize,
    "Reciprocal": of(torch.reciprocal),
    "ReduceL1": reduced(lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim)),
    "ReduceL2": reduced(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim).sqrt()),
    "ReduceMax": reduced(torch.amax),
    "ReduceMean": reduced(torch.mean),
    "ReduceMin": reduced(torch.amin),
    "ReduceSum": reduced(torch.sum),
    "ReduceSumSquare": reduced(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim)),
    "Relu": of(torch.relu),
    "Reshape": reshape,
    "Round": of(torch.round),
    "Selu": lambda a, x: a.get("gamma", 1.05070102) * F.elu(x, a.get("alpha", 1.67326319)),
    "Shape": shape_of,
    "Sigmoid": of(torch.sigmoid),
    "Sign": of(torch.sign),
    "Sin": of(torch.sin),
    "Slice": slice_,
    "Softmax": softmax(F.softmax),
    "Softplus": of(F.softplus),
    "Split": split,
    "Sqrt": of(torch.sqrt),
    "Squeeze": squeeze,
    "Sub": of(torch.sub),
    "Sum": pairwise(torch.add),
    "Tanh": of(torch.tanh),
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
    "Where": of(torch.where),
}
