"""Backward linear bounds: CROWN (Zhang et al. 2018, arXiv:1811.00866; on general graphs: Xu et al. 2020,
arXiv:2002.12920).

    state = intermediate(problem)                 # bounds of every value that a relaxation needs
    found = finish(problem, state, objective)     # rows from the output to the inputs

Value by value, from the input on: an interval; and where it leaves open what a relaxation would like to
know (the sign before a ReLU), rows from there back to the inputs (`walk`). Sound at every stop: the rows
met so far, taken over the intervals they stand at, are a bound too. So rows of neurons whose sign is
settled on the way are dropped there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from netweight.core.graph import Node
from netweight.verification import difference, ibp, lines
from netweight.verification.problem import Problem
from netweight.verification.relax import Interval
from netweight.verification.rows import Unit, planar
from netweight.verification.state import State, kind
from netweight.verification.walk import BUDGET, lowest

DEEP = 2  # values tightened before, from which on rows are worth to be dropped on their way
WINDOWS = 1024  # rows that start as windows; they go on in parts where they grow


@dataclass(frozen=True, eq=False)
class Proof:
    """Bounds as an Interval has them, and the slopes of the lines that they rest on.

    slopes: by node, of the lines below it, `b *shape`; of optimised ones the choices of each row,
    `b s *shape`, by "node/lower" and "node/upper".
    """

    lower: Tensor
    upper: Tensor
    slopes: Mapping[str, Tensor] = field(default_factory=dict)


def bound(
    problem: Problem, objective: Float[Tensor, "b s out"] | None, upper: bool = True, *, tighten: bool = True
) -> Proof:
    """Bounds on the output `b *out`, or on the rows of the objective times the flattened output.

    tighten: rows inside, not intervals alone. upper: whether upper bounds are asked for; else they are
    infinite.
    """
    state = intermediate(problem, tighten=tighten)
    found = finish(problem, state, objective, upper)
    return Proof(found.lower, found.upper, {name: used.lower_slope for name, used in state.lines.items()})


def finish(
    problem: Problem, state: State, objective: Float[Tensor, "b s out"] | None, upper: bool
) -> Interval:
    """The last pass: rows from the output."""
    if objective is None:
        x = state.values[problem.output.name]
        if problem.output.name not in state.tight:
            everything = torch.ones_like(x.lower, dtype=torch.bool)
            x = _tightened(problem, state, problem.output, everything, False)
        return x
    rows = torch.cat([objective, -objective], 1) if upper else objective
    limit = max(1, BUDGET // (8 * _widest(problem, problem.output) * len(rows)))
    parts = [
        lowest(problem, state, objective_rows(problem, piece), early=True) for piece in rows.split(limit, 1)
    ]
    lower = torch.cat(parts, 1)
    if not upper:
        return Interval(lower, torch.full_like(lower, torch.inf))
    below, above = lower.chunk(2, 1)
    return Interval(below, -above)


# Bounds of the values inside -----------------------------------------------------------------------------


def asked(problem: Problem) -> dict[str, list[Node]]:
    """The values whose bounds a relaxation uses, and the nodes that use them."""
    found: dict[str, list[Node]] = {}
    for node in problem.graph.nodes:
        if kind(problem, node) in ("scalar", "planes", "cut") and node.op != difference.NOISE:
            for name in node.inputs:
                if name in problem.nodes:
                    found.setdefault(name, []).append(node)
    return found


def intermediate(problem: Problem, *, tighten: bool = True) -> State:
    """Bounds of every value: intervals, and where `tighten` rows for what intervals leave open."""
    state = State(ibp.inputs(problem))
    wanted, free = asked(problem), dict.fromkeys(problem.regions, True)
    for node in problem.graph.nodes:
        state.values[node.name] = ibp.step(problem, node, state.values)
        exact = _exact(problem, node, free)
        found = state.values[node.name]
        if not tighten or exact or node.name not in wanted or not isinstance(found, Interval):
            continue
        if not found.lower.is_floating_point():
            continue
        open_ = _open(problem, node.name, found, wanted[node.name], state)
        if open_.any():
            signs = all(user.op in SIGNS for user in wanted[node.name])
            state.values[node.name] = _tightened(problem, state, node, open_, signs)
            state.tight.add(node.name)
    return state


SIGNS = (
    "aten.relu",
    "aten.leaky_relu",
    "aten.prelu",
    "aten.abs",
    "aten.sign",
)  # linear once the sign is known
ALONE = frozenset(
    f"aten.{name}"
    for name in [
        "reshape",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "neg",
        "batch_norm",
        "_to_copy",
        "_native_batch_norm_legit_no_training",
    ]
)


def _exact(problem: Problem, node: Node, free: dict[str, bool]) -> bool:
    """Whether the node's interval is exact: one affine operator after elements that move independently.

    free[name]: True where each element depends on an input element of its own, False where the interval is
    exact nevertheless; absent otherwise.
    """
    if not all(region.boxed for region in problem.regions.values()):
        return False
    before = [free.get(name) for name in node.inputs if name in problem.nodes]
    shifts = node.op in ("aten.add", "aten.sub", "aten.mul", "aten.div") and len(before) == 1
    alone = len(before) == 1 and (node.op in ALONE or shifts)
    if alone and before[0] is not None:
        free[node.name] = before[0]
        return True
    linear = node.op in ("aten.linear", "aten.convolution", "aten.matmul", "aten.mm") and len(before) == 1
    if linear and before[0] is True:
        free[node.name] = False
        return True
    return False


def _open(
    problem: Problem, name: str, x: Interval, users: Sequence[Node], state: State
) -> Bool[Tensor, "b ..."]:
    """The elements of which a tighter bound could matter to a user."""
    found = torch.zeros_like(x.lower, dtype=torch.bool)
    for user in users:
        if kind(problem, user) == "scalar":
            found |= lines.undecided(user, problem.params(user, state.values), x)
        elif user.op == difference.GAP and user.inputs[0] == name:  # the value: its twin asks for the rest
            found |= (x.lower < 0) & (x.upper > 0)
        elif user.op == difference.GAP:
            found |= difference.open_between(user, problem.params(user, {**state.values, name: x}))
        else:
            found |= x.upper > x.lower
    return found


def _tightened(problem: Problem, state: State, node: Node, open_: Tensor, signs: bool) -> Interval:
    """The interval of the node with row bounds for the open elements, where those are tighter.

    Where only signs are asked for and the way back is long, first the side that the value at the middle of
    the regions suggests, then the other side of what that leaves open.
    """
    x = state.values[node.name]
    ends = [end.contiguous().clone() for end in (x.lower, x.upper)]
    reach = [end.clone() for end in ends]  # of the rows alone
    if signs and len(state.tight) >= DEEP:
        likely = _at_centre(problem, state)[node.name] >= 0
        for side in (likely, ~likely):
            for sign in (1, -1):
                _ask(problem, state, node, open_ & (side if sign > 0 else ~side), (sign,), ends, reach, True)
            open_ = open_ & (ends[0] < 0) & (ends[1] > 0)
    else:
        _ask(problem, state, node, open_, (1, -1), ends, reach, False)
    state.rises[node.name] = reach[1] > -reach[0]
    return Interval(*ends)


def _at_centre(problem: Problem, state: State) -> Mapping[str, Tensor]:
    """About the values at the middle of the regions."""
    if not state.centres:
        values: ibp.State = {}
        for name, region in problem.regions.items():
            centre = region.centre_and_spread(0.0)[0]
            values[name] = Interval(centre, centre)
        for node in problem.graph.nodes:
            values[node.name] = ibp.step(problem, node, values)
        state.centres.update({name: x.centre for name, x in values.items() if isinstance(x, Interval)})
    return state.centres


def _ask(
    problem: Problem,
    state: State,
    node: Node,
    open_: Bool[Tensor, "b ..."],
    signs: Sequence[int],
    ends: Sequence[Tensor],
    reach: Sequence[Tensor],
    drop: bool,
) -> None:
    """Rows for the open elements, from below (1), above (-1) or both; their bounds go into ends and reach."""
    pixels = planar(node.shape)  # rows of one pixel lie together: they share a window
    moved = open_.movedim(2, -1).flatten(1) if pixels else open_.flatten(1)
    channels = node.shape[1] if pixels else 1
    plane = moved.shape[1] // channels
    flat = [[end.view(len(end), -1) for end in pair] for pair in (ends, reach)]
    for examples, index, real in _chunks(problem, node, moved):
        index = index % channels * plane + index // channels if pixels else index
        one = torch.ones_like(index, dtype=ends[0].dtype)
        unit = Unit(torch.cat([index for _ in signs], 1), torch.cat([sign * one for sign in signs], 1))
        found = lowest(problem, state, {node.name: unit}, examples, drop=drop)
        owner, place = examples.unsqueeze(1).expand(index.shape)[real], index[real]
        for sign, half in zip(signs, found.chunk(len(signs), 1)):
            side, value = (0, half[real]) if sign > 0 else (1, -half[real])
            tighter = torch.maximum if sign > 0 else torch.minimum
            flat[1][side][owner, place] = value
            flat[0][side][owner, place] = tighter(flat[0][side][owner, place], value)


def _chunks(
    problem: Problem, node: Node, open_: Bool[Tensor, "b n"]
) -> Iterator[tuple[Int[Tensor, " e"], Int[Tensor, "e s"], Bool[Tensor, "e s"]]]:
    """(examples, elements, which of them are no filling): groups of examples with similarly many elements."""
    limit = max(1, BUDGET // (8 * _widest(problem, node)))
    limit = max(limit, WINDOWS) if planar(node.shape) else limit
    counts = open_.sum(1)
    by_count = counts.argsort(descending=True, stable=True)
    by_count = by_count[counts[by_count] > 0]
    start = 0
    while start < len(by_count):
        most = int(counts[by_count[start]])
        several = max(1, min(limit // most, int((counts[by_count[start:]] * 2 >= most).sum())))
        examples = by_count[start : start + several]
        start += several
        index = open_[examples].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = torch.arange(most, device=index.device) < counts[examples].unsqueeze(1)
        for piece, kept in zip(index.split(limit, 1), real.split(limit, 1)):
            yield examples, piece, kept


def _widest(problem: Problem, node: Node) -> int:
    """The number of elements of the largest value on the way from the node to the inputs."""
    seen, todo, most = set(), [node.name], 1
    while todo:
        name = todo.pop()
        if name in seen or name not in problem.nodes:
            continue
        seen.add(name)
        found = problem.nodes[name]
        most = max(most, torch.Size(found.shape).numel())
        todo.extend(found.inputs)
    return most


def objective_rows(problem: Problem, objective: Float[Tensor, "b s out"]) -> dict[str, Tensor]:
    """Rows that start at the output."""
    rows = objective.to(problem.arithmetic.dtype)
    return {problem.output.name: rows.reshape(*rows.shape[:2], *problem.output.shape)}
