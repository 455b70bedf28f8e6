"""Where rewrites are learnt and what they start with; s and diagonals keep away from zero."""

import pytest
import torch
from torch import nn

from netweight.core.affine import Band, Mixing
from netweight.core.compressed import weight_of
from netweight.core.sites import Site, column_ranges
from netweight.core.task import Data
from netweight.nn.learnt import (
    LEAST,
    AtQuery,
    AtSite,
    AtValue,
    Channels,
    Where,
    channels,
    detached,
    keep_away_from_zero,
    middle,
    places,
    start,
)
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task


def test_channels_by_hand():
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.tensor([[1.0, -4.0], [3.0, 2.0], [-7.0, 0.0], [-1.0, 0.0]])
    found = channels(model, ["0"], Data(x, batch=2))["0"]
    assert found.largest.tolist() == [7.0, 4.0]
    assert found.middle.tolist() == pytest.approx([0.99 * 2 + 0.01 * -4, 0.99 * -1])
    task, net = tiny_task(), tiny_model()
    inputs = net[:3](task.calibration.x)
    assert torch.equal(
        channels(net, ["3"], task.calibration)["3"].largest, inputs.abs().amax((0, 2, 3)).detach()
    )


def test_start_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    model[0].weight.data = torch.tensor([[1.0, 0.0, 2.0], [-4.0, 0.0, 1.0]])
    model[1].weight.data = torch.tensor([[-1.0, 0.0, 9.0], [2.0, 0.0, 1.0]])
    seen = Channels(torch.tensor([16.0, 1.0, 0.0]), torch.zeros(3))
    where = Where(model, "", ["0", "1"], {"0": seen})
    s = start(where, ("0", "1"), 0.5)
    assert s.tolist() == pytest.approx([2.0, 1 / (1e-5) ** 0.5, LEAST])
    assert start(where, ("0", "1"), 0.75)[0].item() == pytest.approx(16**0.75 / 4**0.25)


def test_a_network_of_unknown_blocks_gets_scales_at_the_sites_of_its_graph():
    model, task = tiny_language_model(), tiny_text_task()
    layers = ["query", "key", "value", "up", "down"]
    where = Where(model, "", layers, channels(model, layers, task.calibration))
    found = places(where, task.calibration, alpha=0.5, whole=True)
    assert [place.site.producer for place in found] == ["norm", "norm2", "up"]
    assert all(isinstance(place, AtSite) and place.size.ndim == 1 and place.shift is None for place in found)
    fewer = places(Where(model, "", layers[:2], where.seen), task.calibration, alpha=0.5, whole=True)
    assert not fewer  # not all readers of the norm
    columns = torch.stack([column_ranges(model, name) for name in layers[:3]]).amax(0)
    expected = (where.seen["query"].largest / columns).sqrt()
    assert torch.allclose(found[0].size, expected)


def test_no_shift_without_biases():
    model, task = tiny_language_model(), tiny_text_task()
    seen = channels(model, ["query", "up"], task.calibration)
    where = Where(model, "", ["query", "up"], seen)
    assert middle(where, "norm", ("query",)) is None
    assert torch.equal(middle(where, "norm2", ("up",)), seen["up"].middle)
    assert len(weight_of(model, "norm")) == 16 and middle(where, "down", ("up",)) is not None


def test_diagonals_keep_away_from_zero_and_their_sign():
    size = torch.tensor([[[1e-3, 5e-3], [1e-3, -1e-3]]], requires_grad=True)
    value = AtValue("v", "o", size, None)
    site = AtSite(Site("n", ("q",)), torch.tensor([-1.0, 0.5], requires_grad=True), None)
    turns = AtQuery("q", "k", torch.tensor([[1e-4, 1.0]]), torch.tensor([[1e-4, 0.0]]))
    keep_away_from_zero([value, site, turns])
    for found, expected in (
        (size, [[[LEAST, 5e-3], [1e-3, -LEAST]]]),
        (site.size, [LEAST, 0.5]),
        (turns.size, [[LEAST, 1.0]]),
        (turns.turn, [[1e-4, 0.0]]),
    ):
        assert torch.allclose(found.detach(), torch.tensor(expected))


def test_rotations_open_when_the_band_reaches_the_pair():
    turns = AtQuery("q", "k", torch.ones(1, 2), torch.full((1, 2), 3.0))
    (closed,), (wide,) = (turns.rewrites(Band(share, 0.5)) for share in (0.5, 1.0))
    assert torch.equal(closed.matrix[0], torch.eye(4))  # half-width 2 does not reach i + 2
    assert wide.matrix[0, 0].tolist() == [1.0, 0.0, -1.5, 0.0] and wide.matrix[0, 2, 0] == 1.5


def test_detached_tensors_have_no_history():
    A = torch.eye(2)[None].requires_grad_()
    made = detached(Mixing("v", "o", 2 * A))
    assert not made.matrix.requires_grad and torch.equal(made.matrix, 2 * torch.eye(2)[None])
