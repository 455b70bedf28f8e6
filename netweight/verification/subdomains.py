"""Parts of a case in which some values inside the network are confined: beta-CROWN (Wang et al. 2021,
arXiv:2103.06624).

    min <a, y>  >=  min <a, y> + beta z - (beta+ hi - beta- lo)        for z in [lo, hi] and every beta,

since the last two terms are at most 0 together. So the multipliers beta of confined values, the lines below
and above each function (alpha) and the mixture of the rows of an unsafe set are optimised, for many
subdomains at once; every value of theirs gives a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netweight.core.graph import Graph, Node
from netweight.verification import crown, lines, walk
from netweight.verification.branch import Goals
from netweight.verification.problem import Problem, Region, pose
from netweight.verification.relax import Interval
from netweight.verification.state import State, kind
from netweight.verification.vnnlib import Case

RATE, FADE = 0.1, 0.97  # of Adam, and by what it shrinks each step
GRAIN = 2.0**12  # weights of rows are multiples of its inverse: mixtures of small whole numbers are exact


@dataclass(frozen=True, eq=False)
class Slot:
    """The elements `index` of the value `name` that the elementwise `node` leaves open; `start` on is their
    place among all open elements."""

    node: Node
    name: str
    index: Int[Tensor, " u"]
    start: int

    @property
    def span(self) -> slice:
        """Where they are among all open elements."""
        return slice(self.start, self.start + len(self.index))


@dataclass(frozen=True, eq=False)
class Root:
    """One case before any split: bounds of all values, and the elements that can be split."""

    problem: Problem
    state: State
    slots: tuple[Slot, ...]

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The interval of every open element, `u` each."""
        found = [(self.state.values[s.name], s.index) for s in self.slots]
        none = torch.zeros(0, dtype=self.problem.arithmetic.dtype)
        lower = [x.lower.flatten()[index] for x, index in found]
        upper = [x.upper.flatten()[index] for x, index in found]
        return torch.cat([none, *lower]), torch.cat([none, *upper])

    @cached_property
    def start(self) -> Float[Tensor, "2 u"]:
        """The slopes that CROWN takes, of the lower and of the upper lines."""
        found = [torch.zeros(2, 0, dtype=self.problem.arithmetic.dtype)]
        for slot in self.slots:
            p = self.problem.params(slot.node, self.state.values)
            pair = lines.start(slot.node, p, self.state.values[slot.name])
            found.append(torch.stack([side.flatten()[slot.index] for side in pair]))
        return torch.cat(found, 1)

    @cached_property
    def zero(self) -> Float[Tensor, " u"]:
        """Where an element is split: at the kink of what is linear on both sides; NaN: in the middle."""
        parts = [
            torch.full((len(s.index),), 0.0 if s.node.op in crown.SIGNS else math.nan) for s in self.slots
        ]
        return torch.cat([torch.zeros(0), *parts]).to(self.ends[0])


@dataclass(frozen=True, eq=False)
class Parts:
    """Subdomains: the intervals of the open elements, the slopes, multipliers and row weights found so far.

    unsafe: which unsafe set of the case. margin: by how much it is missed at least.
    """

    lower: Float[Tensor, "b u"]
    upper: Float[Tensor, "b u"]
    alpha: Float[Tensor, "b 2 u"]
    beta: Float[Tensor, "b u"]
    weight: Float[Tensor, "b k"]
    unsafe: Int[Tensor, " b"]
    margin: Float[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.unsafe)

    def take(self, which: Tensor) -> Parts:
        """Some of them."""
        return Parts(*(tensor[which] for tensor in vars(self).values()))

    def joined(self, more: Parts) -> Parts:
        """Both together."""
        return Parts(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(more).values())))


def root_of(graph: Graph, case: Case, arithmetic: str) -> Root:
    """Bounds inside the network by CROWN, and what they leave open."""
    problem = pose(graph, [Region(case.lower[None], case.upper[None])], arithmetic)
    with torch.no_grad():
        state = crown.intermediate(problem)
    slots, start = [], 0
    for node in graph.nodes:
        names = [name for name in node.inputs if name in problem.nodes]
        if kind(problem, node) != "scalar":
            continue
        x = state.values[names[0]]
        open_ = (
            lines.undecided(node, problem.params(node, state.values), x)
            & x.lower.isfinite()
            & x.upper.isfinite()
        )
        index = open_.flatten().nonzero()[:, 0]
        if len(index):
            slots.append(Slot(node, names[0], index, start))
            start += len(index)
    return Root(problem, state, tuple(slots))


# Bounds of subdomains ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Posed:
    """Subdomains as a problem of the engine: their bounds of all values, and rows and limits `b k`."""

    root: Root
    parts: Parts
    problem: Problem
    state: State
    rows: Float[Tensor, "b k out"]
    limits: Float[Tensor, "b k"]

    @classmethod
    def of(cls, root: Root, parts: Parts, goals: Goals) -> Posed:
        """The root's bounds, cut to the intervals of each subdomain."""
        count = len(parts)

        def repeated(x: Any) -> Any:
            if isinstance(x, Interval):
                return Interval(*(end.expand(count, *end.shape[1:]) for end in (x.lower, x.upper)))
            return tuple(repeated(part) for part in x) if isinstance(x, tuple) else x

        regions = {
            name: Region(*(end.expand(count, *end.shape[1:]).clone() for end in (r.lower, r.upper)))
            for name, r in root.problem.regions.items()
        }
        values = {name: repeated(x) for name, x in root.state.values.items()}
        for slot in root.slots:
            x = values[slot.name]
            lower, upper = x.lower.flatten(1).clone(), x.upper.flatten(1).clone()
            lower[:, slot.index] = torch.maximum(lower[:, slot.index], parts.lower[:, slot.span])
            upper[:, slot.index] = torch.minimum(upper[:, slot.index], parts.upper[:, slot.span])
            values[slot.name] = Interval(lower.reshape(x.lower.shape), upper.reshape(x.lower.shape))
        problem = replace(root.problem, regions=regions)
        return cls(
            root,
            parts,
            problem,
            State(values),
            goals.rows[0, parts.unsafe],
            goals.limits[0, parts.unsafe],
        )

    def spread(self, slot: Slot, values: Float[Tensor, "b u"]) -> Float[Tensor, "b ..."]:
        """The values of one slot in the shape of its node, 0 elsewhere."""
        shape = self.problem.nodes[slot.name].shape
        flat = values.new_zeros(len(values), math.prod(shape))
        return flat.index_copy(1, slot.index, values[:, slot.span]).reshape(-1, *shape)

    def alphas(self, alpha: Float[Tensor, "b 2 u"]) -> dict[str, tuple[Tensor, Tensor]]:
        """The slopes by node."""
        return {
            s.node.name: (self.spread(s, alpha[:, 0]), self.spread(s, alpha[:, 1])) for s in self.root.slots
        }

    def margin(
        self, alpha: Float[Tensor, "b 2 u"] | None, beta: Float[Tensor, "b u"], weight: Float[Tensor, "b k"]
    ) -> Float[Tensor, " b"]:
        """By how much the mixture of rows exceeds that of limits at least: a bound, whatever is given.

        alpha None: the lines that the state holds.
        """
        shares = torch.softmax(weight.double(), 1)
        shares = shares + ((shares * GRAIN).round() / GRAIN - shares).detach()
        rows = (shares.unsqueeze(2) * self.rows).sum(1, keepdim=True)
        added: dict[str, Tensor] = {}
        for slot in self.root.slots:
            more = self.spread(slot, beta).unsqueeze(1)
            added[slot.name] = added[slot.name] + more if slot.name in added else more
        chosen = {} if alpha is None else self.alphas(alpha)
        by_row = {name: (low.unsqueeze(1), high.unsqueeze(1)) for name, (low, high) in chosen.items()}
        start = crown.objective_rows(self.problem, rows)
        found = walk.lowest(self.problem, self.state, start, alphas=by_row, betas=added)[:, 0].double()
        ends = torch.stack([self.parts.lower, self.parts.upper]).double()
        paid = torch.where(beta > 0, beta * ends[1], beta * ends[0]).sum(1)
        lost = self.problem.slack(beta.shape[1]) * (beta.abs() * ends.abs().amax(0)).sum(1)
        return (found - paid - lost - (shares * self.limits).sum(1)).nan_to_num(
            -math.inf, math.inf, -math.inf
        )


def optimised(posed: Posed, steps: int, tick: Callable[[], None]) -> Parts:
    """The subdomains with the best slopes, multipliers and row weights of some steps of Adam.

    tick: called at each step; it may raise.
    """
    parts, root = posed.parts, posed.root
    dtype = parts.alpha.dtype
    none = torch.zeros((), dtype=dtype)
    least = torch.where(parts.lower > root.ends[0], -math.inf, none)
    most = torch.where(parts.upper < root.ends[1], math.inf, none)
    moved = [tensor.clone().requires_grad_() for tensor in (parts.alpha, parts.beta, parts.weight)]
    alpha, beta, weight = moved
    adam = torch.optim.Adam(moved, RATE)
    fading = torch.optim.lr_scheduler.ExponentialLR(adam, FADE)
    best = parts
    for step in range(steps + 1):
        margin = posed.margin(alpha, beta, weight)
        better = margin.detach() > best.margin
        kept = [
            torch.where(better.reshape(-1, *[1] * (old.ndim - 1)), new.detach(), old)
            for new, old in zip((*moved, margin), (best.alpha, best.beta, best.weight, best.margin))
        ]
        best = replace(best, alpha=kept[0], beta=kept[1], weight=kept[2], margin=kept[3])
        if step == steps or bool((best.margin > 0).all()):
            break
        tick()
        adam.zero_grad()
        (-margin[best.margin <= 0].sum()).backward()
        for tensor in moved:
            tensor.grad = None if tensor.grad is None else tensor.grad.nan_to_num(0.0, 0.0, 0.0)
        adam.step()
        fading.step()
        with torch.no_grad():
            alpha.clamp_(0, 1)
            beta.clamp_(least, most)
    return best
