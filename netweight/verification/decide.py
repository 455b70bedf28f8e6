"""Whether a network has a property: verified, refuted by a counterexample, or unknown.

    verdict = decided("net.onnx", "prop.vnnlib", timeout=60)
    verdict = decide(model, vnnlib.read("prop.vnnlib"), shape=(1, 1, 28, 28), timeout=60)

First the network is searched for a counterexample, then bounded; what neither decides is split: the boxes of
inputs where few inputs vary (`branch`), else neurons (`neurons`; Wang et al. 2021, arXiv:2103.06624). A
counterexample counts when the network in float64 confirms it, and ONNX Runtime too where it is given.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import Graph, capture
from netweight.models.load import load
from netweight.models.onnx_reader import input_shape
from netweight.verification import vnnlib
from netweight.verification.branch import Overtime, Tally, split_inputs
from netweight.verification.counterexample import Search, Witness, onnx_runtime, search, twin
from netweight.verification.lines import SCALAR
from netweight.verification.neurons import split_neurons
from netweight.verification.prepare import prepared
from netweight.verification.problem import ARITHMETICS
from netweight.verification.vnnlib import Case, Property

FEW, FEWER, LARGE = 20, 6, 10_000  # inputs that vary: up to FEW, or FEWER where a network has more than LARGE
# values inside and a bound is dear, their boxes are split; else neurons
AT_FIRST = 0.05  # share of the time for the first search
WORDS = {"verified": "unsat", "refuted": "sat", "unknown": "unknown"}  # of VNN-COMP


@dataclass(frozen=True, eq=False)
class Verdict:
    """What is known about a property.

    answer: verified, refuted or unknown. x, y: the counterexample and its outputs. bound: by how much the
    outputs stay away from what is unsafe at least, in units of the outputs; proven, and negative where
    nothing was decided. domains: parts that were bounded; left: parts that are undecided. late: whether the
    time was up. arithmetic: what the proof covers (`problem`).
    """

    answer: str
    bound: float
    domains: int
    left: int
    seconds: float
    late: bool
    arithmetic: str
    x: Float[Tensor, " in"] | None = None
    y: Float[Tensor, " out"] | None = None

    @property
    def word(self) -> str:
        """sat, unsat, unknown or timeout, as VNN-COMP says it."""
        return "timeout" if self.late and self.answer == "unknown" else WORDS[self.answer]

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "result": self.word,
            "verdict": self.answer,
            "bound": self.bound,
            "domains": self.domains,
            "undecided": self.left,
            "seconds": self.seconds,
            "arithmetic": self.arithmetic,
            "x": None if self.x is None else self.x.tolist(),
            "y": None if self.y is None else self.y.tolist(),
        }

    def text(self) -> str:
        """The result file of VNN-COMP: the word, and the counterexample where there is one."""
        if self.x is None or self.y is None:
            return self.word
        named = [("X", self.x.tolist()), ("Y", self.y.tolist())]
        lines = [f"({name}_{i} {value!r})" for name, values in named for i, value in enumerate(values)]
        return f"{self.word}\n({chr(10).join(lines)})"


def decide(
    model: nn.Module,
    prop: Property,
    *,
    shape: Sequence[int],
    timeout: float = 60.0,
    arithmetic: str = "float64",
    runtime: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Verdict:
    """Whether no input of the property's boxes has unsafe outputs.

    shape: of one input of the network, its batch axis included. timeout: seconds from the call on. runtime:
    another implementation, from one flat input to flat outputs, that has to confirm a counterexample. Raises
    `DoesNotFit` where the numbers of inputs or outputs differ, `BadInput` for a time that is no time.
    """
    begun = time.monotonic()
    _is_time(timeout)
    if arithmetic not in ARITHMETICS:
        raise unknown("arithmetic", arithmetic, ARITHMETICS)
    _fits(prop.inputs, math.prod(shape), "inputs")
    looking = Search(twin(model, shape, runtime), seed)
    graph = prepared(capture(model, torch.zeros(tuple(shape))), fold=arithmetic == "real")
    (last,) = (node for node in graph.nodes if node.name == graph.outputs[0])
    _fits(prop.outputs, math.prod(last.shape), "outputs")
    jobs = _jobs(graph, looking, prop.cases, arithmetic)
    tallies, found, late = [Tally(begun + timeout) for _ in jobs], None, False
    try:
        with _alarm(begun + timeout):
            found = _found_at_first(looking, prop.cases, begun + AT_FIRST * timeout)
            for job, tally in zip(jobs, tallies):
                found = found or job(tally)
    except Overtime:
        late = True
    bound, left = min(tally.bound for tally in tallies), sum(tally.left for tally in tallies)
    answer = "refuted" if found else "verified" if bound > 0 else "unknown"
    return Verdict(
        answer,
        bound,
        sum(tally.domains for tally in tallies),
        left,
        time.monotonic() - begun,
        late,
        arithmetic,
        found.x if found else None,
        found.y if found else None,
    )


def decided(
    model: str | Path, spec: str | Path, *, timeout: float = 60.0, arithmetic: str = "float64", seed: int = 0
) -> Verdict:
    """The verdict for an ONNX network and a .vnnlib file, by their paths; loading counts as time.

    Counterexamples are confirmed by ONNX Runtime where it is installed. Raises `BadInput` for files that
    cannot be read, for a network that is not of an ONNX file, and for a time that loading uses up.
    """
    begun = time.monotonic()
    _is_time(timeout)
    prop, network = vnnlib.read(spec), load(str(model))
    shape = input_shape(network)
    if shape is None:
        raise BadInput(f"{model}: VNN-LIB properties speak of ONNX networks; give a .onnx or .onnx.gz file")
    left = timeout - (time.monotonic() - begun)
    if left <= 0:
        raise BadInput(f"{model}: loading took longer than the timeout of {timeout} s; give more time")
    runtime = onnx_runtime(model, shape)
    return decide(network, prop, shape=shape, timeout=left, arithmetic=arithmetic, runtime=runtime, seed=seed)


def _is_time(timeout: float) -> None:
    if not (math.isfinite(timeout) and timeout > 0):
        raise BadInput(f"a timeout of {timeout} s cannot be kept; give a positive number of seconds")


def _fits(asked: int, given: int, what: str) -> None:
    if asked != given:
        raise DoesNotFit(
            f"the property speaks of {asked} {what}, the network has {given}; give one for this network"
        )


def _found_at_first(looking: Search, cases: Sequence[Case], until: float) -> Witness | None:
    """A short search in one case after the other, as long as the time for it lasts."""
    for case in cases:
        found = search(looking.net, case, steps=30, starts=1, seed=looking.seed)
        if found is not None or time.monotonic() > until:
            return found
    return None


def _jobs(
    graph: Graph, looking: Search, cases: Sequence[Case], arithmetic: str
) -> list[Callable[[Tally], Witness | None]]:
    """What has to be done: inputs are split where few of them vary or no neuron can be, else neurons."""
    vary = max(int((case.upper > case.lower).sum()) for case in cases)
    inside = sum(math.prod(node.shape) for node in graph.nodes if node.op in SCALAR)
    if vary <= (FEW if inside <= LARGE else FEWER) or not inside:
        return [lambda tally: split_inputs(graph, looking, cases, arithmetic, tally)]
    return [partial(_neurons_first, graph, looking, case, arithmetic) for case in cases]


def _neurons_first(
    graph: Graph, looking: Search, case: Case, arithmetic: str, tally: Tally
) -> Witness | None:
    """Split neurons; where that ends without an answer, inputs."""
    found = split_neurons(graph, looking, case, arithmetic, tally)
    return found if found or not tally.left else split_inputs(graph, looking, [case], arithmetic, tally)


@contextlib.contextmanager
def _alarm(deadline: float) -> Iterator[None]:
    """Raises `Overtime` inside the block a moment past the deadline, also in the middle of one long bound.

    Only the main thread of a Unix process can be interrupted; elsewhere the searches look at the clock alone.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    waiting = signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline + 0.2 - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *waiting)  # of whoever had set one before
