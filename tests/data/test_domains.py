"""Domains: what each does to an image, how examples are dealt out, equal shares, and files that hold them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data
from netweight.data import arrays, digits
from netweight.data.domains import (
    DIGITS,
    NOISE,
    PHOTOS,
    blurred,
    dealt,
    domains_of,
    edges,
    every,
    in_equal_shares,
    inverted,
    noisy,
    rotated,
)


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_images_stay_images_and_the_same_come_twice():
    x = torch.rand(5, 3, 12, 12, generator=chance())
    for name, domain in {**DIGITS, **PHOTOS}.items():
        found = domain(x, chance())
        assert found.shape == x.shape and found.min() >= 0 and found.max() <= 1, name
        assert torch.equal(found, domain(x, chance())), name
        assert torch.equal(found, x) == (name in ("clean", "original")), name


def test_what_each_domain_does():
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 7] = 1.0  # three to the right of the middle
    turned = rotated(dot, chance())[0, 0]
    row, column = divmod(int(turned.argmax()), 9)
    assert (row, column) == (3, 7)  # against the clock: up by 3 sin 25 = 1.3
    assert torch.equal(inverted(dot, chance()), 1 - dot)
    assert blurred(dot, 1)[0, 0, 3:6, 6:9].flatten().tolist() == [
        value / 16 for value in (1, 2, 1, 2, 4, 2, 1, 2, 1)
    ]
    grey = torch.full((1, 1, 50, 50), 0.5)
    assert (noisy(grey, chance()) - 0.5).std().item() == pytest.approx(NOISE, rel=0.05)
    assert not edges(grey, chance()).any()
    step = torch.zeros(1, 1, 5, 6)
    step[..., 3:] = 0.2
    assert torch.allclose(edges(step, chance())[0, 0, 2], torch.tensor([0, 0, 0.4, 0.4, 0, 0]))
    colours = torch.rand(2, 3, 4, 4, generator=chance())
    assert torch.equal(PHOTOS["grey"](colours, chance())[:, 0], PHOTOS["grey"](colours, chance())[:, 2])


def test_each_example_is_dealt_to_one_domain_and_every_gives_all():
    data = digits.train()
    found = dealt(data, DIGITS, 0)
    assert found.domain.bincount().tolist() == [315, 314, 314, 314]
    for number in (0, 2):
        rows = found.domain == number
        assert torch.equal(found.x[rows], [*DIGITS.values()][number](data.x[rows], chance()))
    assert torch.equal(found.y, data.y) and not torch.equal(dealt(data, DIGITS, 1).domain, found.domain)
    assert torch.equal(dealt(data, DIGITS, 0).x, found.x)
    one = every(digits.test(), DIGITS, 2)
    assert torch.equal(one.x, 1 - digits.test().x) and one.domain.unique().tolist() == [2]
    left = found.rows(found.domain != 1)
    assert left.domain.unique().tolist() == [0, 2, 3] and len(left) == 943


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4), share=st.integers(1, 5), more=st.integers(0, 1)
)
def test_every_step_has_the_same_share_and_the_largest_domain_is_seen_once(sizes, share, more):
    domain = torch.cat([torch.full((size,), 3 * i) for i, size in enumerate(sizes)])
    domain = domain[torch.randperm(len(domain), generator=chance())]
    batch = share * len(sizes) + more
    order = in_equal_shares(domain, batch)
    steps = order(chance())
    assert len(steps) == -(-max(sizes) // share)
    for rows in steps:
        assert domain[rows].unique(return_counts=True)[1].tolist() == [share] * len(sizes)
    seen = torch.cat(list(steps))
    for number, size in enumerate(sizes):
        times = seen[domain[seen] == 3 * number].bincount(minlength=len(domain))[domain == 3 * number]
        assert times.min() >= len(steps) * share // size and times.max() <= times.min() + 1


def test_the_order_is_chance_s():
    order = in_equal_shares(torch.arange(40) % 2, 8)
    first, same, other = (torch.cat(list(order(torch.Generator().manual_seed(seed)))) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_file_holds_domains(tmp_path):
    x, y = np.random.default_rng(0).random((20, 1, 4, 4)).astype(np.float32), np.arange(20) % 3
    names = np.array(["photo", "art"])[np.arange(20) % 2]
    np.savez(tmp_path / "a.npz", x=x, y=y, domain=names)
    split = arrays.load(tmp_path / "a.npz")
    for part in (split.calibration, split.test):
        for image, label, domain in zip(part.x, part.y, part.domain):
            row = next(i for i in range(20) if np.array_equal(image.numpy(), x[i]))
            assert (label, domain) == (row % 3, 1 - row % 2)
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, domain_train=np.arange(20) // 10, x_test=x, y_test=y)
    parts = arrays.load(tmp_path / "b.npz")
    assert parts.train.domain.tolist() == [0] * 10 + [1] * 10 and parts.test.domain is None
    assert parts.calibration.domain is not None
    np.savez(tmp_path / "c.npz", x=x, y=y, domain=np.arange(19))
    with pytest.raises(BadInput, match=r"domains of shape \(19,\)"):
        arrays.load(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=x, y=y, domain=np.arange(20) / 2)
    with pytest.raises(BadInput, match="give one whole number or name each"):
        arrays.load(tmp_path / "d.npz")


def test_mistakes_are_said():
    x = torch.rand(4, 1, 3, 3)
    with pytest.raises(DoesNotFit, match="gaqat needs the domain of each example; give a .npz file"):
        domains_of(Data(x), "gaqat")
    with pytest.raises(DoesNotFit, match="all examples are of one domain"):
        domains_of(Data(x, domain=torch.ones(4, dtype=torch.long)), "gaqat")
    with pytest.raises(BadInput, match="batch=2: it holds no example of each of 3 domains"):
        in_equal_shares(torch.arange(3), 2)
