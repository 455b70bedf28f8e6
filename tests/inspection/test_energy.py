"""The energy meter: counters where they can be read, wrapped ones too, else CPU time; and it says which."""

import time

import pytest

from netweight.core.errors import BadInput
from netweight.inspection.counters import Counter, counters
from netweight.inspection.energy import energy


def busy(seconds: float):
    def way() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return way


def test_cpu_time_times_watts():
    found = energy({"short": busy(0.002), "long": busy(0.006)}, runs=3, watts=4.0, meters=())
    for reading in found.values():
        assert reading.joules == pytest.approx(4.0 * reading.seconds)
        assert "CPU time" in reading.how and "4 W" in reading.how
    assert found["short"].seconds >= 0.002
    assert 2 < found["long"].joules / found["short"].joules < 4


def test_sleep_costs_nothing_then():
    found = energy({"asleep": lambda: time.sleep(0.005)}, runs=2, meters=())
    assert found["asleep"].seconds < 0.003


def test_counters_are_read_and_begin_anew(tmp_path):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "energy_uj").write_text("900\n")
    (package / "max_energy_range_uj").write_text("1000\n")
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "energy_uj").write_text("5\n")
    (part / "max_energy_range_uj").write_text("1000\n")
    (tmp_path / "intel-rapl:1").mkdir()  # a package that may not be read
    (counter,) = counters(tmp_path)
    assert (counter.read(), counter.wraps) == (900, 1000)

    def use() -> None:  # 300 microjoules a call, past the end of the range
        busy(0.025)()
        (package / "energy_uj").write_text(str((counter.read() + 300) % 1000))

    found = energy({"use": use}, runs=3, meters=[counter])["use"]
    assert found.joules == pytest.approx(300e-6)
    assert "RAPL of 1 counters" in found.how
    assert counters(tmp_path / "nowhere") == ()


def test_ways_are_called_in_turns():
    seen: list[str] = []
    energy({name: lambda name=name: seen.append(name) or busy(0.003)() for name in "ab"}, runs=3, meters=[])
    assert "".join(seen[4:]) == "ababab"


def test_nonsense_is_named():
    with pytest.raises(BadInput, match="runs=0"):
        energy({}, runs=0)
    with pytest.raises(BadInput, match="watts=-1"):
        energy({}, watts=-1.0)
    assert Counter.__dataclass_params__.frozen
