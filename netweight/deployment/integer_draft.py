"""An integer-only network while it is being drawn up: values with their scales, and the calls that make them.

A value that is still real is affine in the network's input, gain x + offset: normalisation becomes part of
the quantizer that reads it. Everything else is an integer q worth S q, S broadcasting against the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import DoesNotFit
from netweight.core.graph import Graph, Node, Ref
from netweight.nn.dyadic import INT32, Dyadic
from netweight.nn.fake import StaticRounding
from netweight.nn.integer_network import Call, Reach, reach_of
from netweight.nn.integer_steps import Clip, Entrance, Rescale, Step

HALF16 = (-(2**15), 2**15 - 1)  # a join is signed, of 16 bits
FINER = 2.0**-12  # of a branch's scale: a join need not be finer, and its dyadic number stays below 2^13


@dataclass(frozen=True)
class Layer:
    """weight: int64 `out in *kernel`. scale: float64, what 1 is worth in each row. rounding: of its input."""

    weight: Tensor
    scale: Float[Tensor, " out"]
    rounding: StaticRounding


@dataclass(frozen=True)
class Value:
    """scale: float64, broadcasts against `b *shape`; a real value is scale x + offset of the moved input x.

    size: the largest |value| on the data, in the units of the network.
    """

    name: str
    reach: Reach
    scale: Tensor
    offset: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    size: float = 0.0

    @property
    def real(self) -> bool:
        """Whether it is not on a grid yet."""
        return self.reach.within is None

    def spread(self, tensor: Tensor) -> Tensor:
        """A scale or offset in the full shape of one example."""
        return tensor.expand(1, *self.reach.shape)


@dataclass
class Draft:
    """calls: in order. values: by node of the graph. made: by call. kept: what was taken to a scale
    already."""

    graph: Graph
    layers: Mapping[str, Layer]
    sizes: Mapping[str, float]
    calls: list[Call] = field(default_factory=list)
    values: dict[str, Value | list[Value]] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Value] = field(default_factory=dict)
    kept: dict[tuple[str, float, int, int], Value] = field(default_factory=dict)

    def look(self, given: object) -> object:
        """The value or constant that a reference names; anything else is itself."""
        if not isinstance(given, Ref):
            return given
        return (
            self.graph.constants[given.name]
            if given.name in self.graph.constants
            else self.values[given.name]
        )

    def emit(self, name: str, step: Step, inputs: Sequence[Value], scale: Tensor) -> Value:
        """One more call; scale: of an integer result."""
        names = (name, *(f"{name}_{i}" for i in range(1, len(self.made) + 2)))
        name = next(n for n in names if n not in self.made)
        made = Call(name, tuple(value.name for value in inputs), step)
        found = Value(name, reach_of(made, [value.reach for value in inputs]), compact(scale))
        self.calls.append(made)
        self.made[name] = found
        if found.reach.within is not None:
            self.scales[name] = found.scale
        return found

    def on_grid(self, value: Value, scale: float, low: int, high: int, name: str) -> Value:
        """The value as an integer of that scale within low to high."""
        if low >= 0:
            value = self._before_relu(value)
        key = (value.name, scale, low, high)
        if key not in self.kept:
            self.kept[key] = self._taken(value, scale, low, high, name)
        return self.kept[key]

    def _taken(self, value: Value, scale: float, low: int, high: int, name: str) -> Value:
        common = torch.full((1,) * (len(value.reach.shape) + 1), scale, dtype=torch.float64)
        if value.real:
            step = Entrance(compact(value.scale / scale), compact(value.offset / scale), low, high)
            return self.emit(name, step, [value], common)
        ends = value.reach.within
        if bool((value.scale == scale).all()) and low <= ends[0] and ends[1] <= high:
            return value
        return self.emit(name, Rescale(Dyadic.of(value.scale / scale, name), low, high), [value], common)

    def _before_relu(self, value: Value) -> Value:
        """What a ReLU reads: a clip at 0 of the quantizer does the same, max(q, 0) r = max(q r, 0)."""
        made = next((call for call in self.calls if call.name == value.name), None)
        if made is None or not isinstance(made.step, Clip) or made.step.high is not None:
            return value
        if made.step.low is None or bool(made.step.low.any()):
            return value
        return self.made[made.inputs[0]]

    def joined(self, values: Sequence[Value], size: float, node: Node) -> tuple[list[Value], Tensor]:
        """The values on one signed 16-bit scale that holds each of them and `size`, and that scale."""
        size = max([size, *(value.size for value in values)])
        if not torch.isfinite(torch.tensor(size)):
            raise DoesNotFit(f"{label(node)}: its values on the data are not finite; calibrate on other data")
        coarsest = max([float(v.scale.max()) for v in values if not v.real], default=0.0)
        scale = max(size / HALF16[1], coarsest * FINER) or 1.0
        found = []
        for value in values:
            low = 0 if not value.real and value.reach.within[0] >= 0 else HALF16[0]
            found.append(self.on_grid(value, scale, low, HALF16[1], f"{node.name}.{value.name}"))
        return found, torch.full((1,) * len(node.shape), scale, dtype=torch.float64)

    def integer(self, value: Value, node: Node) -> Value:
        """The value, on 16 bits if it is still real."""
        return self.joined([value], 0.0, node)[0][0] if value.real else value

    def common(self, value: Value, axes: Sequence[int], node: Node) -> Value:
        """An integer whose scale does not change along the axes."""
        value = self.integer(value, node)
        if all(value.scale.shape[axis] == 1 for axis in axes):
            return value
        return replace(self.joined([value], 0.0, node)[0][0], size=value.size)

    def fits(self, value: Value, count: int) -> bool:
        """Whether the sum of so many stays in int32."""
        return max(abs(end) for end in value.reach.within) * count <= INT32[1]


def compact(scale: Tensor) -> Tensor:
    """Without the axes along which nothing changes (they become 1)."""
    for axis in range(scale.ndim):
        first = scale.narrow(axis, 0, 1)
        if scale.shape[axis] > 1 and bool((scale == first).all()):
            scale = first
    return scale.clone()


def label(node: Node) -> str:
    """A node as a user knows it."""
    return f"{node.name} (in layer {node.layer})" if node.layer else node.name


def refuse(node: Node, reason: str) -> DoesNotFit:
    """The error for a node that cannot be treated."""
    return DoesNotFit(f"{label(node)}: {reason}")


def source(draft: Draft, node: Node, name: str) -> Value:
    """The value that a param names; a constant or a list of results is none."""
    found = draft.look(node.params[name])
    if not isinstance(found, Value):
        raise refuse(node, f"{node.op} of {name} that is no value of the network has no integer form")
    return found


def constant(draft: Draft, given: Any) -> Tensor | None:
    """A plain number or a stored tensor, in float64; None for a value."""
    found = draft.look(given)
    if isinstance(found, Value | list):
        return None
    return (
        found.double().cpu() if isinstance(found, Tensor) else torch.tensor(float(found), dtype=torch.float64)
    )
