"""An integer-only network as an ONNX file of integer operators, and as a folder that netweight reads back.

Behind the entrance (Cast to float64, Mul, Add, Round, Clip, Cast to int32) every tensor of the file is an
integer: ConvInteger and MatMulInteger on uint8 with zero points, Mul and Add in int32 and int64, shifts,
Clip, Max, ReduceSum, Slice. ONNX shifts unsigned numbers only, so a product p = q m, below 2^62 in size, goes

    (p + 2^62) as uint64, + 2^(e-1), >> e, as int64, - 2^(62-e)        =  (p + 2^(e-1)) >> e, arithmetic.

uint8 weights (zero point 128) keep runtimes from the 16-bit saturating products of older processors. Inputs
of more than 8 bits and weights of 9 are taken in two parts. The output is int32, worth `scale` each (in the
metadata of the file). Before a file is written it is run in ONNX Runtime and has to be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

from netweight.core import io
from netweight.core.compressed import Compressed
from netweight.core.errors import DoesNotFit, need
from netweight.core.task import Data
from netweight.deployment.integer import lower
from netweight.nn.dyadic import INT32
from netweight.nn.integer_network import INPUT, NAMES, Call, IntegerNetwork, Reach, executed, reaches, write
from netweight.nn.integer_steps import (
    Clip,
    Concat,
    Entrance,
    Join,
    Move,
    Negate,
    Pool,
    Product,
    Rescale,
    outputs,
    places,
)  # fmt: skip

OPSET = 18
FILES = (*NAMES, "model.onnx")
FAR = 2**31 - 1  # beyond the end of every axis


@dataclass(frozen=True)
class Lowered:
    """The integer network beside ONNX Runtime and beside the network it was made of, on the examples.

    same: outputs in ONNX Runtime are equal bit for bit. operators: that ran behind the entrance, all on
    integers. largest_difference: from the compressed network, in units of its outputs. same_class: share of
    examples with the same largest output. scale: what 1 is worth in the output.
    """

    examples: int
    same: bool
    operators: int
    largest_difference: float
    same_class: float
    scale: float


def export(small: Compressed, folder: str | Path, data: Data, x: Num[Tensor, "b ..."]) -> Lowered:
    """Lower the network and write it: integer.json, integer.safetensors, model.onnx; compare them on x.

    `data` gives the scales where branches meet. Raises `DoesNotFit` for a network without an integer form,
    `MissingExtra` without onnx and onnxruntime.
    """
    network, folder = lower(small, data), Path(folder)
    device = next((t.device for t in network.scales.values()), x.device)
    wanted = network(x.to(device))
    content = proto(network).SerializeToString()
    found = run(content, x)
    io.write_bytes(folder / FILES[-1], content)
    write(network, folder)
    real, before = wanted.cpu().double() * network.scale, small.model.eval()(x.to(device)).detach().cpu()
    return Lowered(
        examples=len(x),
        same=torch.equal(found, wanted.cpu()),
        operators=sum(executed(network, x[:1].to(device)).values()),
        largest_difference=float((real - before).abs().max()),
        same_class=float((real.argmax(-1) == before.argmax(-1)).float().mean()),
        scale=network.scale,
    )


def run(content: bytes, x: Num[Tensor, "b ..."]) -> Tensor:
    """What ONNX Runtime gives on the CPU."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {INPUT: x.float().cpu().numpy()})[0])


def proto(network: IntegerNetwork) -> Any:
    """The ModelProto, for any number of float32 examples."""
    onnx = need("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    found, file = reaches(network.calls, network.shape), File(onnx)
    file.node("Cast", [INPUT], "entrance", to=kinds.DOUBLE)
    names = {INPUT: "entrance"}
    for call in network.calls:
        inputs = [names[name] for name in call.inputs]
        names[call.name] = file.name(f"{call.name}.value")
        WRITERS[type(call.step)](file, call, inputs, names[call.name], [found[name] for name in call.inputs])
    file.node("Identity", [names[network.output]], "output")
    shape = found[network.output].shape
    graph = helper.make_graph(
        file.nodes, "integer", [helper.make_tensor_value_info(INPUT, kinds.FLOAT, ["b", *network.shape])],
        [helper.make_tensor_value_info("output", kinds.INT32, ["b", *shape])], file.constants,
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="netweight"
    )
    model.ir_version = 9
    helper.set_model_props(model, {"scale": repr(network.scale)})
    onnx.checker.check_model(model)
    return model


@dataclass
class File:
    """Nodes and constants while the file is drawn up."""

    onnx: Any
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def name(self, about: str) -> str:
        """A name that nothing else has."""
        return f"{about}.{len(self.nodes)}.{len(self.constants)}"

    def node(self, op: str, inputs: Sequence[str], output: str | None = None, **settings: Any) -> str:
        """One more operator; the name of its result."""
        output = output or self.name(op)
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [output], **settings))
        return output

    def constant(self, value: Any, kind: Any = np.int64) -> str:
        """A stored tensor; its name."""
        array = value.cpu().numpy().astype(kind) if isinstance(value, Tensor) else np.array(value, kind)
        name = self.name("constant")
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def cast(self, x: str, kind: str, output: str | None = None) -> str:
        """Another dtype, by the name ONNX has for it."""
        return self.node("Cast", [x], output, to=getattr(self.onnx.TensorProto, kind))


# Steps ---------------------------------------------------------------------------------------------------


def entrance(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """Real numbers to codes, half to even."""
    step, real = call.step, np.float64
    assert isinstance(step, Entrance)
    x = file.node("Mul", [inputs[0], file.constant(step.gain, real)])
    x = file.node("Add", [x, file.constant(step.offset, real)])
    x = file.node("Round", [x])
    x = file.node("Clip", [x, file.constant(step.low, real), file.constant(step.high, real)])
    file.cast(x, "INT32", output)


def product(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """Products of uint8, summed over the parts of inputs and weights."""
    step = call.step
    assert isinstance(step, Product)
    low, high = before[0].within or (0, 0)
    total = None
    for codes, zero, factor in digits(file, inputs[0], low, high):
        for weight in weights(step.weight.cpu()):
            part = product_of(file, step, codes, zero, weight)
            if factor != 1:
                part = file.node("Mul", [part, file.constant(factor, np.int32)])
            total = part if total is None else file.node("Add", [total, part])
    bias = step.bias.reshape(-1, *[1] * (step.weight.ndim - 2))
    file.node("Add", [total, file.constant(bias, np.int32)], output)


def digits(file: File, x: str, low: int, high: int) -> list[tuple[str, int, int]]:
    """(uint8 codes, zero point, factor): parts of int32 numbers that add up to them."""
    if high - low < 256:
        zero = max(0, min(255, -low))
        if not (low + zero >= 0 and high + zero <= 255):
            raise DoesNotFit(f"numbers from {low} to {high} have no 8-bit grid with a 0; calibrate again")
        return [(file.cast(plus(file, x, zero), "UINT8"), zero, 1)]
    if not (low >= -(2**15) and high < 2**15):
        raise DoesNotFit(
            f"inputs of a layer from {low} to {high}: ONNX multiplies at most 16 bits; use fewer"
        )
    shifted = file.cast(plus(file, x, 2**15), "UINT32")  # 0 to 2^16 - 1
    upper = file.node("BitShift", [shifted, file.constant(8, np.uint32)], direction="RIGHT")
    whole = file.node("Mul", [upper, file.constant(256, np.uint32)])
    lower = file.node("Sub", [shifted, whole])
    return [(file.cast(lower, "UINT8"), 0, 1), (file.cast(upper, "UINT8"), 128, 256)]


def plus(file: File, x: str, by: int) -> str:
    """x + by in int32."""
    return file.node("Add", [x, file.constant(by, np.int32)]) if by else x


def weights(weight: Tensor) -> list[Tensor]:
    """Parts of -128 to 127 that add up to the weights."""
    if weight.dtype == torch.int8:
        return [weight]
    half = weight >> 1
    return [half, weight - half]


def product_of(file: File, step: Product, codes: str, zero: int, weight: Tensor) -> str:
    """int32 sums of (codes - zero) times weights of 8 bits."""
    flat = weight.ndim == 2
    stored = file.constant((weight.t() if flat else weight).to(torch.int32) + 128, np.uint8)
    inputs = [codes, stored, file.constant(zero, np.uint8), file.constant(128, np.uint8)]
    if flat:
        return file.node("MatMulInteger", inputs)
    return file.node(
        "ConvInteger", inputs, strides=list(step.stride), pads=[*step.padding, *step.padding],
        dilations=list(step.dilation), group=step.groups, kernel_shape=list(weight.shape[2:]),
    )  # fmt: skip


def rescaled(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """(q m + 2^(e-1)) >> e, clipped."""
    step = call.step
    assert isinstance(step, Rescale)
    e = step.factor.shift
    one = torch.ones_like(e)
    x = file.node("Mul", [file.cast(inputs[0], "INT64"), file.constant(step.factor.multiplier)])
    x = file.cast(file.node("Add", [x, file.constant(2**62)]), "UINT64")
    x = file.node("Add", [x, file.constant(one << (e - 1), np.uint64)])
    x = file.node("BitShift", [x, file.constant(e, np.uint64)], direction="RIGHT")
    x = file.node("Sub", [file.cast(x, "INT64"), file.constant(one << (62 - e))])
    x = file.node("Clip", [x, file.constant(step.low), file.constant(step.high)])
    file.cast(x, "INT32", output)


def joined(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """A sum of branches."""
    total = inputs[0]
    for branch in inputs[1:-1]:
        total = file.node("Add", [total, branch])
    file.node("Add", [total, inputs[-1]], output)


def concatenated(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """Branches side by side."""
    assert isinstance(call.step, Concat)
    file.node("Concat", inputs, output, axis=call.step.axis)


def clipped(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """Max and Min per channel."""
    step, x = call.step, inputs[0]
    assert isinstance(step, Clip)
    for op, end in (("Max", step.low), ("Min", step.high)):
        x = x if end is None else file.node(op, [x, file.constant(end, np.int32)])
    file.node("Identity", [x], output)


def negated(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """-q."""
    file.node("Neg", inputs, output)


def pooled(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """Whole axes by reduction, windows by the largest or the sum of their slices."""
    step = call.step
    assert isinstance(step, Pool)
    if step.axes:
        op = "ReduceMax" if step.of == "max" else "ReduceSum"
        file.node(op, [inputs[0], file.constant(step.axes)], output, keepdims=int(step.keep))
        return
    x, count = inputs[0], len(step.kernel)
    sizes = before[0].shape[-count:]
    if any(step.padding):
        fill = file.constant(INT32[0] if step.of == "max" else 0, np.int32)
        lead = [0] * (len(before[0].shape) + 1 - count)
        x = file.node("Pad", [x, file.constant([*lead, *step.padding] * 2), fill])
    out = [outputs(*each) for each in zip(sizes, step.kernel, step.stride, step.padding, step.dilation)]
    axes, parts = file.constant(list(range(-count, 0))), []
    for starts, ends in places(step.kernel, step.stride, step.dilation, out):
        cut = [x, file.constant(starts), file.constant(ends), axes, file.constant(step.stride)]
        parts.append(file.node("Slice", cut))
    op = "Max" if step.of == "max" else "Add"
    total = parts[0]
    for part in parts[1:]:
        total = file.node(op, [total, part])
    file.node("Identity", [total], output)


def moved(file: File, call: Call, inputs: Sequence[str], output: str, before: Sequence[Reach]) -> None:
    """Movements, of integers or of the inputs in float64."""
    step, x = call.step, inputs[0]
    assert isinstance(step, Move)
    by = step.by
    match step.how:
        case "reshape":
            file.node("Reshape", [x, file.constant([-1, *by["shape"]])], output)
        case "permute":
            file.node("Transpose", [x], output, perm=list(by["dims"]))
        case "select":
            file.node("Gather", [x, file.constant(by["index"])], output, axis=by["dim"])
        case "slice":
            ends = [file.constant([by[key]]) for key in ("start", "end", "dim", "step")]
            file.node("Slice", [x, *ends], output)
        case "flip":
            n = len(by["dims"])
            ends = [file.constant([-1] * n), file.constant([-FAR] * n), file.constant(by["dims"])]
            file.node("Slice", [x, *ends, file.constant([-1] * n)], output)
        case "pad":
            pairs = list(zip(by["pad"][::2], by["pad"][1::2]))[::-1]
            lead = [0] * (len(before[0].shape) + 1 - len(pairs))
            pads = [*lead, *(a for a, _ in pairs), *lead, *(b for _, b in pairs)]
            fill = file.constant(0, np.float64 if before[0].within is None else np.int32)
            file.node("Pad", [x, file.constant(pads), fill], output)


WRITERS: dict[type, Callable[..., None]] = {
    Entrance: entrance,
    Product: product,
    Rescale: rescaled,
    Join: joined,
    Concat: concatenated,
    Clip: clipped,
    Negate: negated,
    Pool: pooled,
    Move: moved,
}
