"""The checker's own bounds on one example: intervals forward, rows back, float64, nothing of the engine.

    found = margins(network, region, objective, "float32", [slopes])

Rounding: with u the unit roundoff of the network and n the terms of a sum, a computed value is off by at most
gamma_n(u) = n u / (1 - n u) times the sum of the |terms| (Higham 2002, section 3.1); a row a that stands at
it pays <|a|, that>. What the proof loses itself is gamma_N(2^-53) times the sizes of all that it has added
up, N more than the longest sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import Graph
from netweight.core.perturbation import L1, L2, Linf
from netweight.verification.check_operators import CUTS, ELEMENTARY, SIGNS, Affine, Step, ends, lines, step

UNITS = {"float32": 2.0**-24, "float64": 2.0**-53, "real": 0.0}
UNDERFLOW = {"float32": 2.0**-126, "float64": 2.0**-1022, "real": 0.0}
ROWS = 2**22  # numbers in one value of a chunk of rows
Slopes = Mapping[str, Tensor]  # by node: the choice of the line below, for each row `k *shape`


@dataclass(frozen=True, eq=False)
class Network:
    """A captured graph as the checker reads it. longest: elements of its largest value or sum."""

    graph: Graph
    steps: Mapping[str, Step]
    shapes: Mapping[str, tuple[int, ...]]
    longest: int

    @property
    def input(self) -> str:
        """The name of the input."""
        return self.graph.inputs[0].name


def network(graph: Graph) -> Network:
    """The graph with every operator taken apart; raises `DoesNotFit` where one cannot be re-checked."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise DoesNotFit(
            f"the network has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; "
            "certificates are re-checked for networks with one of each"
        )
    constants = {
        name: tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in graph.constants.items()
    }
    steps = {node.name: step(graph, node, constants) for node in graph.nodes}
    shapes = {node.name: node.shape for node in (*graph.inputs, *graph.nodes)}
    sums = [each.affine.terms for each in steps.values() if each.affine]
    return Network(graph, steps, shapes, max([math.prod(shape) for shape in shapes.values()] + sums))


@dataclass(frozen=True, eq=False)
class Region:
    """The set around one x in float64: a box rounded outwards, and the ball."""

    x: Tensor
    lower: Tensor
    upper: Tensor
    within: Linf | L2 | L1

    @classmethod
    def of(cls, x: Tensor, within: Linf | L2 | L1) -> Region:
        """Raises `BadInput` for an input outside its valid range."""
        x = x.detach().cpu().double()
        low = -math.inf if within.low is None else within.low
        high = math.inf if within.high is None else within.high
        lower = torch.nextafter(x - within.eps, torch.full_like(x, -math.inf)).clamp(low, high)
        upper = torch.nextafter(x + within.eps, torch.full_like(x, math.inf)).clamp(low, high)
        if not bool(((lower <= x) & (x <= upper)).all()):
            raise BadInput(
                f"an input lies outside its valid range {within.low} to {within.high}; scale the data"
            )
        return cls(x, lower, upper, within)

    def lowest(self, a: Float[Tensor, "r *in"]) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
        """(min <a, s> over the set or something below it, the size of what was added up)."""
        centre, radius = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        found, mass = _dot(a, centre) - _dot(a.abs(), radius), _dot(a.abs(), centre.abs() + radius)
        if isinstance(self.within, Linf):
            return found, mass
        order = 2 if isinstance(self.within, L2) else math.inf
        dual = self.within.eps * torch.linalg.vector_norm(a.flatten(1), order, dim=1)
        size = _dot(a.abs(), self.x.abs()) + dual
        return torch.maximum(found, _dot(a, self.x) - dual), torch.maximum(mass, size)

    def lowest_point(self, a: Float[Tensor, " *in"]) -> Tensor:
        """About where <a, s> is least."""
        if isinstance(self.within, Linf):
            return torch.where(a > 0, self.lower, self.upper)
        if isinstance(self.within, L2):
            return self.x - self.within.eps * a / torch.linalg.vector_norm(a).clamp(min=1e-300)
        point, most = self.x.clone().flatten(), a.flatten().abs().argmax()
        point[most] -= self.within.eps * a.flatten()[most].sign()
        return point.reshape(self.x.shape)


@dataclass(eq=False)
class Example:
    """One example. values: the interval of every value. masses: what `mass` gave, of affine operators."""

    network: Network
    region: Region
    arithmetic: str
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)

    def size(self, name: str) -> Tensor:
        """The largest |value|."""
        low, high = self.values[name]
        return torch.maximum(low.abs(), high.abs())

    def mass(self, name: str) -> Tensor:
        """The size of what is added up in each element of a value."""
        each = self.network.steps[name]
        if each.affine is None:
            return self.size(name)
        if name not in self.masses:
            sizes = each.affine.size(*(self.size(of) for of in each.moving))
            self.masses[name] = sizes + each.affine.heavy
        return self.masses[name]

    def slack(self, name: str) -> Tensor | None:
        """What the network's evaluation may lose at a node; None for nothing."""
        each, unit = self.network.steps[name], UNITS[self.arithmetic]
        terms = (
            each.affine.terms if each.affine else 0 if each.node.op in ("aten.relu", *CUTS) else ELEMENTARY
        )
        if unit == 0 or terms == 0:
            return None
        return gamma(terms, unit) * self.mass(name) + terms * UNDERFLOW[self.arithmetic]

    @property
    def own(self) -> float:
        """What one of the proof's sums can lose, relative to its size."""
        return gamma(self.network.longest + 8 * len(self.network.steps) + 64, 2.0**-53)


def gamma(terms: int, unit: float) -> float:
    """n u / (1 - n u), rounded up."""
    if terms * unit >= 0.5:
        raise DoesNotFit(f"a sum of {terms} products cannot be re-checked in this precision; use float64")
    return 1.001 * terms * unit / (1 - terms * unit)


def _dot(a: Tensor, value: Tensor) -> Tensor:
    return (a * value).flatten(1).sum(1)


# Forward -------------------------------------------------------------------------------------------------


def bounded(net: Network, region: Region, arithmetic: str) -> Example:
    """The interval of every value, tightened by rows where an activation is undecided."""
    found = Example(net, region, arithmetic, {net.input: (region.lower, region.upper)})
    readers: dict[str, list[Step]] = {}
    for each in net.steps.values():
        for name in each.moving if each.affine is None and each.node.op not in CUTS else ():
            readers.setdefault(name, []).append(each)
    for name, each in net.steps.items():
        found.values[name] = interval(found, each)
        if name in readers:
            low, high = found.values[name]
            signs = all(reader.node.op in SIGNS for reader in readers[name])
            undecided = (low < 0) & (high > 0) if signs else high > low
            if bool(undecided.any()):
                found.values[name] = tightened(found, name, undecided)
    return found


def interval(example: Example, each: Step) -> tuple[Tensor, Tensor]:
    """The interval of one value, those of what it reads given."""
    read = [example.values[name] for name in each.moving]
    if each.affine is None:
        low, high = ends(each, *read[0])
        example.values[each.node.name] = (low, high)  # for its size
        slack = example.slack(each.node.name)
        return (low, high) if slack is None else (low - slack, high + slack)
    if each.affine.terms == 0:  # a copy: nothing is rounded
        return each.affine.by(*(low for low, _ in read)), each.affine.by(*(high for _, high in read))
    centre = each.affine.by(*((low + high) / 2 for low, high in read)) + each.affine.offset
    slack = example.slack(each.node.name)
    radius = each.affine.size(*((high - low) / 2 for low, high in read))
    radius = radius + 2 * example.own * example.mass(each.node.name) + (0.0 if slack is None else slack)
    return centre - radius, centre + radius


def tightened(example: Example, name: str, undecided: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of a value with rows for its undecided elements."""
    low, high = (end.flatten().clone() for end in example.values[name])
    index = undecided.flatten().nonzero()[:, 0]
    for part in index.split(max(1, ROWS // example.network.longest)):
        rows = torch.zeros(len(part), low.numel(), dtype=torch.float64)
        rows[torch.arange(len(part)), part] = 1.0
        rows = rows.reshape(-1, *example.network.shapes[name])
        found, _ = lowest(example, name, torch.cat([rows, -rows]), {})
        below, above = found.chunk(2)
        low[part], high[part] = torch.maximum(low[part], below), torch.minimum(high[part], -above)
    shape = example.network.shapes[name]
    return low.reshape(shape), high.reshape(shape)


# Back ----------------------------------------------------------------------------------------------------


def margins(
    net: Network,
    region: Region,
    objective: Float[Tensor, "k out"],
    arithmetic: str,
    slopes: Sequence[Slopes] = (),
) -> tuple[Float[Tensor, " k"], Tensor]:
    """(lower bounds of the objective times the flattened output, a point where the least may lie).

    The best of the checker's own slopes and of those that are given, whatever they are worth.
    """
    example = bounded(net, region, arithmetic)
    name = net.graph.outputs[0]
    rows = objective.double().reshape(-1, *net.shapes[name])
    best, at_input = lowest(example, name, rows, {})
    for chosen in slopes:
        found, at = lowest(example, name, rows, chosen)
        better = found > best
        best = torch.where(better, found, best)
        at_input = torch.where(better.reshape(-1, *[1] * (at.ndim - 1)), at, at_input)
    return best, region.lowest_point(at_input[best.argmin()])


def lowest(
    example: Example, start: str, rows: Float[Tensor, "r ..."], slopes: Slopes
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r *in"]]:
    """(a lower bound of <row, value> for each row, the rows when they reach the input).

    At each activation on the way the rows are also taken over the intervals they stand at; the best counts.
    """
    net, waiting = example.network, {start: rows}
    bias = mass = torch.zeros(len(rows), dtype=torch.float64)
    best = torch.full_like(bias, -math.inf)
    order = list(net.steps)
    for name in reversed(order[: 1 + order.index(start)] if start in net.steps else []):
        if name not in waiting:
            continue
        each = net.steps[name]
        if each.affine is None:
            best = torch.maximum(best, here(example, waiting, bias, mass))
        a = waiting.pop(name)
        mass = mass + _dot(a.abs(), example.mass(name))
        slack = example.slack(name)
        if slack is not None:
            bias = bias - _dot(a.abs(), slack)
        if each.node.op in CUTS:
            low, high = example.values[name]
            bias = bias + _dot(a.clamp(min=0), low) + _dot(a.clamp(max=0), high)
        elif each.affine is None:
            of = each.moving[0]
            under, floor, over, ceiling = lines(each.node, *example.values[of], slopes.get(name))
            positive, negative = a.clamp(min=0), a.clamp(max=0)
            bias = bias + _dot(positive, floor) + _dot(negative, ceiling)
            _add(waiting, of, positive * under + negative * over)
            mass = mass + _dot(a.abs(), example.size(of) + floor.abs() + ceiling.abs())
        else:
            if isinstance(each.affine.offset, Tensor):
                bias = bias + _dot(a, each.affine.offset)
            shapes = [net.shapes[of] for of in each.moving]
            for of, coefficients in zip(each.moving, transposed(each.affine, a, shapes)):
                _add(waiting, of, coefficients)
    last = waiting.get(net.input, torch.zeros(len(rows), *net.shapes[net.input], dtype=torch.float64))
    reached, size = example.region.lowest(last)
    found = bias + reached - example.own * (mass + size + bias.abs())
    return torch.maximum(best, found.nan_to_num(-math.inf, -math.inf, -math.inf)), last


def here(example: Example, waiting: Mapping[str, Tensor], bias: Tensor, mass: Tensor) -> Tensor:
    """The bound that follows from the intervals at which the rows stand."""
    for name, a in waiting.items():
        low, high = example.values[name]
        bias = bias + _dot(a.clamp(min=0), low) + _dot(a.clamp(max=0), high)
        mass = mass + _dot(a.abs(), example.size(name))
    return (bias - example.own * (mass + bias.abs())).nan_to_num(-math.inf, -math.inf, -math.inf)


def transposed(
    affine: Affine, a: Float[Tensor, "r ..."], shapes: Sequence[tuple[int, ...]]
) -> tuple[Tensor, ...]:
    """The rows at what the operator reads: its vector-Jacobian product, which does not depend on a value."""
    _, back = torch.func.vjp(affine.by, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    return torch.vmap(back)(a)


def _add(waiting: dict[str, Tensor], name: str, rows: Tensor) -> None:
    waiting[name] = waiting[name] + rows if name in waiting else rows
