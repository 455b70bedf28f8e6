"""E2GC: which group size a group convolution should have, by a balance of computing against moving data.

Paper: Jha et al., "E2GC: Energy-efficient Group Convolution in Deep Neural Networks", VLSID 2020,
arXiv:2006.15100.

A convolution of M to N channels, kernel of k taps (3 x 3: 9), P places of its output (Q of its input), groups
of G channels each:

    MACs = N G k P,    weights = N G k,    moved = M Q + N P + weights,    intensity AI = MACs / moved.

Few channels a group: few MACs, but each number that is moved is used little; many: the reverse. The balance

    J(G) = e_c G k + e_d / AI(G) = e_c G k + e_d ((1 + r) / (G k) + 1 / P),     r = M Q / (N P),

for each number of the output, is convex with its one minimum at G* = (1/k) sqrt((1 + r) e_d / e_c): where M
Q = N P it depends neither on width nor on resolution, hence one size for the whole network. e_d / e_c
belongs to the machine and is fitted (`fit`) by non-negative least squares on measured energies of layers,

    E = e_c MACs + e_d N P / AI + e_m moved + e_0,

of which the last two terms do not move the minimum. With a ceiling on all MACs and a convex cost of G alike
for all outputs, Jensen's inequality gives the same G to every layer (`equal`); unequal costs and sizes that
must divide are a knapsack (`choose`).

Differs from the paper: the abstract says that computing and data movement are balanced by a constant group
size; J, its fit and Jensen's argument are this project's derivation. Energies are those of
`inspection/energy.py`: on a machine without counters CPU time times a constant, one thread, channels last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import Graph, capture
from netweight.core.knapsack import solve
from netweight.core.progress import doing
from netweight.inspection.energy import Reading, energy

BATCH = 8  # of the layers that are measured
GRID = tuple(  # channels, side of the image, group size
    (channels, side, size)
    for channels, side in (
        (32, 32), (32, 16), (64, 16), (64, 8), (128, 16), (128, 8), (256, 8), (256, 4), (512, 4), (512, 2),
    )
    for size in (2, 4, 8, 16, 32)
)  # fmt: skip


@dataclass(frozen=True)
class Conv:
    """One convolution for one example: M, N, kernel taps, places of its input and output, group size G."""

    inputs: int
    outputs: int
    taps: int
    places_in: int
    places: int
    size: int
    name: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.outputs * self.size * self.taps * self.places

    @property
    def weights(self) -> int:
        """Numbers in the weight."""
        return self.outputs * self.size * self.taps

    @property
    def moved(self) -> int:
        """Numbers read and written once each: input, output, weight."""
        return self.inputs * self.places_in + self.outputs * self.places + self.weights

    @property
    def intensity(self) -> float:
        """MACs for each number moved."""
        return self.macs / self.moved

    @property
    def ratio(self) -> float:
        """r: numbers of the input for each of the output."""
        return self.inputs * self.places_in / (self.outputs * self.places)

    def sized(self, size: int) -> Conv:
        """The same convolution with another group size; raises `DoesNotFit` where it does not divide."""
        if size < 1 or self.inputs % size or self.outputs % (self.inputs // size):
            raise DoesNotFit(
                f"{self.name or 'a convolution'}: {self.inputs} to {self.outputs} channels do not divide "
                f"into groups of {size}; give a size that divides"
            )
        return replace(self, size=size)


@dataclass(frozen=True)
class Constants:
    """Joules: compute for each MAC, data for each unit of outputs / AI, move for each number, start of a
    layer.

    fit: R^2 of the logarithms of predicted and measured energies (NaN: not fitted). how: the energies'
    source.
    """

    compute: float
    data: float
    move: float = 0.0
    start: float = 0.0
    fit: float = math.nan
    how: str = "given"

    def __post_init__(self) -> None:
        values = (self.compute, self.data, self.move, self.start)
        if not all(math.isfinite(v) and v >= 0 for v in values):
            raise BadInput(f"constants {values}: joules are finite and not below 0; fit or give them again")

    @property
    def balance(self) -> float:
        """e_d / e_c, infinite where computing costs nothing."""
        return self.data / self.compute if self.compute else math.inf

    def energy(self, layer: Conv) -> float:
        """E of one layer for one example."""
        return float(np.dot(features(layer), (self.compute, self.data, self.move, self.start)))


@dataclass(frozen=True)
class Advice:
    """One convolution of a network: as it is, and at the group size that is recommended."""

    layer: str
    conv: Conv
    best: float
    recommended: int
    joules: float
    joules_recommended: float


@dataclass(frozen=True)
class Found:
    """What `e2gc` says: the machine's constants, one size for the network, a line for each convolution."""

    constants: Constants
    size: int
    layers: tuple[Advice, ...]
    left: Mapping[str, str]


def features(layer: Conv) -> tuple[float, float, float, float]:
    """What each constant is multiplied with."""
    return layer.macs, layer.outputs * layer.places / layer.intensity, layer.moved, 1.0


def balance(size: float, compute: float, data: float, taps: int, ratio: float, places: int) -> float:
    """J(G)."""
    return compute * size * taps + data * ((1 + ratio) / (size * taps) + 1 / places)


def best_size(constants: Constants, taps: int = 9, ratio: float = 1.0) -> float:
    """G*, where J is least; 0 where moving costs nothing, infinite where computing does."""
    return math.sqrt((1 + ratio) * constants.balance) / taps


def snapped(size: float, channels: Sequence[int]) -> int:
    """The power of two nearest to `size` on a logarithmic scale, of those that divide all channels."""
    common = math.gcd(*channels)
    sizes = [2**k for k in range(common.bit_length()) if common % 2**k == 0]
    wanted = math.log2(min(max(size, 1.0), 2.0**60))
    return min(sizes, key=lambda s: abs(math.log2(s) - wanted))


def equal(layers: Sequence[Conv], macs: float) -> float:
    """G of every layer where their MACs sum to `macs`: the best for any convex cost alike for all outputs."""
    return macs / sum(layer.macs / layer.size for layer in layers)


def choose(
    layers: Sequence[Conv], sizes: Sequence[int], macs: float, cost: Callable[[Conv], float]
) -> list[int]:
    """The group size of each layer with the least summed cost within `macs` MACs; exact (a knapsack).

    Raises `DoesNotFit` where a layer takes none of the sizes, or the smallest together have more MACs.
    """
    options = [[layer.sized(size) for size in sizes if _divides(layer, size)] for layer in layers]
    for layer, fitting in zip(layers, options):
        if not fitting:
            raise DoesNotFit(
                f"{layer.name}: none of the group sizes {tuple(sizes)} divides; give one that does"
            )
    values = [np.array([cost(option) for option in fitting]) for fitting in options]
    costs = [np.array([[float(option.macs)] for option in fitting]) for fitting in options]
    chosen = solve(values, costs, [macs])
    if chosen is None:
        least = sum(min(option.macs for option in fitting) for fitting in options)
        raise DoesNotFit(f"macs={macs:g}: the smallest possible sum is {least}; allow at least that many")
    return [fitting[k].size for fitting, k in zip(options, chosen)]


def _divides(layer: Conv, size: int) -> bool:
    return layer.inputs % size == 0 and layer.outputs % (layer.inputs // size) == 0


def fit(layers: Sequence[Conv], joules: Sequence[float], how: str = "given") -> Constants:
    """The constants of the least squared relative errors, none below 0 (Lawson and Hanson's NNLS, 1974).

    Raises `BadInput` for fewer than four layers, or energies that are not above 0.
    """
    from scipy.optimize import nnls

    measured = np.asarray(joules, float)
    if len(layers) < 4 or len(layers) != len(measured) or not (np.isfinite(measured) & (measured > 0)).all():
        raise BadInput(
            f"{len(layers)} layers, {len(measured)} energies: fit at least 4, each with an energy above 0"
        )
    rows = np.array([features(layer) for layer in layers]) / measured[:, None]
    unit = rows.max(0)
    constants = nnls(rows / unit, np.ones(len(rows)))[0] / unit
    predicted = np.array([features(layer) for layer in layers]) @ constants
    return Constants(*constants.tolist(), fit=agreement(predicted, measured), how=how)


def agreement(predicted: np.ndarray, measured: np.ndarray) -> float:
    """R^2 of log predicted against log measured: 1 - squared errors / spread of the measured."""
    a, b = np.log(predicted), np.log(measured)
    return float(1 - ((a - b) ** 2).sum() / ((b - b.mean()) ** 2).sum())


def on_this_machine(
    grid: Sequence[tuple[int, int, int]] = GRID, *, runs: int = 15, seed: int = 0
) -> tuple[Constants, list[tuple[Conv, float]]]:
    """Constants fitted to 3 x 3 convolutions of the grid, and what was measured: joules for one example.

    One thread, channels last, batches of 8; the thread count is set back afterwards.
    """
    layers = [Conv(m, m, 9, side * side, side * side, size) for m, side, size in grid]
    ways = {str(k): _call(layer, seed) for k, layer in enumerate(layers)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = energy(ways, runs=runs)
    finally:
        torch.set_num_threads(threads)
    joules = [found[str(k)].joules / BATCH for k in range(len(layers))]
    return fit(layers, joules, found["0"].how), list(zip(layers, joules))


def _call(layer: Conv, seed: int) -> Callable[[], Tensor]:
    """One forward pass of a convolution of that form, with weights and images of its own."""
    side = math.isqrt(layer.places_in)
    kernel = math.isqrt(layer.taps)
    conv = nn.Conv2d(
        layer.inputs,
        layer.outputs,
        kernel,
        padding=kernel // 2,
        groups=layer.inputs // layer.size,
        bias=False,
    )
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(conv.weight.shape, generator=draw) * layer.size**-0.5 / kernel
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    x = torch.randn(BATCH, layer.inputs, side, side, generator=draw).contiguous(
        memory_format=torch.channels_last
    )

    def call() -> Tensor:
        with torch.inference_mode():
            return conv(x)

    return call


def convolutions(graph: Graph) -> tuple[list[Conv], dict[str, str]]:
    """The convolutions of a captured graph for one example, and those that are not modelled, with why."""
    shapes = {node.name: node.shape for node in (*graph.nodes, *graph.inputs)}
    shapes |= {name: tuple(tensor.shape) for name, tensor in graph.constants.items()}
    found: list[Conv] = []
    left: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "aten.convolution":
            continue
        name = node.layer or node.name
        if node.params["transposed"]:
            left[name] = "it is transposed"
            continue
        before, weight = shapes[node.params["input"].name], shapes[node.params["weight"].name]
        places_in, places = math.prod(before[2:]), math.prod(node.shape[2:])
        found.append(Conv(before[1], weight[0], math.prod(weight[2:]), places_in, places, weight[1], name))
    return found, left


def e2gc(model: nn.Module, x: Tensor, *, constants: Constants | None = None, runs: int = 5) -> Found:
    """The energy model of each convolution of a network, and the one group size recommended for all of them.

    x: an example, `1 *in`. constants: the machine's; fitted now if not given (seconds). The size is the
    power of two nearest to G*, averaged over the outputs of the k x k convolutions, that divides all their
    channels; those of the first layer (few channels) and 1 x 1 convolutions, which are there to join all
    channels, keep their groups. Raises `DoesNotFit` for a network without a convolution.
    """
    layers, left = convolutions(capture(model, x))
    if not layers:
        raise DoesNotFit("the network has no convolution; this energy model speaks of nothing else")
    if constants is None:
        with doing("Fitting energies", 1) as advance:
            constants, _ = on_this_machine(runs=runs)
            advance()
    best = {k: best_size(constants, layer.taps, layer.ratio) for k, layer in enumerate(layers)}
    free = [k for k, layer in enumerate(layers) if k and layer.taps > 1 and layer.inputs % 2 == 0]
    outputs = [layers[k].outputs * layers[k].places for k in free]
    mean = float(np.average([best[k] for k in free], weights=outputs)) if free else 1.0
    channels = [math.gcd(layers[k].inputs, layers[k].outputs) for k in free]
    size = snapped(mean, channels) if free else 1
    advice = []
    for k, layer in enumerate(layers):
        after = layer.sized(size) if k in free and _divides(layer, size) else layer
        advice.append(
            Advice(layer.name, layer, best[k], after.size, constants.energy(layer), constants.energy(after))
        )
    return Found(constants, size, tuple(advice), left)


def readings(stacks: Mapping[str, Sequence[Conv]], *, runs: int = 15, seed: int = 0) -> dict[str, Reading]:
    """Energy of stacks of convolutions (batches of 8, one thread, channels last), measured in turns."""
    calls = {
        name: [_call(layer, seed + k) for k, layer in enumerate(stack)] for name, stack in stacks.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return energy(
            {name: lambda own=own: [call() for call in own] for name, own in calls.items()}, runs=runs
        )
    finally:
        torch.set_num_threads(threads)
