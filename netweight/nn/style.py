"""Layers that change the style of features while a network trains: mean and deviation of each channel.

Papers: Zhang, Li, Li, Jia and Zhang, "Adversarial Style Augmentation for Domain Generalization", 2023,
arXiv:2301.12643 (AdvStyle); Li et al., "Uncertainty Modeling for Out-of-Distribution Generalization", ICLR
2022, arXiv:2202.03958 (DSU); Zhou et al., "Domain Generalization with MixStyle", ICLR 2021, arXiv:2104.02008.

For features x of shape `b c *places`, mu and sigma are mean and deviation over the places, of each channel of
each example; a new style (mu', sigma') gives

    x' = sigma' (x - mu) / sigma + mu',

    MixStyle   mu' = l mu + (1 - l) mu_j, sigma' likewise; j another row, l ~ Beta(alpha, alpha) of each row
    DSU        mu' = mu + e S_mu, sigma' = sigma + e' S_sigma, e ~ N(0, 1) of each row and channel;
               S_mu, S_sigma: the deviations over the batch of mu and of sigma
    AdvStyle   the same with learnt S_mu, S_sigma of each channel, whose gradients are turned round: dL/dS
               becomes -k dL/dS, so that one step of the optimizer lowers the loss in the weights and raises
               it in S. S begins as DSU has it on the first batch. A third of the batches pass unchanged, a
               third are moved by the learnt S, a third as by DSU.

Variances are unbiased, with 1e-6 added under the root, as in the official code. sigma' may be below 0, which
mirrors the channel around mu'. Evaluation is the identity. Chance comes from torch's own state, as dropout's.

Differs from the paper: style is of 1-d to 3-d places, computed in float32 at least. Where a batch is not
moved by the learnt S, its gradient is 0 and not missing, so that momentum goes on in every step, as in the
torch of the official code, and processes that draw apart have the same gradients to average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.quantizer import scaled_gradient

SMALLEST = 1e-6  # added to variances
CHANCE, ALPHA = 0.5, 0.1  # of DSU and MixStyle; of MixStyle's Beta distribution

Features = Float[Tensor, "b c ..."]


# The equations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """Mean and deviation of each channel, `b c 1 ...` (of one example each), or how far they vary."""

    mean: Tensor
    deviation: Tensor


def style_of(x: Features) -> Style:
    """(mu, sigma) over the places; raises `DoesNotFit` for features without two places."""
    if x.ndim < 3 or x[0, 0].numel() < 2:
        raise DoesNotFit(
            f"features of shape {tuple(x.shape)} have no style; it takes b c *places with two places or more"
        )
    places = tuple(range(2, x.ndim))
    return Style(x.mean(places, keepdim=True), (x.var(places, keepdim=True) + SMALLEST).sqrt())


def spread_of(style: Style) -> Style:
    """S: the deviations of mu and sigma over the batch, `1 c 1 ...`; raises `DoesNotFit` for one example."""
    if len(style.mean) < 2:
        raise DoesNotFit("the styles of one example do not vary; give batches of two examples or more")
    mean, deviation = (
        (part.var(0, keepdim=True) + SMALLEST).sqrt() for part in (style.mean, style.deviation)
    )
    return Style(mean, deviation)


def restyled(x: Features, now: Style, to: Style) -> Features:
    """x, of style `now`, in another style."""
    return (x - now.mean) / now.deviation * to.deviation + to.mean


def moved(now: Style, spread: Style, noise: Style) -> Style:
    """mu + e S_mu and sigma + e' S_sigma. noise: e and e', `b c 1 ...`."""
    return Style(now.mean + noise.mean * spread.mean, now.deviation + noise.deviation * spread.deviation)


def mixed(now: Style, other: Int64[Tensor, " b"], share: Float[Tensor, "b ..."]) -> Style:
    """l of a row's own style and 1 - l of that of row `other`. share: l, `b 1 1 ...`."""
    mean, deviation = (share * part + (1 - share) * part[other] for part in (now.mean, now.deviation))
    return Style(mean, deviation)


def noise_like(style: Style) -> Style:
    """Normal numbers of that shape, from torch's own state."""
    return Style(torch.randn_like(style.mean), torch.randn_like(style.deviation))


# The layers ------------------------------------------------------------------------------------------------


class MixStyle(nn.Module):
    """Styles mixed within the batch, with chance p for a batch; no gradient passes through styles."""

    def __init__(self, p: float = CHANCE, alpha: float = ALPHA) -> None:
        super().__init__()
        if not (0 <= p <= 1 and 0 < alpha < float("inf")):
            raise BadInput(f"p={p}, alpha={alpha}: a chance from 0 to 1, and a number above 0")
        self.p, self.alpha = p, alpha

    def forward(self, x: Features) -> Features:
        """x in evaluation; raises `DoesNotFit` for features without places."""
        if not self.training or drawn() >= self.p:
            return x
        now = style_of(wide(x.detach()))
        both = torch.full((2,), self.alpha, device=x.device)
        share = torch.distributions.Beta(both[0], both[1]).sample((len(x), *[1] * (x.ndim - 1)))
        other = torch.randperm(len(x), device=x.device)
        return restyled(wide(x), now, mixed(now, other, share)).to(x.dtype)


class DSU(nn.Module):
    """Styles moved as far as they vary within the batch, with chance p for a batch."""

    def __init__(self, p: float = CHANCE) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise BadInput(f"p={p}: a chance lies between 0 and 1")
        self.p = p

    def forward(self, x: Features) -> Features:
        """x in evaluation; raises `DoesNotFit` for one example, or features without places."""
        if not self.training or drawn() >= self.p:
            return x
        return by_batch(x)


class AdvStyle(nn.Module):
    """Styles moved by a learnt spread that raises the loss, in turns with DSU and with nothing.

    mean_spread, deviation_spread: S_mu and S_sigma, `c` each; to be trained with the weights, at their rate
    and without weight decay. k: how strongly they are pushed; below 0 they lower the loss.
    """

    begun: Tensor

    def __init__(self, channels: int, k: float = 1.0) -> None:
        super().__init__()
        if channels < 1 or not abs(k) < float("inf"):
            raise BadInput(f"channels={channels}, k={k}: give at least one channel and a finite k")
        self.k = k
        self.mean_spread = nn.Parameter(torch.zeros(channels))
        self.deviation_spread = nn.Parameter(torch.zeros(channels))
        self.register_buffer("begun", torch.tensor(False))

    @torch.no_grad()
    def begin(self, x: Features) -> None:
        """Set S to how far the styles of these features vary."""
        spread = spread_of(style_of(wide(x)))
        self.mean_spread.copy_(spread.mean.flatten())
        self.deviation_spread.copy_(spread.deviation.flatten())
        self.begun.fill_(True)

    def forward(self, x: Features) -> Features:
        """x in evaluation; raises `DoesNotFit` for one example, other channels, or no places."""
        if not self.training:
            return x
        if x.ndim < 3 or x.shape[1] != len(self.mean_spread):
            raise DoesNotFit(
                f"features of shape {tuple(x.shape)}: expected b {len(self.mean_spread)} *places"
            )
        if not self.begun:
            self.begin(x)
        turn = drawn()
        if 1 / 3 <= turn < 2 / 3:
            now = style_of(wide(x))
            return restyled(wide(x), now, moved(now, self.against(x.ndim), noise_like(now))).to(x.dtype)
        x = _Bystanders.apply(x, self.mean_spread, self.deviation_spread)
        return x if turn < 1 / 3 else by_batch(x)

    def against(self, axes: int) -> Style:
        """S for features of so many axes, with -k times its gradient."""
        shape = (1, -1, *[1] * (axes - 2))
        mean, deviation = (
            scaled_gradient(part.reshape(shape), -self.k)
            for part in (self.mean_spread, self.deviation_spread)
        )
        return Style(mean, deviation)


def by_batch(x: Features) -> Features:
    """x with styles moved as far as they vary within the batch."""
    now = style_of(wide(x))
    return restyled(wide(x), now, moved(now, spread_of(now), noise_like(now))).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: 1e-6 is next to nothing in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def drawn() -> float:
    """A number in [0, 1) from torch's own state, on the CPU whatever the device."""
    return torch.rand(()).item()


class _Bystanders(torch.autograd.Function):
    """x, with a gradient of 0 for parameters that have no part in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(*rest)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros_like(one) for one in ctx.saved_tensors)
