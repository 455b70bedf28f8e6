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

from netweight.core.progress import steps
from netweight.core.task import Data, token_loss


def traces(
    model: nn.Module, data: Data, layers: Sequence[str], *, probes: int = 16, seed: int = 0
) -> dict[str, float]:
    """tr(H_l) of the mean loss in nats for the weight of every layer.

    The loss is the cross-entropy of the data's labels, or of the model's own predictions where there are none
    or they are no classes. The mean over `probes` vectors; exact for a diagonal H.
    """
    model = copy.deepcopy(model).eval()
    weights = [model.get_submodule(layer).weight.requires_grad_() for layer in layers]
    device = weights[0].device
    generator = torch.Generator().manual_seed(seed)
    signs = [
        [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
        for _ in range(probes)
    ]
    total = torch.zeros(len(layers), dtype=torch.float64)
    for x, y in steps(data, "Probing the curvature", total=-(-len(data) // data.batch)):
        out = model(x.to(device))
        target = out.detach().argmax(-1) if y is None or y.is_floating_point() else y.to(device)
        gradients = torch.autograd.grad(token_loss(out, target).sum(), weights, create_graph=True)
        for number, v in enumerate(signs):
            along = sum((g * s).sum() for g, s in zip(gradients, v))
            products = torch.autograd.grad(
                along, weights, retain_graph=number + 1 < probes, allow_unused=True
            )
            total += torch.tensor([_dot(h, s) for h, s in zip(products, v)], dtype=torch.float64)
    return dict(zip(layers, (total / probes / len(data)).tolist()))


def _dot(product: Tensor | None, signs: Tensor) -> float:
    return 0.0 if product is None else float((product * signs).sum())
