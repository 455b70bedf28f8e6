"""Branch and bound on the inputs: boxes are bounded by CROWN, and halved where that does not decide.

For few inputs this decides everything that the arithmetic can tell apart (Wang et al. 2018,
arXiv:1804.10829). Many boxes at once, those with the lowest bound first; halved across the input that holds
the bound back most (`pulls`). Where the linear bound of a box is least, the network is tried: that point is
often a counterexample.

What has to be shown of a box: of each unsafe set {y : rows y <= limits} one row exceeds its limit everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netweight.core import progress
from netweight.core.graph import Graph
from netweight.verification import counterexample, crown, walk
from netweight.verification.counterexample import Search, Witness
from netweight.verification.problem import ARITHMETICS, Problem, Region, pose
from netweight.verification.state import State
from netweight.verification.vnnlib import Case

PACE = 2.0  # seconds that one batch of boxes may take
STEPS = 12  # towards the best mixture of rows
MEMORY = 256 << 20  # bytes of the bounds of one batch
KEPT = 1 << 30  # bytes of boxes that wait


class Overtime(Exception):
    """The time is up."""


@dataclass
class Tally:
    """What a search has reached, also when it is stopped: read it after `Overtime`.

    bound: what is proven so far about the whole property, the least margin by which an unsafe set is missed.
    domains: boxes, or parts of a case, that were bounded. left: those that are still to be done.
    """

    deadline: float
    bound: float = -math.inf
    domains: int = 0
    left: int = 1

    def reached(self, proven: float, waiting: Float[Tensor, " b"]) -> None:
        """Note the least margin that is proven, and those that wait; past the deadline raise `Overtime`."""
        self.left = len(waiting)
        self.bound = min(proven, float(waiting.min())) if len(waiting) else proven
        if len(waiting):
            self.tick()

    def tick(self) -> None:
        """Raises `Overtime` past the deadline."""
        if time.monotonic() > self.deadline:
            raise Overtime


@dataclass(frozen=True, eq=False)
class Goals:
    """The rows of all unsafe sets of each case, filled up to equal numbers by repeating the last."""

    rows: Float[Tensor, "c d k out"]
    limits: Float[Tensor, "c d k"]

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Goals:
        """The goals of the cases, in order."""
        sets = max(len(case.unsafe) for case in cases)
        depth = max(len(one.limits) for case in cases for one in case.unsafe)

        def filled(tensors: list[Tensor], count: int) -> Tensor:
            return torch.stack([*tensors, *[tensors[-1]] * (count - len(tensors))])

        rows = [filled([filled(list(one.rows), depth) for one in case.unsafe], sets) for case in cases]
        limits = [filled([filled(list(one.limits), depth) for one in case.unsafe], sets) for case in cases]
        return cls(torch.stack(rows), torch.stack(limits))


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes, the case that each is a part of, and the margin that is proven on it."""

    lower: Float[Tensor, "b in"]
    upper: Float[Tensor, "b in"]
    case: Int[Tensor, " b"]
    margin: Float[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.case)

    def take(self, which: Tensor) -> Boxes:
        """Some of them."""
        return Boxes(self.lower[which], self.upper[which], self.case[which], self.margin[which])

    def joined(self, more: Boxes) -> Boxes:
        """Both together."""
        pairs = zip(vars(self).values(), vars(more).values())
        return Boxes(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True, eq=False)
class Bounded:
    """margin: by how much a box misses the unsafe set that it misses least. worst: the point where the linear
    bound of that margin is least.
    """

    margin: Float[Tensor, " b"]
    worst: Float[Tensor, "b in"]


def bounding(
    graph: Graph,
    boxes: Boxes,
    rows: Float[Tensor, "b d k out"],
    limits: Float[Tensor, "b d k"],
    arithmetic: str,
) -> Bounded:
    """CROWN on each box, for the rows of its own case and, where sets have several, for mixtures of them."""
    problem, ends = posed(graph, boxes, arithmetic)
    with torch.no_grad():
        state = crown.intermediate(problem)
    each = exceeded(problem, state, rows, limits)
    margins = each.amax(2)
    if rows.shape[2] > 1 and bool((margins <= 0).any()):
        shares = mixture(*linear(each, ends), (boxes.upper - boxes.lower) / 2)
        mixed = exceeded(problem, state, *(mix(shares, part) for part in (rows, limits)))
        margins = torch.maximum(margins, mixed[..., 0])
    least = margins.amin(1)
    slope = sum(g.flatten(1) for g in torch.autograd.grad(least.sum(), ends))
    return Bounded(least.detach(), torch.where(slope > 0, boxes.lower, boxes.upper))


def pulls(
    graph: Graph,
    boxes: Boxes,
    rows: Float[Tensor, "b d k out"],
    limits: Float[Tensor, "b d k"],
    arithmetic: str,
) -> Float[Tensor, "b in"]:
    """What narrowing each input would gain: its width times the derivative of the margin by its ends.

    The derivative of the whole computation, with intervals inside (CROWN-IBP): it sees how much of the
    looseness of every relaxation comes from which input. The coefficients of the linear bound alone do not,
    and cut thousands of slices along one input.
    """
    problem, ends = posed(graph, boxes, arithmetic)
    state = crown.intermediate(problem, tighten=False)
    margins = exceeded(problem, state, rows, limits).amax(2).amin(1)
    below, above = (g.flatten(1).double() for g in torch.autograd.grad(margins.sum(), ends))
    return (below - above).nan_to_num(0.0).clamp(min=0) * (boxes.upper - boxes.lower)


def posed(graph: Graph, boxes: Boxes, arithmetic: str) -> tuple[Problem, list[Tensor]]:
    """The problem of the boxes, and the ends of its region, to be differentiated by."""
    problem = pose(graph, [Region(boxes.lower, boxes.upper)], arithmetic)
    (region,) = problem.regions.values()
    return problem, [region.lower.requires_grad_(), region.upper.requires_grad_()]


def exceeded(problem: Problem, state: State, rows: Tensor, limits: Tensor) -> Float[Tensor, "b d k"]:
    """By how much each row exceeds its limit at least; differentiable in the ends of the box."""
    found = walk.lowest(problem, state, crown.objective_rows(problem, rows.flatten(1, 2)))
    found = found.double().unflatten(1, rows.shape[1:3]) - limits
    below = torch.full_like(found, -math.inf)
    return torch.nextafter(found, below).nan_to_num(-math.inf, math.inf, -math.inf)


def linear(margins: Float[Tensor, "b d k"], ends: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(coefficients `b d k in`, margins): the linear functions of the input whose least values they are.

    The least of <A, x> is <A+, lower> + <A-, upper>: A is the sum of both gradients.
    """
    flat = margins.flatten(1)
    one_row = torch.eye(flat.shape[1], dtype=flat.dtype).unsqueeze(1).expand(-1, len(flat), -1)
    found = torch.autograd.grad(flat, ends, one_row, retain_graph=True, is_grads_batched=True)
    A = sum(g.flatten(2).double() for g in found).nan_to_num(0.0)
    return A.transpose(0, 1).unflatten(1, margins.shape[1:]), margins.detach()


def mixture(
    A: Float[Tensor, "b d k in"], margins: Float[Tensor, "b d k"], radius: Float[Tensor, "b in"]
) -> Float[Tensor, "b d k"]:
    """Shares of the rows, of sum 1, whose mixture has a high least value over the box.

    All rows are at most 0 somewhere only if each mixture is: the dual of that linear program,
    max over shares of <shares, h> - <|shares A|, radius> with h the values in the middle, by multiplicative
    steps along its gradient.
    """
    wide = radius[:, None, None]
    h = margins.clamp(min=-1e30) + (A.abs() * wide).sum(3)
    shares = torch.full_like(h, 1 / h.shape[2])
    best, highest = shares, torch.full_like(h[..., 0], -math.inf)
    for step in range(STEPS):
        mixed = (shares.unsqueeze(3) * A).sum(2)
        value = (shares * h).sum(2) - (mixed.abs() * wide[:, :, 0]).sum(2)
        better = value > highest
        best = torch.where(better.unsqueeze(2), shares, best)
        highest = torch.where(better, value, highest)
        gradient = h - (A * (mixed.sign() * wide[:, :, 0]).unsqueeze(2)).sum(3)
        gradient = gradient - gradient.amax(2, keepdim=True)
        size = gradient.abs().amax(2, keepdim=True).clamp(min=1e-30)
        shares = torch.softmax(shares.clamp(min=1e-9).log() + 3 / (1 + step) ** 0.5 * gradient / size, 2)
    return best


def mix(shares: Float[Tensor, "b d k"], values: Tensor) -> Tensor:
    """One row, or one limit, for each set: the sum of its own by their shares."""
    extended = shares.reshape(*shares.shape, *[1] * (values.ndim - 3))
    return (extended * values).sum(2, keepdim=True)


def split_inputs(
    graph: Graph, search: Search, cases: Sequence[Case], arithmetic: str, tally: Tally
) -> Witness | None:
    """Halve boxes until all are proven or a counterexample is found; None where none is.

    The tally says how far it came: nothing is left where all is proven. Raises `Overtime`.
    """
    goals, most = Goals.of(cases), batch_limit(graph, cases, arithmetic)
    queue = Boxes(
        torch.stack([case.lower for case in cases]),
        torch.stack([case.upper for case in cases]),
        torch.arange(len(cases)),
        torch.full((len(cases),), -math.inf, dtype=torch.float64),
    )
    proven, stuck, size = math.inf, queue.take(queue.case[:0]), min(16, most)
    with progress.doing("Deciding boxes") as advance:
        while len(queue):
            tally.reached(proven, torch.cat([queue.margin, stuck.margin]))
            started, order = time.monotonic(), queue.margin.argsort()
            batch, queue = queue.take(order[:size]), queue.take(order[size:])
            found = bounding(graph, batch, goals.rows[batch.case], goals.limits[batch.case], arithmetic)
            tally.domains += len(batch)
            advance(len(batch))
            done = found.margin > 0
            proven = min(proven, float(found.margin[done].min()) if done.any() else math.inf)
            if not done.all():
                left = Boxes(batch.lower, batch.upper, batch.case, torch.maximum(found.margin, batch.margin))
                left = left.take(~done)
                own = [cases[i] for i in left.case.tolist()]
                witness = counterexample.at(search.net, own, found.worst[~done]) or search.more(own[0])
                if witness is not None:
                    return witness
                pull = pulls(graph, left, goals.rows[left.case], goals.limits[left.case], arithmetic)
                children, atoms = halves(left, pull, size - len(queue))
                queue, stuck = queue.joined(children), stuck.joined(atoms)
            seconds = time.monotonic() - started
            size = size_after(size, len(batch), seconds, most)
            if len(queue) * queue.lower.shape[1] * 16 > KEPT:
                break
    tally.reached(proven, torch.cat([queue.margin, stuck.margin]))
    return None


def halves(boxes: Boxes, pull: Float[Tensor, "b in"], room: int) -> tuple[Boxes, Boxes]:
    """(the halves of the boxes that can be halved, the others); quarters and eighths while there is room.

    Across the input with the largest pull; where nothing pulls (an infinite bound), across the widest one.
    """
    whole = boxes.take(boxes.case[:0])
    for _ in range(3):
        middle = boxes.lower + (boxes.upper - boxes.lower) / 2
        wide = (middle > boxes.lower) & (middle < boxes.upper)
        flat = (pull * wide).amax(1, keepdim=True) <= 0
        score = torch.where(flat, boxes.upper - boxes.lower, pull).masked_fill(~wide, -1.0)
        best = score.argmax(1, keepdim=True)
        can = wide.gather(1, best)[:, 0]
        whole = whole.joined(boxes.take(~can))
        boxes, best, middle, pull = boxes.take(can), best[can], middle[can], pull[can]
        cut = middle.gather(1, best)
        first = Boxes(boxes.lower, boxes.upper.scatter(1, best, cut), boxes.case, boxes.margin)
        second = Boxes(boxes.lower.scatter(1, best, cut), boxes.upper, boxes.case, boxes.margin)
        boxes = first.joined(second)
        pull = pull.scatter(1, best, pull.gather(1, best) / 2).repeat(2, 1)
        if 2 * len(boxes) > room:
            break
    return boxes, whole


def size_after(size: int, used: int, seconds: float, most: int) -> int:
    """The next batch: twice or half as large, towards `PACE` seconds."""
    if seconds > 2 * PACE:
        return max(1, used // 2)
    return min(2 * size, most) if seconds < PACE / 2 and 2 * used > size else size


def batch_limit(graph: Graph, cases: Sequence[Case], arithmetic: str) -> int:
    """How many boxes are bounded at once at most: their intervals, lines and rows fit into `MEMORY`."""
    goals = max(len(case.unsafe) for case in cases) * max(
        len(u.limits) for case in cases for u in case.unsafe
    )
    sizes = [torch.Size(node.shape).numel() for node in (*graph.inputs, *graph.nodes)]
    numbers = 8 * sum(sizes) + 3 * goals * max(sizes)
    return max(1, min(4096, MEMORY // (numbers * ARITHMETICS[arithmetic].dtype.itemsize)))
