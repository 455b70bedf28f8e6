"""DeepSloth: points that cost the whole network, because nothing in it is sure enough to save work.

Paper: Hong, Kaya, Modoranu and Dumitras, "A Panda? No, It's a Sloth: Slowdown Attacks on Adaptive Multi-Exit
Neural Network Inference", ICLR 2021, arXiv:2010.02432 (section 4.3).

Over the decisions k at which s still saves work, the ascent climbs

    sum_k e_k(s),       e_k = log C + mean_c log p_c of an exit:

minus the cross-entropy of the uniform distribution, as in the paper. For the gate of a block that is skipped
(`nn.skipping`) e_k is how far its score lies below the threshold.

Differs from the paper: an exit that is passed already is not pushed on; a point that costs the whole network
leaves the batch; steps shrink (`core.ascent`).
"""

from __future__ import annotations

from jaxtyping import Int, Num
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import check_inputs, device_of, evaluated
from netweight.nn.dynamic import dynamic_of


def deepsloth(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 40,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A point in the set around each x for which no work is saved where one is found, else the nearest to it.

    hit: whether it costs the whole network, whatever class comes out; y is not looked at. Raises
    `DoesNotFit` for a network that decides nothing, and for inputs that are whole numbers.
    """
    net = dynamic_of(model)
    check_inputs(x, "deepsloth")

    def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        made = net.decisions(s)
        return (made.effort * made.saves).sum(1), ~made.saves.any(1)

    with evaluated(model):
        return ascend(score, x.to(device_of(model, x)), within, steps=steps, restarts=restarts, seed=seed)
