"""PowerNorm: a norm by quadratic means over the batch, for transformers as well as layer norm is.

Paper: Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, arXiv:2003.07845.

x_i are the features of token i of N (all of a batch but padding), each feature by itself, no mean is taken:

    PN-V    psi_B^2 = mean_i x_i^2,        z = x / sqrt(psi_B^2 + eps),        y = gamma z + beta
            dL/dx = (g - z mean_i(g_i z_i)) / sqrt(psi_B^2 + eps),        g = gamma dL/dy         (exact)
    PN      z = x / sqrt(psi^2 + eps) with the running psi^2 of before this batch, and then
            psi^2 <- r psi^2 + (1 - r) psi_B^2
            dL/dx = (g - nu z) / sqrt(psi^2 + eps),        and then
            nu <- nu (1 - (1 - s) mean_i z_i^2) + (1 - s) mean_i(g_i z_i)                         (estimate)

nu estimates the term that PN-V takes from the batch. The first `warmup` steps are PN-V, in which psi^2 is
the mean of all psi_B^2 so far and nu is filled from 0. Before it each token is scaled by the quadratic mean
of its features in `groups` groups (layer scale; groups = 0: not). In evaluation

    y = gamma x / sqrt(psi^2 + eps) + beta        of the scaled x,

one factor and one shift for each feature, whatever else is in the batch: `nn.power_rewrites` puts both into
the Linear layers that read the norm, and without layer scale nothing of it is left.

Differs from the paper: nothing that is known. The official code divides the gradient by psi_B where the paper
has psi, and uses nu in the warm-up, too. In mixed precision statistics stay in float32. Every forward pass in
training mode counts as a step: in second passes (sharpness-aware steps, recomputed activations) use
`unwatched`. Over several processes, means are over the rows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown

KINDS = ("pn", "pn-v")


class LayerScale(nn.Module):
    """x over the quadratic mean of each token's features, in groups of neighbouring ones; features last."""

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The scaled features."""
        parts = x.unflatten(-1, (self.groups, -1)) if self.groups > 1 else x
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).reshape(x.shape)


class PowerNorm(nn.Module):
    """The norm of `features` features on an axis, the last (-1, as layer norm) or 1 (as batch norm).

    kind: pn or pn-v. groups: of features in layer scale, 0 for none (the only choice on axis 1). warmup:
    steps. forward_decay, backward_decay: r and s. Gain and shift are `weight` and `bias`.
    """

    power: Tensor
    correction: Tensor
    step: Tensor

    def __init__(
        self,
        features: int,
        *,
        kind: str = "pn",
        groups: int = 1,
        warmup: int = 10_000,
        forward_decay: float = 0.9,
        backward_decay: float = 0.9,
        eps: float = 1e-5,
        axis: int = -1,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("kind of power norm", kind, KINDS)
        if groups < 0 or groups and features % groups or groups and axis != -1:
            raise DoesNotFit(
                f"groups={groups}: layer scale takes groups that divide the {features} features, which are "
                "the last axis; give 0 for none"
            )
        if not (0 <= forward_decay < 1 and 0 <= backward_decay < 1 and eps > 0 and warmup >= 0):
            raise BadInput(
                f"decays {forward_decay} and {backward_decay}, eps={eps}, warmup={warmup}: decays lie in "
                "[0, 1), eps above 0, and the warm-up is a number of steps"
            )
        self.features, self.kind, self.warmup, self.eps, self.axis = features, kind, warmup, eps, axis
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.scale = LayerScale(groups, eps) if groups else nn.Identity()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("power", torch.ones(features))
        self.register_buffer("correction", torch.zeros(features))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.watching = True
        self.kept: Tensor | None = None  # which tokens are no padding, see `padded`

    def reset_parameters(self) -> None:
        """Begin anew."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.power.fill_(1)
        self.correction.zero_()
        self.step.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """y; raises `DoesNotFit` for other features, or in training for a batch of a single token."""
        if x.shape[self.axis] != self.features:
            raise DoesNotFit(f"inputs of {tuple(x.shape)} do not have {self.features} features; give others")
        x = self.scale(x)
        if not self.training:
            return along(x, *self.affine(), self.axis)
        rows = x.movedim(self.axis, -1)
        z = self.normalized(rows.reshape(-1, self.features)).reshape(rows.shape).movedim(-1, self.axis)
        return along(z.to(x.dtype), self.weight, self.bias, self.axis)

    def affine(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Factor and shift of every feature in evaluation mode, after layer scale."""
        return self.weight * (self.power + self.eps).rsqrt(), self.bias

    def normalized(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """z in training mode; the statistics move on."""
        kept = None if self.kept is None else self.kept.reshape(-1)
        if kept is not None and len(kept) != len(rows):
            raise DoesNotFit(
                f"a mask of {len(kept)} tokens does not fit {len(rows)}; give one entry for each"
            )
        if (len(rows) if kept is None else int(kept.sum())) < 2:
            raise DoesNotFit("a power norm in training needs at least two tokens; give a larger batch")
        wide = rows.to(torch.promote_types(rows.dtype, self.power.dtype))
        moment = mean_of(wide.detach().square(), kept)
        first = int(self.step) < self.warmup
        batch = first or self.kind == "pn-v"
        divisor = moment if batch else self.power.clone()  # of before this batch
        if self.watching:
            self.step += 1
            old = 1 - 1 / int(self.step) if first else self.forward_decay
            self.power.copy_(old * self.power + (1 - old) * moment)
        return Divide.apply(wide, (divisor + self.eps).sqrt(), kept, self, batch)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Shown in the module's name."""
        return f"{self.features}, kind={self.kind}, warmup={self.warmup}, axis={self.axis}"


class Divide(torch.autograd.Function):
    """z = x / s; the gradient of PN-V if s is that of the batch, the estimate of PN if not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, kept: Tensor | None, norm: PowerNorm, batch: bool) -> Tensor:
        """`n d`; the norm's correction is read, and moves on, in the backward pass."""
        z = x / s
        ctx.save_for_backward(z, s, kept)
        ctx.norm, ctx.batch, ctx.watching = norm, batch, norm.watching
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dL/dx; padding has none."""
        z, s, kept = ctx.saved_tensors
        norm = ctx.norm
        if kept is not None:
            g = g * kept[:, None]
        both, parts = mean_of(g * z, kept), processes()  # each of them has a loss of its own, the mean counts
        found = (g - (both if ctx.batch else norm.correction * parts) * z) / s
        if kept is not None:
            found = found * kept[:, None]
        if ctx.watching:
            new = moved(norm.correction, mean_of(z * z, kept), both / parts, norm.backward_decay)
            # a float16 step that overflows is left out, and may not stay in what is remembered
            norm.correction.copy_(torch.where(new.isfinite(), new, norm.correction))
        return found, None, None, None, None


def moved(nu: Tensor, gamma: Tensor, both: Tensor, decay: float) -> Tensor:
    """nu of the next step, from the means of z^2 and of g z."""
    return nu * (1 - (1 - decay) * gamma) + (1 - decay) * both


def mean_of(rows: Float[Tensor, "n d"], kept: Bool[Tensor, " n"] | None) -> Float[Tensor, " d"]:
    """The mean over the rows that are kept, of all processes."""
    rows = rows if kept is None else rows * kept[:, None]
    count = rows.new_full((1,), len(rows)) if kept is None else kept.sum(0, keepdim=True).to(rows)
    both = summed(torch.cat([rows.sum(0), count]))
    return both[:-1] / both[-1]


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def along(x: Tensor, factor: Float[Tensor, " d"], shift: Float[Tensor, " d"], axis: int) -> Tensor:
    """factor x + shift, features on that axis."""
    shape = [-1] if axis == -1 else [-1] + [1] * (x.ndim - axis - 1)
    return x * factor.reshape(shape).to(x.dtype) + shift.reshape(shape).to(x.dtype)


@contextmanager
def padded(model: nn.Module, kept: Bool[Tensor, ...]) -> Iterator[None]:
    """Inside, tokens where `kept` is False count for no statistic of the model and pass no gradient back."""
    norms = [module for module in model.modules() if isinstance(module, PowerNorm)]
    for norm in norms:
        norm.kept = kept
    try:
        yield
    finally:
        for norm in norms:
            norm.kept = None


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Inside, passes in training mode leave running statistics as they are: for a step's second pass."""
    norms = [module for module in model.modules() if isinstance(module, PowerNorm)]
    before = [norm.watching for norm in norms]
    for norm in norms:
        norm.watching = False
    try:
        yield
    finally:
        for norm, was in zip(norms, before):
            norm.watching = was
