"""N:M sparsity inside a training step: masks along inputs or outputs, and layers whose passes differ.

Papers: Fang et al., "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow
Co-Design", IEEE TCAD 2023, arXiv:2309.13015 (BDWP); Zhou et al., "Learning N:M Fine-grained Structured
Sparse Neural Networks From Scratch", ICLR 2021, arXiv:2102.04010 (SR-STE); McDanel et al., "Accelerating DNN
Training with Structured Data Gradient Pruning", ICPR 2022, arXiv:2202.00774 (SDGP).

A layer has three products, with weight W `out in`:

    FF  Y = X W'     sums over inputs,        BP  dX = dY W     sums over outputs,        WU  dW = dY' X.

Hardware skips zeros along the axis that is summed over, so FF and BP need a mask each:

    W_F = m_F W,  M consecutive inputs, at one output           W_B = m_B W,  M outputs, at one input

(convolutions: channels, at one kernel position, within one group of channels). Each keeps the N largest |w|
of a group, of equals the lower index. WU stays dense and its gradient goes to the dense W, straight through
both masks. With blocks, `block` neighbouring rows share one pattern, chosen by the sum of their w^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED
from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.layers import run
from netweight.nn.packed import NM

INPUTS, OUTPUTS = 1, 0  # axes of a weight: what FF sums over, what BP sums over


@dataclass(frozen=True)
class Pattern:
    """N:M: `keep` of every `of` consecutive weights stay; `block` neighbouring rows keep the same ones."""

    keep: int = 2
    of: int = 8
    block: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.of <= 256:
            raise BadInput(
                f"keep={self.keep}, of={self.of}: N:M keeps 1 to M of M weights, M at most 256; "
                "give for example 2 and 8"
            )
        if self.block < 1:
            raise BadInput(f"block={self.block}: at least one row has a pattern; give 1, or for example 64")

    @property
    def share(self) -> float:
        """N / M."""
        return self.keep / self.of


@dataclass(frozen=True)
class Sides:
    """What is N:M: the weight in FF, the weight in BP (by a mask of its own), the gradient dY in BP."""

    forward: bool = True
    backward: bool = True
    gradients: bool = False

    def products(self, pattern: Pattern) -> tuple[float, float, float]:
        """MACs of FF, BP and WU, each in units of the dense product."""
        return (
            pattern.share if self.forward else 1.0,
            pattern.share if self.backward or self.gradients else 1.0,
            1.0,
        )


TWO_OF_EIGHT = Pattern()
BOTH, NEITHER = Sides(), Sides(forward=False, backward=False)


def mask(
    weight: Float[Tensor, "out in *kernel"], pattern: Pattern, axis: int = INPUTS
) -> Bool[Tensor, "out in *kernel"]:
    """True for what stays, in groups along `axis`; the axis has to be a multiple of `of`.

    Raises `DoesNotFit` where groups or blocks do not divide the weight.
    """
    other = 1 - axis
    if weight.shape[axis] % pattern.of or weight.shape[other] % pattern.block:
        raise DoesNotFit(
            f"a weight of {tuple(weight.shape)} does not divide into groups of {pattern.of} along axis "
            f"{axis} and blocks of {pattern.block} along the other"
        )
    size = weight.detach().abs()
    if pattern.block > 1:
        size = size.square().unflatten(other, (-1, pattern.block)).sum(other + 1)
    groups = size.movedim(axis, -1).unflatten(-1, (-1, pattern.of))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
    kept = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device).scatter_(-1, best, True)
    kept = kept.flatten(-2).movedim(-1, axis)
    return kept.repeat_interleave(pattern.block, other) if pattern.block > 1 else kept


def masked(weight: Tensor, kept: Bool[Tensor, ...]) -> Tensor:
    """The weight where it is kept, 0 elsewhere."""
    return weight.masked_fill(~kept, 0.0)


def stored(weight: Float[Tensor, "out in *kernel"], kept: Bool[Tensor, "out in *kernel"], of: int) -> NM:
    """The kept weights and their places; `kept` has as many in every group of `of` inputs."""
    groups, places = (t.movedim(1, -1).reshape(-1, of) for t in (weight.detach(), kept))
    index = places.nonzero()[:, 1].reshape(len(places), -1)
    return NM.of(groups.gather(1, index), index.to(torch.uint8), of, tuple(weight.shape))


def misfit(layer: nn.Module, pattern: Pattern, sides: Sides) -> str:
    """Why the layer cannot be trained with that pattern, "" if it can."""
    if not isinstance(layer, WEIGHTED):
        return f"a {type(layer).__name__} has no N:M product"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the attention around it computes its product"
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    if sides.forward and inputs % pattern.of:
        return f"its {inputs} inputs are not a multiple of {pattern.of}"
    if (sides.backward or sides.gradients) and outputs % pattern.of:
        return f"its {outputs} outputs are not a multiple of {pattern.of}"
    if (sides.forward and outputs % pattern.block) or (sides.backward and inputs % pattern.block):
        return f"its {outputs} outputs and {inputs} inputs are not multiples of the block {pattern.block}"
    return ""


# The layer ------------------------------------------------------------------------------------------------


class SparseLayer(nn.Module):
    """`like` with N:M operands in its passes; its own dense weight is what is trained.

    Masks are made anew in every forward pass, hence once for each update. Raises `DoesNotFit` for a layer
    that the pattern does not divide.
    """

    def __init__(self, like: nn.Module, pattern: Pattern, sides: Sides = BOTH, name: str = "layer") -> None:
        super().__init__()
        reason = misfit(like, pattern, sides)
        if reason:
            raise DoesNotFit(f"{name}: {reason}; leave it out or give another pattern")
        self.like, self.pattern, self.sides = like, pattern, sides

    def kept(self) -> Bool[Tensor, ...]:
        """m_F as it is now."""
        return mask(self.like.weight, self.pattern, INPUTS)

    @property
    def weight(self) -> Tensor:
        """What FF multiplies with: W_F, or W."""
        dense = self.like.weight.detach()
        return masked(dense, self.kept()) if self.sides.forward else dense

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        return self.like.bias

    def forward(self, x: Tensor) -> Tensor:
        """X W_F' + b; the gradient of x is made with W_B, that of the weight is dense."""
        if not torch.is_grad_enabled():
            return run(self.like, x, self.weight)
        weight, before, bias = self.like.weight, self.weight, self.like.bias
        after = (
            masked(weight.detach(), mask(weight, self.pattern, OUTPUTS)) if self.sides.backward else before
        )
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight, before, after = (t.to(low) for t in (x, weight, before, after))
            bias = None if bias is None else bias.to(low)
        pruned = self.pattern if self.sides.gradients else None
        if isinstance(self.like, nn.Linear):
            return _Linear.apply(x, weight, bias, before, after, pruned)
        x, padding, whole = padded(self.like, x)
        how = (self.like.stride, padding, self.like.dilation, self.like.groups)
        y = _Conv.apply(x, weight, bias, before, after, (how, pruned))
        return y if whole else y.squeeze(0)


def padded(like: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...], bool]:
    """x as a batch, padded where the convolution cannot; the padding left; whether x was a batch."""
    axes = like.weight.ndim - 2
    whole = x.ndim == axes + 2
    x = x if whole else x.unsqueeze(0)
    if like.padding_mode == "zeros" and not isinstance(like.padding, str):
        return x, like.padding, whole
    mode = "constant" if like.padding_mode == "zeros" else like.padding_mode
    return F.pad(x, like._reversed_padding_repeated_twice, mode=mode), (0,) * axes, whole


class _Linear(torch.autograd.Function):
    """The three products of a Linear layer; x: `... in`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, *rest: Any
    ) -> Tensor:
        after, ctx.pruned = rest
        ctx.save_for_backward(x, after)
        return F.linear(x, before, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, after), (dy,) = ctx.saved_tensors, grads
        flat = dy.reshape(-1, dy.shape[-1])
        wanted = ctx.needs_input_grad
        to_x = masked(dy, gradient_mask(dy, ctx.pruned, -1)) if ctx.pruned else dy
        dx = to_x @ after if wanted[0] else None
        dw = flat.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
        return dx, dw, flat.sum(0) if wanted[2] else None, None, None, None


class _Conv(torch.autograd.Function):
    """The three products of a convolution of `b in *places`, padded by zeros."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, *rest: Any
    ) -> Tensor:
        after, ((stride, padding, dilation, groups), ctx.pruned) = rest
        ctx.how = (stride, padding, dilation, False, [0] * len(stride), groups)
        ctx.save_for_backward(x, after)
        return torch.ops.aten.convolution(x, before, bias, *ctx.how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, after), (dy,) = ctx.saved_tensors, grads
        wanted = ctx.needs_input_grad[:3]

        def products(dy: Tensor, which: list[bool]) -> Any:
            size = [dy.shape[1]] if which[2] else None
            return torch.ops.aten.convolution_backward(dy, x, after, size, *ctx.how, which)

        if ctx.pruned is None:
            return *products(dy, [*wanted]), None, None, None
        _, dw, db = products(dy, [False, *wanted[1:]])
        dx = products(sparse_gradient(dy, ctx.pruned), [True, False, False])[0] if wanted[0] else None
        return dx, dw, db, None, None, None


def gradient_mask(dy: Tensor, pattern: Pattern, axis: int) -> Bool[Tensor, ...]:
    """Which of every M consecutive output channels stay: the N largest, at one example and place."""
    rows = dy.movedim(axis, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    kept = mask(flat, Pattern(pattern.keep, pattern.of), INPUTS)
    return kept.reshape(rows.shape).movedim(-1, axis)


def sparse_gradient(dy: Float[Tensor, "b out *places"], pattern: Pattern) -> Float[Tensor, "b out *places"]:
    """dY N:M along its channels; each of an example keeps its sum of |dy| (the scale of SDGP's code)."""
    kept = masked(dy, gradient_mask(dy, pattern, 1))
    places = tuple(range(2, dy.ndim))
    sums = (t.abs().sum(places, keepdim=True) for t in (dy, kept))
    before, after = sums
    return kept * torch.where(after > 0, before / after, 1.0)
