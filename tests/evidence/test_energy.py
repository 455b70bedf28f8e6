"""The energy of an inference and of a training run, which says how it is known, through the commands too."""

import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from netweight.cli.main import app
from netweight.core.errors import BadInput
from netweight.core.result import Evidence
from netweight.evidence import energy as module
from netweight.evidence.energy import FILE, row, training_rows


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 10))


def test_a_larger_network_takes_more_and_the_row_says_how_it_knows():
    found = row(mlp(1500), mlp(8), torch.rand(1, 64))
    assert (found.question, found.quantity, found.unit) == ("cost", "energy per inference", "joules")
    assert 0 < 3 * found.compressed < found.original < 10
    assert found.low <= found.compressed <= found.high and found.n == module.RUNS
    assert found.arithmetic in ("measured", "modelled") and found.method.startswith(found.arithmetic)
    assert "turns" in found.method


def test_networks_are_evaluated_and_left_as_they_were():
    seen, model = [], nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model.train()
    model.register_forward_hook(lambda m, i, o: seen.append((m.training, o.requires_grad)))
    row(model, mlp(4)[0:0], torch.rand(1, 4))
    assert set(seen) == {(False, False)} and model.training


def test_it_stops_when_time_is_over(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    found = row(mlp(8), mlp(8), torch.rand(1, 64))
    assert found.n == 3 and found.high == math.inf  # three turns bound no median


def said(folder, joules: object) -> str:
    folder.mkdir()
    energy = {"joules": joules, "how": "CPU: modelled", "known": "modelled"}
    (folder / FILE).write_text(json.dumps({"method": "x", "energy": energy}))
    return str(folder)


def test_the_energy_of_training_is_that_of_the_folder(tmp_path):
    one, two = said(tmp_path / "one", 12.5), said(tmp_path / "two", 3)
    (found,) = training_rows("digits-cnn", one)
    assert math.isnan(found.original) and found.compressed == 12.5
    assert (found.method, found.arithmetic, found.unit) == ("CPU: modelled", "modelled", "joules")
    assert (training_rows(one, two)[0].original, training_rows(one, two)[0].compressed) == (12.5, 3.0)
    assert training_rows("digits-cnn", str(tmp_path)) == []
    assert "energy of training" in str(Evidence([found]))


@pytest.mark.parametrize("content", ["[]", '{"energy": 3}', '{"energy": {"joules": "many"}}', "{"])
def test_a_file_that_says_nothing_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(BadInput, match=FILE):
        training_rows("digits-cnn", tmp_path)


def call(*args: object) -> dict:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout) if "--json" in args else {"text": result.stdout}


def test_train_meters_and_compare_shows_it(tmp_path):
    out = tmp_path / "trained"
    words = ("train", "digits-cnn", "--data", "digits", "--method", "weight-compander", "--epochs", 1)
    text = call(*words, "--batch", 256, "--out", out)["text"]
    assert "energy: " in text and " g CO2" in text
    told = call(*words, "--batch", 256, "--out", out, "--json")["energy"]
    assert told["joules"] > 0 and told["of"] == "the whole run"
    assert told["joules"] == pytest.approx(told["watts"] * told["seconds"])
    assert json.loads((out / FILE).read_text())["energy"] == told
    rows = call("compare", "digits-cnn", out, "--data", "digits", "--out", tmp_path / "e", "--json")
    named = {r["quantity"]: r for r in rows["evidence"]["rows"]}
    assert named["energy of training"]["compressed"] == told["joules"]
    assert named["energy of training"]["original"] is None
    assert named["energy per inference"]["arithmetic"] in ("measured", "modelled")
    page = (tmp_path / "e" / "report.html").read_text()
    assert "energy of training" in page and "energy per inference" in page
