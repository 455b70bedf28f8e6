"""Networks that are told how noisy their input is: a vision transformer and a residual MLP.

The encoder of rRCM (Lei et al., 2025, arXiv:2501.13094) on the input scaling of EDM (Karras et al., 2022,
arXiv:2206.00364): for an input x_t of noise level t (standard deviation, inputs in [-1, 1])

    r = LayerNorm(class token of blocks([class; time(t); patches]))        of c_in(t) x_t,
    c_in(t) = 1 / sqrt(t^2 + sigma_data^2),  time(t) = (cos, sin)(250 ln(t) 10000^(-2i/width)).

`ResidualMLP` is for inputs without neighbours: its blocks work on one vector, to which time(t) is added.
Both are `embed`, `blocks` and `norm`, in the order in which data passes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1]
PERIOD = 10_000.0


def scaled(x: Float[Tensor, "b *in"], t: Float[Tensor, " b"]) -> Float[Tensor, "b *in"]:
    """c_in(t) x: noisy inputs of about one standard deviation, whatever the noise."""
    return x * (t**2 + SIGMA_DATA**2).rsqrt().reshape(-1, *[1] * (x.ndim - 1))


def time_token(t: Float[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """time(t), cosines first; an odd width ends in a 0."""
    rates = torch.exp(
        -math.log(PERIOD) * torch.arange(width // 2, device=t.device, dtype=t.dtype) / (width // 2)
    )
    angles = 250 * t.log()[:, None] * rates
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, width % 2))


class ResidualMLP(nn.Module):
    """`b *in` inputs and their noise levels to representations `b width`."""

    def __init__(self, inputs: int, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(_feed_forward(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b *in"], t: Float[Tensor, " b"]) -> Float[Tensor, "b width"]:
        """r of each input."""
        h = self.embed(scaled(x, t).flatten(1)) + time_token(t, self.width)
        for block in self.blocks:
            h = h + block(h)
        return self.norm(h)


class Patches(nn.Module):
    """Images to `b 2+patches width`: class token, time token, one token per patch, all with their place."""

    def __init__(self, channels: int, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        places = torch.empty(1, 2 + (side // patch) ** 2, width)
        self.places = nn.Parameter(nn.init.trunc_normal_(places, std=0.02))

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]) -> Float[Tensor, "b tokens width"]:
        """The tokens of inputs that are scaled already."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        time = time_token(t, patches.shape[2])[:, None]
        return torch.cat([self.token.expand(len(x), -1, -1), time, patches], 1) + self.places


class AttentionBlock(nn.Module):
    """Pre-norm block: every token looks at every other, then a feed-forward layer of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.feed_forward = _feed_forward(width, 4 * width)

    def forward(self, h: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        """The tokens after the block."""
        b, tokens, width = h.shape
        query, key, value = (
            self.qkv(self.norm(h)).reshape(b, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        seen = F.scaled_dot_product_attention(query, key, value)
        h = h + self.out(seen.transpose(1, 2).reshape(b, tokens, width))
        return h + self.feed_forward(h)


class VisionTransformer(nn.Module):
    """`b c h w` images and their noise levels to representations `b width`; rRCM-B on CIFAR-10 by default."""

    def __init__(
        self,
        channels: int = 3,
        side: int = 32,
        *,
        patch: int = 4,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        if side % patch or width % heads:
            raise ValueError(
                f"need side a multiple of patch, width of heads; got {side}, {patch}, {width}, {heads}"
            )
        self.width = width
        self.embed = Patches(channels, side, patch, width)
        self.blocks = nn.ModuleList(AttentionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]) -> Float[Tensor, "b width"]:
        """r of each image."""
        h = self.embed(scaled(x, t), t)
        for block in self.blocks:
            h = block(h)
        return self.norm(h[:, 0])


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
