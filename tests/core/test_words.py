"""Synonyms: exact against enumeration, and proofs of a network of words."""

import itertools

import pytest
import torch
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Perturbation
from netweight.core.words import Synonyms
from netweight.verification.bounds import bounds


def sentences(b=2, t=4, s=2, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, d, generator=generator)
    return x, x.unsqueeze(2) + torch.randn(b, t, s, d, generator=generator)


def everything(x, choices, k):
    """Every sentence of the set of one example."""
    t, s, _ = choices.shape
    found = []
    for picks in itertools.product(range(s + 1), repeat=t):
        if sum(p > 0 for p in picks) <= k:
            found.append(torch.stack([x[i] if p == 0 else choices[i, p - 1] for i, p in enumerate(picks)]))
    return torch.stack(found)


@pytest.mark.parametrize("k", [0, 1, 2, 4, 9])
def test_support_is_the_largest_of_all_sentences(k):
    x, choices = sentences()
    within = Synonyms(choices, k)
    a = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    found = within.support(a, x)
    for i in range(2):
        values = torch.einsum("rtd,ntd->rn", a[i].double(), everything(x[i], choices[i], k).double()).amax(1)
        assert (found[i].double() >= values).all()
        torch.testing.assert_close(found[i].double(), values, rtol=1e-5, atol=1e-5)
    assert isinstance(within, Perturbation)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_points_are_inside_and_others_are_not(k):
    x, choices = sentences(b=3)
    within, generator = Synonyms(choices, k), torch.Generator().manual_seed(0)
    lower, upper = within.corners(x)
    for _ in range(20):
        for s in (
            within.sample(x, generator),
            within.project(x + torch.randn(x.shape, generator=generator), x),
        ):
            assert within.contains(s, x).all()
            assert (lower <= s).all() and (s <= upper).all()
    assert not within.contains(x + 1e-3, x).any()
    assert torch.equal(within.project(x, x), x)
    if k < 4:
        assert not within.contains(choices[:, :, 0], x).any()


def test_bounds_hold_for_every_sentence_and_beat_the_box():
    x, choices = sentences(b=3, t=4, d=3)
    choices = x.unsqueeze(2) + 0.1 * (choices - x.unsqueeze(2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    width = []
    for k in (1, 2, 4):
        found = bounds(model, x, Synonyms(choices, k))
        width.append(float((found.upper - found.lower).mean()))
        for i in range(3):
            y = model(everything(x[i], choices[i], k)).double()
            assert (found.lower[i] <= y).all() and (y <= found.upper[i]).all()
    assert width[0] < 0.8 * width[1] < 0.8 * width[2]


def test_nonsense_is_one_sentence():
    x, choices = sentences()
    with pytest.raises(BadInput, match="k of at least 0"):
        Synonyms(choices, -1)
    with pytest.raises(DoesNotFit, match="one for each word"):
        Synonyms(choices).corners(x[:, :2])
