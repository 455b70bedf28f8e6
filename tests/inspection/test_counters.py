"""What energy is read from: counters that begin anew, power over time, a GPU's two ways, a modelled CPU."""

import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.inspection import counters as module
from netweight.inspection.counters import (
    PER_GB,
    WATTS,
    Busy,
    Counted,
    Counter,
    Drawn,
    core_watts,
    counters,
    gpu_counter,
    resident,
    sources,
)

CUDA = torch.device("cuda", 0)


def zone(folder, name: str, label: str, value: int = 0, wraps: int = 1000) -> None:
    place = folder / name
    place.mkdir()
    (place / "name").write_text(label + "\n")
    (place / "energy_uj").write_text(str(value))
    (place / "max_energy_range_uj").write_text(str(wraps))


def test_packages_and_memory_count_once(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "core")  # in the package
    zone(tmp_path, "intel-rapl:0:1", "dram")  # beside it
    zone(tmp_path, "intel-rapl:1", "package-1")
    zone(tmp_path, "intel-rapl:2", "psys")  # all of them
    zone(tmp_path, "intel-rapl-mmio:0", "package-0")  # the same once more
    places = [str(c.path.parent.relative_to(tmp_path)) for c in counters(tmp_path)]
    assert places == ["intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1"]
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("nonsense")
    assert len(counters(tmp_path)) == 2
    assert counters(tmp_path / "nowhere") == ()


@given(
    steps=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 499)), min_size=1, max_size=8),
    start=st.integers(0, 999),
)
def test_counters_that_begin_anew_are_added_up(steps, start):
    now = [start, start % 500]
    read = [
        SimpleNamespace(read=lambda: now[0] % 1000, wraps=1000),
        SimpleNamespace(read=lambda: now[1] % 500, wraps=500),
    ]
    source, total = Counted("CPU", read, ""), 0
    for first, second in steps:  # less than a whole range between two readings
        now[0], now[1], total = now[0] + first, now[1] + second, total + first + second
        assert source.joules() == pytest.approx(total * 1e-6)
    assert source.joules() == pytest.approx(total * 1e-6)


@given(
    gaps=st.lists(st.floats(0.01, 5), min_size=1, max_size=8), level=st.floats(0, 100), slope=st.floats(-5, 5)
)
def test_trapezoids_are_exact_for_linear_power(gaps, level, slope):
    now = [0.0]
    source = Drawn("GPU", lambda: level + slope * now[0], "", measured=True, clock=lambda: now[0])
    for gap in gaps:
        now[0] += gap
        found = source.joules()
    wanted = level * now[0] + slope * now[0] ** 2 / 2
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_without_counters_the_cpu_is_modelled_and_says_so():
    processor, memory = sources(rapl=(), watts=4.0)
    assert isinstance(processor, Busy) and "4 W" in processor.how
    assert [s.measured for s in (processor, memory)] == [False, False]
    assert "modelled, give or take half" in processor.how and str(PER_GB) in memory.how
    before, end = processor.joules(), time.process_time() + 0.05
    while time.process_time() < end:
        pass
    time.sleep(0.02)
    used = processor.joules() - before
    assert 4 * 0.05 <= used < 4 * 0.3
    assert memory.watts() == pytest.approx(PER_GB * resident(), rel=0.2)
    assert 0.05 < resident() < 64


def test_counters_take_the_place_of_the_model(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 900)
    (source,) = sources(rapl=counters(tmp_path))
    assert source.measured and "1 RAPL counters, other processes included" in source.how
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")
    assert source.joules() == pytest.approx(200e-6)
    assert source.every <= 60  # a counter that is read too rarely begins anew unseen


def test_the_watts_of_a_core_are_those_of_its_processor(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("processor : 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\n")
    assert core_watts(about) == 280 / 64
    about.write_text("model name : something else\n")
    assert core_watts(about) == WATTS == core_watts(tmp_path / "nowhere")


class Refused(Exception):
    """What NVML raises."""


@pytest.fixture
def nvml(monkeypatch):
    """A GPU of which NVML tells `energy` millijoules and `power` milliwatts."""
    state = SimpleNamespace(energy=5000, power=250_000, NVMLError=Refused, asked=None)

    def counted(handle):
        if state.energy is None:
            raise Refused("not supported")
        return state.energy

    def handle(uuid):
        state.asked = uuid
        return "handle"

    state.nvmlInit = lambda: None
    state.nvmlDeviceGetHandleByUUID = handle
    state.nvmlDeviceGetTotalEnergyConsumption = counted
    state.nvmlDeviceGetPowerUsage = lambda handle: state.power
    monkeypatch.setitem(sys.modules, "pynvml", state)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="12ab-34"))
    return state


def test_a_gpu_is_counted_in_millijoules(nvml):
    *_, source = sources(CUDA, rapl=())
    assert source.measured and "energy counter" in source.how and nvml.asked == "GPU-12ab-34"
    nvml.energy += 3000
    assert source.joules() == pytest.approx(3.0)
    assert gpu_counter(CUDA).read() == 8_000_000
    assert gpu_counter(torch.device("cpu")) is None is gpu_counter(None)


def test_an_older_gpu_tells_its_power(nvml, monkeypatch):
    nvml.energy, now = None, [0.0]
    assert gpu_counter(CUDA) is None
    *_, source = sources(CUDA, rapl=())
    assert isinstance(source, Drawn) and source.measured and source.every == 0.1
    source.clock, source.last = lambda: now[0], (0.0, source.watts())
    now[0] = 2.0
    assert source.joules() == pytest.approx(500.0)  # 250 W for 2 s


@pytest.mark.parametrize("missing", ["module", "driver"])
def test_a_gpu_that_cannot_be_asked_is_said(nvml, monkeypatch, missing):
    if missing == "module":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        nvml.nvmlInit = lambda: (_ for _ in ()).throw(Refused("no driver"))
    *_, source = sources(CUDA, rapl=())
    assert "not counted" in source.how and not source.measured and source.joules() == 0
    assert source.every == math.inf and module.gpu(CUDA) is None


def test_counters_are_frozen():
    assert Counter.__dataclass_params__.frozen
