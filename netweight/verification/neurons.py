"""Branch and bound on neurons: beta-CROWN (Wang et al. 2021, arXiv:2103.06624).

A neuron is split where its function bends: z <= 0 or z >= 0 at a ReLU, the halves of its interval at other
elementwise functions. `subdomains` bounds what is left. Which neuron is next: of the few whose relaxation
costs the bound most, both halves of each are bounded, and the best is taken (filtered smart branching,
De Palma et al. 2021, arXiv:2104.06718).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netweight.core import progress
from netweight.core.graph import Graph, call
from netweight.verification import counterexample, lines
from netweight.verification.branch import MEMORY, Goals, Tally, exceeded, size_after
from netweight.verification.counterexample import Search, Witness
from netweight.verification.lines import Lines
from netweight.verification.problem import Problem
from netweight.verification.subdomains import Parts, Posed, Root, Slot, optimised, root_of
from netweight.verification.vnnlib import Case

FIRST, LATER = 40, 16  # steps of optimisation before the first split, and after each
LAST = 200  # steps where nothing more can be split
SURE = 4.0  # how much the first mixture prefers the best row, as a logarithm
TRIED = 4  # neurons of each subdomain of which both halves are bounded before one is chosen
KEPT = 1 << 30  # bytes of subdomains that wait


# Splits --------------------------------------------------------------------------------------------------


def errors(posed: Posed) -> tuple[Float[Tensor, "b u"], Float[Tensor, "b u"], Float[Tensor, "b in"]]:
    """(what the relaxation of each open element costs the bound where it would be split, that place, the
    input where the linear bound is least).

    The derivative by the intercept of a line is the coefficient that meets it.
    """
    parts, values = posed.parts, posed.state.values
    chosen, found, ends = posed.alphas(parts.alpha), [], []
    for slot in posed.root.slots:
        x = values[slot.name]
        line = lines.lines(slot.node, posed.problem.params(slot.node, values), x, chosen[slot.node.name])
        zero = torch.zeros_like(x.lower)
        low, high = (zero if t is None else t for t in (line.lower, line.upper))
        line = Lines(
            line.lower_slope, (low + zero).requires_grad_(), line.upper_slope, (high + zero).requires_grad_()
        )
        posed.state.lines[slot.node.name] = line
        found.append(line)
    for region in posed.problem.regions.values():
        ends += [region.lower.requires_grad_(), region.upper.requires_grad_()]
    margin = posed.margin(None, parts.beta, parts.weight)
    inputs = [end for line in found for end in (line.lower, line.upper)]
    slopes = torch.autograd.grad(margin.sum(), [*ends, *inputs], allow_unused=True, materialize_grads=True)
    middle = torch.where(posed.root.zero.isnan(), (parts.lower + parts.upper) / 2, posed.root.zero)
    costs = []
    for i, (slot, line) in enumerate(zip(posed.root.slots, found)):
        below, above = (g.abs() for g in slopes[len(ends) + 2 * i : len(ends) + 2 * i + 2])
        at = posed.spread(slot, middle)
        here = _value(slot, posed.problem, values, at)
        cost = above * (line.upper_slope * at + line.upper - here)
        cost = cost + below * (here - line.lower_slope * at - line.lower)
        costs.append(cost.detach().flatten(1)[:, slot.index])
    region = next(iter(posed.problem.regions.values()))
    worst = torch.where(slopes[0] + slopes[1] > 0, region.lower, region.upper).flatten(1)
    return torch.cat([middle[:, :0], *costs], 1), middle, worst.detach()


def _value(slot: Slot, problem: Problem, values: Mapping[str, Any], at: Tensor) -> Tensor:
    """The function itself at `at`."""
    p = problem.params(slot.node, {**values, slot.name: at})
    return torch.vmap(lambda one: call(slot.node, {k: one if v is at else v for k, v in p.items()}))(at)


def children(
    posed: Posed, cost: Float[Tensor, "b u"], middle: Float[Tensor, "b u"], goals: Goals
) -> tuple[Parts, Parts]:
    """(both halves of each subdomain that can be split, the others)."""
    parts = posed.parts
    can = (parts.lower < middle) & (middle < parts.upper)
    can &= posed.root.zero.isnan() | (posed.root.zero == middle)
    some = can.any(1)
    parts, cost, middle, can = parts.take(some), cost[some], middle[some], can[some]
    rest = posed.parts.take(~some)
    if len(parts) == 0:
        return parts, rest
    tried = min(TRIED, cost.shape[1])
    places = cost.nan_to_num(0.0).masked_fill(~can, -1.0).topk(tried, 1).indices
    halves = [halved(parts, places[:, i : i + 1], middle) for i in range(tried)]
    halves = [bounded(posed.root, both, goals) for both in halves]
    gains = torch.stack([both.margin.unflatten(0, (2, -1)) for both in halves])  # tried 2 b
    allowed = can.gather(1, places).T
    rank = gains.clamp(max=0).amin(1) + 1e-3 * gains.clamp(max=0).amax(1)
    best = rank.masked_fill(~allowed, -math.inf).argmax(0).repeat(2)
    which = torch.arange(2 * len(parts))
    stacked = [torch.stack(tensors) for tensors in zip(*(vars(both).values() for both in halves))]
    return Parts(*(tensor[best, which] for tensor in stacked)), rest


def halved(parts: Parts, place: Int[Tensor, "b 1"], middle: Float[Tensor, "b u"]) -> Parts:
    """Below the middle of one element, then above it."""
    cut = middle.gather(1, place)
    below = replace(parts, upper=parts.upper.scatter(1, place, cut))
    above = replace(parts, lower=parts.lower.scatter(1, place, cut))
    return below.joined(above)


def bounded(root: Root, parts: Parts, goals: Goals) -> Parts:
    """With the margins that the slopes and multipliers at hand give."""
    with torch.no_grad():
        margin = Posed.of(root, parts, goals).margin(parts.alpha, parts.beta, parts.weight)
    return replace(parts, margin=torch.maximum(margin, parts.margin))


# The search ----------------------------------------------------------------------------------------------


def split_neurons(graph: Graph, search: Search, case: Case, arithmetic: str, tally: Tally) -> Witness | None:
    """Split neurons until the case is proven or a counterexample is found; None where none is.

    The tally says how far it came: nothing is left where all is proven. It ends early where a subdomain has
    nothing more to split and is still open. Raises `Overtime`.
    """
    root, goals = root_of(graph, case, arithmetic), Goals.of([case])
    queue, proven, steps = first(root, goals), math.inf, FIRST
    stuck = queue.take(queue.unsafe[:0])
    most = batch_limit(graph, root)
    size = most
    with progress.doing("Deciding subdomains") as advance:
        while len(queue) and len(stuck) == 0:
            tally.reached(proven, queue.margin)
            started, order = time.monotonic(), queue.margin.argsort()
            batch, queue = queue.take(order[:size]), queue.take(order[size:])
            batch = optimised(Posed.of(root, batch, goals), steps, tally.tick)
            tally.domains += len(batch)
            advance(len(batch))
            proven, batch = settled(proven, batch)
            if len(batch):
                posed = Posed.of(root, batch, goals)
                cost, middle, worst = errors(posed)
                worst = worst.double().clamp(case.lower, case.upper)
                witness = counterexample.at(search.net, [case] * len(batch), worst) or search.more(case)
                if witness is not None:
                    return witness
                both, rest = children(posed, cost, middle, goals)
                proven, both = settled(proven, both)
                queue, rest = (
                    queue.joined(both),
                    rest if len(rest) == 0 else optimised(Posed.of(root, rest, goals), LAST, tally.tick),
                )
                proven, stuck = settled(proven, rest)
            size = size_after(size, len(batch), time.monotonic() - started, most)
            steps = LATER if len(queue) == 0 or not bool((queue.lower == root.ends[0]).all()) else steps
            if len(queue) * root.ends[0].numel() * 5 * root.ends[0].itemsize > KEPT:
                break
    tally.reached(proven, torch.cat([queue.margin, stuck.margin]))
    return None


def first(root: Root, goals: Goals) -> Parts:
    """One subdomain for each unsafe set, and the row that exceeds its limit most to start from."""
    with torch.no_grad():
        margins = exceeded(root.problem, root.state, goals.rows, goals.limits)[0]
    sets, lower, upper = len(margins), *root.ends
    return Parts(
        lower.expand(sets, -1),
        upper.expand(sets, -1),
        root.start.expand(sets, -1, -1),
        torch.zeros(sets, lower.numel(), dtype=lower.dtype),
        SURE * torch.nn.functional.one_hot(margins.argmax(1), margins.shape[1]).to(lower.dtype),
        torch.arange(sets),
        margins.amax(1),
    )


def settled(proven: float, parts: Parts) -> tuple[float, Parts]:
    """(the least margin that is proven, the subdomains that are not)."""
    done = parts.margin > 0
    return min(proven, float(parts.margin[done].min()) if done.any() else math.inf), parts.take(~done)


def batch_limit(graph: Graph, root: Root) -> int:
    """How many subdomains are bounded at once at most, with what the gradient keeps, within `MEMORY`."""
    sizes = [torch.Size(node.shape).numel() for node in (*graph.inputs, *graph.nodes)]
    numbers = 2 * TRIED * 16 * sum(sizes)
    return max(1, min(1024, MEMORY // (numbers * root.problem.arithmetic.dtype.itemsize)))
