"""Random views: what a seed, a size and a chance promise, and each change against its definition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.data.augment import BYOL, View, blurred, coloured, cropped, grey, turned, view

NOTHING = View(crop=1.0, brightness=0, contrast=0, saturation=0, hue=0, jitter=0, grey=0, blur=0, flip=0)


def images(count: int = 6, channels: int = 3, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25)
@given(st.integers(1, 4), st.sampled_from([1, 3, 4]), st.integers(6, 12), st.integers(0, 99))
def test_a_view_is_an_image_of_the_same_size_in_range(count, channels, side, seed):
    x = images(count, channels, side, seed)
    for how in BYOL:
        found = view(x, how, chance(seed))
        assert found.shape == x.shape and found.dtype == x.dtype
        assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
        assert torch.equal(found, view(x, how, chance(seed)))


def test_two_views_differ_and_each_image_has_its_own():
    x = images(1).expand(8, -1, -1, -1)
    first, second = (view(x, BYOL[0], generator) for generator in [chance()] * 2)
    assert not torch.allclose(first, second, atol=0.01)
    assert all(not torch.allclose(first[0], first[i], atol=0.01) for i in range(1, 8))


def test_a_grey_image_stays_grey():
    found = view(images(5, 1).expand(-1, 3, -1, -1), BYOL[0], chance())
    torch.testing.assert_close(found, grey(found).expand_as(found), atol=1e-3, rtol=0)


def test_mirroring_alone_reverses_the_columns_of_half_of_the_images():
    x = images(400)
    always = cropped(x, View(crop=1.0, flip=1.0), chance())
    whole = View(crop=1.0, flip=0.0)
    plain = cropped(x, whole, chance())
    torch.testing.assert_close(always, plain.flip(3), atol=1e-5, rtol=0)
    some = cropped(x, View(crop=1.0, flip=0.5), chance())
    share = (some - plain.flip(3)).abs().amax((1, 2, 3)).lt(1e-5).float().mean()
    assert 0.4 < share < 0.6


def test_a_crop_keeps_at_least_its_share_of_the_area():
    ramp = torch.linspace(0, 1, 64).expand(500, 1, 64, 64)
    spans = [
        (cut.amax((1, 2, 3)) - cut.amin((1, 2, 3)))
        for cut in (cropped(x, View(crop=0.25, flip=0), chance(3)) for x in (ramp, ramp.mT.contiguous()))
    ]
    area = spans[0] * spans[1]
    assert area.min() > 0.2 and area.median() < 0.7 and area.max() > 0.85


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-0.5, 0.5))
def test_a_turned_hue_keeps_the_brightness_and_turns_all_the_way_round(r, g, b, circles):
    x = torch.tensor([r, g, b]).reshape(1, 3, 1, 1)
    found = turned(x, torch.tensor([circles]))
    assert grey(found).item() == pytest.approx(grey(x).item(), abs=1e-3)
    torch.testing.assert_close(turned(found, torch.tensor([-circles])), x, atol=1e-3, rtol=0)
    torch.testing.assert_close(turned(x, torch.tensor([1.0])), x, atol=1e-4, rtol=0)


def test_a_third_of_a_circle_takes_red_to_another_primary():
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(3, -1, -1, -1)
    found = turned(red, torch.tensor([0.0, 1 / 3, -1 / 3])).argmax(1).flatten().tolist()
    assert found[0] == 0 and sorted(found) == [0, 1, 2]


def test_colours_move_by_no_more_than_their_strength():
    x = 0.25 + 0.25 * images(300)
    bright = coloured(x, View(brightness=0.4, contrast=0, saturation=0, hue=0), chance())
    factors = (bright / x).amax((1, 2, 3))
    assert factors.min() > 0.599 and factors.max() < 1.401 and factors.std() > 0.2
    torch.testing.assert_close(bright, x * factors[:, None, None, None])
    flat = coloured(x, View(brightness=0, contrast=1.0, saturation=0, hue=0), chance())
    torch.testing.assert_close(grey(flat).mean((1, 2, 3)), grey(x).mean((1, 2, 3)), atol=0.02, rtol=0)


def test_a_blur_spreads_a_point_as_a_gaussian_does():
    point = torch.zeros(1, 2, 41, 41)
    point[0, 0, 20, 20] = 1.0
    found = blurred(point, View(blur_width=(2 / 41, 2 / 41)), chance())
    assert found[0, 1].abs().max() == 0 and found.sum().item() == pytest.approx(1.0, abs=1e-4)
    places = torch.arange(41.0) - 20
    for axis in (0, 1):
        assert (found[0, 0].sum(axis) * places**2).sum().item() == pytest.approx(4.0, rel=0.05)
    constant = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(blurred(constant, View(), chance()), constant)


def test_solarizing_turns_bright_pixels_over():
    x = images(200)
    plain = view(x, NOTHING, chance())
    torch.testing.assert_close(
        view(x, replace(NOTHING, solarize=1.0), chance()), plain.where(plain < 0.5, 1 - plain)
    )
    greyed = view(x, replace(NOTHING, grey=1.0), chance())
    torch.testing.assert_close(greyed, grey(plain).expand_as(plain))
