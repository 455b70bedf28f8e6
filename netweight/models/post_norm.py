"""A small transformer that normalises after each residual sum, as the first ones did: a language model.

Architecture: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762, the decoder without
an encoder, with learnt positions: x <- norm(x + attention(x)), x <- norm(x + feed-forward(x)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit


class PostNormBlock(nn.Module):
    """Causal attention and a feed-forward part of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.joint, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The values of the next block."""
        b, t, d = x.shape
        parts = self.joint(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = self.norm1(x + self.output(mixed.transpose(1, 2).reshape(b, t, d)))
        return self.norm2(x + self.down(F.relu(self.up(x))))


class PostNormTransformer(nn.Module):
    """Token ids `b t` to scores of the next tokens, `b t vocabulary`, for t up to `length`."""

    def __init__(
        self, vocabulary: int, *, width: int = 64, layers: int = 2, heads: int = 4, length: int = 64
    ):
        super().__init__()
        if width % heads:
            raise DoesNotFit(f"a width of {width} is not a multiple of {heads} heads; give another")
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Int64[Tensor, "b t"]) -> Float[Tensor, "b t vocabulary"]:
        """Scores, not normalised."""
        if tokens.shape[1] > self.place.num_embeddings:
            raise DoesNotFit(f"{tokens.shape[1]} tokens, but there are {self.place.num_embeddings} places")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.token(tokens) + self.place(places))
        for block in self.blocks:
            x = block(x)
        return self.head(x)
