"""What is bounded: the graph of a network, a batch of regions of its inputs, the arithmetic to be covered.

    problem = pose(graph, [Region.of(x, within)], "float32")

The graph is that of one example (captured at batch 1), so that any axis of a value may hold anything; bounds
of a batch carry one more axis in front, `B *shape`.

What a bound holds for, and what its own computation loses:

    float32  the network as float32 evaluates it, and in real arithmetic; its roundings are bounded
    float64  the network as float64 evaluates it, and in real arithmetic; its roundings are bounded
    real     the network in real arithmetic; the bound is computed in float32 and reduced by an estimate of
             what that loses, not by a bound on it: fast, and no more rigorous than other verifiers
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import DoesNotFit, unknown
from netweight.core.exact import rounded
from netweight.core.graph import Graph, Node, Ref
from netweight.core.perturbation import L1, L2, Linf, Perturbation
from netweight.core.words import Synonyms
from netweight.verification.relax import gamma

PIECE = 16  # examples whose corners are found at once
ESTIMATE = 16  # units in which a float32 proof of "real" arithmetic is taken to be right


@dataclass(frozen=True)
class Arithmetic:
    """unit: the unit roundoff of the network that is covered (0: real numbers alone). dtype: of the proof.

    own: the unit roundoff of the proof that is bounded; where it is 0, `estimate` times the size of a sum is
    taken off instead.
    """

    name: str
    dtype: torch.dtype
    unit: float
    own: float
    estimate: float = 0.0

    @property
    def total(self) -> float:
        """What one operation of the network and of the proof lose together."""
        return self.unit + 2 * self.own


ARITHMETICS = {
    "float32": Arithmetic("float32", torch.float32, 2.0**-24, 2.0**-24),
    "float64": Arithmetic("float64", torch.float64, 2.0**-53, 2.0**-53),
    "real": Arithmetic("real", torch.float32, 0.0, 0.0, ESTIMATE * 2.0**-24),
}


@dataclass(frozen=True, eq=False)
class Region:
    """The values that one input can take: a box `B *in`, and the set where that is smaller than its box."""

    lower: Float[Tensor, "b *in"]
    upper: Float[Tensor, "b *in"]
    x: Tensor | None = None
    within: Perturbation | None = None

    @classmethod
    def of(cls, x: Tensor, within: Perturbation) -> Region:
        """The set around x `b *in`, its box rounded outwards. Raises `DoesNotFit` where shapes do not fit."""
        pieces = x.split(PIECE) if isinstance(within, Linf | L2 | L1) and len(x) > PIECE else (x,)
        ends = [within.corners(piece) for piece in pieces]  # in pieces: exact corners take much memory
        lower, upper = ends[0] if len(ends) == 1 else (torch.cat(side) for side in zip(*ends))
        if lower.shape != x.shape:
            raise DoesNotFit(
                f"the set is of {tuple(lower.shape)}, the inputs of {tuple(x.shape)}; give one of that shape"
            )
        boxed = not isinstance(within, Synonyms) and getattr(within, "norm", math.inf) == math.inf
        return cls(lower, upper) if boxed else cls(lower, upper, x, within)

    @property
    def boxed(self) -> bool:
        """Whether the set is its box."""
        return self.within is None

    def to(self, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Region:
        """In the dtype of a proof and the shape of the graph's input, behind an axis of examples."""

        def moved(tensor: Tensor, up: bool) -> Tensor:
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor = rounded(tensor.double(), dtype, up=up)
            return tensor.to(device).reshape(-1, *shape)

        x = None if self.x is None else self.x.to(device).reshape(-1, *shape)
        return Region(moved(self.lower, False), moved(self.upper, True), x, self.within)

    def take(self, examples: Tensor) -> Region:
        """Some of the examples."""
        x = None if self.x is None else self.x[examples]
        within = self.within.take(examples) if isinstance(self.within, Synonyms) else self.within
        return Region(self.lower[examples], self.upper[examples], x, within)

    def centre_and_spread(self, slack: float) -> tuple[Tensor, Tensor]:
        """The middle of the box, and half its width with slack times the size of what it holds."""
        centre, radius = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        return centre, radius + slack * (centre.abs() + radius)

    def lowest(self, a: Float[Tensor, "b s *in"], slack: float) -> Float[Tensor, "b s"]:
        """min <a, s> over the set, lowered by slack times the size of the sum."""
        flat = a.flatten(2)
        centre, spread = self.centre_and_spread(slack)
        found = _dot(flat, centre) - _dot(flat.abs(), spread)
        if self.within is None:
            return found
        if not isinstance(self.within, L2 | L1):
            return torch.maximum(found, rounded(-self.within.support(-a.double(), self.x), a.dtype, up=False))
        x = self.x.to(a.dtype)
        order = 2 if isinstance(self.within, L2) else math.inf
        dual = torch.linalg.vector_norm(flat, order, dim=2) * (self.within.eps * (1 + slack))
        return torch.maximum(found, _dot(flat, x) - dual - slack * _dot(flat.abs(), x.abs()))


def _dot(flat: Float[Tensor, "b s n"], vector: Tensor) -> Float[Tensor, "b s"]:
    return torch.matmul(flat, vector.reshape(len(vector), -1, 1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class Problem:
    """A graph of one example, the regions of its inputs (by name), the arithmetic, constants in its dtype."""

    graph: Graph
    regions: Mapping[str, Region]
    arithmetic: Arithmetic
    constants: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(next(iter(self.regions.values())).lower)

    @cached_property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(iter(self.regions.values())).lower.device

    @cached_property
    def nodes(self) -> Mapping[str, Node]:
        """Inputs and operators by name, in an order of evaluation."""
        return {node.name: node for node in (*self.graph.inputs, *self.graph.nodes)}

    @property
    def output(self) -> Node:
        """The node whose value is bounded: the first output."""
        return self.nodes[self.graph.outputs[0]]

    def slack(self, terms: int) -> float:
        """The relative error that a sum of `terms` products is covered for, in the network and the proof."""
        if self.arithmetic.estimate:
            return self.arithmetic.estimate
        return gamma(terms + len(self.graph.nodes), self.arithmetic.total)

    def params(self, node: Node, values: Mapping[str, Any]) -> dict[str, Any]:
        """The node's params with constants, and `values` for what is perturbed, in the place of names."""

        def own(value: Any) -> Any:
            if isinstance(value, Ref):
                return self.constants[value.name] if value.name in self.constants else values[value.name]
            return [own(v) for v in value] if isinstance(value, list | tuple) else value

        return {key: own(value) for key, value in node.params.items()}


def pose(graph: Graph, regions: Sequence[Region], arithmetic: str | Arithmetic) -> Problem:
    """The problem for one region per input of the graph.

    Raises `BadInput` for an unknown arithmetic, `DoesNotFit` where the regions are not of the graph's inputs.
    """
    if isinstance(arithmetic, str) and arithmetic not in ARITHMETICS:
        raise unknown("arithmetic", arithmetic, ARITHMETICS)
    how = ARITHMETICS[arithmetic] if isinstance(arithmetic, str) else arithmetic
    if len(regions) != len(graph.inputs):
        raise DoesNotFit(
            f"the network has {len(graph.inputs)} inputs, {len(regions)} regions were given; give one each"
        )
    for node, region in zip(graph.inputs, regions):
        if math.prod(node.shape) != math.prod(region.lower.shape[1:]):
            raise DoesNotFit(
                f"{node.name}: an example of {tuple(region.lower.shape[1:])} does not fit the network's "
                f"{node.shape}; give inputs of that shape"
            )
    device = next((t.device for t in graph.constants.values()), regions[0].lower.device)
    constants = {
        name: tensor.to(how.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in graph.constants.items()
    }
    inputs = {
        node.name: region.to(how.dtype, node.shape, device) for node, region in zip(graph.inputs, regions)
    }
    return Problem(graph, inputs, how, constants)
