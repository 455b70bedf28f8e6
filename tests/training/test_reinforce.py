"""Controllers trained through time and by PPO: equations by hand, learning, resuming, bad input."""

import dataclasses

import pytest
import torch
from torch import nn

from netweight.attacks.bifurcation import bifurcation, sensors
from netweight.core.errors import BadInput
from netweight.data.district import synthetic
from netweight.models.battery_district import FEATURES, actions, district, policy, run
from netweight.models.battery_district import sensors as measured
from netweight.training.checkpoint import Checkpoint
from netweight.training.gradients import Diverged
from netweight.training.reinforce import (
    PPO,
    Played,
    ThroughTime,
    advantages,
    costs,
    ppo,
    saved,
    surrogate,
    through_time,
)
from netweight.training.settings import Training

WHERE = district(synthetic(1000, 2, 1))
STARTS = torch.arange(0, 900, 3)
HOW = Training(epochs=2, batch=16, rate=5e-3, clip=1.0)


def cost_of(model: nn.Module) -> float:
    with torch.no_grad():
        course = run(WHERE, lambda s: actions(model(s)), torch.arange(0, 900, 48), 48)
    return float(costs(course, WHERE).mean())


IDLE = cost_of(nn.Sequential(nn.Linear(FEATURES, 1), nn.Threshold(1e9, 0.0)))


def test_costs_by_hand():
    course = run(WHERE, lambda s: torch.linspace(-1, 1, len(s)), STARTS[:2], 5)
    bare, year = WHERE.year.load - WHERE.year.solar, WHERE.year
    means = [float((rate * bare.clamp(min=0)).mean()) for rate in (year.price[:, :1], year.carbon)]
    for h, w, n in ((0, 0, 0), (4, 1, 1)):
        hour, drawn = int(course.at[h, w]), max(0.0, float(course.net[h, w, n]))
        rates = (float(year.price[hour, 0]), float(year.carbon[hour, 0]))
        wanted = sum(rate * drawn / mean for rate, mean in zip(rates, means)) / 2
        assert float(costs(course, WHERE)[h, w, n]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    idle = run(WHERE, lambda s: torch.zeros(len(s)), STARTS[:2], 5)
    assert saved(idle, WHERE).abs().max() < 1e-5 and saved(course, WHERE).abs().max() > 0.1


def test_training_through_time_saves_and_leaves_the_model_alone():
    model = policy(1, 32)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    trained = through_time(model, WHERE, STARTS, HOW, ThroughTime(24))
    assert cost_of(trained.model) < 0.97 * IDLE and trained.losses[1] < trained.losses[0]
    assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    again = through_time(model, WHERE, STARTS, HOW, ThroughTime(24))
    assert again.losses == trained.losses
    other = through_time(model, WHERE, STARTS, dataclasses.replace(HOW, seed=1), ThroughTime(24))
    assert other.losses != trained.losses


def test_stopped_and_resumed_gives_the_same_numbers(tmp_path):
    model, how = policy(1, 16), dataclasses.replace(HOW, epochs=3)
    few = STARTS[::8]
    whole = through_time(model, WHERE, few, how, ThroughTime(6))
    keep = Checkpoint(tmp_path / "state", resume=True)

    def stopping(network):
        def perceive(x, state):
            stopping.calls += 1
            if stopping.calls > 30:
                raise KeyboardInterrupt
            return x

        return perceive

    stopping.calls = 0
    with pytest.raises(KeyboardInterrupt):
        through_time(model, WHERE, few, how, ThroughTime(6), perceive=stopping, keep=keep)
    assert keep.path.exists()
    stopping.calls = -(10**9)
    resumed = through_time(model, WHERE, few, how, ThroughTime(6), perceive=stopping, keep=keep)
    assert stopping.calls < -(10**9) + 60  # it did not begin again
    assert resumed.losses == whole.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    with pytest.raises(BadInput, match="other weights, data or settings"):
        through_time(model, WHERE, few, how, ThroughTime(7), perceive=stopping, keep=keep)


def test_training_under_attack_is_harder_to_turn():
    def attacked(network):
        def perceive(x, state):
            within = sensors(x.detach(), measured(), 0.1)
            points = bifurcation(network, x.detach(), None, within, steps=2).points
            return x + (points - x).detach()  # gradients go on through the district

        return perceive

    plain = through_time(policy(1, 16), WHERE, STARTS, HOW, ThroughTime(12)).model
    robust = through_time(plain, WHERE, STARTS[::3], HOW, ThroughTime(12), perceive=attacked).model
    with torch.no_grad():
        x = run(WHERE, lambda s: actions(plain(s)), STARTS[:4], 48).x.flatten(0, 2)
    flips = [
        float(bifurcation(model, x, None, sensors(x, measured(), 0.1)).hit.float().mean())
        for model in (plain, robust)
    ]
    assert flips[1] < 0.9 * flips[0]


# PPO ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    reward = torch.tensor([[1.0], [2.0], [3.0]])
    value = torch.tensor([[0.5], [1.0], [2.0]])
    d = [1 + 0.9 * 1 - 0.5, 2 + 0.9 * 2 - 1, 3 + 0.9 * 2 - 2]
    last = d[2]
    middle = d[1] + 0.9 * 0.8 * last
    wanted = [d[0] + 0.9 * 0.8 * middle, middle, last]
    assert advantages(reward, value, 0.9, 0.8)[:, 0].tolist() == pytest.approx(wanted)


def test_the_surrogate_by_hand():
    x = torch.zeros(2, FEATURES)
    model, critic = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 1)
    with torch.no_grad():
        for layer in (model, critic):
            layer.weight.zero_()
            layer.bias.zero_()
    before = torch.tensor([0.25, 0.8]).log()  # now 0.5 each: ratios 2 and 0.625
    seen = Played(x, torch.tensor([0, 1]), before, torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.0]), 0.0)
    found = surrogate(model, critic, seen, torch.arange(2), PPO(clip=0.2, entropy=0.1))
    gained = (min(2.0, 1.2) * 1.0 + min(-0.625, -0.8)) / 2
    assert found.item() == pytest.approx(-gained - 0.1 * 0.6931472 + 0.5 * 2.0)


def test_ppo_learns_and_is_the_same_twice():
    settings = PPO(rounds=40, windows=16, hours=36, batch=576)
    model = policy(20, 32)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    trained = ppo(model, WHERE, STARTS, settings)
    assert cost_of(trained.model) < min(0.98 * IDLE, cost_of(model))
    assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    short = dataclasses.replace(settings, rounds=2)
    twice = [ppo(model, WHERE, STARTS, short, seed=seed).losses for seed in (0, 0, 1)]
    assert twice[0] == twice[1] == trained.losses[:2] != twice[2]


def test_nonsense_is_refused():
    with pytest.raises(BadInput, match="expected one u"):
        through_time(policy(4, 8), WHERE, STARTS, HOW)
    with pytest.raises(BadInput, match="expected the logits of two bins or more"):
        ppo(policy(1, 8), WHERE, STARTS)
    with pytest.raises(BadInput, match="do not fit into a year of 1000"):
        through_time(policy(1, 8), WHERE, torch.tensor([990]), HOW)
    with pytest.raises(BadInput, match="hours=1"):
        ThroughTime(1)
    with pytest.raises(BadInput, match="counts are at least 1"):
        PPO(rounds=0)
    with pytest.raises(BadInput, match="both are above 0"):
        PPO(rate=0.0)
    with pytest.raises(Diverged):
        through_time(policy(1, 8), WHERE, STARTS, HOW, perceive=lambda net: lambda x, state: x * torch.nan)
