"""The harness: means over seeds, records written whole and only by full runs, resuming, nonsense refused."""

import json
import math
import os
import statistics
import sys
import types

import pytest

from netweight.core.catalogue import SYSTEMS, System
from netweight.core.errors import BadInput, MissingExtra
from netweight.core.result import Bar, Claim
from netweight.reproduce import harness

MEASURED = {0: 0.2, 1: 0.4, 2: 0.3}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """A stand-in reproduction under the slug "fake"; the list says which seeds ran, and where data lay."""
    ran: list[tuple[int, bool, str | None]] = []
    module = types.ModuleType("fakes.fake", "Doe 2020: it shrinks | by half.\n\nMore about it.")

    def reproduce(*, seed=0, quick=False):
        ran.append((seed, quick, os.environ.get("NETWEIGHT_DATA")))
        if module.stop_at == seed:
            raise KeyboardInterrupt
        bars = [Bar("error", MEASURED[seed], 0.3, "at most"), Bar("gain | loss", math.inf, 2.0, "at least")]
        return Claim(bars, {"curve": [seed, math.nan]})

    module.reproduce, module.stop_at = reproduce, None
    system = System("fake", "Fake", "ICML", 2020, "compression", "", "fakes.fake")
    monkeypatch.setitem(sys.modules, "fakes.fake", module)
    monkeypatch.setattr(harness, "reproduction", lambda slug: system)
    monkeypatch.setattr(harness, "reproductions", lambda: [system])
    monkeypatch.setenv("NETWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NETWEIGHT_DATA", raising=False)
    return types.SimpleNamespace(ran=ran, module=module, system=system, results=tmp_path / "results")


def test_a_full_run_takes_the_mean_and_is_recorded(runs):
    outcome = harness.run("fake", 3, results=runs.results)
    error, gain = outcome.marks
    assert [seed for seed, _, _ in runs.ran] == [0, 1, 2]
    assert error.measured == (0.2, 0.4, 0.3)
    assert error.mean == pytest.approx(0.3)
    assert error.std == pytest.approx(statistics.stdev(MEASURED.values()))
    assert error.passed == (sum(MEASURED.values()) / 3 <= 0.3)
    assert gain.passed
    found = json.loads((runs.results / "fake.json").read_text())
    assert found == json.loads(json.dumps(outcome.to_json()))
    assert found["claim"] == "Doe 2020: it shrinks | by half."
    assert found["bars"][1]["measured"] == ["inf"] * 3
    assert found["figures"][2]["curve"] == [2, None]
    assert found["seeds"] == [0, 1, 2]
    assert found["seconds"] >= 0
    assert found["machine"]["cores"] == os.cpu_count()
    assert "torch" in found["versions"]
    assert found["commit"]
    text = (runs.results.parent / "RESULTS.md").read_text()
    assert "## fake: Fake (ICML, 2020)" in text
    assert "| error | 0.3 ± 0.1 | at most 0.3 |" in text
    assert r"| gain \| loss | inf ± - | at least 2 | yes |" in text
    assert harness.state(runs.system, runs.results) == f"{1 + error.passed} of 2 bars reached"


def test_the_mean_decides_and_a_missed_bar_stays(runs):
    outcome = harness.run("fake", 2, seed=1, results=runs.results)
    assert outcome.marks[0].mean == pytest.approx(0.35)
    assert not outcome.passed
    assert "| **no** |" in (runs.results.parent / "RESULTS.md").read_text()
    assert harness.state(runs.system, runs.results) == "1 of 2 bars reached"


def test_nan_is_never_reached(runs, monkeypatch):
    monkeypatch.setitem(MEASURED, 1, math.nan)
    outcome = harness.run("fake", 2, results=runs.results)
    assert not outcome.marks[0].passed
    assert json.loads((runs.results / "fake.json").read_text())["bars"][0]["mean"] is None


def test_a_quick_run_is_not_recorded(runs):
    outcome = harness.run("fake", 1, quick=True, results=runs.results)
    assert runs.ran == [(0, True, None)]
    assert outcome.quick
    assert outcome.marks[0].std == 0
    assert not runs.results.exists()
    assert harness.state(runs.system, runs.results) == "not run yet"


def test_a_stopped_run_goes_on_with_the_seeds_that_are_missing(runs):
    runs.module.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        harness.run("fake", 3, results=runs.results)
    assert not runs.results.exists()
    runs.module.stop_at = None
    runs.ran.clear()
    outcome = harness.run("fake", 3, resume=True, results=runs.results)
    assert [seed for seed, _, _ in runs.ran] == [2]
    assert outcome.marks[0].measured == (0.2, 0.4, 0.3)
    assert outcome.marks[1].measured == (math.inf,) * 3
    runs.ran.clear()
    harness.run("fake", 3, resume=True, results=runs.results)
    assert len(runs.ran) == 3  # a finished run leaves nothing to go on from


@pytest.mark.parametrize("change", ["no resume", "other code", "quick"])
def test_finished_seeds_count_only_for_the_same_run(runs, monkeypatch, change):
    runs.module.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        harness.run("fake", 2, results=runs.results)
    runs.module.stop_at = None
    runs.ran.clear()
    if change == "other code":
        code = {**harness.circumstances(), "commit": "another"}
        monkeypatch.setattr(harness, "circumstances", lambda: code)
    again = {"resume": change != "no resume", "quick": change == "quick"}
    harness.run("fake", 2, results=runs.results, **again)
    assert [seed for seed, _, _ in runs.ran] == [0, 1]


def test_data_dir_is_set_for_the_run_and_put_back(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", "before")
    harness.run("fake", 1, data_dir=tmp_path, results=runs.results)
    assert runs.ran[0][2] == str(tmp_path)
    assert os.environ["NETWEIGHT_DATA"] == "before"
    with pytest.raises(BadInput, match="no such folder; --data-dir"):
        harness.run("fake", 1, data_dir=tmp_path / "gone", results=runs.results)


def test_workers_run_seeds_on_ray(runs, monkeypatch):
    started = []
    far = types.SimpleNamespace(
        init=lambda **options: started.append(options["num_cpus"]),
        remote=lambda **_: lambda f: types.SimpleNamespace(remote=lambda *args: (f, args)),
        wait=lambda waiting: (waiting[-1:], waiting[:-1]),  # the last seed is ready first
        get=lambda ready: [f(*args) for f, args in ready],
        shutdown=lambda: started.append("over"),
    )
    monkeypatch.setitem(sys.modules, "ray", far)
    outcome = harness.run("fake", 3, workers=2, results=runs.results)
    assert started == [2, "over"]
    assert [seed for seed, _, _ in runs.ran] == [2, 1, 0]
    assert outcome.marks[0].measured == (0.2, 0.4, 0.3)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"netweight\[ray\]"):
        harness.run("fake", 2, workers=2, results=runs.results)


def test_bars_have_to_agree_and_seeds_to_exist(runs):
    runs.module.reproduce = lambda *, seed, quick: Claim([Bar("error", 0.1, seed, "at most")])
    with pytest.raises(ValueError, match="fake: every seed has to be held against the same bars"):
        harness.run("fake", 2, results=runs.results)
    runs.module.reproduce = lambda *, seed, quick: Claim([])
    with pytest.raises(ValueError, match="at least one"):
        harness.run("fake", 1, results=runs.results)
    with pytest.raises(BadInput, match="seeds=0"):
        harness.run("fake", 0, results=runs.results)


def test_states_of_the_catalogue(tmp_path):
    states = {system.slug: harness.state(system, tmp_path) for system in SYSTEMS}
    assert states["awq"] == states["gptq"] == "not run yet"
    assert states["pgd"] == ""
