"""The battery district: energy is kept, idling changes nothing, gradients are true; CityLearn itself."""

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.data.district import FOLDER, citylearn, synthetic
from netweight.data.shared import shared_data
from netweight.models.battery_district import (
    CLOCK,
    FEATURES,
    Battery,
    actions,
    along,
    charged,
    district,
    fresh,
    policy,
    run,
    sensors,
)

BATTERY = Battery()
WHERE = district(synthetic(400, 3, 1))
STARTS = torch.tensor([0, 30, 200])


def charged_by_hand(soc: float, left: float, before: float, action: float) -> tuple[float, float, float]:
    """CityLearn's equations with numbers: (charge, kWh drawn, efficiency)."""

    def on(x: float, points) -> float:
        for (a, low), (b, high) in zip(points, points[1:]):
            if x <= b:
                return low + (high - low) * (x - a) / (b - a)
        return points[-1][1]

    c, p = BATTERY.capacity, BATTERY.power
    ask, most = action * c, p * on(soc, BATTERY.capacity_power)
    if ask >= 0:
        e = min(ask, most, p, left - soc * c)
    else:
        e = max(ask, -most, -soc * c * before**0.5)
    h = on(min(abs(ask), most) / p, BATTERY.power_efficiency)
    then = min(soc * c + e * h**0.5, c) if ask >= 0 else max(0.0, soc * c + e / h**0.5)
    moved = then - soc * c
    return then / c, moved / h**0.5 if moved >= 0 else moved * h**0.5, h


@given(st.floats(0, 1), st.floats(-1, 1), st.floats(0.8, 0.95))
@example(0.5, -0.6, 0.8)  # what it can give is told by the efficiency before: something stays
def test_a_step_is_citylearns_and_keeps_the_energy(soc, action, before):
    state = fresh(torch.tensor([soc], dtype=torch.float64), BATTERY)._replace(
        efficiency=torch.tensor([before], dtype=torch.float64)
    )
    after, drawn = charged(state, torch.tensor([action], dtype=torch.float64), BATTERY)
    then, by_hand, h = charged_by_hand(soc, BATTERY.capacity, before, action)
    assert float(after.soc) == pytest.approx(then, abs=1e-9) and 0 <= float(after.soc) <= 1
    assert float(drawn) == pytest.approx(by_hand, abs=1e-9)
    assert float(after.efficiency) == pytest.approx(h, abs=1e-9)
    stored = (float(after.soc) - soc) * BATTERY.capacity
    lost = float(drawn) - stored
    assert lost >= -1e-9  # what is drawn is stored or lost, never made
    assert stored == pytest.approx(float(drawn) * (h**0.5 if stored >= 0 else h**-0.5), abs=1e-9)
    assert float(after.capacity) <= BATTERY.capacity


def test_by_hand():
    state = fresh(torch.tensor([0.0, 0.5, 0.0, 1.0]), BATTERY)
    after, drawn = charged(state, torch.tensor([0.0, 0.0, -1.0, 1.0]), BATTERY)
    assert drawn.abs().max() < 1e-6 and torch.allclose(after.soc, state.soc)  # nothing to do, empty, full
    after, drawn = charged(fresh(torch.zeros(1), BATTERY), torch.tensor([0.5]), BATTERY)
    share = 3.2 / 5  # between the points 0.3 and 0.7 of the efficiency curve
    assert drawn.item() == pytest.approx(3.2) and after.efficiency.item() == pytest.approx(
        0.83 + 0.07 * (share - 0.3) / 0.4
    )
    assert along(torch.tensor([-1.0, 0.9, 2.0]), BATTERY.capacity_power).tolist() == pytest.approx(
        [1, 0.6, 0.2]
    )
    assert after.capacity.item() < BATTERY.capacity


def test_doing_nothing_leaves_load_minus_sun_and_windows_do_not_meet():
    course = run(WHERE, lambda s: torch.zeros(len(s)), STARTS, 20)
    bare = (WHERE.year.load - WHERE.year.solar)[course.at]
    assert torch.allclose(course.net, bare, atol=1e-5) and course.soc.abs().max() == 0
    assert torch.equal(course.at[0], STARTS + 1)
    generator = torch.Generator().manual_seed(0)
    random = 2 * torch.rand(20, 3, 3, generator=generator) - 1

    def playing(rows) -> list:
        left = [*random[:, rows].flatten(1)]
        return [run(WHERE, lambda s: left.pop(0), STARTS[rows], 20), left]

    both, alone = playing([0, 1, 2])[0], playing([1])[0]
    assert torch.allclose(both.net[:, 1:2], alone.net) and torch.equal(both.x[:, 1:2], alone.x)
    drawn = both.net - (WHERE.year.load - WHERE.year.solar)[both.at]
    stored = both.soc.diff(dim=0) * BATTERY.capacity
    assert stored.abs().max() > 3 and (drawn - stored).min() > -1e-5  # energy is lost on the way, never made
    assert (drawn - stored).max() < 1 and both.soc.min() >= 0 and both.soc.max() <= 1


def test_observations_are_scaled_and_say_what_is_there():
    x = run(WHERE, lambda s: torch.ones(len(s)), STARTS, 30).x
    assert x.shape == (30, 3, 3, FEATURES) and x.min() >= 0 and x.max() <= 1
    assert sensors().sum() == FEATURES - CLOCK and not sensors()[:CLOCK].any()
    course = run(WHERE, lambda s: torch.ones(len(s)), STARTS, 30)
    assert torch.allclose(course.x[..., -2], course.soc[:-1])
    told = course.x[1:, ..., -1] * (WHERE.high - WHERE.low) + WHERE.low
    assert torch.allclose(told, course.net[:-1], atol=1e-4)
    assert torch.allclose(course.x[0, 1, :, :-2], WHERE.seen[30])


def test_gradients_go_through_all_hours():
    u = torch.full((6, 1, 3), 0.3, dtype=torch.float64, requires_grad=True)
    where = dataclasses.replace(WHERE, year=_double(WHERE.year), seen=WHERE.seen.double())

    def drawn(values: torch.Tensor) -> torch.Tensor:
        left = [*values]
        return run(where, lambda s: left.pop(0), STARTS[:1], 6).net

    assert torch.autograd.gradcheck(drawn, (u * torch.linspace(-1, 1, 6).reshape(6, 1, 1) + 0.05,), eps=1e-6)


def _double(year):
    return dataclasses.replace(
        year, **{f.name: getattr(year, f.name).double() for f in dataclasses.fields(year) if f.name != "name"}
    )


def test_controllers_act_by_tanh_or_by_bins():
    assert actions(torch.tensor([[0.0], [0.5]])).tolist() == pytest.approx([0, 0.46211716])
    assert actions(torch.eye(20)[[0, 19]]).tolist() == [-1, 1]
    assert torch.equal(policy(seed=3)[0].weight, policy(seed=3)[0].weight)
    assert not torch.equal(policy(seed=3)[0].weight, policy(seed=4)[0].weight)


def test_nonsense_is_refused():
    with pytest.raises(BadInput, match="3 windows of 500 hours do not fit into a year of 400"):
        run(WHERE, lambda s: torch.zeros(len(s)), STARTS, 500)
    with pytest.raises(BadInput, match="capacity and power are above 0"):
        Battery(capacity=0.0)
    with pytest.raises(BadInput, match="from left to right"):
        Battery(capacity_power=((0.0, 1.0), (0.0, 0.5)))


def test_the_same_as_citylearn():
    """net load of random actions, where the package and its files are here (checked with 2.2.0)."""
    real = pytest.importorskip("citylearn.citylearn", reason="the citylearn package is not installed")
    root = shared_data()
    if root is None or not (root / FOLDER / "schema.json").is_file():
        pytest.skip("CityLearn's files are not in the data folder")
    from citylearn.data import DataSet  # pyright: ignore[reportMissingImports]

    hours, year = 500, citylearn(root / FOLDER)
    with pytest.MonkeyPatch.context() as patch:  # what it would load from the network sizes nothing here
        for name in ("get_pv_sizing_data", "get_battery_sizing_data"):
            patch.setattr(DataSet, name, lambda self: None)
        env = real.CityLearnEnv(
            str(root / FOLDER / "schema.json"), simulation_start_time_step=0, simulation_end_time_step=hours
        )
        env.reset()
    chosen = 2 * torch.rand(hours, 5, generator=torch.Generator().manual_seed(0)) - 1
    for row in chosen.tolist():
        env.step([[action] for action in row])
    for house, building in enumerate(env.buildings):
        storage = building.electrical_storage
        curves = (storage.power_efficiency_curve, storage.capacity_power_curve)
        efficiency, power = (tuple(map(tuple, curve.T.tolist())) for curve in curves)
        battery = Battery(power_efficiency=efficiency, capacity_power=power)
        state, bare = fresh(torch.zeros(1), battery), year.load[:, house] - year.solar[:, house]
        for hour in range(hours):
            state, drawn = charged(state, chosen[hour, house : house + 1], battery)
            theirs = float(building.net_electricity_consumption[hour + 1])
            assert float(bare[hour + 1] + drawn) == pytest.approx(theirs, abs=2e-4)
            assert float(state.soc) == pytest.approx(float(storage.soc[hour + 1]), abs=1e-4)
