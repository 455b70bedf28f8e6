"""Attention of a BART of transformers whose products are taken of rounded numbers.

Paper: Liu et al., "Binary and Ternary Natural Language Generation", ACL 2023, arXiv:2306.01841, section 2.2.
Queries q, keys k, values v and weights are rounded, each by its own rounding R, before both products:

    R_w(dropout(softmax(R_q(q) R_k(k)' / sqrt(d) + mask))) R_v(v)

q, k and v are rounded before they are split into heads, so what a cache of keys and values holds is rounded
already, and decoding with it gives what computing everything again gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import replace
from netweight.core.errors import DoesNotFit, need
from netweight.nn.elastic import ElasticRounding
from netweight.nn.fake import DynamicRounding

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class ProductRoundings:
    """What rounds queries, keys, values and weights of an attention: modules from tensor to tensor."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    weights: nn.Module


class RoundedAttention(nn.Module):
    """A `BartAttention` of the same four layers with roundings before its two products.

    Like that it gives its output `b t d` and its weights `b heads t s`, these before they are rounded.
    """

    def __init__(self, like: Any, how: ProductRoundings) -> None:
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, getattr(like, name))
        self.heads, self.scaling, self.dropout = like.num_heads, like.scaling, like.dropout
        self.layer_idx = like.layer_idx
        self.query_rounding, self.key_rounding = how.query, how.key
        self.value_rounding, self.weights_rounding = how.value, how.weights
        self.train(like.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "b t d"],
        key_value_states: Float[Tensor, "b s d"] | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        """Output and weights; arguments as transformers gives them, the mask is added to the scores."""
        query = self.split(self.query_rounding(self.q_proj(hidden_states)))
        key, value = self.keys_and_values(hidden_states, key_value_states, past_key_values)
        scores = query @ key.transpose(2, 3) * self.scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = self.weights_rounding(weights) @ value
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def split(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t each"]:
        """The part of each head."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, own: Tensor, other: Tensor | None, past: Any) -> tuple[Tensor, Tensor]:
        """Of the decoder's own tokens, or of the encoder's if `other` is there; what `past` holds is used."""
        cache = getattr(past, "self_attention_cache" if other is None else "cross_attention_cache", past)
        if other is not None and past is not None and past.is_updated.get(self.layer_idx):
            return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        source = own if other is None else other
        key = self.split(self.key_rounding(self.k_proj(source)))
        value = self.split(self.value_rounding(self.v_proj(source)))
        if cache is None:
            return key, value
        if other is not None:
            past.is_updated[self.layer_idx] = True
        return cache.update(key, value, self.layer_idx)


Stored = ElasticRounding | DynamicRounding


@dataclass(frozen=True)
class RoundProducts:
    """A rewrite (not exact): the attention of that name gets these roundings before its products."""

    name: str
    query: Stored
    key: Stored
    value: Stored
    weights: Stored

    def apply(self, model: nn.Module) -> None:
        """Replace in place; raises `DoesNotFit` for what is no attention of BART."""
        parts = (self.query, self.key, self.value, self.weights)
        put(model, self.name, ProductRoundings(*(part.module() for part in parts)))


def put(model: nn.Module, name: str, how: ProductRoundings) -> None:
    """Round the products of that attention, in place; masks are added to scores from then on ("eager")."""
    attention = model.get_submodule(name)
    if not isinstance(attention, _kind()):
        raise DoesNotFit(f"{name}: a {type(attention).__name__} is no attention of BART; leave it out")
    device = attention.q_proj.weight.device
    replace(model, name, RoundedAttention(attention, how).to(device))
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and module.config._attn_implementation != "eager":
            module.set_attn_implementation("eager")


def attentions(model: nn.Module) -> list[str]:
    """Names of the attentions of BART in the network; none where transformers is not in use."""
    if not any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        return []
    return [name for name, module in model.named_modules() if isinstance(module, _kind())]


def _kind() -> type[nn.Module]:
    return need("transformers.models.bart.modeling_bart").BartAttention
