"""Batch norms and constant factors as part of the linear layer or convolution before them.

slope (W x + b) + shift = (slope W) x + (slope b + shift),        one slope and shift per output channel
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from netweight.core.graph import Node, Ref
from netweight.verification.split import Look, named


def scaling(node: Node, look: Look) -> tuple[Tensor | None, Tensor | None, str]:
    """(slope, shift, source) per channel of a batch norm, or of a constant factor, of one value."""
    p = node.params
    if node.op in ("aten.batch_norm", "aten._native_batch_norm_legit_no_training") and not p.get("training"):
        mean, var = (look(p[name]).double() for name in ("running_mean", "running_var"))
        weight, bias = (None if p[name] is None else look(p[name]).double() for name in ("weight", "bias"))
        slope = (var + p["eps"]).rsqrt() * (1.0 if weight is None else weight)
        return slope, -mean * slope + (0.0 if bias is None else bias), p["input"].name
    factor = look(p.get("other"))
    single = isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.numel() == 1)
    plain = node.op in ("aten.mul", "aten.div") and p.get("rounding_mode") is None
    if not (plain and single and isinstance(look(p["self"]), Node)):
        return None, None, ""
    factor = torch.as_tensor(factor, dtype=torch.float64).reshape(1)
    return 1 / factor if node.op == "aten.div" else factor, None, p["self"].name


def merged(layer: Node, slope: Tensor, shift: Tensor | None, constants: dict[str, Tensor]) -> Node | None:
    """The linear layer or convolution with slope and shift of each output channel in it."""
    if layer.op not in ("aten.linear", "aten.convolution") or layer.params["weight"].name not in constants:
        return None
    if layer.op == "aten.linear" and len(layer.shape) != 2 and len(slope) > 1:
        return None  # the channels of a batch norm are not the last axis
    axis = 1 if layer.params.get("transposed") else 0
    if axis and layer.params["groups"] > 1:
        return None
    weight = constants[layer.params["weight"].name]
    channels = weight.shape[axis]
    slope = slope.to(weight.device).expand(channels)
    shape = [channels if d == axis else 1 for d in range(weight.ndim)]
    params = {**layer.params, "weight": Ref(f"{layer.name}.weight.folded")}
    constants[params["weight"].name] = (weight.double() * slope.reshape(shape)).to(weight.dtype)
    given = layer.params["bias"]
    bias = torch.zeros(channels, dtype=torch.float64, device=weight.device)
    bias = bias if given is None else constants[given.name].double() * slope
    bias = bias if shift is None else bias + shift
    if given is not None or shift is not None:
        params["bias"] = Ref(f"{layer.name}.bias.folded")
        constants[params["bias"].name] = bias.to(weight.dtype)
    return replace(layer, params=params, inputs=named(params))
