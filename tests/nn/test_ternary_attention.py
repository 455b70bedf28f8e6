"""Rounded attention against the attention of transformers, with and without a cache."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.stored import put_together, take_apart
from netweight.models.small_bart import small_bart
from netweight.models.trained import seeded
from netweight.nn.elastic import Elastic, ElasticRounding
from netweight.nn.fake import DynamicRounding
from netweight.nn.ternary_attention import (
    ProductRoundings,
    RoundedAttention,
    RoundProducts,
    attentions,
    put,
)

pytest.importorskip("transformers")
X = torch.tensor(
    [[4, 5, 6, 2, 1, 0, 7, 8, 9, 1], [6, 2, 1, 1, 1, 0, 10, 1, 1, 1], [4, 4, 9, 9, 2, 0, 7, 7, 8, 8]]
)


def tiny():
    with seeded(0):
        return small_bart(12, 5, width=16, layers=1, heads=2, inner=24)


def rounded(model, make):
    model = copy.deepcopy(model)
    for name in attentions(model):
        put(model, name, ProductRoundings(*(make(signed) for signed in (True, True, True, False))))
    return model.eval()


def elastic(model):
    made = rounded(model, lambda signed: Elastic(2, signed=signed))
    with torch.no_grad():
        made(X)
    return made


def test_without_rounding_it_is_the_attention_of_transformers():
    model = tiny()
    assert attentions(model) == [
        f"hf.model.{place}" for place in
        ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn")
    ]  # fmt: skip
    same = rounded(model, lambda signed: nn.Identity())
    assert not attentions(same) and sum(isinstance(m, RoundedAttention) for m in same.modules()) == 3
    assert torch.allclose(same(X), model(X), atol=1e-6)
    assert model.state_dict().keys() == same.state_dict().keys()
    same.train()
    model.train()
    same(X).square().sum().backward()
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, same.get_parameter(name).grad, rtol=1e-3, atol=1e-3), name


def test_the_state_of_a_stock_network_leaves_only_the_roundings_missing():
    found = elastic(tiny()).load_state_dict(tiny().state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("_rounding." in name for name in found.missing_keys) and len(found.missing_keys) == 3 * 4 * 3


def test_products_are_of_rounded_numbers():
    net = elastic(tiny())
    attention = net.get_submodule("hf.model.encoder.layers.0.self_attn")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, -1e9])
    out, weights = attention(x, attention_mask=mask)

    def heads(rounding, layer):
        return rounding(layer(x)).reshape(2, 5, 2, 8).transpose(1, 2)

    q, k, v = (heads(getattr(attention, f"{n}_rounding"), getattr(attention, f"{n[0]}_proj")) for n in
               ("query", "key", "value"))  # fmt: skip
    assert all(len(each.unique()) <= 3 for each in (q, k, v))
    assert torch.allclose(weights, (q @ k.transpose(2, 3) / 8**0.5 + mask).softmax(-1), atol=1e-6)
    mixed = (attention.weights_rounding(weights) @ v).transpose(1, 2).reshape(2, 5, 16)
    assert torch.allclose(out, attention.out_proj(mixed), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 8])
def test_decoding_with_a_cache_is_computing_everything_again(bits):
    net = elastic(tiny()) if bits == 2 else rounded(tiny(), lambda signed: DynamicRounding(8).module())
    source, mask = X[:, :5], X[:, :5] != 1
    whole = net.hf(input_ids=source, attention_mask=mask, decoder_input_ids=X[:, 5:], use_cache=False).logits
    past, steps = None, []
    for place in range(5, 10):
        out = net.hf(
            input_ids=source, attention_mask=mask, decoder_input_ids=X[:, place : place + 1],
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        past = out.past_key_values
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    found = net.generate(X, 4)
    again = X[:, 5:6]
    for _ in range(found.shape[1]):
        again = torch.cat([again, net(torch.cat([source, again], 1))[:, -1:].argmax(-1)], 1)
    ends = (found == 2).cumsum(1).cumsum(1) <= 1  # up to the end; padded after it
    assert torch.equal(found[ends], again[:, 1:][ends])


def test_the_rewrite_does_the_same_and_survives_being_stored():
    model, net = tiny(), elastic(tiny())
    kinds = {ElasticRounding, DynamicRounding}
    for name in attentions(model):
        a = net.get_submodule(name)
        parts = [getattr(a, f"{n}_rounding").stored() for n in ("query", "key", "value", "weights")]
        rewrite = put_together(*take_apart(RoundProducts(name, *parts)))
        assert {type(rewrite.query), type(rewrite.weights)} <= kinds
        rewrite.apply(model)
    assert torch.equal(model(X), net(X))


def test_masks_are_added_whatever_the_network_was_set_to():
    model = tiny()
    fused = tiny()
    fused.hf.set_attn_implementation("sdpa")
    assert torch.allclose(fused(X), model(X), atol=1e-5)
    assert torch.allclose(rounded(fused, lambda signed: nn.Identity())(X), model(X), atol=1e-5)


def test_refuses_what_is_no_attention():
    model = tiny()
    with pytest.raises(DoesNotFit, match="hf.lm_head: a Linear is no attention of BART"):
        put(model, "hf.lm_head", ProductRoundings(*[nn.Identity()] * 4))
    assert attentions(nn.Sequential(nn.Linear(2, 2))) == []
