"""The meter: what its parts saw, nested meters, units, carbon, and what it says of how it knows."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.inspection.counters import Counted, Drawn
from netweight.inspection.meters import INTENSITY, WORLD, Energy, Meter, Part, resting, together

positive = st.floats(1e-3, 1e6)


def energy(joules: float = 7200.0, seconds: float = 60.0) -> Energy:
    return Energy((Part("CPU", joules, True, "measured"),), seconds, 30.0)


def synthetic() -> tuple[Counted, list[int]]:
    """A source that counts microjoules in a list, and begins anew at 1,000,000."""
    now = [0]
    return Counted("CPU", [SimpleNamespace(read=lambda: now[0] % 1_000_000, wraps=1_000_000)], "counted"), now


@given(joules=positive, seconds=positive)
def test_units_go_there_and_back(joules, seconds):
    found = energy(joules, seconds)
    assert found.watts * seconds == pytest.approx(joules)
    assert found.hours * 3600 == pytest.approx(joules)
    assert found.grams(1000.0) * 3600 == pytest.approx(joules)  # 1 kWh is 3.6 MJ


@given(joules=positive, factor=st.floats(0, 100), pue=st.floats(1, 3), intensity=st.floats(0, 1000))
def test_carbon_is_linear(joules, factor, pue, intensity):
    one = energy(joules).grams(intensity, pue)
    assert energy(joules * factor).grams(intensity, pue) == pytest.approx(one * factor)
    assert one == pytest.approx(pue * intensity * energy(joules).grams(1.0))
    assert energy().grams("FR") == energy().grams(float(INTENSITY["FR"])) < energy().grams(WORLD)


def test_a_meter_sees_what_happens_inside_it_past_the_end_of_the_range():
    source, now = synthetic()
    now[0] = 900_000
    with Meter(read=[source]) as meter:
        now[0] += 300_000
        time.sleep(0.02)
    now[0] += 500_000  # after it
    assert meter.energy.joules == pytest.approx(0.3) and meter.energy.known == "measured"
    assert 0.02 <= meter.energy.seconds < 30 and meter.energy.cpu < meter.energy.seconds + 0.1
    with meter:
        now[0] += 100_000
    assert meter.energy.joules == pytest.approx(0.1)


def test_nested_meters_add_up():
    source, now = synthetic()
    with Meter(read=[source]) as outer:
        now[0] += 50_000
        parts = []
        for step in (200_000, 700_000):
            with Meter(read=[source]) as inner:
                now[0] += step
            parts.append(inner.energy.joules)
        now[0] += 150_000
    assert parts == pytest.approx([0.2, 0.7]) and outer.energy.joules == pytest.approx(0.05 + 0.9 + 0.15)


def test_sources_are_asked_in_time_and_no_longer_than_that():
    seen: list[int] = []
    source = Drawn("GPU", lambda: seen.append(1) or 100.0, "drawn", measured=True, every=0.01)
    threads = threading.active_count()
    with Meter(read=[source]) as meter:
        assert threading.active_count() == threads + 1
        time.sleep(0.3)
    asked = len(seen)
    assert asked >= 4 and threading.active_count() == threads
    assert meter.energy.joules == pytest.approx(100 * meter.energy.seconds, rel=0.2)
    time.sleep(0.05)
    assert len(seen) == asked


def test_a_failure_inside_stops_the_meter():
    source, now = synthetic()
    threads, meter = threading.active_count(), Meter(read=[source])
    with pytest.raises(KeyError), meter:
        now[0] += 1000
        raise KeyError
    assert meter.energy.joules == pytest.approx(1e-3) and threading.active_count() == threads
    with pytest.raises(ValueError, match="is not running"):
        meter.end()
    with pytest.raises(ValueError, match="measured nothing"):
        _ = Meter(read=[source]).energy


def test_net_is_without_the_rest_and_not_below_nothing():
    assert energy(600.0, 60.0).net(4.0).joules == pytest.approx(360.0)
    assert energy(600.0, 60.0).net(0.0).joules == 600.0
    assert energy(600.0, 60.0).net(100.0).joules == 0.0


def test_resting_is_power():
    assert 0 <= resting(0.05) < 1000


def test_processes_of_one_machine_share_its_counters():
    def run(joules: float, seconds: float) -> Energy:
        parts = (Part("CPU", joules, False, "modelled"), Part("GPU a", 10 * joules, True, "measured"))
        return Energy(parts, seconds, seconds / 2)

    both = together([run(3.0, 4.0), run(5.0, 2.0)])
    assert {p.name: p.joules for p in both.parts} == {"GPU a": 50.0, "CPU": 8.0}
    assert (both.seconds, both.cpu, both.known) == (4.0, 3.0, "partly measured")
    assert together([run(5.0, 2.0), run(3.0, 4.0)]).joules == both.joules
    assert together([run(3.0, 4.0)]).joules == run(3.0, 4.0).joules


def test_it_says_how_it_knows():
    modelled = Energy((Part("CPU", 1.0, False, "modelled"),), 2.0, 1.0)
    mixed = Energy((*modelled.parts, *energy().parts), 2.0, 1.0)
    assert [e.known for e in (modelled, energy(), mixed)] == ["modelled", "measured", "partly measured"]
    told = json.loads(json.dumps(modelled.told(examples=4, intensity="FR")))
    assert told["joules"] == 1.0 and told["joules_per_example"] == 0.25 and told["watts"] == 0.5
    assert told["known"] == "modelled" and told["grams_per_kwh"] == 56 and told["how"] == "CPU: modelled"
    assert "joules_per_example" not in modelled.told()
    assert modelled.line() == "1 J at 0.5 W (modelled), 0.000132 g CO2"


@pytest.mark.parametrize(
    ("intensity", "pue", "words"),
    [("ZZ", 1.0, "unknown country 'ZZ'"), (-1.0, 1.0, "-1.0 g/kWh"), (475.0, 0.5, "PUE 0.5")],
)
def test_nonsense_is_named(intensity, pue, words):
    with pytest.raises(BadInput, match=words):
        energy().grams(intensity, pue)
