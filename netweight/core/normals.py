"""Mean inputs of layers without any data: from the statistics that batch norms keep.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv:1906.04721, section 4.2.1 and appendix C.

The output of a batch norm is taken for N(beta, gamma^2) in each channel. With a = (lo - mu) / sigma and
b = (hi - mu) / sigma, phi and Phi of the standard normal, a clip to [lo, hi] (ReLU: [0, inf)) has

    E    = lo Phi(a) + hi (1 - Phi(b)) + mu (Phi(b) - Phi(a)) + sigma (phi(a) - phi(b))
    E x^2 = lo^2 Phi(a) + hi^2 (1 - Phi(b)) + (mu^2 + sigma^2) (Phi(b) - Phi(a))
            + sigma ((mu + lo) phi(a) - (mu + hi) phi(b)),

so that E ReLU(N(beta, gamma^2)) = gamma phi(-beta / gamma) + beta (1 - Phi(-beta / gamma)).

Differs from the paper: sums (residual branches) are followed too, as if their parts were independent and what
is clipped normal again; so are means over positions and shortcuts padded with channels of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.graph import FIRST_OF, Node, capture
from netweight.core.task import Data

SAME = frozenset(
    ["aten.mean", "aten.slice"]
    + [f"aten.{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)]
)
ENDS = {"aten.hardtanh": ("min_val", "max_val"), "aten.clamp": ("min", "max")}
READERS = frozenset(["aten.convolution", "aten.linear"])


@dataclass(frozen=True)
class Normal:
    """Mean and variance of each channel, float64."""

    mean: Float[Tensor, " channels"]
    var: Float[Tensor, " channels"]


def expected_inputs(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Tensor]:
    """E[x] of each input channel, `in` float64, of those layers for which the batch norms tell it.

    Of the data only the shape counts. Raises `DoesNotFit` for a model that cannot be captured as one graph.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    known: dict[str, Normal] = {}
    found: dict[str, Tensor] = {}
    calls: dict[str, list[str]] = {}  # a layer that is called twice has two means, and is left out
    for node in capture(model, data.x[:2].to(device)).nodes:
        before = [known.get(name) for name in node.inputs]
        if node.op in READERS:
            calls.setdefault(node.inputs[1], []).append(node.layer)
            if before[0] is not None:
                found[node.layer] = before[0].mean
        after = _after(model, node, before)
        if after is not None:
            known[node.name] = after
    once = {layer for (layer, *more) in calls.values() if not more}
    return {layer: found[layer] for layer in layers if layer in once and layer in found}


def clipped(x: Normal, lo: float, hi: float) -> Normal:
    """What a clip to [lo, hi] makes of it; `hi` may be infinite."""
    mu, sigma = x.mean, x.var.clamp(min=1e-24).sqrt()
    a = (lo - mu) / sigma
    below, at_a = _below(a), _density(a)
    above, at_b, top = 0.0, 0.0, 0.0
    if math.isfinite(hi):
        b = (hi - mu) / sigma
        above, at_b, top = 1 - _below(b), _density(b), hi
    inside = 1 - below - above
    mean = lo * below + top * above + mu * inside + sigma * (at_a - at_b)
    square = lo**2 * below + top**2 * above + (x.mean.square() + sigma.square()) * inside
    square = square + sigma * ((mu + lo) * at_a - (mu + top) * at_b)
    return Normal(mean, (square - mean.square()).clamp(min=0))


def _below(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _after(model: nn.Module, node: Node, before: Sequence[Normal | None]) -> Normal | None:
    """The output of one operator; None where it is not known."""
    if node.op in FIRST_OF and node.layer:
        return _of_norm(model.get_submodule(node.layer))
    x = before[0] if before else None
    if x is None:
        return None
    if node.op == "aten.relu":
        return clipped(x, 0.0, math.inf)
    if node.op in ENDS:
        lo, hi = (node.params.get(name) for name in ENDS[node.op])
        return None if lo is None else clipped(x, float(lo), math.inf if hi is None else float(hi))
    if (
        node.op == "aten.add"
        and len(before) == 2
        and before[1] is not None
        and node.params.get("alpha", 1) == 1
    ):
        return Normal(x.mean + before[1].mean, x.var + before[1].var)
    if node.op == "aten.constant_pad_nd":
        return _padded(x, node)
    same = node.op in SAME or node.op == "aten.reshape" and math.prod(node.shape[2:]) == 1
    if node.op in ("aten.mean", "aten.slice"):  # over positions, not over channels
        along = node.params.get("dim")
        same = all(axis >= 2 for axis in (along if isinstance(along, list | tuple) else [along or 0]))
    return x if same and len(node.shape) > 1 and node.shape[1] == len(x.mean) else None


def _of_norm(norm: nn.Module) -> Normal | None:
    if getattr(norm, "running_mean", None) is None:
        return None
    mean = norm.running_mean.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    return Normal(beta, gamma.square())


def _padded(x: Normal, node: Node) -> Normal | None:
    """More channels, all zero; None where positions are padded."""
    pad, value = list(node.params["pad"]), node.params.get("value", 0)
    place = 2 * (len(node.shape) - 2)
    if value or any(pad[:place]) or any(pad[place + 2 :]):
        return None
    ends = pad[place : place + 2]
    if not ends:
        return x
    return Normal(*(nn.functional.pad(values, ends) for values in (x.mean, x.var)))
