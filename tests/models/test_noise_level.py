"""Networks that are told the noise: scaling, time token, shapes, and that place and noise level matter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.models.noise_level import ResidualMLP, VisionTransformer, scaled, time_token


@given(st.floats(0.002, 80))
def test_noisy_inputs_have_one_standard_deviation(t):
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(4000, generator=generator) + t * torch.randn(4000, generator=generator)
    assert scaled(x[None], torch.tensor([t])).std().item() == pytest.approx(1.0, rel=0.05)


def test_the_scaling_is_one_number_per_example():
    x, t = torch.ones(2, 1, 2, 2), torch.tensor([0.0, math.sqrt(0.75)])
    assert scaled(x, t).amax((1, 2, 3)).tolist() == pytest.approx([2.0, 1.0])
    assert scaled(x, t).amin((1, 2, 3)).tolist() == pytest.approx([2.0, 1.0])


def test_the_time_token_by_hand():
    token = time_token(torch.tensor([1.0, 2.0]), 5)
    assert token[0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    angle = 250 * math.log(2)
    wanted = [math.cos(angle), math.cos(angle / 100), math.sin(angle), math.sin(angle / 100), 0.0]
    torch.testing.assert_close(token[1], torch.tensor(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "network", [ResidualMLP(48, 16, 2), VisionTransformer(3, 4, patch=2, width=16, depth=2, heads=4)]
)
def test_each_image_is_represented_on_its_own(network):
    x, t = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 2, 5)
    r = network(x, t)
    assert r.shape == (5, network.width) == (5, 16) and len(network.blocks) == 2
    torch.testing.assert_close(network(x[2:3], t[2:3]), r[2:3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(network(x[2:3], t[3:4]), r[2:3], atol=1e-3)
    torch.testing.assert_close(r.mean(1), torch.zeros(5), atol=1e-5, rtol=0)  # a norm comes last
    own = [p for part in (network.embed, network.blocks, network.norm) for p in part.parameters()]
    assert len(own) == len([*network.parameters()])


def test_the_transformer_sees_where_a_patch_is():
    torch.manual_seed(0)
    network = VisionTransformer(1, 4, patch=2, width=8, depth=1, heads=2)
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(network(x, torch.ones(1)), network(x.flip(3), torch.ones(1)), atol=1e-3)


def test_the_papers_size_is_the_default():
    with torch.device("meta"):
        network = VisionTransformer()
    assert network.embed.places.shape == (1, 66, 768) and len(network.blocks) == 12
    assert sum(p.numel() for p in network.parameters()) == 12 * (
        12 * 768**2 - 768 * (768 - 768) + 10 * 768
    ) + (48 * 768 + 768 + 66 * 768 + 768 + 2 * 768)


def test_patches_and_heads_have_to_fit():
    with pytest.raises(ValueError, match="side a multiple of patch"):
        VisionTransformer(1, 6, patch=4)
    with pytest.raises(ValueError, match="width of heads"):
        VisionTransformer(1, 4, width=10, heads=3)
