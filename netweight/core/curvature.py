"""Curvature of the loss: the trace of each layer's block of the Hessian, by Hutchinson's estimator.

    tr(H_l) = E_v v_l^T (H v)_l,      v with independent entries +1 or -1,

so that one Hessian product prices all layers at once: cross terms have mean 0 (Dong et al., "HAWQ-V2",
NeurIPS 2020, arXiv:1911.03852, section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from netweight.core.progress import steps
from netweight.core.task import Data, token_loss

ROUND = 4  # probes of `settled` between two looks at the change


def traces(
    model: nn.Module, data: Data, layers: Sequence[str], *, probes: int = 16, seed: int = 0
) -> dict[str, float]:
    """tr(H_l) of the mean loss in nats for the weight of every layer.

    The loss is the cross-entropy of the data's labels, or of the model's own predictions where there are none
    or they are no classes. The mean over `probes` vectors for each batch, so that small batches give more of
    them at the same cost; exact for a diagonal H.
    """
    model = copy.deepcopy(model).eval()
    weights = [model.get_submodule(layer).weight.requires_grad_() for layer in layers]
    device = weights[0].device
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(layers), dtype=torch.float64)
    for x, y in steps(data, "Probing the curvature", total=-(-len(data) // data.batch)):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            out = model(x.to(device))
        target = out.detach().argmax(-1) if y is None or y.is_floating_point() else y.to(device)
        gradients = torch.autograd.grad(
            token_loss(out, target).sum(), weights, create_graph=True, allow_unused=True
        )
        for number in range(probes):  # new ones for each batch: as many more that are independent
            v = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
            along = sum((g * s).sum() for g, s in zip(gradients, v) if g is not None)
            products = torch.autograd.grad(
                along, weights, retain_graph=number + 1 < probes, allow_unused=True
            )
            total += torch.tensor([_dot(h, s) for h, s in zip(products, v)], dtype=torch.float64)
    return dict(zip(layers, (total / probes / len(data)).tolist()))


def settled(
    model: nn.Module,
    data: Data,
    layers: Sequence[str],
    *,
    most: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """`traces` with `ROUND` probes after the other, until a round changes the mean of no layer's trace by
    more than `tolerance` of it, or `most` probes are spent."""
    total, spent = dict.fromkeys(layers, 0.0), 0
    while spent < most:
        probes = min(ROUND, most - spent)
        new = traces(model, data, layers, probes=probes, seed=seed + spent)
        before = {layer: value / max(spent, 1) for layer, value in total.items()}
        total = {layer: value + probes * new[layer] for layer, value in total.items()}
        spent += probes
        moved = [abs(total[layer] / spent - before[layer]) for layer in layers]
        if all(change <= tolerance * abs(total[layer]) / spent for change, layer in zip(moved, layers)):
            break
    return {layer: value / spent for layer, value in total.items()}


def _dot(product: Tensor | None, signs: Tensor) -> float:
    return 0.0 if product is None else float((product * signs).sum())
