"""Disagree: points of a set around each input where a compressed network leaves the original.

Source: the search for behavioural disagreements between a network and its compressed form of Xie et al.,
"DiffChaser: Detecting Disagreements for Deep Neural Networks", IJCAI 2019, done with gradients.

With c the original's class at x, and m_f(s) = f_c(s) - max_{j != c} f_j(s) the lead that f gives to c,

    maximise    min( m_original(s), -m_compressed(s) )        over s in S(x):

a point above 0 is one where the original keeps its class and the compressed network does not.

Differs from the paper: projected gradient ascent instead of a genetic search; the original has to keep its
class.
"""

from __future__ import annotations

import torch
from jaxtyping import Num
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import margin, victim


def disagree(
    original: nn.Module,
    compressed: nn.Module,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    steps: int = 40,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A point in the set around each x where only the compressed network changes class, or the nearest.

    Both networks are on the same device and run in evaluation mode. An x on which they part already is its
    own point. Raises `DoesNotFit` for inputs that are whole numbers, outputs that are not `b classes`, and
    sets that do not lie around inputs.
    """
    with victim(original, x, None, "disagree") as v, victim(compressed, v.x, v.of, "disagree") as small:
        if v.clean.shape != small.clean.shape:
            raise DoesNotFit(
                f"disagree needs the same class scores `b classes` of both networks, but they give "
                f"{tuple(v.clean.shape)} and {tuple(small.clean.shape)}"
            )

        def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            keeps, leaves, c = v.scores(s), small.scores(s), v.of[rows]
            parted = (keeps.argmax(1) == c) & (leaves.argmax(1) != c)
            return torch.minimum(-margin(keeps, c), margin(leaves, c)), parted

        return ascend(score, v.x, within, steps=steps, restarts=restarts, seed=seed)
