"""A district of houses with batteries, stepped for many windows of time at once and differentiable.

Source of the equations: CityLearn 2.2 (intelligent-environments-lab/CityLearn, `energy_model.Battery`):
Vazquez-Canteli et al. 2020, arXiv:2012.10504. With the state of charge soc of capacity C, the action a in
[-1, 1] asks for e = a C kWh; p(.) is the power curve, h(.) the efficiency curve, P the nominal power:

    most     = P p(soc)                                    C_t: the capacity that is left after wear
    e        = min(a C, most, P, C_t - soc C)              charging
    e        = max(a C, -most, -soc C sqrt(h_before))      discharging
    h        = h(min(|a C|, most) / P)
    soc'     = soc + e sqrt(h) / C   or   soc + e / (sqrt(h) C)
    net      = load - solar + (soc' - soc) C / sqrt(h)     or   ... + (soc' - soc) C sqrt(h)
    C_t'     = C_t - wear C |net - load + solar| / (2 C_t)

An action that is chosen on the observation of hour t acts in hour t + 1, as in CityLearn.

Differs from CityLearn: the two curves are the fixed ones of its version 2.1 (2.2 draws them anew for each
battery, within a few per cent of these); observations are scaled to [0, 1], the calendar to sines and
cosines, which CityLearn leaves to wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.data.district import Year

Curve = tuple[tuple[float, float], ...]
CLOCK = 6  # columns of the calendar, before all others
FEATURES = CLOCK + 25


@dataclass(frozen=True)
class Battery:
    """capacity in kWh, power in kW. efficiency: of the round trip before the first step.

    power_efficiency: points (share of the nominal power, efficiency). capacity_power: points (state of
    charge, share of nominal power that can flow). wear: the share of capacity that a full cycle costs.
    """

    capacity: float = 6.4
    power: float = 5.0
    efficiency: float = 0.9
    power_efficiency: Curve = ((0.0, 0.83), (0.3, 0.83), (0.7, 0.9), (0.8, 0.9), (1.0, 0.85))
    capacity_power: Curve = ((0.0, 1.0), (0.8, 1.0), (1.0, 0.2))
    wear: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.capacity > 0 and self.power > 0 and 0 < self.efficiency <= 1 and self.wear >= 0):
            raise BadInput(f"{self}: capacity and power are above 0, the efficiency is in (0, 1]")
        for curve in (self.power_efficiency, self.capacity_power):
            if len(curve) < 2 or any(a[0] >= b[0] for a, b in zip(curve, curve[1:])):
                raise BadInput(f"{curve}: a curve needs two points or more, from left to right")


class State(NamedTuple):
    """Of each battery: charge (share of the capacity), kWh that wear has left, last step's efficiency."""

    soc: Tensor
    capacity: Tensor
    efficiency: Tensor


def fresh(soc: Tensor, battery: Battery) -> State:
    """Batteries without wear."""
    return State(soc, torch.full_like(soc, battery.capacity), torch.full_like(soc, battery.efficiency))


def charged(state: State, action: Tensor, battery: Battery) -> tuple[State, Tensor]:
    """(the batteries an hour later, kWh that each has drawn; below 0 where it has given)."""
    held = state.soc * battery.capacity
    ask = action * battery.capacity
    most = battery.power * along(state.soc, battery.capacity_power)
    room = (state.capacity - held).clamp(min=0)
    up = torch.minimum(torch.minimum(ask, most.clamp(max=battery.power)), room)
    down = torch.maximum(torch.maximum(ask, -most), -held * state.efficiency.sqrt())
    efficiency = along(torch.minimum(ask.abs(), most) / battery.power, battery.power_efficiency)
    root = efficiency.sqrt()
    then = torch.where(ask >= 0, held + up * root, held + down / root).clamp(0, battery.capacity)
    moved = then - held
    drawn = torch.where(moved >= 0, moved / root, moved * root)
    worn = state.capacity - battery.wear * battery.capacity * drawn.abs() / (2 * state.capacity)
    return State(then / battery.capacity, worn.clamp(min=0), efficiency), drawn


def along(x: Tensor, curve: Curve) -> Tensor:
    """The straight lines between the points of a curve, level outside."""
    value = torch.full_like(x, curve[0][1])
    for (left, low), (right, high) in zip(curve, curve[1:]):
        value = value + (high - low) / (right - left) * (x - left).clamp(0, right - left)
    return value


# The district ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class District:
    """A year with a battery in each house. seen: the features of each hour and house but the last two."""

    year: Year
    battery: Battery
    seen: Float[Tensor, "t n 29"]
    low: float
    high: float

    @property
    def houses(self) -> int:
        """How many there are."""
        return self.year.load.shape[1]

    def to(self, device: torch.device | str) -> District:
        """The same district with its tensors there."""
        columns = {f.name: getattr(self.year, f.name) for f in fields(self.year)}
        moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in columns.items()}
        return replace(self, year=Year(**moved), seen=self.seen.to(device))

    def observe(
        self, at: Int[Tensor, " w"], soc: Float[Tensor, "w n"], net: Float[Tensor, "w n"]
    ) -> Float[Tensor, "w*n f"]:
        """What the controller of each house is told, in [0, 1]: `CLOCK` columns of calendar, then sensors.

        Sensors: weather with forecasts (16), price with forecasts (4), carbon, load, sun, charge, net load.
        """
        scaled = ((net - self.low) / (self.high - self.low)).clamp(0, 1)
        both = torch.stack([soc.clamp(0, 1), scaled], 2)
        return torch.cat([self.seen[at], both], 2).flatten(0, 1)


def district(year: Year, battery: Battery = Battery()) -> District:
    """The features of a year, scaled by the least and the greatest of the year."""
    month, day, hour = (year.calendar[:, i] / unit for i, unit in enumerate((12, 7, 24)))
    clock = [
        0.5 + 0.5 * f(2 * torch.pi * part) for part in (month, day, hour) for f in (torch.sin, torch.cos)
    ]
    shared = torch.stack([*clock, *year.weather.T, *year.price.T, *year.carbon.T], 1)
    shared[:, CLOCK:] = unit_range(shared[:, CLOCK:], 0)
    own = torch.stack([unit_range(part, None) for part in (year.load, year.solar)], 2)
    seen = torch.cat([shared[:, None].expand(-1, year.load.shape[1], -1), own], 2)
    bare = year.load - year.solar
    return District(year, battery, seen, float(bare.min()) - battery.power, float(bare.max()) + battery.power)


def unit_range(values: Tensor, dim: int | None) -> Tensor:
    """Scaled to [0, 1] along an axis, or as a whole; what never changes becomes 0."""
    low, high = (values.amin(), values.amax()) if dim is None else (values.amin(dim), values.amax(dim))
    return ((values - low) / torch.where(high > low, high - low, torch.ones_like(high))).clamp(0, 1)


def sensors() -> Bool[Tensor, " f"]:
    """Which features are measured; the calendar is not."""
    return torch.arange(FEATURES) >= CLOCK


@dataclass(frozen=True, eq=False)
class Course:
    """What happened in h hours of w windows in n houses.

    x: observations, as they were. s: as the controllers were told. action: in [-1, 1]. net: kWh drawn from
    the grid in the hour after. soc: before each hour, and after the last one. at: hours of the year that net
    is of.
    """

    x: Float[Tensor, "h w n f"]
    s: Float[Tensor, "h w n f"]
    action: Float[Tensor, "h w n"]
    net: Float[Tensor, "h w n"]
    soc: Float[Tensor, "h1 w n"]
    at: Int[Tensor, "h w"]


def run(
    where: District,
    act: Callable[[Tensor], Tensor],
    starts: Int[Tensor, " w"],
    hours: int,
    *,
    perceive: Callable[[Tensor, State], Tensor] | None = None,
    soc: Float[Tensor, "w n"] | None = None,
) -> Course:
    """Closed loop: `act` gives the actions `b` for what is perceived `b f`, and the district answers.

    perceive: (observations, batteries) -> what the controllers are told in their place. soc: at the start, 0
    by default. Gradients go through all hours. Raises `BadInput` for windows that leave the year.
    """
    if hours < 1 or len(starts) == 0 or int(starts.min()) < 0 or int(starts.max()) + hours >= len(where.year):
        raise BadInput(
            f"{len(starts)} windows of {hours} hours do not fit into a year of {len(where.year)}; "
            "give starts from 0 on, and hours that end within it"
        )
    n = where.houses
    bare = where.year.load - where.year.solar
    state = fresh(bare.new_zeros(len(starts), n) if soc is None else soc, where.battery)
    net = bare[starts]
    told: list[list[Tensor]] = [[], [], [], [], [state.soc], []]
    for hour in range(hours):
        x = where.observe(starts + hour, state.soc, net)
        s = x if perceive is None else perceive(x, state)
        action = act(s).reshape(len(starts), n).clamp(-1, 1)
        state, drawn = charged(state, action, where.battery)
        at = starts + hour + 1
        net = bare[at] + drawn
        for place, value in zip(told, (x, s, action, net, state.soc, at), strict=True):
            place.append(value)
    x, s, action, net, charge, at = (torch.stack(values) for values in told)
    shape = (hours, len(starts), n, -1)
    return Course(x.reshape(shape), s.reshape(shape), action, net, charge, at)


# Controllers ----------------------------------------------------------------------------------------------


def policy(outputs: int = 1, width: int = 128, *, seed: int = 0) -> nn.Sequential:
    """A controller: features `b 31` to u `b 1`, or to the logits `b outputs` of bins of actions from -1 to 1.

    Before training a bin is the likelier the less it does (by exp(-6 |a|)), whatever is observed: full power
    at random empties or fills a battery within two hours, and little is learnt from it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(FEATURES, width), nn.Linear(width, width), nn.Linear(width, outputs)
    first, second, last = layers
    if outputs > 1:
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.copy_(-6 * torch.linspace(-1, 1, outputs).abs())
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def actions(output: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """tanh(u) of one output; of several the middle of the likeliest bin, bins from -1 to 1."""
    if output.shape[1] == 1:
        return output[:, 0].tanh()
    return torch.linspace(-1, 1, output.shape[1], device=output.device)[output.argmax(1)]
