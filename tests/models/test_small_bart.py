"""The translator's form: rows in, logits out."""

import pytest
import torch

from netweight.core.errors import DoesNotFit
from netweight.models.small_bart import small_bart
from netweight.models.trained import seeded

pytest.importorskip("transformers")
X = torch.tensor([[4, 5, 2, 1, 0, 7, 8, 9], [6, 8, 9, 2, 0, 10, 1, 1]])


def tiny():
    with seeded(0):
        return small_bart(12, 4, width=16, layers=1, heads=2, inner=24)


def test_logits_are_those_of_transformers_and_padding_is_not_read():
    model = tiny()
    wanted = model.hf(
        input_ids=X[:, :4], attention_mask=(X[:, :4] != 1).long(), decoder_input_ids=X[:, 4:]
    ).logits
    assert torch.equal(model(X), wanted)
    assert torch.allclose(model(X)[:1], model(X[:1]), atol=1e-6)
    assert model.mask(X).tolist() == [[True, True, True, False], [True] * 4]
    without = model.hf(input_ids=X[:1, :3], decoder_input_ids=X[:1, 4:]).logits
    assert torch.allclose(model(X)[:1], without, atol=1e-5)
    later = X.clone()
    later[:, 6:] = 11
    assert torch.equal(model(later)[:, :2], model(X)[:, :2])


def test_one_table_for_everything():
    model = tiny()
    inner = model.hf.model
    assert inner.encoder.embed_tokens is inner.shared is inner.decoder.embed_tokens
    assert model.hf.lm_head.weight is inner.shared.weight
    assert float(inner.encoder.layers[0].fc1.weight.detach().abs().max()) > 0.2  # Glorot, not 0.02


def test_greedy_tokens():
    model = tiny()
    found = model.generate(X, 3)
    first = model(X)[:, 0].argmax(-1)
    assert found.shape == (2, 3)
    assert torch.equal(found[:, 0], first)


def test_bad_input():
    with pytest.raises(DoesNotFit, match="4 token ids, of which the source takes 4"):
        tiny()(X[:, :4])
    with pytest.raises(DoesNotFit, match="a width of 10 is not a multiple of 4 heads"):
        small_bart(12, 4, width=10)
