"""Predicted beside measured distortion: the table and the picture."""

import pytest

from netweight.bench import distortion
from netweight.data.split import Split
from netweight.evidence.agreement import agreement
from netweight.testing import tiny_model, tiny_task


def test_every_measure_has_its_row_and_its_panel(tmp_path, monkeypatch):
    task = tiny_task()
    monkeypatch.setattr(distortion, "load", lambda name: tiny_model())
    monkeypatch.setattr(distortion.files, "load", lambda name, model: Split(task.calibration, task.test))
    found = distortion.bench(plans=6, examples=8, plot=str(tmp_path / "panels.png"))
    expected = agreement(tiny_model(), task, plans=6, examples=8)
    assert [row["distortion"] for row in found["rows"]] == [*expected]
    for row in found["rows"]:
        assert row["rank_correlation"] == pytest.approx(expected[row["distortion"]].correlation, nan_ok=True)
        assert row["measured"] == list(expected[row["distortion"]].measured)
    assert all(len(row["predicted"]) == len(row["measured"]) == 6 for row in found["rows"])
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")
