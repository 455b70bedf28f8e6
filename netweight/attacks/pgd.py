"""PGD: points of a set around each input that the network gets wrong, by projected gradient ascent.

Paper: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv:1706.06083.

    s_0 random in S(x),        s_{t+1} = project_S(x)( s_t + a_t d_t ),
    d_t = argmax over |d| <= eps of <d, grad m(s_t)>,

where for class scores z and class y

    m(s) = max_{j != y} z_j(s) - z_y(s),        s is wrong iff its largest score is not y's.

d_t is eps times the gradient's signs for Linf, the normalised gradient for L2 (`core.ascent`).

Differs from the paper: the margin m instead of the cross-entropy, whose gradient vanishes in float32 where
the network is sure (Carlini and Wagner 2017, arXiv:1608.04644); steps shrink; wrong points leave the batch.
"""

from __future__ import annotations

from jaxtyping import Int, Num
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import margin, victim


def pgd(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 40,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point in the set around each x where one is found, else the point that came nearest to it.

    y: class numbers; None stands for the network's own predictions. An x that is wrong already is its own
    point. The model runs in evaluation mode; x goes to its device. Raises `DoesNotFit` for inputs that are
    whole numbers, for outputs that are not `b classes`, and for sets that do not lie around inputs.
    """
    with victim(model, x, y, "pgd") as v:

        def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            scores = v.scores(s)
            return margin(scores, v.of[rows]), scores.argmax(1) != v.of[rows]

        return ascend(score, v.x, within, steps=steps, restarts=restarts, seed=seed)
