"""Counterexamples: a point of a box whose outputs are unsafe, found by gradient ascent, checked in float64.

Projected gradients as in `core.ascent` (Madry et al. 2018, arXiv:1706.06083), in float64 from the start: the
points lie in the box to the last bit and their outputs are those that the check sees. Each unsafe set of a
case has starts of its own, at the centre and at random.
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.graph import Graph, capture, evaluate
from netweight.core.perturbation import Box
from netweight.verification.vnnlib import Case

NEAR = 1e-4  # by how much, relative to the outputs, float32 may miss what float64 shows: VNN-COMP's tolerance
POINTS = 512  # evaluated at once


@dataclass(frozen=True, eq=False)
class Twin:
    """The network in float64, from flat inputs `b in` to flat outputs `b out`, differentiable.

    runtime: another implementation, from one flat input to its flat outputs, that has to agree to a
    counterexample.
    """

    outputs: Callable[[Tensor], Tensor]
    runtime: Callable[[Tensor], Tensor] | None = None

    def confirmed(self, case: Case, x: Float[Tensor, " in"]) -> Tensor | None:
        """The outputs at x where x is a counterexample: inside the box, and unsafe; else None."""
        if bool((x < case.lower).any()) or bool((x > case.upper).any()):
            return None
        with torch.no_grad():
            y = self.outputs(x[None])
        if not bool(y.isfinite().all()) or float(case.excess(y)) > 0:
            return None
        if self.runtime is not None:
            there = self.runtime(x).detach().double().reshape(1, -1)
            if not float(case.excess(there)) <= NEAR * max(1.0, float(there.abs().max())):
                return None
        return y[0]


def twin(model: nn.Module, shape: Sequence[int], runtime: Callable[[Tensor], Tensor] | None = None) -> Twin:
    """The network for inputs of `shape`, its first axis being the batch where the network allows one."""
    double = copy.deepcopy(model).double().eval().requires_grad_(False)
    graph = capture(double, torch.zeros(tuple(shape), dtype=torch.float64))

    def one_by_one(x: Tensor) -> Tensor:
        return torch.vmap(lambda one: evaluate(graph, one).flatten())(x.reshape(-1, *shape)).double()

    def at_once(x: Tensor) -> Tensor:
        return double(x.reshape(-1, *shape[1:])).flatten(1).double()

    return Twin(at_once if _batched(at_once, graph, shape) else one_by_one, runtime)


def onnx_runtime(path: str | Path, shape: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """An ONNX file (or .onnx.gz) as ONNX Runtime evaluates it, from one flat input to flat outputs.

    None where ONNX Runtime is not installed, or cannot load the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    path = Path(path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else str(path)
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception:  # it has errors of its own
        return None
    name = session.get_inputs()[0].name

    def outputs(x: Tensor) -> Tensor:
        found = session.run(None, {name: x.float().reshape(tuple(shape)).numpy()})
        return torch.from_numpy(found[0]).double().flatten()

    return outputs


def _batched(at_once: Callable[[Tensor], Tensor], graph: Graph, shape: Sequence[int]) -> bool:
    """Whether the network gives for two examples what it gives for each."""
    if not shape or shape[0] != 1:
        return False
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    try:
        with torch.no_grad():
            alone = torch.stack([evaluate(graph, one).double().flatten() for one in x])
            both = at_once(x.flatten(1))
    except (RuntimeError, ValueError, IndexError):  # a network of one fixed batch
        return False
    return both.shape == alone.shape and torch.allclose(both, alone, 1e-9, 1e-9)


@dataclass(frozen=True, eq=False)
class Witness:
    """A counterexample in float64, its outputs, and the case whose box it lies in."""

    x: Float[Tensor, " in"]
    y: Float[Tensor, " out"]
    case: Case = field(repr=False)


@dataclass(eq=False)
class Search:
    """Searches now and then, in at most a tenth of the time since it was made, always with another seed."""

    net: Twin
    seed: int = 0
    begun: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    longest: float = 0.0

    def more(self, case: Case) -> Witness | None:
        """A counterexample of the case, or None, also where the time for searching is used up."""
        started = time.monotonic()
        if 10 * (self.spent + self.longest) > started - self.begun:
            return None
        self.seed += 1
        found = search(self.net, case, steps=60, starts=2, seed=self.seed)
        seconds = time.monotonic() - started
        self.spent, self.longest = self.spent + seconds, max(self.longest, seconds)
        return found


def at(net: Twin, cases: Sequence[Case], x: Float[Tensor, "b in"]) -> Witness | None:
    """The first of the points x[i] that is a counterexample of cases[i]."""
    for start in range(0, len(x), POINTS):
        some, points = cases[start : start + POINTS], x[start : start + POINTS]
        with torch.no_grad():
            y = net.outputs(points)
        for i in _unsafe(some, y).nonzero()[:, 0].tolist():
            found = net.confirmed(some[i], points[i])
            if found is not None:
                return Witness(points[i], found, some[i])
    return None


def _unsafe(cases: Sequence[Case], y: Float[Tensor, "b out"]) -> Bool[Tensor, " b"]:
    """Which outputs are unsafe in their own case; cases that follow each other are often the same."""
    found = torch.zeros(len(y), dtype=torch.bool)
    start = 0
    for end in range(1, len(cases) + 1):
        if end == len(cases) or cases[end] is not cases[start]:
            found[start:end] = cases[start].excess(y[start:end]) <= 0
            start = end
    return found


def search(net: Twin, case: Case, *, steps: int = 30, starts: int = 1, seed: int = 0) -> Witness | None:
    """A counterexample of the case, or None: `starts` random starts of `steps` steps for each unsafe set."""
    centre = case.lower + (case.upper - case.lower) / 2
    targets = torch.arange(len(case.unsafe)).repeat_interleave(starts)
    x = centre.clamp(case.lower, case.upper).repeat(len(targets), 1)

    def score(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        y = net.outputs(points)
        if not y.requires_grad:  # whole numbers have no gradient: the search is a random one
            y = y + 0 * points.sum(1, keepdim=True)
        each = torch.stack([one.excess(y) for one in case.unsafe])
        return -each.gather(0, targets[rows][None])[0], each.amin(0) <= 0

    found = ascend(score, x, Box(case.lower, case.upper), steps=steps, restarts=1, seed=seed)
    return at(net, [case] * len(x), found.points)
