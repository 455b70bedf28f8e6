"""A compressed network as an ONNX file that ONNX Runtime runs on 8-bit integers from the input to the logits.

`deployment/onnx.py` writes the network as it is: weights and inputs of layers are rounded, sums and outputs
are not, so that a runtime goes back to float32 after every layer. Here rounding is added at every edge
(`deployment/onnx_edges.py`), as pairs of QuantizeLinear and DequantizeLinear, which ONNX Runtime fuses with
what lies between them into QLinearConv, QLinearAdd and QGemm: products of unsigned codes of activations and
signed codes of weights, with biases as 32-bit integers. Slices, padding, reshaping and maxima are moved in
front of the DequantizeLinear, onto the codes.

This is another network than the one that was compressed, hence a form of its own: outputs are compared with a
simulation that rounds at the same edges, and what the added rounding changes is said beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor, fx

from netweight.core import io
from netweight.core.compressed import Compressed
from netweight.core.errors import need
from netweight.core.task import Data
from netweight.deployment import onnx, onnx_codes, onnx_edges
from netweight.deployment.onnx_edges import Edged, Int8
from netweight.deployment.onnx_exact import Exact
from netweight.deployment.reopened import CLOSE, wanted


@dataclass(frozen=True)
class Int8Exported:
    """What came out of ONNX Runtime beside the simulation, and beside the network that was compressed.

    largest_difference: from the simulation with rounding at the same edges, in units of the outputs. same:
    whether that is at most 1e-3 of the largest output (at least 1). from_network: the largest difference from
    the network without the added rounding; same_class: share of examples whose largest output is the same as
    there. edges: roundings between layers, `measured_edges` of them on ranges measured here.
    integer_weights: layers on 8-bit integers, of `packed_weights`.
    """

    examples: int
    largest_difference: float
    same: bool
    from_network: float
    same_class: float
    edges: int
    measured_edges: int
    integer_weights: int
    packed_weights: int


def export(
    small: Compressed, path: str | Path, data: Data, x: Num[Tensor, "b ..."], *, how: str = "min-max"
) -> Int8Exported:
    """Write the network with rounding at every edge as an ONNX file (whole or not at all), compared on x.

    data: calibration examples that the ranges of edges are measured on, by `how` (see `nn.ranges.HOW`).
    Raises `MissingExtra` without onnx, onnxruntime and onnxscript, and `DoesNotFit` where no layer can run on
    integers or an operator has no counterpart in ONNX.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        need(package)
    made = onnx_edges.edged(small, data, how)
    content = written(small, made, x)
    expected = simulated(made, x)
    network, found = wanted(small, x), onnx.outputs(content, x, precise=False)
    difference = float((found - expected).abs().max())
    io.write_bytes(path, content)
    return Int8Exported(
        examples=len(x),
        largest_difference=difference,
        same=math.isfinite(difference) and difference <= CLOSE * max(1.0, float(expected.abs().max())),
        from_network=float((found - network).abs().max()),
        same_class=float((found.argmax(-1) == network.argmax(-1)).float().mean()),
        edges=made.measured + made.shared,
        measured_edges=made.measured,
        integer_weights=len(made.layers),
        packed_weights=len(small.packed),
    )


def simulated(made: Edged, x: Tensor) -> Tensor:
    """The outputs of the simulation, in float32 on the CPU."""
    with torch.no_grad():
        return Exact(made).run(x.cpu()).float()


def written(small: Compressed, made: Edged, x: Tensor) -> bytes:
    """The content of the file."""
    others = {
        name: form
        for name, form in onnx.integer_forms(small).items()
        if name.removesuffix(".weight").removesuffix(".layer") not in made.layers
    }
    forms = {**{f"{name}.weight": each.form for name, each in made.layers.items()}, **others}
    proto = onnx.traced(onnx.paired(fx.GraphModule(made.twin, made.twin.graph)), tuple(forms), x.cpu())
    for name, form in forms.items():
        onnx.store(proto.graph, name, form)
    for name, each in made.layers.items():
        store_bias(proto.graph, name, each)
    onnx_codes.tidy(proto)
    kept = [value for value in proto.graph.input if value.name not in forms]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    need("onnx").checker.check_model(proto)
    return proto.SerializeToString()


def store_bias(graph: Any, layer: str, each: Int8) -> None:
    """Let the bias of a layer come from 32-bit integers, worth S_w S_x each.

    One that is no input of a Conv or Gemm stays as it is.
    """
    helper, numpy_helper = need("onnx").helper, need("onnx").numpy_helper
    name = f"{layer}.bias"
    readers = [node for node in graph.node if name in node.input]
    at = next((i for i, tensor in enumerate(graph.initializer) if tensor.name == name), None)
    if at is None or any(node.op_type not in ("Conv", "Gemm") or node.input[2] != name for node in readers):
        return
    values = numpy_helper.to_array(graph.initializer[at])
    scale = each.bias_scale().expand(len(values)).contiguous()
    unit = each.form.scale.double().reshape(-1) * each.rounding.scale.double()
    codes = (torch.from_numpy(values.copy()).double() / unit).round().to(torch.int32)
    del graph.initializer[at]
    graph.initializer.extend(
        [
            numpy_helper.from_array(codes.numpy(), f"{name}.codes"),
            numpy_helper.from_array(scale.numpy(), f"{name}.scale"),
        ]
    )
    node = helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [name], axis=0)
    graph.node.insert(0, node)
