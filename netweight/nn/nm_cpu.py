"""Block-shared N:M products that a CPU really computes faster: rows gathered, then a dense product.

Source: the layout is this project's; the N:M of forward and backward pass is that of Fang et al., "Efficient
N:M Sparse DNN Training", IEEE TCAD 2023, arXiv:2309.13015 (see `nn.nm_sparse`).

A CPU gains nothing from single weights that are zero. Where `block` neighbouring rows of W share a pattern,

    Y[rows of a block] = W[rows, kept] X[kept],        kept: K N/M of the K inputs, X feature-major, `in b`,

is a dense product of N/M of the size, after a gather of whole rows of X, which lie in one piece each. BP is
the same with W' and blocks of inputs, dX[block] = W[kept, block]' dY[kept]; WU is dense. Which rows are kept
is looked up anew after `refresh` updates (pre-generation); the values are read from W in every step.

`quickest` measures, on this machine, with which block a step is fastest, or that dense is. It is no part of a
training: what depends on a clock does not give the same numbers twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.nm_sparse import BOTH, INPUTS, OUTPUTS, TWO_OF_EIGHT, Pattern, mask, masked, misfit

REFRESH = 20  # updates between two looks at which weights are largest
BLOCKS = (32, 64, 128)


def kept_rows(weight: Float[Tensor, "out in"], pattern: Pattern, axis: int) -> Int[Tensor, "blocks kept"]:
    """For each block of rows (axis `INPUTS`) or columns (`OUTPUTS`) the places that it keeps, ascending."""
    kept = mask(weight, pattern, axis)
    one = kept[:: pattern.block] if axis == INPUTS else kept[:, :: pattern.block].t()
    return one.nonzero()[:, 1].reshape(len(one), -1)


def forward_product(
    weight: Float[Tensor, "out in"], kept: Int[Tensor, "blocks kept"], x: Float[Tensor, "in b"]
) -> Float[Tensor, "out b"]:
    """W_F X."""
    block = len(weight) // len(kept)
    y = x.new_empty(len(weight), x.shape[1])
    for start, index in zip(range(0, len(weight), block), kept):
        rows = slice(start, start + block)
        torch.mm(weight[rows].index_select(1, index), x.index_select(0, index), out=y[rows])
    return y


def backward_product(
    weight: Float[Tensor, "out in"], kept: Int[Tensor, "blocks kept"], dy: Float[Tensor, "out b"]
) -> Float[Tensor, "in b"]:
    """W_B' dY."""
    inputs = weight.shape[1]
    block = inputs // len(kept)
    dx = dy.new_empty(inputs, dy.shape[1])
    for start, index in zip(range(0, inputs, block), kept):
        columns = slice(start, start + block)
        torch.mm(weight[:, columns].index_select(0, index).t(), dy.index_select(0, index), out=dx[columns])
    return dx


class _Product(torch.autograd.Function):
    """y = x W_F' of `b in`, computed feature-major; dx by W_B, dW dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: Tensor, after: Tensor) -> Tensor:
        columns = x.t().contiguous()  # costs nothing where the layer before was one of these
        ctx.save_for_backward(columns, weight, after)
        return forward_product(weight, before, columns).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        columns, weight, after = ctx.saved_tensors
        dy = grads[0].t().contiguous()
        dx = backward_product(weight, after, dy).t() if ctx.needs_input_grad[0] else None
        return dx, dy @ columns.t() if ctx.needs_input_grad[1] else None, None, None


class BlockLinear(nn.Module):
    """A Linear layer trained by block-shared N:M products in both passes.

    before, after: what FF and BP keep, made anew every `refresh` forward passes in training; kept in
    checkpoints. Raises `DoesNotFit` for a layer that pattern and block do not divide.
    """

    def __init__(
        self, like: nn.Module, pattern: Pattern, refresh: int = REFRESH, name: str = "layer"
    ) -> None:
        super().__init__()
        reason = misfit(like, pattern, BOTH)
        if reason or not isinstance(like, nn.Linear):
            raise DoesNotFit(f"{name}: {reason or 'it is no Linear layer'}; leave it out")
        if refresh < 1:
            raise BadInput(
                f"refresh={refresh}: patterns are looked up every so many updates; give at least 1"
            )
        self.like, self.pattern, self.refresh = like, pattern, refresh
        self.register_buffer("before", kept_rows(like.weight, pattern, INPUTS))
        self.register_buffer("after", kept_rows(like.weight, pattern, OUTPUTS))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))

    def kept(self) -> Bool[Tensor, "out in"]:
        """m_F as it is used now."""
        weight = self.like.weight
        rows = torch.zeros(len(self.before), weight.shape[1], dtype=torch.bool, device=weight.device)
        return rows.scatter_(1, self.before, True).repeat_interleave(self.pattern.block, 0)

    @property
    def weight(self) -> Tensor:
        """W_F."""
        return masked(self.like.weight.detach(), self.kept())

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        return self.like.bias

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x W_F' + b."""
        weight, bias = self.like.weight, self.like.bias
        if self.training and torch.is_grad_enabled():
            if int(self.age) % self.refresh == 0:
                self.before.copy_(kept_rows(weight, self.pattern, INPUTS))
                self.after.copy_(kept_rows(weight, self.pattern, OUTPUTS))
            self.age += 1
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(low), weight.to(low)
        y = _Product.apply(x.reshape(-1, x.shape[-1]), weight, self.before, self.after)
        y = y if x.ndim == 2 else y.reshape(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias.to(y)


# How fast it is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quickest:
    """block: the fastest, 0 where the dense layer is. speed: how many times as fast as dense it is."""

    block: int
    speed: float


def training_pass(layer: nn.Module, x: Float[Tensor, "b in"], dy: Float[Tensor, "b out"]) -> None:
    """The layer's forward pass, and its backward pass from dy: gradients of x and of the weight."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).backward(dy)


def ways(
    outputs: int, inputs: int, batch: int, patterns: Sequence[Pattern], refresh: int = REFRESH
) -> dict[int, Callable[[], None]]:
    """By block (0: dense) `refresh` passes in training of one layer, one look-up of the patterns included."""
    generator = torch.Generator().manual_seed(0)
    like = nn.Linear(inputs, outputs, bias=False)
    like.weight.data.copy_(torch.randn(outputs, inputs, generator=generator))
    x, dy = (torch.randn(n, batch, generator=generator) for n in (inputs, outputs))
    layers: dict[int, nn.Module] = {0: like}
    layers |= {pattern.block: BlockLinear(like, pattern, refresh).train() for pattern in patterns}

    def taken(layer: nn.Module) -> Callable[[], None]:
        major = (lambda t: t) if isinstance(layer, BlockLinear) else Tensor.contiguous  # each as it likes it
        rows, grad = major(x.t()).detach().requires_grad_(), major(dy.t())

        def some() -> None:
            for _ in range(refresh):
                training_pass(layer, rows, grad)

        return some

    return {block: taken(layer) for block, layer in layers.items()}


def quickest(
    outputs: int, inputs: int, batch: int, pattern: Pattern = TWO_OF_EIGHT, *, turns: int = 3
) -> Quickest:
    """The block with which a training step of such a layer takes the least CPU time on this machine."""
    patterns = [replace(pattern, block=block) for block in BLOCKS]
    fitting = [p for p in patterns if not (outputs % p.block or inputs % p.block)]
    taken = ways(outputs, inputs, batch, fitting)
    seconds: dict[int, list[float]] = {block: [] for block in taken}
    for turn in range(turns + 1):
        for block, some in taken.items():
            start = time.process_time()
            some()
            if turn:
                seconds[block].append(time.process_time() - start)
    found = {block: statistics.median(times) for block, times in seconds.items()}
    best = min(found, key=lambda block: found[block])
    return Quickest(best, found[0] / found[best])
