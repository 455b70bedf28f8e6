"""netweight switch: another width in place, whole or not at all, with what is known of every width."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from netweight import pipeline
from netweight.cli.main import app
from netweight.core import io, widths
from netweight.core.compressed import Change, Compressed
from netweight.core.errors import BadInput
from netweight.core.plan import Plan
from netweight.core.task import Task, outputs
from netweight.data import digits
from netweight.models.digits_cnn import digits_cnn
from netweight.nn.switchable import switched, widths_of
from netweight.training.double_rounding import DoubleRounding, double_rounding
from netweight.training.loop import Training

LAYERS = ("4", "8")  # of the digits network: all but the first and the last


def call(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def answer(*args) -> dict:
    status, out, err = call(*args, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def small() -> Compressed:
    task = Task(digits.calibration(), digits.test(), train=digits.train())
    return double_rounding(digits_cnn(), task.blind(), Training(1, 128), DoubleRounding()).network()


@pytest.fixture
def folder(tmp_path, small):
    small.save(tmp_path / "net")
    return tmp_path / "net"


def test_all_layers_at_once_and_back(folder, small):
    x = digits.test()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = answer("switch", folder, "--bits", 4)
    assert said["before"] == dict.fromkeys(LAYERS, 8)
    assert said["after"] == dict.fromkeys(LAYERS, 4)
    assert (said["widths"], said["changed"], said["evidence"]) == ([8, 6, 4, 2], 2, [])
    assert 0 < said["seconds"] < 0.5
    net = pipeline.load(folder)
    assert widths_of(net) == dict.fromkeys(LAYERS, 4)
    assert torch.equal(outputs(net.model, x), outputs(switched(small, dict.fromkeys(LAYERS, 4)).model, x))
    assert not torch.equal(outputs(net.model, x), outputs(small.model, x))
    changed = [path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]]
    assert changed == [io.MARK]  # one small file; the weights are not touched
    answer("switch", folder, "--bits", 8)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_exports_that_are_of_other_widths_now_are_named(folder):
    (folder / "model.onnx").write_bytes(b"as exported at 8 bits")
    assert answer("switch", folder, "--bits", 8)["exports_of_other_widths"] == []
    assert answer("switch", folder, "--bits", 2)["exports_of_other_widths"] == ["model.onnx"]
    assert "of other widths, export again: model.onnx" in call("switch", folder, "--bits", 4)[1]


def test_layers_by_name_and_a_look_alone(folder, small):
    said = answer("switch", folder, "--bits", "6,8=2")
    assert said["after"] == {"4": 6, "8": 2}
    x = digits.test()
    wanted = outputs(switched(small, {"4": 6, "8": 2}).model, x)
    assert torch.equal(outputs(pipeline.load(folder).model, x), wanted)
    assert answer("switch", folder)["after"] == {"4": 6, "8": 2}
    assert answer("switch", folder, "--bits", "4=8")["after"] == {"4": 8, "8": 2}
    status, out, _ = call("switch", folder)
    assert status == 0
    assert "1 at 8 bits, 1 at 2 bits" in out


def test_evidence_of_every_width_in_one_report(folder, small):
    said = answer("switch", folder, "--bits", 2, "--data", "digits", "--against", "digits-cnn")
    quantities = [row["quantity"] for row in said["evidence"]]
    assert quantities == [f"accuracy at {b} bits" for b in (8, 6, 4, 2)]
    right = {}
    for b in (8, 6, 4, 2):
        out = outputs(switched(small, dict.fromkeys(LAYERS, b)).model, digits.test())
        right[b] = float((out.argmax(1) == digits.test().y).float().mean())
    assert [row["compressed"] for row in said["evidence"]] == pytest.approx(list(right.values()))
    assert all(row["original"] > 0.95 for row in said["evidence"])
    page = (folder / "report.html").read_text()
    assert all(quantity in page for quantity in quantities)
    again = answer("switch", folder, "--bits", 8)  # what was measured stays, and is shown
    assert again["evidence"] == said["evidence"]
    answer("switch", folder, "--data", "digits")  # measured again: not twice in the table
    kept = json.loads((folder / "evidence.json").read_text())["rows"]
    assert [row["quantity"] for row in kept] == quantities
    assert kept[0]["original"] is None


def test_compare_says_it_too(folder, tmp_path):
    said = answer("compare", "digits-cnn", folder, "--data", "digits", "--out", tmp_path / "seen")
    rows = [row["quantity"] for row in said["evidence"]["rows"]]
    assert rows.count("accuracy at 4 bits") == 1
    assert "accuracy at 4 bits" in (tmp_path / "seen" / "report.html").read_text()


def test_a_switch_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, _, err = call("switch", folder, "--bits", 4)
    assert status == 2
    assert "no space is left" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        ("5", "trained for 8, 6, 4, 2"), ("", "trained for"), ("four", "trained for"), ("4=3", "trained for"),
        ("5x=4", "unknown switchable layer"), ("-4", "trained for"), ("4,", "trained for"),
    ],
)  # fmt: skip
def test_widths_and_layers_that_do_not_exist(folder, bits, sentence):
    with pytest.raises(BadInput, match=sentence):
        widths.switch(folder, bits)
    assert call("switch", folder, f"--bits={bits}")[0] == 2
    assert answer("switch", folder)["after"] == dict.fromkeys(LAYERS, 8)


def test_folders_that_cannot_be_switched(folder, tmp_path):
    with pytest.raises(BadInput, match="not a folder that netweight wrote"):
        widths.switch(tmp_path / "nowhere", "4")
    Compressed(digits_cnn(), Plan(), Change({})).save(tmp_path / "plain")
    with pytest.raises(BadInput, match="one bit width alone"):
        widths.switch(tmp_path / "plain", "4")
    head = json.loads((folder / io.MARK).read_text())
    for damage in (
        {"packed": []}, {"packed": {"4": 3}}, {"packed": {"4": {"is": "DoubleRounded"}}},
        {"activations": {"9": {"is": "WidthRounding"}}}, {"rewrites": [{"is": "SwitchNorms"}]},
    ):  # fmt: skip
        (folder / io.MARK).write_text(json.dumps({**head, **damage}))
        with pytest.raises(BadInput):
            widths.switch(folder, "4")


def test_nothing_heavy_is_imported_for_a_switch(folder):
    script = (
        "import sys; from netweight.core import widths; "
        f"widths.switch({str(folder)!r}, '4'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
