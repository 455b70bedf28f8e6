"""The nodes of a checked ONNX network as layers and steps.

Conv, ConvTranspose, Gemm, MatMul with a stored matrix, and BatchNormalization become real layers under
`layers`, so that compression methods find them by name; a bias that is added after a MatMul becomes the bias
of its layer. What does not depend on the input is computed once; the rest is a list of steps over `onnx_ops`.
A network that was written for one example runs on any number of them: as one batch where that gives the same
outputs, else one by one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput, need
from netweight.models.onnx_layers import layer_of
from netweight.models.onnx_ops import DTYPES, LOOSE, OPERATORS, STATIC
from netweight.models.onnx_shapes import Unreadable

LARGEST = 2 << 30  # bytes of a file, unpacked, and of all tensors
READ = frozenset([*OPERATORS, "BatchNormalization", "Constant"])


@dataclass(frozen=True)
class Step:
    """One node. inputs: names of values ("" for one that is left out). static: inputs that are plain numbers.

    layer: its name under `layers`, or "" for a function of `onnx_ops`.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    static: Mapping[int, Any] = field(default_factory=dict)
    layer: str = ""


class OnnxNetwork(nn.Module):
    """The network of an ONNX file; `b *in` to `b *out`."""

    def __init__(self, source: str, target: str, steps: Sequence[Step]) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.steps = tuple(steps)
        self.layers = nn.ModuleDict()
        self.constants = nn.Module()
        self.buffer_of: dict[str, str] = {}
        self.whole = True  # whether a batch may run at once

    def forward(self, x: Float[Tensor, "b *in"]) -> Tensor:
        """The outputs, one row per example."""
        if self.whole:
            return self.once(x)
        found = [self.once(one) for one in x.split(1)]
        return torch.cat(found) if found[0].ndim and len(found[0]) == 1 else torch.stack(found)

    def once(self, x: Tensor) -> Tensor:
        """The nodes of the file, one after the other."""
        values: dict[str, Any] = {name: getattr(self.constants, at) for name, at in self.buffer_of.items()}
        values[self.source] = x
        for step in self.steps:
            found = self.run(step, values)
            values.update(zip(step.outputs, found if isinstance(found, tuple | list) else (found,)))
        return values[self.target]

    def run(self, step: Step, values: Mapping[str, Any]) -> Any:
        """What one step gives."""
        inputs = [
            step.static[i] if i in step.static else values.get(name) for i, name in enumerate(step.inputs)
        ]
        if step.layer:
            return self.layers[step.layer](inputs[0])
        return OPERATORS[step.op](step.settings, *inputs)


def build(proto: Any, where: str) -> nn.Module:
    """The module of a checked network."""
    graph = proto.graph
    stored = {tensor.name: _array(tensor, where) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise BadInput(
            f"{where}: it has {len(inputs)} inputs and {len(graph.output)} outputs; expected one of each"
        )
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    model = OnnxNetwork(inputs[0].name, graph.output[0].name, ())
    kind = DTYPES.get(inputs[0].type.tensor_type.elem_type, torch.float32)
    example = torch.zeros(_input_shape(inputs[0], where), dtype=kind)
    steps = Builder(model, stored, {inputs[0].name: example}, opset, where)
    steps.uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        steps.add(node)
    if model.target not in steps.live:
        raise BadInput(f"{where}: its output does not depend on its input; expected a network")
    model.steps = tuple(steps.steps)
    steps.keep_constants()
    model.eval().requires_grad_(True)
    model.whole = _runs_whole(model, example)
    return model


def _input_shape(value: Any, where: str) -> tuple[int, ...]:
    """The declared shape with one example where the first size is left open."""
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
    if not sizes or any(size < 1 for size in sizes[1:]) or math.prod(sizes[1:]) > LARGEST // 4:
        raise BadInput(
            f"{where}: input {value.name!r} has the shape {sizes}; every size but the first has to be fixed"
        )
    return (max(1, sizes[0]), *sizes[1:])


def _runs_whole(model: OnnxNetwork, example: Tensor) -> bool:
    """Whether two batches of the declared size give the same at once as one by one."""
    generator = torch.Generator().manual_seed(0)
    size = len(example)
    x = torch.rand(2 * size, *example.shape[1:], generator=generator)
    x = x.to(example.dtype) if example.is_floating_point() else (2 * x).to(example.dtype)
    with torch.no_grad():
        apart = [model.once(part) for part in x.split(size)]
        try:
            together = model.once(x)
        except (RuntimeError, IndexError):
            return False
    if apart[0].ndim == 0 or len(apart[0]) != size or together.shape != torch.cat(apart).shape:
        return False
    scale = float(together.abs().max()) or 1.0
    return torch.allclose(together / scale, torch.cat(apart) / scale, 0.0, 1e-4)


@dataclass
class Builder:
    """Walks the nodes with an example: what is known is computed, the rest becomes steps."""

    model: OnnxNetwork
    known: dict[str, Tensor]
    live: dict[str, Tensor]
    opset: int
    where: str
    steps: list[Step] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    layers: dict[Any, str] = field(default_factory=dict)

    def add(self, node: Any) -> None:
        """One more node."""
        settings = {a.name: _setting(a, self.where) for a in node.attribute}
        settings.update(opset=self.opset, outputs=len(node.output))
        try:
            self._add(node, settings)
        except (Unreadable, RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(
                f"{self.where}: node {node.name or node.output[0]!r} ({node.op_type}) is not read: {reason}"
            ) from error

    def _add(self, node: Any, settings: dict[str, Any]) -> None:
        if node.op_type == "Constant":
            self.known[node.output[0]] = _constant(settings)
        elif node.op_type == "Shape" and node.input[0] in self.live:
            self.known[node.output[0]] = OPERATORS["Shape"](settings, self.live[node.input[0]])
        elif all(name in self.known for name in node.input if name):
            self._compute(node, settings)
        elif not self._becomes_bias(node):
            for step in self._steps(node, settings):
                found = self.model.run(step, {**self.known, **self.live})
                self.live.update(zip(step.outputs, found if isinstance(found, tuple | list) else (found,)))
                self.steps.append(step)

    def _compute(self, node: Any, settings: dict[str, Any]) -> None:
        step = Step(
            node.op_type, tuple(node.input), tuple(node.output), settings, self._static(node, settings)
        )
        found = self.model.run(step, self.known)
        self.known.update(zip(node.output, found if isinstance(found, tuple | list) else (found,)))

    def _steps(self, node: Any, settings: dict[str, Any]) -> list[Step]:
        """The step of a node, with one before it that pads where a layer cannot."""
        weights = [self.known.get(name) for name in node.input[1:]]
        x = self.live.get(node.input[0])
        made = None if x is None else layer_of(node.op_type, settings, x, weights)
        if made is None:
            static = self._static(node, settings)
            return [Step(node.op_type, tuple(node.input), tuple(node.output), settings, static)]
        layer, pads = made
        key = (node.op_type, *node.input[1:], repr(sorted(settings.items(), key=lambda item: item[0])))
        if key not in self.layers:
            named = str(node.input[1])
            label = (
                named.removesuffix(".weight") if named.endswith(".weight") else node.name or node.output[0]
            )
            self.layers[key] = _free(label, self.model.layers)
            self.model.layers[self.layers[key]] = layer
        source, before = node.input[0], []
        if pads is not None:
            source = f"{node.output[0]} padded"
            before = [Step("Pad", (node.input[0], ""), (source,), {}, {1: pads})]
        return [*before, Step(node.op_type, (source,), (node.output[0],), layer=self.layers[key])]

    def _becomes_bias(self, node: Any) -> bool:
        """Whether this adds a stored vector to what a Linear layer without a bias gives: its bias then."""
        if node.op_type != "Add" or not self.steps:
            return False
        step = self.steps[-1]
        named = [name for name in node.input if name in self.known]
        if len(named) != 1 or step.outputs[0] not in node.input or not step.layer:
            return False
        layer, bias = self.model.layers[step.layer], self.known[named[0]]
        once = self.uses[step.outputs[0]] == 1 and [s.layer for s in self.steps].count(step.layer) == 1
        if not isinstance(layer, nn.Linear) or layer.bias is not None or not once:
            return False
        if bias.numel() != layer.out_features or bias.shape[-1:] != (layer.out_features,):
            return False
        if bias.ndim > self.live[step.outputs[0]].ndim:
            return False
        layer.bias = nn.Parameter(bias.reshape(-1).clone())
        self.steps[-1] = Step(step.op, step.inputs, (node.output[0],), layer=step.layer)
        self.live[node.output[0]] = self.live[step.outputs[0]] + layer.bias.detach()
        return True

    def _static(self, node: Any, settings: dict[str, Any]) -> dict[int, Any]:
        """The inputs that decide shapes, as numbers; the batch is kept by Reshape where it can be."""
        found: dict[int, Any] = {}
        for place in STATIC.get(node.op_type, ()):
            name = node.input[place] if place < len(node.input) else ""
            if name and name in self.known:
                value = self.known[name]
                if node.op_type != "Pow" or value.numel() == 1:
                    found[place] = value.tolist() if node.op_type not in ("Pow", "Clip") else value.item()
            elif name and node.op_type not in LOOSE:
                raise Unreadable(f"{name!r} decides a shape and depends on the input")
        x = self.live.get(node.input[0]) if node.input else None
        if node.op_type == "Reshape" and x is not None and found[1][:1] == [len(x)] and 0 not in found[1]:
            found[1] = [0, *found[1][1:]]
            settings["allowzero"] = 0
        return found

    def keep_constants(self) -> None:
        """Hand the model the stored values that its steps read."""
        for step in self.steps:
            for place, name in enumerate(step.inputs):
                if name in self.known and place not in step.static and name not in self.model.buffer_of:
                    at = _free(name, self.model.constants._buffers)
                    self.model.constants.register_buffer(at, self.known[name].clone())
                    self.model.buffer_of[name] = at


def _free(name: str, taken: Any) -> str:
    """A name for a module or buffer, of letters, digits and underscores, that is not taken."""
    name = re.sub(r"\W", "_", name.strip("/"), flags=re.ASCII)[:60]
    if not name or name[0].isdigit() or hasattr(nn.ModuleDict, name) or hasattr(nn.Module(), name):
        name = f"n_{name}"
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _array(tensor: Any, where: str) -> Tensor:
    """A stored tensor."""
    onnx = need("onnx")
    if tensor.data_type == onnx.TensorProto.STRING:
        raise BadInput(f"{where}: tensor {tensor.name!r} holds text; expected numbers")
    array = onnx.numpy_helper.to_array(tensor)
    small = {onnx.TensorProto.UINT4: "uint8", onnx.TensorProto.INT4: "int8"}
    array = array.astype(small[tensor.data_type]) if tensor.data_type in small else array
    return torch.from_numpy(array.copy())


def _setting(attribute: Any, where: str) -> Any:
    """An attribute as a plain value or tensor."""
    value = need("onnx").helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return _array(value, where) if attribute.HasField("t") else value


def _constant(settings: Mapping[str, Any]) -> Tensor:
    """The value of a Constant node."""
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in settings:
            value = settings[name]
            return value if isinstance(value, Tensor) else torch.tensor(value)
    raise Unreadable("only numbers are read as constants")
