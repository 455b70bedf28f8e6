"""Ensemble: several attacks in turn, each on what the ones before did not break.

Paper: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks" (AutoAttack), ICML 2020, arXiv:2003.01690.

    PGD on the margin -> APGD on the cross-entropy -> APGD and FAB towards the best wrong classes -> Square

A network that passes no gradients on is left to Square and HopSkipJump.

Differs from the paper: PGD goes first because it is cheap; Square has 10 queries for each step of the others
(1,000 by default, 5,000 there). A box has no shortest way, so FAB does not look for one there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int, Num
from torch import Tensor, nn

from netweight.attacks.apgd import apgd
from netweight.attacks.fab import fab
from netweight.attacks.hop_skip_jump import hop_skip_jump
from netweight.attacks.pgd import pgd
from netweight.attacks.square import square
from netweight.core.ascent import around_inputs
from netweight.core.perturbation import Box, Found, Perturbation
from netweight.core.victim import margin, passes_gradients, victim

QUERIES = 10  # of Square, for each step of the others
Attack = Callable[[Tensor, Tensor], Found]


def ensemble(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point in the set around each x where one of the attacks finds it, else the largest margin seen.

    y: class numbers; None stands for the network's own predictions. steps, restarts: of each attack. Raises
    `DoesNotFit` for inputs that are whole numbers, for outputs that are not `b classes`, and for sets that do
    not lie around inputs.
    """
    within = around_inputs(within)
    how = {"restarts": restarts, "seed": seed}
    with victim(model, x, y, "ensemble") as v:
        points = within.project(v.x, v.x)
        best, hit = margin(v.clean, v.of), v.clean.argmax(1) != v.of
        attacks: list[Attack] = [
            lambda x, y: square(model, x, y, within, steps=QUERIES * steps, **how),
        ]
        if passes_gradients(v):
            attacks = [
                lambda x, y: pgd(model, x, y, within, steps=steps, **how),
                lambda x, y: apgd(model, x, y, within, loss="ce", steps=steps, **how),
                lambda x, y: apgd(model, x, y, within, loss="targeted", steps=steps, **how),
                *(
                    []
                    if isinstance(within, Box)
                    else [lambda x, y: fab(model, x, y, within, steps=steps, **how)]
                ),
                *attacks,
            ]
        elif not isinstance(within, Box):
            attacks.append(lambda x, y: hop_skip_jump(model, x, y, within, **how))
        for attack in attacks:
            rows = (~hit).nonzero()[:, 0]
            if len(rows) == 0:
                break
            found = attack(v.x[rows], v.of[rows])
            with torch.no_grad():
                value = margin(v.scores(found.points), v.of[rows])
            better = found.hit | (value > best[rows])
            points[rows[better]], best[rows[better]] = found.points[better], value[better]
            hit[rows] = found.hit
        return Found(points, hit)
