"""What is proven about a network: bounds that hold for every point of a set around each input.

    bounds(model, x, within)                    # lower, upper of every output
    certify(model, task, within)                # on how many examples the class cannot change
    equivalence(original, compressed, x, within)  # how far the outputs of two networks can part

They hold for the network in real arithmetic, and as it is evaluated in `arithmetic`: float32 or float64,
round to nearest (see `relax`; not with TF32 or Winograd kernels), by default the network's own. Intervals let
the rounding of a layer grow in the next ones, so in deep networks float64 is much tighter. Packed layers have
the weight they decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from netweight.core import progress
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import Graph, capture, evaluate
from netweight.core.perturbation import Perturbation
from netweight.core.task import Data, Task
from netweight.verification import ibp

METHODS = {"ibp": ibp.propagate}  # name: (graph, lower, upper, objective, unit roundoff) -> an interval
UNITS = {"float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Bounds:
    """lower <= output <= upper for every point of the set: float64, `b *out`, or `b k` for rows of an
    objective.

    arithmetic: the precision of the network's evaluation that is covered, beside real numbers.
    """

    lower: Float[Tensor, "b ..."]
    upper: Float[Tensor, "b ..."]
    method: str
    arithmetic: str


@dataclass(frozen=True)
class Certificates:
    """One verdict per example.

    labels: the class that was asked about. correct: whether the network gives it at the point itself. margin:
    proven lower bound of min over j of output_label - output_j on the whole set (units of the outputs).
    """

    labels: Int[Tensor, " b"]
    correct: Bool[Tensor, " b"]
    margin: Float[Tensor, " b"]
    method: str
    arithmetic: str

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


def bounds(
    model: nn.Module | Compressed,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    objective: Float[Tensor, "b k out"] | None = None,
    method: str = "ibp",
    arithmetic: str | None = None,
) -> Bounds:
    """Bounds on each output, or on the rows of `objective` times the (flattened) outputs.

    Raises `DoesNotFit` where an operator has no bounds or shapes do not fit, `BadInput` for an unknown name.
    """
    graph = capture(model, x)
    return _bounds(graph, x, within, objective, _how(graph, method, arithmetic))


def certify(
    model: nn.Module | Compressed,
    task: Task | Data,
    within: Perturbation,
    *,
    method: str = "ibp",
    arithmetic: str | None = None,
) -> Certificates:
    """Whether each test example keeps its label within the set; without labels, its prediction.

    The network has one output per class. Raises `BadInput` for labels that are no classes of it.
    """
    data = task.test if isinstance(task, Task) else task
    batch = min(data.batch, len(data))
    graph = capture(model, data.x[:batch])
    how = _how(graph, method, arithmetic)
    batches = progress.steps(data.batched(batch), "Proving", total=-(-len(data) // batch))
    parts = [_certify(graph, x, y, within, how) for x, y in batches]
    labels, correct, margin = (torch.cat(part) for part in zip(*parts))
    return Certificates(labels, correct, margin, *how)


def equivalence(
    original: nn.Module | Compressed,
    compressed: nn.Module | Compressed,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    method: str = "ibp",
    arithmetic: str | None = None,
) -> Bounds:
    """Bounds on compressed(s) - original(s) for every s of the set: the difference of the bounds of both.

    Sound, and loose: what both networks do alike is counted twice.
    """
    first = bounds(original, x, within, method=method, arithmetic=arithmetic)
    second = bounds(compressed, x, within, method=method, arithmetic=arithmetic)
    if first.lower.shape != second.lower.shape:
        raise DoesNotFit(
            f"the networks give outputs of {tuple(first.lower.shape)} and {tuple(second.lower.shape)}; "
            "only networks with the same outputs can be compared"
        )
    lower, upper = second.lower - first.upper, second.upper - first.lower
    away = torch.full_like(lower, torch.inf)
    covered = max(first.arithmetic, second.arithmetic)  # float64 where both cover it, else the weaker claim
    return Bounds(torch.nextafter(lower, -away), torch.nextafter(upper, away), method, covered)


def margins(labels: Int[Tensor, " b"], classes: int) -> Float[Tensor, "b k out"]:
    """The objective whose rows are output_label - output_j for every other class j."""
    eye = torch.eye(classes, dtype=torch.float64, device=labels.device)
    others = torch.stack([torch.cat([eye[:label], eye[label + 1 :]]) for label in labels.tolist()])
    return eye[labels].unsqueeze(1) - others


def _how(graph: Graph, method: str, arithmetic: str | None) -> tuple[str, str]:
    """(method, arithmetic), checked; by default the coarsest precision that the network computes in."""
    if method not in METHODS:
        raise unknown("method of bounds", method, METHODS)
    found = {
        str(n.dtype).removeprefix("torch.")
        for n in (*graph.inputs, *graph.nodes)
        if n.dtype.is_floating_point
    }
    for name in found - UNITS.keys():
        raise DoesNotFit(
            f"the network computes in {name}, bounds hold for float32 and float64; use model.float()"
        )
    if arithmetic is not None and arithmetic not in UNITS:
        raise unknown("arithmetic", arithmetic, UNITS)
    return method, arithmetic or min(found, default="float64")


def _bounds(
    graph: Graph, x: Tensor, within: Perturbation, objective: Tensor | None, how: tuple[str, str]
) -> Bounds:
    """Bounds on a captured graph."""
    lower, upper = within.corners(x)
    if lower.shape != x.shape:
        raise DoesNotFit(
            f"the set is of {tuple(lower.shape)}, the inputs of {tuple(x.shape)}; give one of the same shape"
        )
    if objective is not None:
        _fits(objective, graph)
    method, arithmetic = how
    with torch.no_grad():
        found = METHODS[method](graph, lower, upper, objective, UNITS[arithmetic])
    return Bounds(found.lower, found.upper, method, arithmetic)


def _fits(objective: Tensor, graph: Graph) -> None:
    """Raises `DoesNotFit` unless the objective is `b k out` for the outputs of the graph."""
    shape = _shape(graph)
    width = torch.Size(shape[1:]).numel()
    if objective.ndim != 3 or (len(objective), objective.shape[2]) != (shape[0], width):
        raise DoesNotFit(
            f"an objective of {tuple(objective.shape)} does not fit outputs of {shape}; "
            f"its shape is ({shape[0]}, rows, {width})"
        )


def _shape(graph: Graph) -> Sequence[int]:
    """The shape of the first output."""
    return next(n.shape for n in (*graph.nodes, *graph.inputs) if n.name == graph.outputs[0])


def _certify(
    graph: Graph, x: Tensor, y: Tensor | None, within: Perturbation, how: tuple[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, correct, margin) of one batch; a short one is filled up with copies of its last example."""
    count = len(x)
    device = next((t.device for t in graph.constants.values()), x.device)
    x = torch.cat([x, x[-1:].expand(graph.batch - count, *x.shape[1:])]).to(device)
    with torch.no_grad():
        outputs = evaluate(graph, x)
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise DoesNotFit(
            f"the network gives outputs of {tuple(outputs.shape)}; a class needs one output for each class"
        )
    predicted = outputs.argmax(1)
    labels = (
        predicted if y is None else torch.cat([y.to(device), y[-1:].to(device).expand(graph.batch - count)])
    )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise BadInput(
            f"the labels are not classes 0 to {outputs.shape[1] - 1} of the network; give data of its own"
        )
    found = _bounds(graph, x, within, margins(labels, outputs.shape[1]), how)
    margin = found.lower.amin(1)
    return labels[:count].cpu(), (predicted == labels)[:count].cpu(), margin[:count].cpu()
