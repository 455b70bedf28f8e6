"""Layers of templates: pieces in their places, growth by hand, folding without a change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.mixture import GROWTHS, Halves, Mixed, kaiming, new_coefficients

INNER, FIRST, LAST = Halves(True, True), Halves(False, True), Halves(True, False)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(like: nn.Module, halves: Halves = INNER, templates: int = 2, seed: int = 0) -> Mixed:
    return Mixed(like, halves, chance(seed), templates=templates)


def by_definition(layer: Mixed, place: int) -> torch.Tensor:
    total = torch.zeros(())
    for j, c in enumerate(layer.coefficients[place]):
        total = total + c * layer.templates[place % 2][j]
    return total


@pytest.mark.parametrize(
    "like", [nn.Conv2d(4, 6, 3), nn.Linear(4, 6), nn.Conv1d(4, 6, 2), nn.Conv3d(4, 6, 1)]
)
def test_pieces_lie_in_their_places(like):
    layer = mixed(like)
    for member in (0, 1):
        layer.use(member)
        assert torch.allclose(layer.weight, by_definition(layer, member), atol=1e-6)
        assert layer.weight.shape == (3, 2, *like.weight.shape[2:])
    layer.grow("orthogonal", 1.0, chance())
    w, (p0, p1, p2, p3) = layer.weight, (by_definition(layer, place) for place in range(4))
    assert w.shape == like.weight.shape
    for found, piece in [(w[:3, :2], p0), (w[3:, 2:], p1), (w[:3, 2:], p2), (w[3:, :2], p3)]:
        assert torch.allclose(found, piece, atol=1e-6)


def test_the_first_layer_splits_its_output_and_the_last_its_input():
    first, last = mixed(nn.Conv2d(3, 4, 3), FIRST), mixed(nn.Linear(4, 10), LAST)
    assert first.weight.shape == (2, 3, 3, 3) and last.weight.shape == (10, 2)
    for member in (0, 1):
        last.biases[member].data.fill_(member + 1.0)
        first.biases[member].data.fill_(member + 1.0)
    for layer in (first, last):
        layer.grow("orthogonal", 1.0, chance())
    assert torch.allclose(first.weight, torch.cat([by_definition(first, m) for m in (0, 1)], 0), atol=1e-6)
    assert torch.allclose(last.weight, torch.cat([by_definition(last, m) for m in (0, 1)], 1), atol=1e-6)
    assert first.bias.tolist() == [1, 1, 2, 2] and last.bias.tolist() == [3.0] * 10
    x = torch.rand(5, 4)
    halves = [x[:, :2] @ last.piece(0).T + 1, x[:, 2:] @ last.piece(1).T + 2]
    assert torch.allclose(last(x), halves[0] + halves[1], atol=1e-6)


def test_groups_halve_with_the_channels():
    like = nn.Conv2d(8, 16, 3, groups=4, stride=2, padding=1)
    layer, x = mixed(like), torch.rand(2, 8, 6, 6)
    member = [layer.use(m) or layer(x[:, 4 * m : 4 * m + 4]) for m in (0, 1)]
    assert member[0].shape == (2, 8, 3, 3) and layer.plain().groups == 2
    layer.grow("orthogonal", 1.0, chance())
    assert torch.allclose(layer(x), torch.cat(member, 1), atol=1e-6) and layer.plain().groups == 4


@pytest.mark.parametrize("like", [
    nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=False),
    nn.Linear(4, 6),
])  # fmt: skip
def test_folded_layers_compute_the_same(like):
    layer = mixed(like)
    x = torch.rand(3, 4, 9, 9) if isinstance(like, nn.Conv2d) else torch.rand(3, 4)
    half = x[:, :2]
    plain = layer.plain()
    assert type(plain) is type(like) and torch.equal(plain(half), layer(half))
    layer.grow("random", 1.0, chance())
    plain = layer.plain()
    assert torch.equal(plain(x), layer(x)) and str(plain) == str(like)
    assert (plain.bias is None) == (like.bias is None)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in like.named_parameters()}


def test_coefficients_begin_orthogonal_and_templates_with_their_fan_in():
    rows = torch.stack([*mixed(nn.Linear(8, 8), templates=4).coefficients])
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
    rows = torch.stack([*mixed(nn.Linear(8, 8), templates=2).coefficients])
    assert torch.allclose(rows.T @ rows, torch.eye(2), atol=1e-5)  # four rows of two: columns alone can be
    for small, fan in ((False, 144), (True, 8 * 144)):
        drawn = kaiming(50, (8, 16, 3, 3), chance(), small=small)
        assert drawn.std() == pytest.approx((2 / fan) ** 0.5, rel=0.02)


@given(templates=st.integers(1, 6), seed=st.integers(0, 999))
def test_growth_by_its_definition(templates, seed):
    rows = torch.randn(4, templates, generator=chance(seed))
    two, three = new_coefficients(rows, "orthogonal", 1.0, chance())
    assert torch.equal(two, rows[2]) and three.norm() == pytest.approx(1, abs=1e-5)
    smallest = torch.linalg.svdvals(rows[:3]).min() if templates <= 3 else 0.0
    assert (rows[:3] @ three).norm() == pytest.approx(float(smallest), abs=1e-4)  # least aligned of all
    assert new_coefficients(rows, "orthogonal", 0.5, chance())[1].norm() == pytest.approx(0.5, abs=1e-5)
    near = new_coefficients(rows, "copy", 0.1, chance())
    assert all((a - b).norm() == pytest.approx(0.1, abs=1e-4) for a, b in zip(near, rows[:2]))
    assert all((row == 0).all() for row in new_coefficients(rows, "zero", 1.0, chance()))
    drawn = torch.stack(new_coefficients(rows, "random", 2.0, chance(seed)))
    assert (drawn >= 0).all() and (drawn <= 2).all() and not torch.equal(drawn[0], drawn[1])


def test_stored_parameters_are_the_full_layer_and_eight():
    like = nn.Conv2d(8, 16, 3, bias=False)
    count = sum(p.numel() for p in mixed(like).parameters())
    assert count == like.weight.numel() + 8  # 2 sets of 2 templates of a quarter each, 4 rows of 2


def test_banks_share_templates_of_one_shape():
    bank = {}
    a, b, c = (Mixed(nn.Linear(4, n), INNER, chance(), bank=bank, name="x") for n in (6, 6, 8))
    assert a.templates is b.templates and a.templates is not c.templates and len(bank) == 2


def test_grows_once_and_has_no_members_then():
    layer = mixed(nn.Linear(4, 4))
    layer.grow("zero", 1.0, chance())
    for again in (lambda: layer.grow("zero", 1.0, chance()), lambda: layer.use(0)):
        with pytest.raises(BadInput, match="build the templates again"):
            again()
    with pytest.raises(BadInput, match="did you mean 'zero'"):
        mixed(nn.Linear(4, 4)).grow("zeros", 1.0, chance())
    assert set(GROWTHS) == {"orthogonal", "random", "zero", "copy"}


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        (nn.Conv2d(4, 7, 3), "conv: 7 outputs do not split in two"),
        (nn.Linear(5, 4), "conv: 5 inputs do not split in two"),
        (nn.Conv2d(9, 6, 3, groups=3), "conv: 3 groups do not split in two"),
        (nn.ConvTranspose2d(4, 4, 3), "conv: a ConvTranspose2d is not made of templates"),
    ],
)
def test_what_does_not_split(like, sentence):
    with pytest.raises(DoesNotFit, match=sentence):
        Mixed(like, INNER, chance(), name="conv")


def test_state_is_kept_and_copies_are_free():
    layer = mixed(nn.Conv2d(4, 6, 3))
    twin = mixed(nn.Conv2d(4, 6, 3), seed=1)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)
    twin = copy.deepcopy(layer)
    twin.grow("zero", 1.0, chance())
    assert layer.member == 0 and layer.weight.shape == (3, 2, 3, 3)
