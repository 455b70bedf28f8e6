"""alpha-CROWN: the lines of the last pass optimised, for every row of its own (Xu et al. 2021,
arXiv:2011.13824).

Any line that `lines` can choose is sound, so the bound of a row is maximised over the choices by gradient
ascent (Adam, projected to [0, 1]) and the best bound that was met is kept: a proof at every step. The bounds
of the values inside stay those of CROWN ("final" slopes); optimising them too costs 2 to 11 times as much for
the last fifth of the gain.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.verification import lines
from netweight.verification.crown import Proof, intermediate, objective_rows
from netweight.verification.problem import Problem
from netweight.verification.state import State, kind, lines_of, moving
from netweight.verification.walk import lowest

STEPS, RATE, DECAY = 14, 0.3, 0.9  # as far as 20 steps at 0.1, 0.98 get, in 0.7 of their time


def bound(
    problem: Problem, objective: Float[Tensor, "b s out"] | None, upper: bool = True, *, steps: int = STEPS
) -> Proof:
    """Bounds on the output `b *out`, or on the rows of the objective times the flattened output."""
    state = intermediate(problem)
    if objective is None:
        width = torch.Size(problem.output.shape).numel()
        eye = torch.eye(width, dtype=problem.arithmetic.dtype, device=problem.device)
        objective = eye.expand(problem.count, width, width)
    rows = torch.cat([objective, -objective], 1) if upper else objective
    lower, choices = optimised(problem, state, rows, steps=steps)
    slopes = {}
    for name, (below, above) in choices.items():
        slopes[f"{name}/lower"] = below
        if problem.nodes[name].op != "aten.relu":
            slopes[f"{name}/upper"] = above
    if not upper:
        return Proof(lower, torch.full_like(lower, torch.inf), slopes)
    below, above = lower.chunk(2, 1)
    return Proof(below, -above, slopes)


def optimised(
    problem: Problem, state: State, rows: Float[Tensor, "b s out"], *, steps: int = STEPS
) -> tuple[Float[Tensor, "b s"], dict[str, tuple[Tensor, Tensor]]]:
    """(the best lower bounds of the rows, the choices that gave them)."""
    start = objective_rows(problem, rows)
    with torch.no_grad():
        best = lowest(problem, state, start, early=True)
    choices = _start(problem, state, rows.shape[1])
    leaves = [choice for pair in choices.values() for choice in pair if choice.requires_grad]
    if not leaves:
        return best, choices
    ascent = torch.optim.Adam(leaves, lr=RATE, maximize=True)
    decay = torch.optim.lr_scheduler.ExponentialLR(ascent, DECAY)
    kept = {name: tuple(choice.detach().clone() for choice in pair) for name, pair in choices.items()}
    for step in range(steps + 1):
        with torch.enable_grad():
            found = lowest(problem, state, start, alphas=choices)
            total = found.clamp(-1e30, 1e30).sum()
        better = found.detach() > best
        best = torch.where(better, found.detach(), best)
        with torch.no_grad():
            for name, pair in choices.items():
                for old, new in zip(kept[name], pair):
                    old[better] = new[better]
        if step == steps:
            break
        ascent.zero_grad()
        total.backward(inputs=leaves)
        ascent.step()
        decay.step()
        with torch.no_grad():
            for leaf in leaves:
                leaf.clamp_(0, 1)
    return best, kept


def _start(problem: Problem, state: State, rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The choices that CROWN makes, one for each row, for every relaxed node where there is one to make."""
    choices = {}
    for node in problem.graph.nodes:
        if kind(problem, node) != "scalar":
            continue
        x = state.values[moving(problem, node)[0]]
        if not bool((x.upper > x.lower).any()):
            continue
        p = problem.params(node, state.values)
        if not bool(lines.undecided(node, p, x).any()):
            continue
        if node.op == "aten.relu":  # its upper line has no choice
            below = lines_of(problem, state, node).lower_slope
            begin = (below, torch.zeros_like(below))
        else:
            begin = lines.start(node, p, x)
        pair = tuple(
            choice.detach().unsqueeze(1).repeat(1, rows, *[1] * (choice.ndim - 1)) for choice in begin
        )
        pair[0].requires_grad_()
        if node.op != "aten.relu":
            pair[1].requires_grad_()
        choices[node.name] = pair
    return choices
