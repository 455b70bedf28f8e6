"""The post-norm transformer: causal, normalised after each sum, with sentences for what does not fit."""

import pytest
import torch

from netweight.core.errors import DoesNotFit
from netweight.models.post_norm import PostNormBlock, PostNormTransformer


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = PostNormTransformer(9, width=8, layers=2, heads=2, length=6).eval()
    x = torch.randint(9, (2, 6))
    other = x.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 9
    assert torch.allclose(model(x)[:, :4], model(other)[:, :4], atol=1e-6)
    assert not torch.allclose(model(x)[:, 4:], model(other)[:, 4:], atol=1e-3)
    assert model(x[:, :3]).shape == (2, 3, 9)


def test_each_sum_is_normalised():
    torch.manual_seed(0)
    y = PostNormBlock(8, 2)(torch.randn(2, 3, 8) * 9)
    assert torch.allclose(y.mean(-1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(y.var(-1, correction=0), torch.ones(2, 3), atol=1e-3)


def test_what_does_not_fit():
    with pytest.raises(DoesNotFit, match="a width of 10 is not a multiple of 4 heads"):
        PostNormTransformer(9, width=10)
    with pytest.raises(DoesNotFit, match="7 tokens, but there are 6 places"):
        PostNormTransformer(9, length=6)(torch.zeros(1, 7, dtype=torch.int64))
