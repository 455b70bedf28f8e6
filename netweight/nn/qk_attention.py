"""Attention whose query and key weights are one: the scores come from their product.

For head h with W_q,h and W_k,h of shape `d_h d` and no bias on either,

    A_h = X W_q,h^T W_k,h X^T / sqrt(d_h) = X (M_h X^T) / sqrt(d_h),        M_h = W_q,h^T W_k,h,   `d d`,

so that the product M_h can be rounded instead of two factors whose rounding errors multiply (query-key
reparameterization). It stores H d^2 numbers in place of 2 d^2 and takes as many more products.

Paper: Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv:2302.02210, section 4.3. The module names are the places where values are rounded (`PLACES`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import replace
from netweight.core.errors import DoesNotFit
from netweight.nn.quantizer import FromMean, Learnt


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d_h)) V of several heads side by side, then `output`; queries and keys have no
    bias, tokens see all tokens."""

    PLACES = ("entry", "queries", "keys", "values", "shares")

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise DoesNotFit(f"a width of {width} is not a multiple of {heads} heads; give another")
        self.width, self.heads = width, heads
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.entry, self.queries, self.keys, self.values, self.shares = (nn.Identity() for _ in range(5))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What each token takes from all tokens."""
        x = self.entry(x)
        q, k = (
            split(place(layer(x)), self.heads)
            for place, layer in ((self.queries, self.query), (self.keys, self.key))
        )
        return mixed(self, x, q @ k.transpose(-1, -2))


class QKAttention(nn.Module):
    """The same function with the products M_h of query and key: row h d + i of `product` is row i of M_h."""

    PLACES = ("entry", "turned", "values", "shares")

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.product: nn.Module = nn.Linear(width, heads * width, bias=False)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.entry, self.turned, self.values, self.shares = (nn.Identity() for _ in range(4))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What each token takes from all tokens."""
        x = self.entry(x)
        turned = self.turned(self.product(x).unflatten(-1, (self.heads, self.width)))  # b t h d
        each = x.unsqueeze(1).expand(-1, self.heads, -1, -1)
        return mixed(self, x, each @ turned.permute(0, 2, 3, 1))


def split(x: Float[Tensor, "b t d"], heads: int) -> Float[Tensor, "b h t e"]:
    """The part of each head."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def mixed(
    own: Attention | QKAttention, x: Float[Tensor, "b t d"], scores: Float[Tensor, "b h t t"]
) -> Float[Tensor, "b t d"]:
    """Shares from the scores, the values taken by them, and the last product."""
    shares = own.shares((scores * (own.width // own.heads) ** -0.5).softmax(-1))
    return own.output((shares @ split(own.values(own.value(x)), own.heads)).transpose(1, 2).flatten(2))


def joined(query: Float[Tensor, "d d"], key: Float[Tensor, "d d"], heads: int) -> Float[Tensor, "hd d"]:
    """All M_h, one below the other."""
    q, k = (w.unflatten(0, (heads, -1)) for w in (query, key))
    return (q.transpose(1, 2) @ k).flatten(0, 1)


@dataclass(frozen=True)
class JoinQueryKey:
    """Exact: the attention of that name with the products M_h in place of query and key."""

    attention: str

    def apply(self, model: nn.Module) -> None:
        """Replace in place; raises `DoesNotFit` for another module, or biases on query or key."""
        old = model.get_submodule(self.attention)
        if not isinstance(old, Attention) or old.query.bias is not None or old.key.bias is not None:
            what = (
                "it has a bias on query or key" if isinstance(old, Attention) else f"a {type(old).__name__}"
            )
            raise DoesNotFit(
                f"{self.attention}: query and key cannot be joined ({what}); give a qk_attention.Attention"
            )
        replace(model, self.attention, like(old))


def like(old: Attention) -> QKAttention:
    """The joined form of an attention, in its dtype and on its device."""
    with torch.random.fork_rng(devices=[]):
        new = QKAttention(old.width, old.heads).to(old.query.weight).train(old.training)
    new.value, new.output = old.value, old.output
    with torch.no_grad():
        new.product.weight.copy_(joined(old.query.weight, old.key.weight, old.heads))
    return new


def parted(new: QKAttention) -> Attention:
    """The attention that `new`, whose product is a `Product`, was made of; both share their weights."""
    assert isinstance(new.product, Product)
    with torch.random.fork_rng(devices=[]):
        old = Attention(new.width, new.heads).train(new.training)
    old.query, old.key = new.product.query, new.product.key
    old.value, old.output = new.value, new.output
    return old


class Product(nn.Module):
    """X M^T with M rounded on each call; the weights of query and key are what is trained.

    held: how near (in steps) an entry of M has to be to a threshold for its gradient to go on to query and
    key; None for all entries.
    """

    def __init__(self, old: Attention, rounding: Learnt | FromMean) -> None:
        super().__init__()
        self.query, self.key, self.heads = old.query, old.key, old.heads
        self.weight_rounding = rounding
        self.held: float | None = None

    def joined(self) -> Float[Tensor, "hd d"]:
        """M as it is now, in the precision of the weights whatever that of the pass."""
        with torch.autocast(self.query.weight.device.type, enabled=False):
            return joined(self.query.weight, self.key.weight, self.heads)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t hd"]:
        """M_h x of each head, side by side."""
        m = self.joined()
        if self.held is not None:
            m = torch.where(uncertain(m, self.weight_rounding, self.held), m, m.detach())
        return nn.functional.linear(x, self.weight_rounding(m))


@torch.no_grad()
def uncertain(weight: Tensor, rounding: Learnt | FromMean, near: float) -> Tensor:
    """Where a weight lies within `near` steps of a threshold between two levels (bool)."""
    levels = rounding.levels
    u = weight / rounding.size(weight) - levels.offset
    below = (u.floor() + 0.5).clamp(levels.low + 0.5, levels.high - 0.5)  # the nearest threshold
    return (u - below).abs() <= near
