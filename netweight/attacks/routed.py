"""PGD on a network that decides how much of it is run, along the way that each point takes.

Paper: Haque and Yang, "Dynamic Neural Network is All You Need: Understanding the Robustness of Dynamic
Mechanisms in Neural Networks", ICCV workshop 2023, arXiv:2308.08709 (RQ1, RQ2; ascent as in `attacks.pgd`).

With k(s) the exit at which s leaves (or the blocks that it does not skip), the ascent climbs

    m(s) = max_{j != y} z_j(s) - z_y(s),    z of the way that s takes;

parts behind the exit are neither run nor differentiated, and the exit is looked up again in every step.

Differs from the paper: margin, steps and stops of `core.ascent`.
"""

from __future__ import annotations

from jaxtyping import Int, Num
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import margin, victim
from netweight.nn.dynamic import Taken, dynamic_of


def routed(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 40,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A point in the set around each x that is wrong where it leaves, else the one that came nearest to it.

    y: class numbers; None stands for what comes out where x leaves. Raises `DoesNotFit` for a network that
    decides nothing, and as `attacks.pgd` does.
    """
    with victim(Taken(dynamic_of(model)), x, y, "routed") as v:

        def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            scores = v.scores(s)
            return margin(scores, v.of[rows]), scores.argmax(1) != v.of[rows]

        return ascend(score, v.x, within, steps=steps, restarts=restarts, seed=seed)
