"""Bifurcation 2024 (arXiv:2407.05182): turning a controller round costs a grid more than moving it far.

The paper: agents of CityLearn under errors of their observations; the bifurcation layer with grouped
difference logits has more impact than untargeted attacks of the same size, needs far smaller errors than
attacks that aim at the worst action, and is hard to see; a discrete agent stands it better.

Here: five houses of the CityLearn challenge 2022 (a synthetic year where its files are absent) in a district
of our own, for the package pins numpy below 2. Beside CityLearn 2.2.0 itself (500 hours of the same files,
random actions, its batteries' curves) net loads differ by at most 7e-5 kWh and charges by at most 2e-5
(`tests/models/test_battery_district.py`). Controller: an MLP 128-128 trained through time on 48-hour windows;
20 bins: PPO. Judged in closed loop on the two weeks of every fourth fortnight, 12 in all, which training does
not see. All sensors may be off by eps of their range, the calendar may not; every attack takes 10 steps from
a random point, each hour anew.

Consumption is the district's (CityLearn's indicator). House by house ("by_house"), where no house feeds
another, the two attacks are about even, and untargeted errors cost more ramping: all indicators are in the
figures, whichever way they fall. a* of the targeted attack: the worst, by a rollout of 12 hours, of 11
actions over the range of the controller's own (of a grid from -1 to 1, 2 % of moments can be led to a* at
all). What is not reached by the longest error tried counts as that long.
Quick: the synthetic year, 60 iterations on shorter windows, flips in three days at eps 0.05 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netweight.attacks.bifurcation import Bifurcation, bifurcation, sensors, targeted, untargeted
from netweight.core.ascent import ascend
from netweight.core.perturbation import L2
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.victim import margin
from netweight.data.district import synthetic, year
from netweight.inspection import stealth
from netweight.inspection.load_profile import Steering, indicators, steering, without
from netweight.models import battery_district as house
from netweight.models.battery_district import Course, District, State, actions, district, policy
from netweight.training.reinforce import PPO, ThroughTime, ppo, through_time
from netweight.training.settings import Training
from netweight.verification.bounds import bounds

WEEK, FORTNIGHT, WINDOW = 168, 336, 48
SIZES = (0.05, 0.1)
NOISE, UNTARGETED, BIFURCATION, TARGETED = "noise", "untargeted", "bifurcation", "targeted"
GRID, AHEAD = 11, 12
STATES = 40  # moments of the clean course that are looked at one by one, in all houses
RUNGS, FIRST, RISE = 18, 0.02, 1.3
LEAST = 1.0  # kWh: what a ratio of consumptions is taken of at least

Attack = Callable[[nn.Module, Tensor, float, int], Tensor]


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Closed-loop impact, shortest errors, proofs and the discrete controller, of one seed."""
    if quick:
        return short(seed)
    where = district(year())
    seen, unseen = split(len(where.year))
    how = Training(epochs=1, batch=32, rate=3e-3, cosine=True, clip=1.0, seed=seed)
    model = through_time(policy(seed=seed), where, some(seen, 100 * 32, seed), how).model
    bins = ppo(policy(20, seed=seed), where, seen, PPO(), seed=seed).model
    runs = {(name, eps): (model, ATTACKS[name]) for eps in SIZES for name in ATTACKS}
    runs |= {("20 bins", eps): (bins, ATTACKS[BIFURCATION]) for eps in SIZES}
    clean = {"u": closed(model, where, unseen, WEEK), "20 bins": closed(bins, where, unseen, WEEK)}
    found = {
        (name, eps): attacked(net, clean["u" if net is model else "20 bins"], where, attack, eps)
        for (name, eps), (net, attack) in steps([*runs.items()], "Attacking a year")
    }
    bars, figures = (
        impact(found),
        {"attacks": {f"{n}, eps {e}": one.figures for (n, e), one in found.items()}},
    )
    figures["without batteries"] = asdict(without(clean["u"], where))
    figures["clean"] = {name: asdict(indicators(course, where)) for name, course in clean.items()}
    figures[TARGETED] = attacked(model, clean["u"], where, worst_actions(where, clean["u"]), SIZES[0]).figures
    norms = shortest_errors(model, where, clean["u"], seed)
    bars.append(Bar("median length of errors, opposite group / worst action", norms["ratio"], 0.5, "at most"))
    proofs = {str(eps): proven(model, clean["u"], eps, seed) for eps in SIZES}
    bars += [
        Bar(f"eps {eps}: proven constant + flips found", one["proven"] + one["flips"], 1.0, "at most")
        for eps, one in proofs.items()
    ]
    for eps in SIZES:
        ratio = found["20 bins", eps].extra / max(found[BIFURCATION, eps].extra, LEAST)
        bars.append(Bar(f"eps {eps}: extra consumption, 20 bins / u", ratio, 0.7, "at most"))
    visible = {f"{n}, eps {e}": seen_by(one.course, seed) for (n, e), one in found.items() if n != "20 bins"}
    figures |= {"shortest errors": norms, "proofs": proofs, "visible": visible}
    return Claim(bars, figures)


def short(seed: int) -> Claim:
    """The synthetic year."""
    where = district(synthetic())
    seen, unseen = split(len(where.year))
    how = Training(epochs=1, batch=8, rate=3e-3, cosine=True, clip=1.0, seed=seed)
    started = some(seen, 60 * 8, seed)
    model = through_time(policy(width=64, seed=seed), where, started, how, ThroughTime(24)).model
    clean = closed(model, where, unseen, 72)
    found = {
        name: attacked(model, clean, where, ATTACKS[name], SIZES[0]) for name in (UNTARGETED, BIFURCATION)
    }
    ratio = found[BIFURCATION].steered.flips / found[UNTARGETED].steered.flips
    return Claim(
        [Bar("flips, bifurcation / untargeted", ratio, 1.2, "at least")],
        {name: one.figures for name, one in found.items()},
    )


def split(hours: int) -> tuple[Int[Tensor, " k"], Int[Tensor, " w"]]:
    """(starts of windows to train on, starts of the weeks to judge on): every fourth fortnight is kept."""
    t = torch.arange(hours - WEEK - 1)
    held = torch.arange(hours) // FORTNIGHT % 4 == 3
    return t[~held[t] & ~held[t + WINDOW + 1]], t[held[t] & (t % WEEK == 0)]


def some(starts: Int[Tensor, " k"], count: int, seed: int) -> Int[Tensor, " count"]:
    """Some of them at random, in random order."""
    return starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:count]]


# Closed loop ----------------------------------------------------------------------------------------------


def closed(
    net: nn.Module,
    where: District,
    starts: Int[Tensor, " w"],
    hours: int,
    perceive: Callable[[Tensor, State], Tensor] | None = None,
) -> Course:
    """What a controller does; without gradients but for what `perceive` needs."""

    def told(x: Tensor, state: State) -> Tensor:
        assert perceive is not None
        with torch.enable_grad():
            return perceive(x, state)

    with torch.no_grad():
        return house.run(
            where, lambda s: actions(net(s)), starts, hours, perceive=None if perceive is None else told
        )


@dataclass(frozen=True, eq=False)
class Effect:
    """What an attack did. extra: kWh of consumption beyond the clean course, the mean of all weeks."""

    course: Course
    steered: Steering
    extra: float
    figures: dict[str, Any]


def attacked(net: nn.Module, clean: Course, where: District, attack: Attack, eps: float) -> Effect:
    """The same weeks as the clean course, under an attack in every hour."""
    hour = 0

    def perceive(x: Tensor, state: State) -> Tensor:
        nonlocal hour
        hour += 1
        return attack(net, x, eps, hour - 1)

    course = closed(net, where, clean.at[0] - 1, len(clean.net), perceive)
    with torch.no_grad():
        told, true = (actions(net(rows.flatten(0, 2))) for rows in (course.s, course.x))
    steered, before, after = steering(course, told, true), indicators(clean, where), indicators(course, where)
    beyond = after.beyond(before)
    of_bare = after.shares(without(clean, where))
    figures = {**asdict(steered), "beyond clean": beyond, "share of no batteries": of_bare}
    return Effect(course, steered, beyond["consumption"], figures)


def by_noise(net: nn.Module, x: Tensor, eps: float, hour: int) -> Tensor:
    """Uniform in the set."""
    return sensors(x, house.sensors(), eps).sample(x, torch.Generator().manual_seed(hour))


def by_distance(net: nn.Module, x: Tensor, eps: float, hour: int) -> Tensor:
    """Untargeted."""
    return untargeted(net, x, sensors(x, house.sensors(), eps), seed=hour).points


def by_bifurcation(net: nn.Module, x: Tensor, eps: float, hour: int) -> Tensor:
    """The method."""
    return bifurcation(net, x, None, sensors(x, house.sensors(), eps), seed=hour).points


ATTACKS: dict[str, Attack] = {NOISE: by_noise, UNTARGETED: by_distance, BIFURCATION: by_bifurcation}


def impact(found: dict[tuple[str, float], Effect]) -> list[Bar]:
    """Flips and extra consumption beside the untargeted attack's."""
    bars = []
    for eps in SIZES:
        ours, theirs = found[BIFURCATION, eps], found[UNTARGETED, eps]
        flips, extra = ours.steered.flips / theirs.steered.flips, ours.extra / max(theirs.extra, LEAST)
        bars += [
            Bar(f"eps {eps}: flips, bifurcation / untargeted", flips, 1.4, "at least"),
            Bar(f"eps {eps}: extra consumption, bifurcation / untargeted", extra, 1.4, "at least"),
        ]
    return bars


# The worst action -----------------------------------------------------------------------------------------


def own_range(clean: Course) -> Float[Tensor, " grid"]:
    """`GRID` actions over what the controller does of itself, but for a hundredth at either end."""
    low, high = clean.action.flatten().quantile(torch.tensor([0.01, 0.99])).tolist()
    return torch.linspace(low, high, GRID)


def worst(
    net: nn.Module,
    where: District,
    grid: Float[Tensor, " grid"],
    at: Int[Tensor, " w"],
    soc: Float[Tensor, "w n"],
) -> Float[Tensor, " w*n"]:
    """The action of the grid in the hours `at` after which a house draws most in `AHEAD` hours."""
    first = [grid.repeat_interleave(soc.numel())]

    def act(x: Tensor) -> Tensor:
        return first.pop() if first else actions(net(x))

    ahead = min(AHEAD, len(where.year) - 1 - int(at.max()))
    with torch.no_grad():
        course = house.run(where, act, at.repeat(len(grid)), ahead, soc=soc.repeat(len(grid), 1))
    drawn = course.net.clamp(min=0).sum(0).reshape(len(grid), -1)
    return grid[drawn.argmax(0)]


def worst_actions(where: District, clean: Course) -> Attack:
    """Targeted at the worst action of each house, hour by hour."""
    grid = own_range(clean)

    def attack(net: nn.Module, x: Tensor, eps: float, hour: int) -> Tensor:
        soc = x.reshape(len(clean.at[0]), where.houses, -1)[..., -2]
        goal = worst(net, where, grid, clean.at[hour] - 1, soc)
        return targeted(net, x, goal, sensors(x, house.sensors(), eps), seed=hour).points

    return attack


# Errors as short as can be --------------------------------------------------------------------------------


def moments(clean: Course, seed: int) -> tuple[Tensor, Tensor]:
    """(hours, windows) of the clean course, at random."""
    generator = torch.Generator().manual_seed(seed)
    hours, windows = clean.at.shape
    return torch.randint(hours, (STATES,), generator=generator), torch.randint(
        windows, (STATES,), generator=generator
    )


def shortest_errors(net: nn.Module, where: District, clean: Course, seed: int) -> dict[str, float]:
    """Median |d|_2 to the opposite group and to the worst action (within 0.05), and what share got there."""
    t, w = moments(clean, seed)
    x = clean.x[t, w].flatten(0, 1)
    goal = worst(net, where, own_range(clean), clean.at[t, w] - 1, clean.soc[t, w])
    with torch.no_grad():
        of = Bifurcation()(net(x)).argmax(1)

    def opposite(output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        value = margin(Bifurcation()(output), of[rows])
        return value, value > 0

    def there(output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        apart = (output.tanh()[:, 0] - goal[rows]).abs()
        return -apart, apart <= 0.05

    norms = [shortest(net, x, wanted, seed) for wanted in (opposite, there)]
    longest = FIRST * RISE ** (RUNGS - 1)  # what was not reached counts as this much, which is too little
    medians = [float(each.clamp(max=longest).median()) for each in norms]
    shares = [float(each.isfinite().float().mean()) for each in norms]
    return {
        "ratio": medians[0] / medians[1],
        "opposite group": medians[0],
        "worst action": medians[1],
        "opposite group, reached": shares[0],
        "worst action, reached": shares[1],
        "worst action, mean size": float(goal.abs().mean()),
    }


def shortest(
    net: nn.Module,
    x: Float[Tensor, "b f"],
    wanted: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    seed: int,
) -> Float[Tensor, " b"]:
    """|d|_2 of the shortest error found with which (outputs, rows) -> (value, reached) is reached; else inf.

    Balls grow by `RISE` until one is large enough; the point found is drawn back along its line as far as it
    stays reached. Only sensors move.
    """
    which = house.sensors()
    still, rows = x[:, ~which], torch.arange(len(x))
    norms = torch.full((len(x),), torch.inf)
    with torch.no_grad():
        norms[wanted(net(x), rows)[1]] = 0.0
    for rung in range(RUNGS):
        rows = (norms == torch.inf).nonzero()[:, 0]
        if len(rows) == 0:
            break
        start = x[rows][:, which]

        def score(z: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
            return wanted(net(torch.cat([still[rows[some]], z], 1)), rows[some])  # noqa: B023

        found = ascend(score, start, L2(FIRST * RISE**rung, 0.0, 1.0), steps=20, restarts=1, seed=seed)
        low, high = torch.zeros(len(rows), 1), torch.ones(len(rows), 1)
        d = found.points - start
        with torch.no_grad():
            for _ in range(10):
                middle = (low + high) / 2
                held = score(start + middle * d, torch.arange(len(rows)))[1][:, None]
                low, high = torch.where(held, low, middle), torch.where(held, middle, high)
        norms[rows[found.hit]] = (high * d).norm(dim=1)[found.hit]
    return norms


# Proofs and statistics ------------------------------------------------------------------------------------


def proven(net: nn.Module, clean: Course, eps: float, seed: int) -> dict[str, float]:
    """Shares of moments in which the sign of u is proven, and in which it was flipped; both: has to be 0."""
    t, w = moments(clean, seed)
    x = clean.x[t, w].flatten(0, 1)
    within = sensors(x, house.sensors(), eps)
    found = bifurcation(net, x, None, within, steps=40, restarts=2, seed=seed).hit
    limits = bounds(net, x, within, method="crown")
    constant: Bool[Tensor, " b"] = ((limits.lower > 0) | (limits.upper < 0)).flatten()
    return {
        "proven": float(constant.float().mean()),
        "flips": float(found.float().mean()),
        "both": float((constant & found).float().mean()),
    }


def seen_by(course: Course, seed: int) -> dict[str, float]:
    """Whether what was told differs from what was, by statistics over sensors.

    p-values of the two-sample test: of 24 hours against 24 other hours, of 200 against 200, of whole weeks
    (all hours of a house in one row) against others; autocorrelation: the largest change over a day of lags,
    of the told net load.
    """
    generator = torch.Generator().manual_seed(seed)
    which = house.sensors()
    x, s = (rows[..., which] for rows in (course.x, course.s))

    def halves(true: Tensor, told: Tensor, count: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(true), generator=generator)
        return true[order[:count]], told[order[-count:]]

    hours = [rows.flatten(0, 2) for rows in (x, s)]
    weeks = [rows.permute(1, 2, 0, 3).flatten(0, 1).flatten(1) for rows in (x, s)]
    memory = [stealth.autocorrelation(rows[..., -1], 24) for rows in (x, s)]
    return {
        "p, 24 hours": stealth.two_samples(*halves(*hours, 24), seed=seed).p,
        "p, 200 hours": stealth.two_samples(*halves(*hours, 200), seed=seed).p,
        "p, weeks": stealth.two_samples(*halves(*weeks, len(weeks[0]) // 2), seed=seed).p,
        "p, weeks, nothing changed": stealth.two_samples(
            *halves(weeks[0], weeks[0], len(weeks[0]) // 2), seed=seed
        ).p,
        "autocorrelation, largest change": float((memory[0] - memory[1]).mean((1, 2)).abs().max()),
    }
