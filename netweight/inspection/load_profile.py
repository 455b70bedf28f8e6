"""What a district's controllers cost: consumption, price, carbon, daily peak, ramping; and what errors did.

Source: the indicators of CityLearn (`cost_function`), Vazquez-Canteli et al. 2020, arXiv:2012.10504. With
E_t = sum of net over all houses, the district's own consumption in hour t,

    consumption = sum max(E, 0)      cost = sum max(price E, 0)      emissions = sum max(carbon E, 0)
    daily peak  = mean over days of max E                            ramping = sum |E_t - E_{t-1}|.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.models.battery_district import Course, District

DAY = 24


@dataclass(frozen=True)
class Indicators:
    """Means over windows: kWh, dollars, kg, kWh in the peak hour of a day, kWh, and kWh of house by house."""

    consumption: float
    cost: float
    emissions: float
    daily_peak: float
    ramping: float
    by_house: float

    def beyond(self, other: Indicators) -> dict[str, float]:
        """How much more of each than in the other."""
        return {name: value - asdict(other)[name] for name, value in asdict(self).items()}

    def shares(self, other: Indicators) -> dict[str, float]:
        """Each as a multiple of the other's (CityLearn: of the district without batteries)."""
        return {name: value / asdict(other)[name] for name, value in asdict(self).items()}


def indicators(course: Course, where: District) -> Indicators:
    """Of a course of a day or more; `by_house` is the consumption if no house feeds another."""
    return of_net(course.net, course.at, where)


def without(course: Course, where: District) -> Indicators:
    """Of the same hours without batteries."""
    return of_net((where.year.load - where.year.solar)[course.at], course.at, where)


def of_net(net: Float[Tensor, "h w n"], at: Tensor, where: District) -> Indicators:
    """The indicators of net loads in the hours `at`."""
    if len(net) < DAY:
        raise BadInput(f"{len(net)} hours: indicators need a day or more")
    whole = net.detach().double().sum(2)
    rates = [where.year.price[:, 0][at], where.year.carbon[:, 0][at]]
    days = whole[: len(whole) // DAY * DAY].unflatten(0, (-1, DAY))
    return Indicators(
        consumption=_mean(whole.clamp(min=0).sum(0)),
        cost=_mean((rates[0] * whole).clamp(min=0).sum(0)),
        emissions=_mean((rates[1] * whole).clamp(min=0).sum(0)),
        daily_peak=_mean(days.amax(1).mean(0)),
        ramping=_mean(whole.diff(dim=0).abs().sum(0)),
        by_house=_mean(net.detach().double().clamp(min=0).sum((0, 2))),
    )


@dataclass(frozen=True)
class Steering:
    """What errors did to the actions: moved: mean |a(s) - a(x)|; flips: the share that changed direction.

    l1, l2: mean length of the errors.
    """

    moved: float
    flips: float
    l1: float
    l2: float


def steering(course: Course, told: Float[Tensor, " k"], true: Float[Tensor, " k"]) -> Steering:
    """told, true: the actions for what the controllers of the course were told, and for what was."""
    d = (course.s - course.x).flatten(0, 2)
    flips = ((told > 0) != (true > 0)).double()
    return Steering(
        moved=_mean((told - true).abs()),
        flips=_mean(flips),
        l1=_mean(d.abs().sum(1)),
        l2=_mean(torch.linalg.vector_norm(d, dim=1)),
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
