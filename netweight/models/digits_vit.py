"""A small vision transformer on scikit-learn's digits, trained where it is used.

Architecture: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929: patches, a
class token, learnt positions, blocks that normalise before attention and before the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.origin import Origin, mark
from netweight.data import digits
from netweight.models.digits_cnn import MEAN, STD
from netweight.models.trained import trained
from netweight.nn.normalize import Normalize
from netweight.nn.qk_attention import Attention

VERSION = 1
EPOCHS = 30
BATCH = 64
RATE = 3e-3


class Block(nn.Module):
    """x + attention(norm(x)), then the same with a feed-forward part of `ratio` times the width."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.act, self.down = (
            nn.Linear(width, ratio * width),
            nn.GELU(),
            nn.Linear(ratio * width, width),
        )

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The values of the next block."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images `b c size size` to scores `b classes`, one token for each patch and one that the class is read
    from; `normalize` comes first, so that eps is in units of the input."""

    def __init__(
        self,
        *,
        size: int = 8,
        patch: int = 2,
        width: int = 48,
        depth: int = 2,
        heads: int = 4,
        ratio: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.normalize = Normalize([MEAN], [STD])
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Scores, not normalised."""
        x = self.patches(self.normalize(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def digits_vit(seed: int = 0) -> nn.Module:
    """The trained network in eval mode; the same for the same seed, from the cache after the first time."""
    model = trained(f"digits-vit-v{VERSION}-{seed}", VisionTransformer, lambda bare: learn(bare, seed), seed)
    return mark(model, Origin("built-in", "digits-vit"))


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The same network, marked, with random weights."""
    return mark(VisionTransformer(), Origin("built-in", target))


def learn(model: nn.Module, seed: int) -> None:
    """AdamW on the training images with one rise and fall of the rate."""
    data = digits.train()
    assert data.y is not None
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
