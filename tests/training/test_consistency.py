"""rRCM by hand: noise levels, schedules, both losses, what moves in a step; then training on tiny images."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput
from netweight.core.task import Data
from netweight.models.noise_level import ResidualMLP, VisionTransformer
from netweight.training.consistency import (
    Finetuning,
    NoisyClassifier,
    Pretraining,
    finetune,
    finetuning_loss,
    follow,
    info_nce,
    level_count,
    noise_levels,
    pretrain,
    pretraining_loss,
    projection,
    rise_and_fall,
    stages,
    symmetric,
    target_decay,
)
from netweight.training.loop import Diverged

PAPER = Pretraining()
TINY = Pretraining(steps=30, batch=16, rate=3e-3, warmup=3, target=(0.9, 0.99), average=0.5, hidden=16, out=8)


def images(count: int = 48, low: float = 0.0, high: float = 1.0) -> Data:
    """Bright left halves (class 0) and bright right halves (class 1), each with its own pattern on top."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    x = 0.3 * torch.rand(count, 1, 4, 4, generator=generator)
    x[y == 0, :, :, :2] += 0.6
    x[y == 1, :, :, 2:] += 0.6
    return Data(low + (high - low) * x, y, name="halves", low=low, high=high)


def flipped(x, generator):
    return x.flip(2), x


def pair(seed: int = 0) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """An online network and another one as its target."""
    made = []
    for number in (seed, seed + 1):
        torch.manual_seed(number)
        made.append(nn.ModuleDict({"encoder": ResidualMLP(16, 8, 1), "head": projection(8, TINY)}).train())
    return made[0], made[1]


def test_noise_levels_run_from_80_down_to_a_five_hundredth():
    for count in (21, 81):
        t = noise_levels(count)
        assert len(t) == count and (t.diff() < 0).all()
        assert t[0].item() == pytest.approx(80.0, rel=1e-6) and t[-1].item() == pytest.approx(0.002, rel=1e-6)
    middle = (0.5 * (80 ** (1 / 7) + 0.002 ** (1 / 7))) ** 7
    assert noise_levels(21)[10].item() == pytest.approx(middle, rel=1e-6)


def test_there_are_21_levels_at_the_start_and_81_at_the_end():
    counts = [level_count(step, PAPER) for step in (0, 1, 129_203, 129_204, 300_000)]
    assert counts == [21, 41, 41, 81, 81]  # K' = ceil(300000 / log2 5) = 129203
    assert [level_count(step, TINY) for step in range(30)] == sorted(level_count(s, TINY) for s in range(30))


def test_the_target_follows_more_and_more_slowly():
    decays = [target_decay(step, PAPER) for step in range(0, 300_001, 10_000)]
    assert decays[0] == pytest.approx(0.99) and decays[-1] == pytest.approx(0.9999, abs=1e-8)
    assert all(a < b for a, b in zip(decays, decays[1:]))
    e = math.sqrt(0.1 * (0.9999**2 - 0.99**2) + 0.99**2)
    c = 2 / (1 + math.exp(-15 * (e - 0.99) / 0.0099)) - 1
    assert target_decay(30_000, PAPER) == pytest.approx(0.9999 * c + 0.99 * (1 - c), rel=1e-9)
    assert target_decay(5, Pretraining(target=(0.99, 0.99))) == 0.99


@given(st.integers(2, 30), st.floats(0.05, 2.0))
def test_the_contrast_of_equal_orthogonal_features(b, temperature):
    f = 3.0 * torch.eye(b, 32).double()
    wanted = math.log(1 + (b - 1) * math.exp(-1 / temperature))
    assert info_nce(f, 0.5 * f, temperature).item() == pytest.approx(wanted, rel=1e-9)


def test_the_contrast_by_hand():
    f, h = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    near = 1 / math.sqrt(2) / 0.2
    first = math.log(math.exp(near) + 1) - near  # cosines 0.707 with its own, 0 with the other
    second = math.log(math.exp(near) + math.exp(5)) - 5
    assert info_nce(f, h, 0.2).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_loss_is_three_contrasts_of_the_right_networks_at_the_right_noise():
    (online, target), b = pair(), 12
    generator = torch.Generator().manual_seed(3)
    x, one, two, noise = torch.randn(4, b, 16, generator=generator)
    near = torch.tensor([5.0, 4.0])
    loss = pretraining_loss(online, target, [x, one, two], noise, near, 0.2)

    def r(network, x, t):
        return network["encoder"](x + t * noise, torch.full((b,), t))

    p = [network["head"](r(network, part, 0.002)) for network in (online, target) for part in (one, two)]
    wanted = info_nce(p[0], p[3], 0.2) + info_nce(p[1], p[2], 0.2)
    wanted = wanted + info_nce(r(online, x, 5.0), r(online, x, 4.0), 0.2)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_no_gradient_reaches_the_target_or_the_cleaner_image():
    online, target = pair()
    x, one, two, noise = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(3))
    given_levels = []
    encoder = online["encoder"]

    class Spy(nn.Module):
        def forward(self, x, t):
            given_levels.append((t[0].item(), torch.is_grad_enabled()))
            return encoder(x, t)

    spied = nn.ModuleDict({"encoder": Spy(), "head": online["head"]})
    pretraining_loss(spied, target, [x, one, two], noise, torch.tensor([5.0, 4.0]), 0.2).backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in online.parameters())
    lowest = torch.tensor(0.002).item()
    assert sorted(given_levels) == [(lowest, True), (lowest, True), (4.0, False), (5.0, True)]


def test_the_projection_normalises_over_the_batch_and_has_no_biases():
    head = projection(8, PAPER)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(2048, 8), (2048, 2048), (256, 2048)]
    assert all(layer.bias is None for layer in linear) and head.training
    assert [type(layer).__name__ for layer in head] == [
        "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear",
    ]  # fmt: skip


def test_an_average_moves_by_what_the_decay_leaves():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    wanted = 0.9 * a.weight.detach() + 0.1 * b.weight.detach()
    before = b.weight.detach().clone()
    follow(a, b, 0.9)
    torch.testing.assert_close(a.weight.detach(), wanted)
    assert torch.equal(b.weight, before)


def test_the_rate_rises_then_falls():
    factor = rise_and_fall(10, 110)
    assert [factor(step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert factor(60) == pytest.approx(0.5) and factor(110) == pytest.approx(0.0, abs=1e-12)
    assert rise_and_fall(0, 10)(0) == 1.0


def test_sure_and_equal_predictions_cost_nothing():
    y = torch.tensor([2, 0, 1])
    scores = 1e4 * torch.nn.functional.one_hot(y, 3).float().expand(2, 3, 3)
    assert finetuning_loss(scores, y, 10.0, 0.5).item() == 0.0


def test_the_fine_tuning_loss_by_hand():
    p = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]])
    q, loss = torch.tensor([0.7, 0.3]), finetuning_loss(p.log(), torch.tensor([0]), 10.0, 0.5)
    ce = -(math.log(0.9) + math.log(0.5)) / 2
    kl = sum((q * (q / row[0]).log()).sum().item() for row in p) / 2
    entropy = -(q * q.log()).sum().item()
    assert loss.item() == pytest.approx(ce + 10 * kl + 0.5 * entropy, rel=1e-5)


def test_layers_near_the_input_learn_more_slowly(monkeypatch):
    groups = []
    made = torch.optim.AdamW

    def adamw(parts, **rest):
        groups.extend((len(part["params"]), part["lr"]) for part in parts)
        return made(parts, **rest)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    finetune(ResidualMLP(16, 8, 2), images(), 0.1, Finetuning(steps=1, batch=32, rate=0.8, layer_decay=0.5))
    assert [rate for _, rate in groups] == pytest.approx([0.1, 0.05, 0.025, 0.0125])  # 0.8 * 32 / 256 first
    model = NoisyClassifier(ResidualMLP(16, 8, 2), 2, 0.5, 0.0, 1.0)
    assert sum(len(part) for part in stages(model)) == len([*model.parameters()]) == sum(n for n, _ in groups)


def test_the_classifier_takes_the_units_of_the_data_and_is_told_the_nearest_level():
    data = images(low=-3.0, high=5.0)
    model = finetune(ResidualMLP(16, 8, 1), data, 2.0, Finetuning(steps=2, batch=8))
    grid = noise_levels(81)
    assert model.level.item() == grid[(grid - 0.5).abs().argmin()]  # 2 of half 8 is 0.5 in [-1, 1]
    x = symmetric(data.x, data)
    assert x.min() >= -1 and x.max() <= 1 and not model.training
    wanted = model.head(model.encoder(x, model.level.expand(len(x))))
    torch.testing.assert_close(model(data.x), wanted, atol=1e-5, rtol=1e-4)


def test_pre_training_lowers_the_loss_and_leaves_what_it_was_given():
    torch.manual_seed(0)
    encoder, data = ResidualMLP(16, 16, 1), images()
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    found = pretrain(encoder, data, flipped, TINY, seed=1)
    assert len(found.losses) == 30
    assert sum(found.losses[-5:]) < 0.9 * sum(found.losses[:5])
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(before[name], p) for name, p in found.encoder.named_parameters())
    assert pretrain(encoder, data, flipped, TINY, seed=1).losses == found.losses
    assert pretrain(encoder, data, flipped, TINY, seed=2).losses != found.losses


def test_the_average_that_is_handed_out_lags_behind(monkeypatch):
    rates = []
    monkeypatch.setattr("netweight.training.consistency.follow", lambda a, m, decay: rates.append(decay))
    encoder = ResidualMLP(16, 8, 1)
    found = pretrain(encoder, images(), flipped, TINY)
    assert rates[::2] == [target_decay(step, TINY) for step in range(30)] and set(rates[1::2]) == {0.5}
    # without averaging it stays where it started
    assert all(torch.equal(a, b) for a, b in zip(found.encoder.parameters(), encoder.parameters()))


def test_one_level_is_drawn_for_the_whole_batch_and_its_neighbour_is_cleaner(monkeypatch):
    drawn = []

    def loss(online, target, images, noise, near, temperature):
        drawn.append(near)
        return sum(p.sum() for p in online.parameters())

    monkeypatch.setattr("netweight.training.consistency.pretraining_loss", loss)
    settings = Pretraining(steps=300, batch=4, hidden=8, out=4)
    pretrain(ResidualMLP(16, 4, 1), images(), flipped, settings)
    for step, near in enumerate(drawn):
        grid = noise_levels(level_count(step, settings))
        place = (grid == near[0]).nonzero().item()
        assert near.shape == (2,) and grid[place + 1] == near[1]
    assert len({near[0].item() for near in drawn}) > 60
    assert max(near[0] for near in drawn) > 60 and min(near[1] for near in drawn) < 0.01


def test_a_vision_transformer_learns_too():
    torch.manual_seed(0)
    encoder = VisionTransformer(1, 4, patch=2, width=8, depth=1, heads=2)
    found = pretrain(encoder, images(), flipped, TINY)
    model = finetune(found.encoder, images(), 0.2, Finetuning(steps=60, batch=48, rate=2e-2))
    assert (model(images().x).argmax(1) == images().y).float().mean() > 0.9


def test_what_cannot_be_trained_on_is_refused():
    encoder = ResidualMLP(16, 8, 1)
    plain = images()
    with pytest.raises(BadInput, match="halves: noise levels are those of inputs in"):
        pretrain(encoder, Data(plain.x, plain.y, name="halves"), flipped, TINY)
    with pytest.raises(BadInput, match="one example cannot be contrasted"):
        pretrain(encoder, plain.take(1), flipped, TINY)
    with pytest.raises(BadInput, match="needs one class number per example"):
        finetune(encoder, Data(plain.x, None, name="halves", low=0.0, high=1.0), 0.1)
    with pytest.raises(BadInput, match="sigma=-0.1"):
        finetune(encoder, plain, -0.1)
    with pytest.raises(Diverged, match="step 1: the loss is nan; lower the rate"):
        pretrain(encoder, plain, lambda x, g: (x * torch.nan, x), TINY)
