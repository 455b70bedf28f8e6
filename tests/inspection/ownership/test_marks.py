"""Bits in weights and triggers: what is read, how many fit, and what chance alone gives."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.core.task import Data, outputs
from netweight.inspection.ownership import trigger_mark, weight_mark
from netweight.inspection.ownership.trigger_mark import abstract, asked, commitment
from netweight.inspection.ownership.weight_mark import Key, averaged, capacity, projected, read
from netweight.testing import tiny_language_model, tiny_model, tiny_task


def conv(weight: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(weight.shape[1], len(weight), weight.shape[2]))
    model[0].weight = nn.Parameter(weight)
    return model


def test_a_mark_is_read_by_its_definition():
    g = torch.Generator().manual_seed(0)
    W, key = torch.randn(5, 3, 2, 2, generator=g), weight_mark.drawn(12, 7, 3)
    signs = []
    for row in key.X:
        total = 0.0
        for place, (c, i, j) in enumerate(itertools.product(range(3), range(2), range(2))):
            total += float(row[place]) * float(W[:, c, i, j].mean())
        signs.append(int(total > 0))
    found = read(conv(W), "0", Key(key.X, torch.tensor(signs)))
    assert (found.errors, found.of, found.rate, found.p) == (0, 7, 0.0, 0.5**7)
    flipped = torch.tensor([1 - signs[0], *signs[1:]])
    assert read(conv(W), "0", Key(key.X, flipped)).p == pytest.approx(8 / 2**7)
    assert read(conv(W), "0", Key(key.X, flipped)).rate == 1 / 7


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_scaling_of_weights_changes_no_bit(scale, seed):
    W = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    key = weight_mark.drawn(12, 9, seed)
    assert read(conv(W), "0", key) == read(conv(scale * W), "0", key)


def test_random_keys_are_wrong_half_of_the_time():
    W = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rates = np.array([read(conv(W), "0", weight_mark.drawn(48, 40, seed)).rate for seed in range(400)])
    spread = 1 / (2 * np.sqrt(40))
    assert abs(rates.mean() - 0.5) < 4 * spread / np.sqrt(400)
    assert (abs(rates - 0.5) <= 1.96 * spread).mean() > 0.9


@pytest.mark.parametrize(("inputs", "bits"), [(2, 4), (2, 3), (3, 5), (3, 3), (1, 2)])
def test_capacity_counts_the_words_that_weights_can_show(inputs, bits):
    g = torch.Generator().manual_seed(inputs + 10 * bits)
    X, w = torch.randn(bits, inputs, generator=g), torch.randn(200_000, inputs, generator=g)
    words = {tuple(word) for word in (w @ X.T > 0).unique(dim=0).tolist()}
    assert capacity(inputs, bits) == pytest.approx(len(words) / 2**bits)


def test_more_bits_than_weights_cannot_all_be_right():
    assert capacity(5, 5) == 1 and capacity(5, 10) == 0.5 and capacity(144, 48) == 1
    W = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(W)
    assert all(read(model, "0", weight_mark.drawn(3, 40, seed)).errors > 0 for seed in range(50))


def test_a_packed_layer_is_read_as_it_is_stored():
    model, task = tiny_model(), tiny_task()
    small = assemble(model, rtn(model, task, ["7"], RTN(2)), Plan({}))
    key = weight_mark.drawn(144, 140, 0)
    found = read(small.model, "7", key)
    assert found == read(small.plain(), "7", key) and found != read(model, "7", key)


def test_a_key_that_does_not_fit_and_nonsense():
    model = tiny_model()
    with pytest.raises(DoesNotFit, match="7: a key of 9 numbers a bit for 144 averaged weights"):
        read(model, "7", weight_mark.drawn(9, 3, 0))
    with pytest.raises(DoesNotFit, match="1: a BatchNorm2d carries no mark"):
        read(model, "1", weight_mark.drawn(9, 3, 0))
    with pytest.raises(BadInput, match="unknown layer"):
        read(model, "none", weight_mark.drawn(9, 3, 0))
    for call in (weight_mark.drawn, lambda a, b, _: capacity(a, b)):
        with pytest.raises(BadInput, match="0 bits in 3 weights"):
            call(3, 0, 0)


def test_a_key_is_committed_to():
    key = weight_mark.drawn(6, 4, 0)
    assert (
        key.commitment() == weight_mark.drawn(6, 4, 0).commitment() != weight_mark.drawn(6, 4, 1).commitment()
    )
    other = Key(key.X, 1 - key.bits)
    assert key.commitment() != other.commitment() and len(key.commitment()) == 64
    assert torch.equal(averaged(torch.ones(4, 2, 3)), torch.ones(6))
    assert projected(torch.ones(4, 2, 3), key.X).shape == (4,)


# Triggers ---------------------------------------------------------------------------------------------------


def test_triggers_are_asked_for_classes_that_the_network_does_not_give():
    model, task = tiny_model(), tiny_task()
    made = trigger_mark.drawn(model, task.test, 40, 0)
    assert made.x.shape == (40, 4, 7, 7) and made.x.min() >= 0 and made.x.max() <= 1
    assert (outputs(model, made).argmax(1) != made.y).all() and set(made.y.tolist()) <= {0, 1, 2, 3}
    assert len(made.x.flatten(1).unique(dim=0)) == 40
    again, other = (trigger_mark.drawn(model, task.test, 40, seed) for seed in (0, 1))
    assert torch.equal(made.x, again.x) and torch.equal(made.y, again.y) and not torch.equal(made.x, other.x)
    found = asked(model, made)
    assert (found.hits, found.of, found.rate, found.p) == (0, 40, 0.0, 1.0)


def test_hits_of_others_come_by_chance_as_often_as_is_said():
    class Guess(nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = y

        def forward(self, x):
            return torch.nn.functional.one_hot(self.y, 4).float()

    model = tiny_model()
    made = trigger_mark.drawn(model, tiny_task().test.batched(60), 60, 0)
    g = torch.Generator().manual_seed(0)
    ps = [asked(Guess(torch.randint(0, 4, (60,), generator=g)), made).p for _ in range(300)]
    assert np.mean(np.array(ps) < 0.05) < 0.05  # 1/4 where 1/3 is granted
    whole = asked(Guess(made.y), made)
    assert (whole.hits, whole.p) == (60, pytest.approx(3.0**-60, rel=1e-6, abs=0))
    assert made.y is not None and asked(Guess((made.y + 1) % 4), made).hits == 0


def test_a_trigger_follows_the_range_and_shape_of_the_data():
    table = Data(torch.randn(30, 6) * 5 + 2, torch.randint(0, 3, (30,)))
    made = trigger_mark.drawn(nn.Linear(6, 3), table, 50, 0)
    assert made.x.shape == (50, 6) and made.x.min() >= table.x.min() and made.x.max() <= table.x.max()
    unit = abstract((3, 2, 16, 16), torch.Generator().manual_seed(0))
    assert unit.min() >= 0 and unit.max() <= 1 and unit.std() > 0.1
    assert not torch.equal(unit[:, 0], unit[:, 1])


def test_a_commitment_binds_images_classes_and_salt():
    made = trigger_mark.drawn(tiny_model(), tiny_task().test, 5, 0)
    first = commitment(made)
    assert made.y is not None
    other = Data(made.x, (made.y + 1) % 4)
    assert len({first, commitment(other), commitment(made, "salt"), commitment(made.rows(slice(0, 4)))}) == 4
    assert first == commitment(copy.deepcopy(made))


def test_bad_triggers():
    model, task = tiny_model(), tiny_task()
    with pytest.raises(BadInput, match="0 triggers"):
        trigger_mark.drawn(model, task.test, 0, 0)
    text = Data(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(DoesNotFit, match="made of numbers"):
        trigger_mark.drawn(tiny_language_model(), text, 3, 0)
    with pytest.raises(DoesNotFit, match="three or more, not"):
        trigger_mark.drawn(nn.Linear(3, 2), Data(torch.randn(4, 3)), 3, 0)
    for call in (lambda data: asked(model, data), commitment):
        with pytest.raises(BadInput, match="with the classes agreed on"):
            call(Data(task.test.x))
