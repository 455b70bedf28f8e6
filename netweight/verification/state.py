"""What is known of every value while rows walk back, and what follows from it once for all rows.

Rounding. With u the unit roundoff of the network and v that of the proof (Higham 2002, section 3.1), a row
a that stands at a value pays <|a|, slack>:

    slack = gamma_f(u) (|W| |x| + |c|) + gamma_(t + r + 2 N)(v) |W| |x| + gamma_(s + 2 N)(v) |c|

f: terms of a sum in the network. t: terms of a sum in the transpose, where the proof finds the coefficients
at what the node reads. r: readers of the value, whose rows are added up. c: the node's constants (bias,
intercepts), which the proof adds up as <a, c>, in blocks of s terms where there are many (`rows.inner`).
N: nodes, each of which adds to the row's sum and takes its payment off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node
from netweight.verification import difference, ibp, lines, order, products, weights
from netweight.verification.backward import BILINEAR, MOVED, SUMMED, at_zero, back, is_affine, terms
from netweight.verification.lines import Lines
from netweight.verification.prepare import STAIRS
from netweight.verification.problem import Problem
from netweight.verification.relax import ELEMENTARY, TINY, UNIT64, Interval, gamma
from netweight.verification.rows import BLOCK, DIRECT
from netweight.verification.split import rounding

RULES = {**products.RULES, **order.RULES, **weights.RULES, **difference.RULES}
EXACT = frozenset(f"aten.{name}" for name in ["relu", "abs", "sign", "round", "floor", "ceil", "trunc"])


@dataclass(eq=False)
class State:
    """Bounds of every value `B *shape`, which of them rows have tightened, and what follows from the bounds
    when it is first asked for: the lines of each relaxed node and the slack of each that rounds.

    rises: of a tightened value, where its row bounds alone reach farther up than down. The line below a ReLU
    is chosen by it: with the choices of plain CROWN and tighter intervals, the bound is never looser than
    CROWN's.
    """

    values: ibp.State
    tight: set[str] = field(default_factory=set)
    rises: dict[str, Tensor] = field(default_factory=dict)
    lines: dict[str, Lines] = field(default_factory=dict)
    sides: dict[str, tuple[lines.Side, lines.Side]] = field(default_factory=dict)
    slack: dict[str, Tensor | None] = field(default_factory=dict)
    centres: dict[str, Tensor] = field(default_factory=dict)


def kind(problem: Problem, node: Node) -> str:
    """input, affine, scalar (lines), planes, or cut (its interval is all that is used)."""
    if node.op in ("input", "getitem"):
        return "input" if node.op == "input" else "affine"
    if not node.dtype.is_floating_point:
        return "cut"
    if is_affine(node, lambda name: name not in problem.constants):
        return "affine"
    if node.op in lines.SCALAR and len({name for name in node.inputs if name not in problem.constants}) == 1:
        return "scalar"
    return "planes" if node.op in RULES else "cut"


def moving(problem: Problem, node: Node) -> list[str]:
    """The values that a node reads and that are no constants."""
    return [name for name in node.inputs if name not in problem.constants]


# What belongs to a node, found once ----------------------------------------------------------------------


def lines_of(problem: Problem, state: State, node: Node) -> Lines:
    """The lines of a relaxed node, `B *shape`."""
    if node.name not in state.lines:
        p, name = problem.params(node, state.values), moving(problem, node)[0]
        rises = state.rises.get(name) if node.op == "aten.relu" else None
        alpha = None if rises is None else (rises.to(problem.arithmetic.dtype),) * 2
        state.lines[node.name] = lines.lines(node, p, state.values[name], alpha)
    return state.lines[node.name]


def slack_of(problem: Problem, state: State, node: Node) -> Tensor | None:
    """What the network's and the proof's arithmetic may lose at a node, elementwise `B *shape`."""
    if node.name not in state.slack:
        state.slack[node.name] = _slack(problem, state, node)
    return state.slack[node.name]


def _slack(problem: Problem, state: State, node: Node) -> Tensor | None:
    how, arithmetic = kind(problem, node), problem.arithmetic
    if how == "affine":
        return _affine(problem, state, node)
    size = state.values[node.name].size
    if how == "planes":
        p, count = problem.params(node, state.values), 64
        if node.op in BILINEAR and node.op != "aten.div":  # the value may be small where its summands are not
            size, count = ibp.mass(problem, node, p), count + terms(node, p) + 2 * max(node.shape[-2:])
        return (problem.slack(count) + 4 * summing(problem, size[0].numel())) * size
    x, chosen = state.values[moving(problem, node)[0]], lines_of(problem, state, node)
    reach = torch.maximum(chosen.lower_slope.abs(), chosen.upper_slope.abs()) * x.size
    constants = torch.zeros_like(reach)
    for intercept in (chosen.lower, chosen.upper):
        constants = constants if intercept is None else torch.maximum(constants, intercept.abs())
    rough = 0 if node.op in EXACT or node.op in STAIRS else ELEMENTARY
    own = (8 + readers(problem, node)) * arithmetic.own
    found = rough * arithmetic.unit * size + own * (reach + constants) + 8 * TINY
    return found + summing(problem, constants[0].numel()) * constants


def _affine(problem: Problem, state: State, node: Node) -> Tensor | None:
    p, arithmetic = problem.params(node, state.values), problem.arithmetic
    if node.op == "netweight.rounded":
        return rounding(node, p, arithmetic.unit).to(arithmetic.dtype) if arithmetic.unit else None
    if node.op == "getitem":
        return None
    inner, outer, met = terms(node, p), transposed_terms(problem, node, p), readers(problem, node)
    constants = at_zero(node, p)
    if isinstance(constants, tuple):
        return None  # several results, each of them moved elements
    constants = constants.abs().nan_to_num(0.0, 0.0, 0.0)
    if inner == 0 and outer == met == 1 and not constants.any():
        return None
    mass = ibp.mass(problem, node, p)
    moving = (mass - constants).clamp(min=0) + 4 * arithmetic.own * mass  # |W| |x| alone
    found = gamma(inner, arithmetic.unit) * mass + (inner + outer) * TINY
    found = found + gamma(outer + met + 2 * len(problem.nodes), arithmetic.own) * moving
    return found + summing(problem, constants.numel()) * constants


def summing(problem: Problem, count: int) -> float:
    """What the proof loses of its size in a row's sum of so many constants, and in adding it on."""
    steps = (count if count <= DIRECT else BLOCK) + 3 + 2 * len(problem.nodes)
    return gamma(steps, problem.arithmetic.own) + gamma(-(-count // BLOCK), UNIT64)


def readers(problem: Problem, node: Node) -> int:
    """How many nodes read a value: so many rows may be added up there."""
    return max(1, sum(other.inputs.count(node.name) for other in problem.graph.nodes))


def transposed_terms(problem: Problem, node: Node, p: dict[str, Any]) -> int:
    """Of how many products a coefficient at what an affine node reads is the sum; 1: nothing is added."""
    if node.op == "aten.convolution":
        weight = p["weight"]
        each = weight.shape[1] if p["transposed"] else weight.shape[0] // p["groups"]
        return each * math.prod(weight.shape[2:])
    if node.op in MOVED:
        ones = torch.ones(1, 1, *node.shape, dtype=problem.arithmetic.dtype, device=problem.device)
        found = back(node, ones, p)[0].values()
        each = [part for parts in found for part in (parts if isinstance(parts, list) else [parts])]
        return max(1, *(round(float(part.max())) for part in each if part is not None and part.numel()))
    before = min(x.lower[0].numel() for x in p.values() if isinstance(x, Interval))
    spread = -(-math.prod(node.shape) // before)  # where a value is broadcast
    if node.op == "aten.linear":
        return p["weight"].shape[0]
    if node.op in ("aten.sum", "aten.mean"):
        return 1
    if "kernel_size" in p:
        return math.prod(p["kernel_size"]) ** (3 if len(p["kernel_size"]) == 1 else 1)
    if node.op in SUMMED:  # windows that overlap by one at each end, or all of an axis
        return math.prod(node.shape) if node.op == "aten.cumsum" else 16 * spread
    if node.op in BILINEAR and node.op not in ("aten.mul", "aten.div"):
        return -(-math.prod(node.shape) * (terms(node, p) - 8) // before)
    return spread
