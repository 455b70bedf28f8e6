"""Controllers of a battery district, trained: by back-propagation through time, and by PPO.

Papers: Mozer, "A focused backpropagation algorithm for temporal pattern recognition", 1989 (gradients through
the unrolled equations of the district, which are known here); Schulman et al., "Proximal Policy Optimization
Algorithms", 2017, arXiv:1707.06347 (PPO); Zhang et al., "Robust Reinforcement Learning on State Observations
with Learned Optimal Adversary", ICLR 2021, arXiv:2101.08452 (ATLA: controller and adversary in turns).

The cost of a house in an hour, in shares of what a house pays on average without a battery, is

    c = ( price max(net, 0) / mean + carbon max(net, 0) / mean ) / 2,

as in the CityLearn challenge 2022. Through time: c itself is differentiable in the weights over a window of
`hours`. PPO, with the reward c without a battery - c, advantages A by generalised advantage estimation, and
rho the ratio of the new to the old probability of an action:

    maximise  mean( min(rho A, clip(rho, 1 - clip, 1 + clip) A) ) + entropy H - (V - returns)^2 / 2.

Differs from the papers: the adversary of ATLA is no learned network but an attack on the present controller
(`perceive` gets it), so that both still change in turns, step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Categorical

from netweight.core.errors import BadInput
from netweight.core.progress import steps
from netweight.core.task import Data
from netweight.models.battery_district import FEATURES, Course, District, State, actions, run
from netweight.training.checkpoint import Checkpoint
from netweight.training.gradients import Diverged
from netweight.training.loop import Moment, Training, train
from netweight.training.trained import Trained, about

Perceive = Callable[[Tensor, State], Tensor]


@dataclass(frozen=True)
class ThroughTime:
    """hours: of a window that gradients go through. Batteries start at a random charge."""

    hours: int = 48

    def __post_init__(self) -> None:
        if self.hours < 2:
            raise BadInput(f"hours={self.hours}: a window needs two hours or more")


@dataclass(frozen=True)
class PPO:
    """windows: run at once, for `hours` each, then `passes` over what was seen in `batch` rows a step."""

    rounds: int = 80
    windows: int = 16
    hours: int = 48
    passes: int = 4
    batch: int = 960
    rate: float = 3e-3
    discount: float = 0.98
    smoothing: float = 0.95
    clip: float = 0.2
    entropy: float = 5e-3

    def __post_init__(self) -> None:
        counts = (self.rounds, self.windows, self.hours, self.passes, self.batch)
        if min(counts) < 1 or not (0 <= self.discount <= 1 and 0 <= self.smoothing <= 1):
            raise BadInput(f"{self}: counts are at least 1, discount and smoothing are in [0, 1]")
        if not (self.rate > 0 and self.clip > 0):
            raise BadInput(f"rate={self.rate}, clip={self.clip}: both are above 0")


def costs(course: Course, where: District, net: Tensor | None = None) -> Float[Tensor, "h w n"]:
    """c of each hour and house, of what was drawn or of another `net`; differentiable."""
    year, drawn = where.year, (course.net if net is None else net).clamp(min=0)
    bare = (year.load - year.solar).clamp(min=0)
    parts = [rate[course.at] * drawn / (rate * bare).mean() for rate in (year.price[:, :1], year.carbon)]
    return torch.stack(parts).mean(0)


def saved(course: Course, where: District) -> Float[Tensor, "h w n"]:
    """How much less c is than without a battery."""
    return costs(course, where, (where.year.load - where.year.solar)[course.at]) - costs(course, where)


def through_time(
    model: nn.Module,
    where: District,
    starts: Int[Tensor, " b"],
    how: Training,
    settings: ThroughTime = ThroughTime(),
    *,
    perceive: Callable[[nn.Module], Perceive] | None = None,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of a controller with one output u, trained on the cost of windows that begin at `starts`.

    how: one window is one example. perceive: (network) -> what it is told in place of the observations, for
    adversarial training. Raises `BadInput` for a network with another output or windows that leave the year,
    `Diverged` where the loss is no number.
    """
    model = copy.deepcopy(model)
    checked(model, where, bins=False)

    def loss(network: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        soc = torch.rand(len(x), where.houses, generator=at.generator)
        seen = None if perceive is None else perceive(network)
        course = run(
            where, lambda s: actions(network(s)), x, settings.hours, perceive=seen, soc=soc.to(where.seen)
        )
        return costs(course, where).mean()

    about_it = about(keep, "through-time", (settings, perceive is not None, where.year.name))
    losses = train(model, Data(starts, starts, name=where.year.name), loss, how, keep=about_it)
    return Trained(model, losses=losses)


def ppo(
    model: nn.Module, where: District, starts: Int[Tensor, " b"], settings: PPO = PPO(), *, seed: int = 0
) -> Trained:
    """A copy of a controller with bins as outputs, trained by PPO; a critic is trained beside it and dropped.

    losses: the mean cost of each round. Raises `BadInput` for a network with one output, `Diverged` where
    the loss is no number.
    """
    model = copy.deepcopy(model)
    checked(model, where, bins=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        critic = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 1)).to(where.seen.device)
    optimizer = torch.optim.Adam([*model.parameters(), *critic.parameters()], settings.rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in steps(range(settings.rounds), "PPO"):
        chosen = torch.randint(len(starts), (settings.windows,), generator=generator)
        seen = played(model, critic, where, starts[chosen], settings, generator)
        losses.append(seen.cost)
        for _ in range(settings.passes):
            for rows in torch.randperm(len(seen.x), generator=generator).split(settings.batch):
                value = surrogate(model, critic, seen, rows, settings)
                if not value.isfinite():
                    raise Diverged(f"PPO: the loss is {float(value)}; give a lower rate than {settings.rate}")
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    return Trained(model.eval(), losses=tuple(losses))


@dataclass(frozen=True, eq=False)
class Played:
    """What was seen in a round: rows of observations, bins, their log-probabilities, advantages, returns."""

    x: Float[Tensor, "b f"]
    bins: Int[Tensor, " b"]
    before: Float[Tensor, " b"]
    advantage: Float[Tensor, " b"]
    returns: Float[Tensor, " b"]
    cost: float


@torch.no_grad()
def played(
    model: nn.Module,
    critic: nn.Module,
    where: District,
    starts: Int[Tensor, " w"],
    settings: PPO,
    generator: torch.Generator,
) -> Played:
    """One round with bins drawn at random from what the controller holds likely."""
    drawn: list[Tensor] = []
    before: list[Tensor] = []

    def act(x: Tensor) -> Tensor:
        logits = model(x).log_softmax(1)
        bins = torch.multinomial(logits.exp().cpu(), 1, generator=generator).to(x.device)
        drawn.append(bins[:, 0])
        before.append(logits.gather(1, bins)[:, 0])
        return torch.linspace(-1, 1, logits.shape[1], device=x.device)[bins[:, 0]]

    soc = torch.rand(len(starts), where.houses, generator=generator).to(where.seen)
    course = run(where, act, starts, settings.hours, soc=soc)
    value = critic(course.x)[..., 0].flatten(1)
    advantage = advantages(saved(course, where).flatten(1), value, settings.discount, settings.smoothing)
    returns = (advantage + value).flatten()
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    cost = float(costs(course, where).mean())
    rows = (course.x.flatten(0, 2), torch.cat(drawn), torch.cat(before))
    return Played(*rows, scaled.flatten(), returns, cost)


def advantages(
    reward: Float[Tensor, "h b"], value: Float[Tensor, "h b"], discount: float, smoothing: float
) -> Float[Tensor, "h b"]:
    """Generalised advantage estimation; the window is cut, so its last value stands for what follows.

    A_t = d_t + discount smoothing A_{t+1},    d_t = r_t + discount V_{t+1} - V_t.
    """
    found, ahead = torch.zeros_like(reward), torch.zeros_like(reward[0])
    following = torch.cat([value[1:], value[-1:]])
    for t in reversed(range(len(reward))):
        ahead = reward[t] + discount * following[t] - value[t] + discount * smoothing * ahead
        found[t] = ahead
    return found


def surrogate(
    model: nn.Module, critic: nn.Module, seen: Played, rows: Int[Tensor, " k"], settings: PPO
) -> Tensor:
    """What is minimised on some rows: the clipped objective, the entropy and the critic's error."""
    likely = Categorical(logits=model(seen.x[rows]))
    ratio = (likely.log_prob(seen.bins[rows]) - seen.before[rows]).exp()
    gain = seen.advantage[rows]
    gained = torch.minimum(ratio * gain, ratio.clamp(1 - settings.clip, 1 + settings.clip) * gain).mean()
    error = F.mse_loss(critic(seen.x[rows])[:, 0], seen.returns[rows])
    return -gained - settings.entropy * likely.entropy().mean() + 0.5 * error


def checked(model: nn.Module, where: District, *, bins: bool) -> None:
    """Raises where a network is no controller of this kind."""
    with torch.no_grad():
        found = model(where.seen.new_zeros(1, FEATURES))
    if found.ndim != 2 or (found.shape[1] > 1) != bins:
        wanted = "the logits of two bins or more" if bins else "one u"
        raise BadInput(f"the controller gives {tuple(found.shape)}; expected {wanted} for each observation")
