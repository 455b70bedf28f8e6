"""Which weights of a layer go, and how many of each: exact counts, and the usual rules to share them out.

    largest(weight, kept)                            a mask that keeps exactly so many
    uniform, uniform_plus, erk, global_magnitude, lamp      (weights, sparsity) -> how many each layer keeps

In every layer the smallest |w| go first. With N weights in all and sparsity s, each rule keeps at most
floor((1 - s) N) of them, shared out as

    uniform            the same share of every layer (Zhu and Gupta, 2017, arXiv:1710.01878)
    uniform_plus       the first convolution is kept whole, of the last layer at least a fifth (Gale et al.,
                       2019, arXiv:1902.09574), the same share of all others
    erk                shares proportional to sum(shape) / prod(shape), none above 1 (Evci et al., "Rigging
                       the Lottery", ICML 2020, arXiv:1911.11134)
    global_magnitude   the largest |w| of all layers together
    lamp               the largest w_u^2 / sum of w_v^2 over |w_v| >= |w_u| in the layer (Lee et al., "Layer-
                       adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv:2010.07611)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from netweight.core.errors import DoesNotFit

LAST = 0.2  # the least share of the last layer that `uniform_plus` keeps
Weights = Mapping[str, Tensor]


def largest(weight: Float[Tensor, ...], kept: int) -> Bool[Tensor, ...]:
    """True for the `kept` largest |w|; among equals the lower index is kept, on every device."""
    order = weight.abs().reshape(-1).argsort(descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[:kept]] = True
    return mask.reshape(weight.shape)


def surviving(total: float, sparsity: float) -> int:
    """floor((1 - s) N), where a product that is a whole number but for rounding counts as one."""
    return math.floor((1 - sparsity) * total + 1e-6)


def uniform(weights: Weights, sparsity: float) -> dict[str, int]:
    """The same share of every layer."""
    return {layer: surviving(weight.numel(), sparsity) for layer, weight in weights.items()}


def uniform_plus(weights: Weights, sparsity: float) -> dict[str, int]:
    """The first layer whole if it is a convolution, a fifth of the last, the same share of the rest.

    Raises `DoesNotFit` where these alone are more than may be kept.
    """
    names = list(weights)
    sizes = {layer: weight.numel() for layer, weight in weights.items()}
    budget = surviving(sum(sizes.values()), sparsity)
    fixed = {names[0]: sizes[names[0]]} if weights[names[0]].ndim > 2 else {}
    found = _shared(dict.fromkeys(names, 1.0), sizes, budget, fixed)
    least = math.ceil(LAST * sizes[names[-1]])
    if found.get(names[-1], 0) < least and len(names) > 1:
        fixed[names[-1]] = least
        found = _shared(dict.fromkeys(names, 1.0), sizes, budget, fixed)
    if sum(found.values()) > budget:
        raise DoesNotFit(
            f"{', '.join(fixed)}: uniform+ keeps {sum(fixed.values())} weights there, more than the {budget} "
            f"that sparsity={sparsity} leaves; prune less"
        )
    return found


def erk(weights: Weights, sparsity: float) -> dict[str, int]:
    """Shares proportional to sum(shape) / prod(shape)."""
    sizes = {layer: weight.numel() for layer, weight in weights.items()}
    raw = {layer: sum(weight.shape) / weight.numel() for layer, weight in weights.items()}
    return _shared(raw, sizes, surviving(sum(sizes.values()), sparsity), {})


def global_magnitude(weights: Weights, sparsity: float) -> dict[str, int]:
    """The largest |w| of all."""
    return _best({layer: weight.abs().reshape(-1).double() for layer, weight in weights.items()}, sparsity)


def lamp(weights: Weights, sparsity: float) -> dict[str, int]:
    """The largest scores of all."""
    return _best({layer: lamp_scores(weight) for layer, weight in weights.items()}, sparsity)


def lamp_scores(weight: Float[Tensor, ...]) -> Float[Tensor, " n"]:
    """w_u^2 / sum_{|w_v| >= |w_u|} w_v^2 in descending order; 1 for the largest weight, 0 for zeros."""
    squares = weight.double().reshape(-1).square().sort(descending=True).values
    return squares / squares.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)


def _best(scores: Mapping[str, Float[Tensor, " n"]], sparsity: float) -> dict[str, int]:
    """How many of each layer are among the best of all; of equals those of the earlier layer."""
    sizes = [len(score) for score in scores.values()]
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(order.device)
    counts = owner[order[: surviving(sum(sizes), sparsity)]].bincount(minlength=len(sizes))
    return dict(zip(scores, counts.tolist()))


def _shared(
    raw: Mapping[str, float], sizes: Mapping[str, int], budget: int, fixed: Mapping[str, int]
) -> dict[str, int]:
    """min(1, eps raw_l) of each layer that is not fixed, with eps so that the budget is used up."""
    whole = dict(fixed)
    while True:
        free = [layer for layer in sizes if layer not in whole]
        mass = sum(raw[layer] * sizes[layer] for layer in free)
        eps = max(budget - sum(whole.values()), 0) / mass if free else 0.0
        full = [layer for layer in free if eps * raw[layer] >= 1]
        if not full:
            break
        whole.update({layer: sizes[layer] for layer in full})
    return {
        layer: whole[layer] if layer in whole else math.floor(eps * raw[layer] * sizes[layer] + 1e-6)
        for layer in sizes
    }
