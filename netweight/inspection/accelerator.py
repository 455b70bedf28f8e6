"""What a training step would cost on SAT, an accelerator for N:M sparse training. Modelled, never measured.

Paper: Fang, Sun, Zhou & Wang, "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow
Co-Design", IEEE TCAD 2023, arXiv:2309.13015. Energies: Horowitz, "Computing's energy problem", ISSCC 2014, 45
nm. Cycles of a systolic array as in Samajdar et al., "SCALE-Sim", 2018, arXiv:1811.02883.

R x C processing elements have N multipliers each. In a cycle one takes N elements of the sum (dense), or a
group of M of which N weights choose (sparse). A product (m, k, n), kappa = ceil(k / N) dense, ceil(k / M)
sparse:

    output stationary   ceil(m / R) ceil(n / C) kappa max(1, L / I) + R + C + L
    weight stationary   ceil(k / (R g)) ceil(n / C) max(m, R)       + R + C + L,       g = N or M

L: stages of the adder; I outputs interleaved hide them. Of B examples a convolution of Ci to Co channels, t
taps, P places from Q places is

    FF (B P, Ci t, Co),      BP (B Q, Co t P / Q, Ci),      WU (Ci t, B P, Co), always dense.

(An input place has a part in t P / Q outputs: t without a stride.) BP of the first layer is counted although
nothing needs it, in dense and in sparse training alike: the less favourable count, as that layer stays dense.
Each takes the longer of its cycles and of bytes / bandwidth: FP16 activations and weights, of sparse ones
N / M (16 + ceil(log2 M)) bits each. An update reads and writes weight and momentum in FP32. Three measures,
each of which can be switched off: interleave mapping (I = 1), pre-generation (N:M is chosen once, in the
update, and stored; without it FF and BP read the dense weights and choose themselves), the offline schedule
(per product the cheaper dataflow; without it output stationary).

    joules = MACs (1.1 + 0.9 pJ) + bytes to the array 1.25 pJ + bytes of memory 160 pJ + static seconds

Differs from the paper: it gives its array's figures for one FPGA; here they are parameters. Size of the
array, clock, stages and lanes, the weight-stationary form and the elementwise traffic (norms and activations
move every output `elementwise` times) are inferred. No speed on an FPGA is claimed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.core.graph import Graph, Node, capture
from netweight.nn.nm_sparse import BOTH, TWO_OF_EIGHT, Pattern, Sides, misfit

HALF, WHOLE = 2, 4  # bytes of FP16 and FP32
MATRICES = ("aten.matmul", "aten.bmm")
HOW = "modelled: cycles and energies of a documented model of SAT, nothing was measured on hardware"


@dataclass(frozen=True)
class Accelerator:
    """SAT and what it is made of.

    rows, columns: of processing elements. keep, of: N and M. hertz: the clock. latency: stages of the adder.
    interleave: outputs interleaved to hide them. lanes: weights updated in a cycle. bandwidth: bytes of
    memory a cycle. elementwise: how often norms and activations move each output. multiply, add: joules of
    one; sram, dram: joules a byte. static: watts.
    """

    rows: int = 32
    columns: int = 32
    keep: int = 2
    of: int = 8
    hertz: float = 200e6
    latency: int = 8
    interleave: int = 8
    lanes: int = 32
    bandwidth: float = 96.0
    pregenerated: bool = True
    scheduled: bool = True
    elementwise: int = 5
    multiply: float = 1.1e-12
    add: float = 0.9e-12
    sram: float = 1.25e-12
    dram: float = 160e-12
    static: float = 0.0

    def __post_init__(self) -> None:
        Pattern(self.keep, self.of)
        sizes = (self.rows, self.columns, self.latency, self.interleave, self.lanes)
        if min(sizes) < 1 or not (self.bandwidth > 0 and self.hertz > 0):
            raise BadInput(f"{self}: sizes, clock and bandwidth are above 0")

    @property
    def pattern(self) -> Pattern:
        """N:M of its processing elements."""
        return Pattern(self.keep, self.of)


@dataclass(frozen=True)
class Layer:
    """One layer for one example: `matrices` products of `places` x (inputs taps) by (inputs taps) x outputs.

    inputs, outputs: of one matrix (group of channels, attention head). places_in: of its input. weights:
    numbers in the weight, 0 for a product of activations. sparse: whether its weight may be N:M.
    """

    name: str
    inputs: int
    outputs: int
    places: int
    places_in: int
    taps: int = 1
    matrices: int = 1
    weights: int = 0
    sparse: bool = False


@dataclass(frozen=True)
class Product:
    """`count` products (m, k, n); sparse: one factor is N:M along k."""

    m: int
    k: int
    n: int
    count: int
    sparse: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates of dense factors."""
        return self.m * self.k * self.n * self.count


@dataclass(frozen=True)
class Part:
    """What one product of one layer costs: cycles, MACs that are done, bytes to the array and of memory."""

    layer: str
    product: str
    flow: str
    cycles: float
    macs: float
    sram: float
    dram: float


@dataclass(frozen=True)
class Estimate:
    """A training step on the accelerator, part by part."""

    chip: Accelerator
    parts: tuple[Part, ...]
    how: str = HOW

    @property
    def cycles(self) -> float:
        """Of the step."""
        return math.fsum(part.cycles for part in self.parts)

    @property
    def macs(self) -> float:
        """Multiply-accumulates that are done."""
        return math.fsum(part.macs for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.cycles / self.chip.hertz

    @property
    def joules(self) -> float:
        """Of the step."""
        return math.fsum(joules(part, self.chip) for part in self.parts)


def joules(part: Part, chip: Accelerator) -> float:
    """Energy of one part."""
    moved = part.sram * chip.sram + part.dram * chip.dram
    return part.macs * (chip.multiply + chip.add) + moved + chip.static * part.cycles / chip.hertz


def bound(pattern: Pattern, sides: Sides = BOTH) -> float:
    """How many times as fast a step can become if all products were: 3 / (1 + 2 N/M) for BDWP."""
    return 3 / sum(sides.products(pattern))


def estimate(
    layers: Sequence[Layer], batch: int, chip: Accelerator = Accelerator(), sides: Sides = BOTH
) -> Estimate:
    """One training step of `batch` examples; sides: `NEITHER` is dense training."""
    if batch < 1 or not layers:
        raise BadInput(f"{len(layers)} layers, batch {batch}: a training step has at least one of each")
    parts = [part for layer in layers for part in layer_parts(layer, batch, chip, sides)]
    return Estimate(chip, tuple(parts))


def layer_parts(layer: Layer, batch: int, chip: Accelerator, sides: Sides) -> list[Part]:
    """FF, BP, WU, the update of the weights and the elementwise traffic behind the layer."""
    b, taps, sparse = batch if layer.weights else 1, layer.taps, layer.sparse
    reached = math.ceil(taps * layer.places / layer.places_in)  # outputs that an input place has a part in
    count = layer.matrices if layer.weights else layer.matrices * batch
    forward, backward = sparse and sides.forward, sparse and (sides.backward or sides.gradients)
    products = {
        "FF": Product(b * layer.places, layer.inputs * taps, layer.outputs, count, forward),
        "BP": Product(b * layer.places_in, layer.outputs * reached, layer.inputs, count, backward),
        "WU": Product(layer.inputs * taps, b * layer.places, layer.outputs, count, False),
    }
    x = HALF * batch * layer.matrices * layer.inputs * layer.places_in
    y = HALF * batch * layer.matrices * layer.outputs * layer.places
    own = layer.weights or batch * layer.matrices * layer.inputs * layer.outputs  # the other activations
    chosen = {"FF": forward, "BP": sparse and sides.backward, "WU": False}
    moved = {"FF": x + y, "BP": x + y, "WU": x + y + (0 if layer.weights else HALF * own)}
    for name in ("FF", "BP"):
        moved[name] += weight_bytes(chip, chosen[name] and chip.pregenerated) * own
    parts = [of_product(layer.name, n, p, moved[n], chip) for n, p in products.items()]
    if not layer.weights:
        return parts
    extra = [
        Part(layer.name, "elementwise", "", chip.elementwise * y / chip.bandwidth, 0, 0, chip.elementwise * y)
    ]
    return [*parts, *extra, *updates(layer, chosen, chip)]


def updates(layer: Layer, chosen: dict[str, bool], chip: Accelerator) -> list[Part]:
    """The update of the weights, and where N:M is chosen: in it, or in FF and in BP."""
    once = layer.weights / chip.lanes
    written = sum(weight_bytes(chip, chosen[name] and chip.pregenerated) for name in ("FF", "BP"))
    if not (any(chosen.values()) and chip.pregenerated):
        written = HALF  # one dense copy
    moved = (4 * WHOLE + written) * layer.weights
    cycles = max(once, moved / chip.bandwidth)
    found = [Part(layer.name, "update", "", cycles, 0, 0, moved)]
    times = min(sum(chosen.values()), 1) if chip.pregenerated else sum(chosen.values())
    return [*found, Part(layer.name, "choice", "", times * once, 0, 0, 0)] if times else found


def weight_bytes(chip: Accelerator, sparse: bool) -> float:
    """Of one weight of a product, on average."""
    return chip.pattern.share * (16 + math.ceil(math.log2(chip.of))) / 8 if sparse else HALF


def of_product(layer: str, name: str, product: Product, moved: float, chip: Accelerator) -> Part:
    """One product by the cheaper dataflow, or longer where memory is the limit."""
    flows = ("output", "weight") if chip.scheduled else ("output",)
    flow = min(flows, key=lambda flow: compute_cycles(product, chip, flow))
    cycles = max(compute_cycles(product, chip, flow), moved / chip.bandwidth)
    share = chip.pattern.share if product.sparse else 1.0
    tiles = math.ceil(product.m / chip.rows), math.ceil(product.n / chip.columns)
    m, k, n = product.m, product.k, product.n
    fed = HALF * (m * k * tiles[1] + share * k * n * tiles[0]) + WHOLE * m * n
    return Part(layer, name, flow, cycles, product.macs * share, fed * product.count, moved)


def compute_cycles(product: Product, chip: Accelerator, flow: str) -> float:
    """Cycles of the array for all `count` products, which follow each other without a gap."""
    taken = chip.of if product.sparse else chip.keep
    columns = math.ceil(product.n / chip.columns)
    if flow == "output":
        stall = max(1.0, chip.latency / chip.interleave)
        one = math.ceil(product.m / chip.rows) * columns * math.ceil(product.k / taken) * stall
    else:
        one = math.ceil(product.k / (chip.rows * taken)) * columns * max(product.m, chip.rows)
    return product.count * one + chip.rows + chip.columns + chip.latency


# Layers of a network --------------------------------------------------------------------------------------


def layers_of(
    model: nn.Module,
    x: Tensor,
    pattern: Pattern = TWO_OF_EIGHT,
    sides: Sides = BOTH,
    sparse: Collection[str] | None = None,
) -> list[Layer]:
    """Linear and Conv layers and products of activations, in the order in which they run.

    x: one example, `1 ...`. sparse: names of the layers that may be N:M; None: all that the pattern divides.
    Raises `BadInput` for a network without any.
    """
    model = copy.deepcopy(model).eval()
    graph = capture(model, x[:1])
    shapes = {node.name: node.shape for node in (*graph.nodes, *graph.inputs)}
    shapes.update({name: tuple(tensor.shape) for name, tensor in graph.constants.items()})

    def may(name: str) -> bool:
        if sparse is not None:
            return name in sparse
        return not misfit(model.get_submodule(name), pattern, sides)

    found = [_layer(node, shapes, graph, may(node.layer)) for node in graph.nodes if node.op in PRODUCTS]
    if not found:
        raise BadInput(f"{type(model).__name__}: it has no product that an accelerator could take")
    return found


PRODUCTS = ("aten.linear", "aten.convolution", *MATRICES)


def _layer(node: Node, shapes: dict[str, tuple[int, ...]], graph: Graph, sparse: bool) -> Layer:
    """One node as a layer; the batch is one example."""

    def shape(name: str) -> tuple[int, ...]:
        return shapes[node.params[name].name]

    if node.op == "aten.convolution":
        weight, groups = shape("weight"), node.params["groups"]
        places, places_in = math.prod(node.shape[2:]), math.prod(shape("input")[2:])
        inputs, outputs = weight[1], weight[0] // groups
        taps, size = math.prod(weight[2:]), math.prod(weight)
        return Layer(node.layer, inputs, outputs, places, places_in, taps, groups, size, sparse)
    if node.op == "aten.linear":
        outputs, inputs = shape("weight")
        places = math.prod(node.shape[:-1])
        return Layer(node.layer, inputs, outputs, places, places, 1, 1, inputs * outputs, sparse)
    inputs, places, outputs = shape("self")[-1], node.shape[-2], node.shape[-1]
    matrices = math.prod(node.shape[:-2])
    return Layer(node.layer, inputs, outputs, places, places, 1, matrices)
