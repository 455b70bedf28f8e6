"""What each option of each layer costs, and how much it distorts: the table that the planner chooses from.

Four measures of distortion, all non-negative and added up over layers by the planner:

    output     E |dW x|^2 / E |W x|^2: relative output error of the layer on calibration data
    network    E mean_c (f(x) - f_l(x))^2 with ONLY layer l changed: additive output distortion of the whole
               network (Xu et al., ICCV 2023, arXiv:2308.10438), measured for every option
    kl         E KL(softmax f(x) | softmax f_l(x)), measured for two options of each method on each layer;
               the others have the divergence per output error of those two: small changes act quadratically
               (the second-order term of the divergence is the Fisher matrix), but what a method leaves as
               error points where that method lets it, so methods differ by up to ten times per error
    curvature  tr(H_l) / n_l |dW|^2 / 2 with the Hessian of the loss (Dong et al., HAWQ-V2, arXiv:1911.03852)

Latency is measured layer by layer on this machine, one example at a time, and only where a budget asks for
it; what lies between the planned layers is not in it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Packed, replace, weight_of
from netweight.core.curvature import traces
from netweight.core.errors import DoesNotFit, unknown
from netweight.core.grid import Grid
from netweight.core.latency import seconds
from netweight.core.moments import Moments, moments, watched
from netweight.core.plan import Option
from netweight.core.progress import steps
from netweight.core.task import Data, Task, outputs
from netweight.nn.packed import Affine

Distortion = Literal["output", "kl", "network", "curvature"]
DISTORTIONS = ("output", "kl", "network", "curvature")
GRID_SETTINGS = ("bits", "symmetric", "group")
FEW = 8  # settings of one method that are priced without asking which are promising
CLEARLY = 0.8
POSITIONS = 1024  # of outputs, tokens of a text: enough to tell layers apart
REFERENCES = 2  # options of a method on a layer whose divergence is measured
LEAST = 0.03
FLOAT_BITS = 32  # what an activation counts in bit operations while it is not rounded


@dataclass(frozen=True)
class Candidate:
    """A method with one choice of settings. slug: its name in the catalogue."""

    slug: str
    method: Callable[[nn.Module, Task, Sequence[str], Any], Change]
    settings: Any


Priced = tuple[
    Candidate, Packed, float
]  # a candidate on one layer, its packed weight, its relative output error


def options(
    model: nn.Module,
    task: Task,
    layers: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    distortion: Distortion = "kl",
    examples: int = 128,
    timed: bool = False,
) -> list[Option]:
    """Every candidate on every layer that it fits, and "keep"; costs are counted on the packed weight.

    examples: calibration examples that "kl", "network" and "curvature" run on at most. timed: with a
    "latency" cost.
    A candidate that does not fit a layer is no option there. The model and the test data are not touched.
    """
    if distortion not in DISTORTIONS:
        raise unknown("distortion", distortion, DISTORTIONS)
    _moments_of_all(model, task.calibration, layers)
    price = _pricing(model, few(model, task.calibration, examples), layers, distortion)
    inputs = _first_inputs(model, task.calibration, layers) if timed else {}
    found: list[Option] = []
    for layer in steps(layers, "Pricing the options of each layer"):
        module, weight = model.get_submodule(layer), weight_of(model, layer)
        macs = weight.numel() * _positions(model, task.calibration, layer)
        priced = _of_layer(model, task, layer, candidates)
        plain = keep(layer, weight, macs)
        if timed:
            plain = dataclasses.replace(plain, cost={**plain.cost, "latency": seconds(module, inputs[layer])})
        for (candidate, form, _), value in zip(priced, price(layer, priced)):
            cost = {"bits": float(form.bits()), "weights": float(weight.numel())}
            cost["bops"] = macs * form.bits() / weight.numel() * FLOAT_BITS
            if timed:
                cost["latency"] = seconds(form.layer(module), inputs[layer])
            found.append(Option(layer, candidate.slug, dataclasses.asdict(candidate.settings), cost, value))
        found.append(plain)
    return found


def few(model: nn.Module, data: Data, examples: int) -> Data:
    """The first examples; of texts as many as have `POSITIONS` tokens."""
    positions = outputs(model, data.take(1))[0, ..., 0].numel()
    return data.take(min(examples, -(-POSITIONS // positions)))


def _pricing(
    model: nn.Module, data: Data, layers: Sequence[str], distortion: Distortion
) -> Callable[[str, Sequence[Priced]], list[float]]:
    """The distortions of the options of one layer."""
    if distortion == "output":
        return lambda layer, priced: [error for _, _, error in priced]
    if distortion == "curvature":
        sharp = traces(model, data, layers)

        def bent(layer: str, priced: Sequence[Priced]) -> list[float]:
            weight = weight_of(model, layer)
            per_weight = max(sharp[layer], 0.0) / weight.numel() / 2
            return [
                per_weight * float((form.decode() - weight).double().square().sum()) for _, form, _ in priced
            ]

        return bent
    judge = Judge(model, data)
    if distortion == "network":
        return lambda layer, priced: [judge.squared(layer, form) for _, form, _ in priced]
    return lambda layer, priced: _scaled(priced, lambda form: judge.divergence(layer, form))


@torch.no_grad()
def _first_inputs(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Tensor]:
    """What each layer reads for the first example."""
    seen: dict[str, Tensor] = {}
    with watched(model, layers, lambda layer, x: seen.setdefault(layer, x)):
        model(data.x[:1].to(next(model.parameters()).device))
    return seen


def keep(layer: str, weight: Tensor, macs: float = 0.0) -> Option:
    """The option that leaves a weight as it is."""
    bits = 8.0 * weight.element_size() * weight.numel()
    cost = {
        "bits": bits,
        "weights": float(weight.numel()),
        "bops": macs * FLOAT_BITS * 8.0 * weight.element_size(),
    }
    return Option(layer, "keep", {}, cost, 0.0)


def _of_layer(model: nn.Module, task: Task, layer: str, candidates: Sequence[Candidate]) -> list[Priced]:
    """Every candidate that fits the layer, its packed weight, and its relative output error."""
    weight = weight_of(model, layer)
    seen = _moments(model, task.calibration, layer)
    priced = []
    for candidate in _promising(candidates, weight, seen):
        try:
            form = candidate.method(model, task.blind(), [layer], candidate.settings).packed[layer]
        except (DoesNotFit, KeyError):
            continue
        priced.append((candidate, form, _error(form.decode() - weight, weight, seen)))
    return priced


def _promising(candidates: Sequence[Candidate], weight: Tensor, seen: Moments | None) -> list[Candidate]:
    """Without the settings of a uniform grid that plain rounding shows to be dominated: another setting of
    the same method takes no more bits and leaves less than `CLEARLY` of the error.

    A method that is better than rounding to nearest is so on every grid, by about as much.
    """
    kept: list[Candidate] = []
    for _, group in itertools.groupby(candidates, key=lambda candidate: candidate.slug):
        alike = list(group)
        if len(alike) < FEW or not all(hasattr(c.settings, name) for c in alike for name in GRID_SETTINGS):
            kept += alike
            continue
        rounded = [_rounded(weight, c.settings, seen) for c in alike]
        kept += [
            candidate
            for candidate, (bits, error) in zip(alike, rounded)
            if not any(b <= bits and e < CLEARLY * error for b, e in rounded)
        ]
    return kept


def _rounded(weight: Tensor, settings: Any, seen: Moments | None) -> tuple[float, float]:
    """Stored bits and relative output error of plain rounding; infinite bits where the grid does not fit."""
    try:
        form = Affine.nearest(weight, Grid(settings.bits, settings.symmetric, settings.group))
    except DoesNotFit:
        return math.inf, math.inf
    return form.bits(), _error(form.decode() - weight, weight, seen)


def _moments_of_all(model: nn.Module, data: Data, layers: Sequence[str]) -> None:
    """Collect the moments of all layers in one pass; they are kept with the data."""
    moments(model, data, [name for name in layers if isinstance(model.get_submodule(name), WEIGHTED)])


def _moments(model: nn.Module, data: Data, layer: str) -> Moments | None:
    """The layer's moments, None for a kind of layer that has none (Embedding, transposed convolution)."""
    try:
        return moments(model, data, [layer])[layer]
    except DoesNotFit:
        return None


def _positions(model: nn.Module, data: Data, layer: str) -> float:
    seen = _moments(model, data, layer)
    return seen.positions if seen is not None else 0.0


def _error(change: Tensor, weight: Tensor, seen: Moments | None) -> float:
    """E |dW x|^2 / E |W x|^2; without moments |dW|^2 / |W|^2; 0 where the layer gives nothing anyway."""
    if seen is None:
        moved, whole = float(change.double().square().sum()), float(weight.double().square().sum())
    else:
        moved, whole = seen.error(change), seen.error(weight)
    return moved / whole if whole > 0 else 0.0


def _scaled(priced: Sequence[Priced], measure: Callable[[Packed], float]) -> list[float]:
    """Distortions of all options of a layer: output error times the divergence per error of their method.

    That unit is the geometric mean of `REFERENCES` measured options of the method, those nearest to 1 % of
    error. A method whose references happen not to move any example is not free: its unit is at least `LEAST`
    of the largest on the layer.
    """
    units: dict[str, float] = {}
    for slug in dict.fromkeys(candidate.slug for candidate, _, _ in priced):
        own = [
            (abs(math.log(error / 0.01)), i)
            for i, (c, _, error) in enumerate(priced)
            if c.slug == slug and error
        ]
        measured = [measure(priced[i][1]) / priced[i][2] for _, i in sorted(own)[:REFERENCES]]
        units[slug] = math.prod(measured) ** (1 / len(measured)) if measured else 0.0
    least = LEAST * max((unit for unit in units.values() if math.isfinite(unit)), default=0.0)
    return [error * max(units[candidate.slug], least) if error else 0.0 for candidate, _, error in priced]


def divergences(reference: Float[Tensor, "b ... c"], moved: Float[Tensor, "b ... c"]) -> Float[Tensor, " b"]:
    """KL divergence of the softmax outputs in nats, float64, for each example the mean over its positions;
    the squared difference for a single output; inf where any output is not finite."""
    if not moved.isfinite().all():
        return torch.full((len(moved),), math.inf, dtype=torch.float64)
    found = []
    for before, after in zip(reference.split(64), moved.split(64)):  # float64 copies of few rows at a time
        if reference.shape[-1] == 1:
            each = (after - before).double().square().flatten(1)
        else:
            p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
            each = (p.exp() * (p - q)).sum(-1).reshape(len(p), -1)
        found.append(each.mean(1).cpu())
    return torch.cat(found).clamp(min=0)


def divergence(reference: Float[Tensor, "b ... c"], moved: Float[Tensor, "b ... c"]) -> float:
    """The mean of `divergences`."""
    return float(divergences(reference, moved).mean())


class Judge:
    """How far the outputs of a network move when one layer's weight is replaced."""

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.model = copy.deepcopy(model).eval()
        self.data = data
        self.reference = outputs(self.model, data)

    def squared(self, layer: str, form: Packed) -> float:
        """Mean squared difference of the outputs."""
        with self._changed(layer, form) as moved:
            return float((moved - self.reference).double().square().mean())

    def divergence(self, layer: str, form: Packed) -> float:
        """See `divergence`, with that one layer changed."""
        with self._changed(layer, form) as moved:
            return divergence(self.reference, moved)

    def whole(self, other: nn.Module) -> float:
        """See `divergence`, for another network on the same data."""
        return float(self.each(other).mean())

    def each(self, other: nn.Module) -> Float[Tensor, " b"]:
        """See `divergences`, for another network on the same data."""
        return divergences(self.reference, outputs(other, self.data))

    @contextmanager
    def _changed(self, layer: str, form: Packed) -> Iterator[Tensor]:
        """The outputs while one layer is replaced; the layer is put back."""
        before = self.model.get_submodule(layer)
        replace(self.model, layer, form.layer(before))
        try:
            yield outputs(self.model, self.data)
        finally:
            replace(self.model, layer, before)
