"""What is proven about a network: bounds that hold for every point of a set around each input.

    bounds(model, x, within)                    # lower, upper of every output
    certify(model, task, within)                # on how many examples the class cannot change
    equivalence(original, compressed, x, within)  # how far the outputs of two networks can part

How a bound is found:

    ibp          one interval per value; the fastest and loosest
    forward      linear functions of the input, carried from input to output
    forward+backward  the same inside, then linear functions carried back from the output
    crown-ibp    linear functions of every value, carried back from the output; intervals inside
    crown        the same, and rows inside where intervals leave something open
    alpha-crown  crown with the slopes of the last pass optimised for every row

They hold for the network in real arithmetic, and as it is evaluated in `arithmetic`: float32 or float64,
round to nearest (see `relax`; not with TF32 or Winograd kernels), by default the network's own; `real` is
the fast and less rigorous one (`problem`). Rounding of a layer is bounded in the next ones, so in deep
networks float64 is much tighter. Packed layers have the weight they decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from netweight.core import progress
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import Graph, Node, capture
from netweight.core.perturbation import Perturbation
from netweight.core.task import Data, Task
from netweight.verification import alpha, crown, forward, ibp
from netweight.verification.crown import Proof
from netweight.verification.difference import joined
from netweight.verification.prepare import evaluate, prepared
from netweight.verification.problem import ARITHMETICS, Problem, Region, pose
from netweight.verification.relax import Interval

MANY = 20_000  # neurons
# name: (problem, rows of an objective or None, whether upper bounds are asked for) -> an interval
METHODS: dict[str, Callable[[Problem, Tensor | None, bool], Interval | Proof]] = {
    "ibp": lambda problem, objective, upper: ibp.propagate(problem, objective),
    "forward": forward.bound,
    "forward+backward": lambda problem, objective, upper: forward.bound(problem, objective, upper, back=True),
    "crown-ibp": lambda problem, objective, upper: crown.bound(problem, objective, upper, tighten=False),
    "crown": crown.bound,
    "alpha-crown": alpha.bound,
}


@dataclass(frozen=True)
class Bounds:
    """lower <= output <= upper for every point of the set: float64, `b *out`, or `b k` for rows of an
    objective.

    arithmetic: the precision of the network's evaluation that is covered, beside real numbers. slopes: of the
    lines that the bounds rest on (`crown.Proof`), where the method draws any.
    """

    lower: Float[Tensor, "b ..."]
    upper: Float[Tensor, "b ..."]
    method: str
    arithmetic: str
    slopes: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Certificates:
    """One verdict per example.

    labels: the class that was asked about. correct: whether the network gives it at the point itself. margin:
    proven lower bound of min over j of output_label - output_j on the whole set (units of the outputs).
    slopes: what `Bounds` has, where they were asked for.
    """

    labels: Int[Tensor, " b"]
    correct: Bool[Tensor, " b"]
    margin: Float[Tensor, " b"]
    method: str
    arithmetic: str
    slopes: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def verified(self) -> Bool[Tensor, " b"]:
        """Right, and right at every point of the set."""
        return self.correct & (self.margin > 0)

    @property
    def verdicts(self) -> list[str]:
        """verified, unknown (right, but the bound is too loose or it can be changed), or wrong already."""
        return [
            "verified" if sure else "unknown" if right else "wrong"
            for sure, right in zip(self.verified.tolist(), self.correct.tolist())
        ]

    def summary(self) -> dict[str, Any]:
        """Counts of the verdicts, and the share of all examples that is verified."""
        verified, wrong = int(self.verified.sum()), int((~self.correct).sum())
        return {
            "examples": len(self),
            "verified": verified,
            "unknown": len(self) - verified - wrong,
            "wrong": wrong,
            "verified share": verified / len(self),
            "arithmetic": self.arithmetic,
        }


def captured(
    model: nn.Module | Compressed | Graph, x: Num[Tensor, "b *in"], arithmetic: str | None = None
) -> Graph:
    """The graph that bounds are computed on: that of one example of x, to be used for many calls.

    arithmetic: with `real`, norms become part of the layer before them.
    """
    if isinstance(model, Graph):
        return model
    return prepared(capture(model, x[:1]), fold=arithmetic == "real")


def affordable(*graphs: Graph) -> str:
    """crown; crown-ibp where a graph has more than `MANY` neurons to bound: seconds for each example."""
    neurons = []
    for graph in graphs:
        problem = pose(graph, [Region(*2 * (torch.zeros(node.shape),)) for node in graph.inputs], "real")
        neurons.append(sum(torch.Size(problem.nodes[name].shape).numel() for name in crown.asked(problem)))
    return "crown" if max(neurons) <= MANY else "crown-ibp"


def bounds(
    model: nn.Module | Compressed | Graph,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    objective: Float[Tensor, "b k out"] | None = None,
    method: str = "crown",
    arithmetic: str | None = None,
    upper: bool = True,
) -> Bounds:
    """Bounds on each output, or on the rows of `objective` times the (flattened) outputs.

    upper: whether upper bounds are asked for; without, they are infinite. Raises `DoesNotFit` where an
    operator has no bounds or shapes do not fit, `BadInput` for an unknown name.
    """
    graph = captured(model, x, arithmetic)
    return _bounds(graph, x, within, objective, _how(graph, method, arithmetic), upper)


def certify(
    model: nn.Module | Compressed,
    task: Task | Data,
    within: Perturbation,
    *,
    method: str = "crown",
    arithmetic: str | None = None,
    slopes: bool = False,
) -> Certificates:
    """Whether each test example keeps its label within the set; without labels, its prediction.

    slopes: whether to keep those that the proofs rest on, for a certificate that others can check. The
    network has one output per class. Raises `BadInput` for labels that are no classes of it.
    """
    data = task.test if isinstance(task, Task) else task
    graph = captured(model, data.x, arithmetic)
    how = _how(graph, method, arithmetic)
    batches = progress.steps(data.batched(data.batch), "Proving", total=-(-len(data) // data.batch))
    parts, used = [], []
    for x, y in batches:
        *part, found = _certify(graph, x, y, within, how)
        parts.append(part)
        used.append({name: slope.cpu() for name, slope in found.items()} if slopes else {})
    labels, correct, margin = (torch.cat(part) for part in zip(*parts))
    return Certificates(labels, correct, margin, *how, _together(used, [len(part[0]) for part in parts]))


def equivalence(
    original: nn.Module | Compressed | Graph,
    compressed: nn.Module | Compressed | Graph,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    method: str = "crown",
    arithmetic: str | None = None,
) -> Bounds:
    """Bounds on compressed(s) - original(s) for every s of the set, `b *out`.

    The tighter, output by output, of two: differences propagated through both networks (`difference`), and
    both networks side by side with their outputs subtracted. Raises `DoesNotFit` unless inputs and outputs
    are alike.
    """
    f, g = captured(original, x), captured(compressed, x)
    how = _how(f, method, arithmetic)
    how = how if arithmetic else min(how, _how(g, method, None))  # the weaker claim of the two
    rounding = ARITHMETICS[how[1]].unit > 0
    found = [
        _bounds(joined(f, g, twins=twins, rounding=rounding), x, within, None, how) for twins in (True, False)
    ]
    lower = torch.maximum(found[0].lower, found[1].lower)
    return Bounds(lower, torch.minimum(found[0].upper, found[1].upper), *how)


def agreement(
    original: nn.Module | Compressed | Graph,
    compressed: nn.Module | Compressed | Graph,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    method: str = "crown",
    arithmetic: str | None = None,
) -> Bool[Tensor, " b"]:
    """Whether both networks provably give every point of the set the class that the original gives x.

    Margins of the compressed network are the larger of two bounds: its own, and the original's plus the
    difference's. Raises `DoesNotFit` unless inputs and outputs are alike.
    """
    f, g = captured(original, x, arithmetic), captured(compressed, x, arithmetic)
    how = _how(f, method, arithmetic)
    how = how if arithmetic else min(how, _how(g, method, None))
    with torch.no_grad():
        scores = torch.vmap(lambda one: evaluate(f, one.unsqueeze(0)))(x).flatten(0, 1)
    rows = margins(scores.argmax(1), scores.shape[1])
    apart = joined(f, g, rounding=ARITHMETICS[how[1]].unit > 0)
    first, second, gap = (_bounds(graph, x, within, rows, how, False).lower for graph in (f, g, apart))
    return (first > 0).all(1) & (torch.maximum(second, first + gap) > 0).all(1)


def margins(labels: Int[Tensor, " b"], classes: int) -> Float[Tensor, "b k out"]:
    """The objective whose rows are output_label - output_j for every other class j."""
    eye = torch.eye(classes, dtype=torch.float64, device=labels.device)
    others = torch.stack([torch.cat([eye[:label], eye[label + 1 :]]) for label in labels.tolist()])
    return eye[labels].unsqueeze(1) - others


def _how(graph: Graph, method: str, arithmetic: str | None) -> tuple[str, str]:
    """(method, arithmetic), checked; by default the coarsest precision that the network computes in."""
    if method not in METHODS:
        raise unknown("method of bounds", method, METHODS)
    computed = [node for node in graph.inputs if not _converted(graph, node)]
    found = {
        str(n.dtype).removeprefix("torch.") for n in (*computed, *graph.nodes) if n.dtype.is_floating_point
    }
    for name in found - ARITHMETICS.keys():
        raise DoesNotFit(
            f"the network computes in {name}, bounds hold for float32 and float64; use model.float()"
        )
    if arithmetic is not None and arithmetic not in ARITHMETICS:
        raise unknown("arithmetic", arithmetic, ARITHMETICS)
    return method, arithmetic or min(found, default="float64")


def _converted(graph: Graph, entrance: Node) -> bool:
    """Whether all that is done with an input is to widen it: nothing is computed in its own precision."""
    readers = [node for node in graph.nodes if entrance.name in node.inputs]
    wide = all(node.op == "aten._to_copy" and node.dtype == torch.float64 for node in readers)
    return bool(readers) and wide and entrance.name not in graph.outputs


def _bounds(
    graph: Graph,
    x: Tensor,
    within: Perturbation,
    objective: Tensor | None,
    how: tuple[str, str],
    upper: bool = True,
) -> Bounds:
    """Bounds on a captured graph."""
    method, arithmetic = how
    problem = pose(graph, [Region.of(x, within)], arithmetic)
    if objective is not None:
        _fits(objective, problem)
        objective = objective.to(problem.device, problem.arithmetic.dtype)
    with torch.no_grad():
        found = METHODS[method](problem, objective, upper)
    shape = (len(x), *problem.output.shape[1:]) if objective is None else found.lower.shape
    low, high = found.lower.double().reshape(shape), found.upper.double().reshape(shape)
    return Bounds(low, high, method, arithmetic, found.slopes if isinstance(found, Proof) else {})


def _fits(objective: Tensor, problem: Problem) -> None:
    """Raises `DoesNotFit` unless the objective is `b k out` for the outputs of the graph."""
    width = torch.Size(problem.output.shape).numel()
    if objective.ndim != 3 or (len(objective), objective.shape[2]) != (problem.count, width):
        raise DoesNotFit(
            f"an objective of {tuple(objective.shape)} does not fit {problem.count} outputs of {width}; "
            f"its shape is ({problem.count}, rows, {width})"
        )


def _certify(
    graph: Graph, x: Tensor, y: Tensor | None, within: Perturbation, how: tuple[str, str]
) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
    """(labels, correct, margin, slopes) of one batch."""
    device = next((t.device for t in graph.constants.values()), x.device)
    x = x.to(device)
    with torch.no_grad():
        outputs = torch.vmap(lambda one: evaluate(graph, one.unsqueeze(0)))(x).flatten(0, 1)
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise DoesNotFit(
            f"the network gives outputs of {tuple(outputs.shape)}; a class needs one output for each class"
        )
    predicted = outputs.argmax(1)
    labels = predicted if y is None else y.to(device)
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise BadInput(
            f"the labels are not classes 0 to {outputs.shape[1] - 1} of the network; give data of its own"
        )
    found = _bounds(graph, x, within, margins(labels, outputs.shape[1]), how, upper=False)
    return labels.cpu(), (predicted == labels).cpu(), found.lower.amin(1).cpu(), found.slopes


def _together(parts: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """The slopes of several batches; 0 for a node whose lines left a batch no choice."""
    found = {}
    for name, like in {name: slope for part in parts for name, slope in part.items()}.items():
        rows = [part.get(name, like.new_zeros(n, *like.shape[1:])) for part, n in zip(parts, counts)]
        found[name] = torch.cat(rows)
    return found
