"""The commands on the built-in digits network, as a user calls them: exit codes, JSON, files."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import netweight
from netweight.cli.main import app
from netweight.core import catalogue
from netweight.core.catalogue import SYSTEMS
from netweight.core.perturbation import Found
from netweight.core.result import Bar, Claim

DIGITS = ("--data", "digits")
COMMANDS = (
    "compress", "plan", "compare", "verify", "attack", "export", "methods", "reproduce", "bench", "train",
    "inspect", "schedule",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def answer(*args, code: int = 0) -> dict:
    status, out, err = call(*args, "--json")
    assert status == code, err
    assert out.count("\n") == 1
    return json.loads(out)


PROGRESS = re.compile(r": \d+/\d+ in \d+ s$")


def sentence(*args) -> str:
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if not PROGRESS.search(line)]  # a slow machine shows bars
    assert len(said) == 1 and "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("cli") / "small"
    options = ("--budget", "bits=4", "--method", "rtn", "--within", "linf=0.01", "--out", out)
    return out, answer("compress", "digits-cnn", *DIGITS, *options)


def test_help_lists_every_command_with_its_json():
    code, out, _ = call("--help")
    assert code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in out
        code, text, _ = call(name, "--help")
        assert code == 0
        assert "--json" in text
        assert "--debug" in text
    assert call("--version")[1].strip() == netweight.__version__
    assert call("no-such-command")[0] == 2


def test_the_module_runs_as_the_command():
    root = Path(netweight.__file__).parent.parent
    command = [sys.executable, "-m", "netweight", "attack", "digits-cn", *DIGITS, "--within", "linf=0.1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "netweight: unknown model 'digits-cn'; did you mean 'digits-cnn'?\n"


def test_compress_writes_the_whole_folder(small):
    out, said = small
    assert {"weights.safetensors", "plan.json", "evidence.json", "report.html", "netweight.json"} <= {
        path.name for path in out.iterdir()
    }
    assert said["out"] == str(out)
    assert said["missed"] == []
    assert said["evidence"] == json.loads((out / "evidence.json").read_text())
    choices = said["plan"]["choices"]
    assert choices == json.loads((out / "plan.json").read_text())["choices"]
    stored = sum(c["cost"]["bits"] for c in choices) / sum(c["cost"]["weights"] for c in choices)
    assert 2 < stored <= 4
    assert {row["question"] for row in said["evidence"]["rows"]} == {
        "average",
        "worst found",
        "worst possible",
        "cost",
    }
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert all(c["layer"] in page for c in choices)


def test_a_budget_that_is_missed_is_named_with_exit_code_1(monkeypatch, tmp_path):
    from netweight import pipeline

    measured = pipeline.compare

    def heavier(*args, **options):
        found = measured(*args, **options)
        found.rows = [
            replace(row, compressed=6.5) if row.quantity == "stored bits per weight" else row
            for row in found.rows
        ]
        return found

    monkeypatch.setattr(pipeline, "compare", heavier)
    options = ("--method", "rtn", "--out", tmp_path / "small")
    code, _, err = call("compress", "digits-cnn", *DIGITS, "--budget", "bits=6,size=40%", *options)
    assert code == 1
    assert "the budget bits=6 is missed" in err
    assert "size" not in err


def test_compare_agrees_with_compress_and_says_it_in_80_columns(small, tmp_path):
    out, said = small
    again = answer("compare", "digits-cnn", out, *DIGITS, "--out", tmp_path / "seen")

    def average(evidence):
        return [row for row in evidence["rows"] if row["question"] == "average"]

    assert average(again["evidence"]) == average(said["evidence"])
    assert (tmp_path / "seen" / "report.html").read_text().startswith("<!doctype html>")
    code, text, _ = call("compare", "digits-cnn", "digits-cnn", *DIGITS)
    assert code == 0
    assert "accuracy" in text
    assert max(map(len, text.splitlines())) <= 80


def test_plan_shows_the_plan_and_draws_it(small, tmp_path):
    drawn = tmp_path / "plan.svg"
    options = ("--budget", "bits=4", "--method", "rtn", "--plot", drawn)
    found = answer("plan", "digits-cnn", *DIGITS, *options)
    assert found["choices"] == small[1]["plan"]["choices"]
    assert found["options"] > len(found["choices"])
    assert drawn.read_text().startswith("<svg")
    message = sentence("plan", "digits-cnn", *DIGITS, "--budget", "bits=0.5", "--method", "rtn")
    assert "the smallest possible is bits=" in message


def test_verify_never_claims_what_an_attack_refutes(small):
    options = (*DIGITS, "--within", "linf=0.02", "--limit", "40")
    proven = answer("verify", small[0], *options)
    attacked = answer("attack", small[0], *options, "--steps", "10")
    assert proven["verified"] + proven["unknown"] + proven["wrong"] == proven["examples"] == 40
    assert not {i for i in attacked["hits"] if proven["verdicts"][i] == "verified"}
    assert attacked["found"] == len(attacked["hits"]) >= proven["wrong"]
    few = (*DIGITS, "--limit", "8", "--against", "digits-cnn")
    apart = answer("verify", small[0], *few, "--within", "linf=0.02")
    assert apart["largest_difference"] >= apart["mean_difference"] > 0
    point = (*few, "--within", "linf=0")
    itself, other = (answer("verify", of, *point)["largest_difference"] for of in ("digits-cnn", small[0]))
    assert 0 < 2 * itself < other  # itself: the slack of rounding alone


def test_a_certificate_is_written_checked_and_found_out(small, tmp_path):
    path = tmp_path / "proof.json"
    options = (*DIGITS, "--within", "linf=0.02", "--limit", "6", "--out", path)
    proven = answer("verify", small[0], *options)
    checked = answer("verify", "--check", path)
    assert proven["certificate"] == str(path) and checked["share_confirmed"] == 1.0
    assert checked["confirmed"] == proven["verified"] > 0
    other = answer("verify", "digits-cnn", "--check", path, code=1)  # not the network of the certificate
    assert other["confirmed"] == 0


def test_verify_smooths_and_decides(tmp_path):
    smoothed = answer(
        "verify", "digits-cnn", *DIGITS, "--method", "smoothing", "--samples", "200", "--limit", "5"
    )
    assert smoothed["examples"] == 5 == smoothed["certified"] + smoothed["wrong"] + smoothed["abstained"]
    assert "--data is missing" in sentence("verify", "digits-cnn")
    assert "MODEL is missing" in sentence("verify")
    (tmp_path / "p.vnnlib").write_text("(declare-const X_0 Real)\n(assert (<= X_7 1))")
    assert "no Y_0 is declared" in sentence("verify", "digits-cnn", "--spec", tmp_path / "p.vnnlib")


def test_attack_finds_where_two_networks_part(small):
    options = (*DIGITS, "--within", "linf=0.1", "--limit", "30", "--steps", "10", "--against", "digits-cnn")
    found = answer("attack", small[0], *options)
    assert found["method"] == "disagree"
    assert found["examples"] == 30
    same = answer("attack", "digits-cnn", *options)
    assert same["found"] == 0


def test_attack_keeps_to_valid_inputs(monkeypatch):
    seen = []

    def search(network, x, y, within, **how):
        seen.append((within.low, within.high, how))
        return Found(x, torch.zeros(len(x), dtype=torch.bool))

    monkeypatch.setattr(catalogue, "method", lambda slug: search)
    options = (*DIGITS, "--within", "linf=0.1", "--limit", "2")
    answer("attack", "digits-cnn", *options, "--restarts", "3", "--steps", "7", "--seed", "5")
    assert seen == [(0.0, 1.0, {"steps": 7, "restarts": 3, "seed": 5})]


def test_attack_by_any_method_counts_wrong_examples_apart_and_saves_what_it_found(small, tmp_path):
    options = (*DIGITS, "--within", "linf=0.2", "--limit", "60")
    found = answer(
        "attack", "digits-cnn", *options, "--method", "apgd", "--steps", "5", "--out", tmp_path / "f.npz"
    )
    assert found["method"] == "apgd" and 0 <= found["wrong before"] <= found["found"] > 20
    arrays = np.load(tmp_path / "f.npz")
    assert arrays["index"].tolist() == found["hits"] and arrays["x"].shape == (found["found"], 1, 8, 8)
    again = answer("attack", "digits-cnn", "--data", tmp_path / "f.npz", "--within", "linf=0", "--limit", "9")
    assert again["wrong before"] == again["examples"]  # as a test set of its own
    parted = answer("attack", small[0], *options, "--against", "digits-cnn", "--out", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == parted["found"] > 0
    assert "--steps; leave it out" in sentence(
        "attack", "digits-cnn", *options, "--method", "fgsm", "--steps", "2"
    )
    assert "holds files" in sentence("attack", "digits-cnn", *options, "--out", tmp_path)
    wide = answer("attack", "digits-cnn", *DIGITS, "--within", "linf=1", "--limit", "2", "--method", "fgsm")
    assert "reaches over the whole valid range" in wide["notes"][0]


def test_attack_flips_stored_bits(small):
    options = (*DIGITS, "--method", "bit-flips", "--limit", "100")
    found = answer("attack", small[0], *options, "--within", "bitflips=5")
    assert found["examples"] == 100 >= found["right before"] > found["right after"]
    none = answer("attack", small[0], *options, "--within", "bitflips=0")
    assert none["right before"] == none["right after"] == found["right before"]
    assert "needs a compressed network" in sentence(
        "attack", "digits-cnn", *options, "--within", "bitflips=1"
    )


def test_attack_makes_one_change_for_all_inputs():
    options = (*DIGITS, "--method", "gd-uap", "--limit", "120", "--within", "linf=0.2", "--steps", "20")
    found = answer("attack", "digits-cnn", *options)
    assert found["examples"] == 120 and found["wrong before"] < found["found"] == len(found["hits"]) < 120
    assert "give linf" in sentence("attack", "digits-cnn", *DIGITS, "--method", "gd-uap", "--within", "l2=1")


def test_attack_makes_images_from_nothing(tmp_path):
    options = (*DIGITS, "--method", "fooling")
    path = tmp_path / "f.npz"
    found = answer("attack", "digits-cnn", *options, "--steps", "3", "--out", path)
    assert found["generations"] == 3 and 0.5 < found["median confidence"] < 1
    assert np.load(path)["x"].shape == (10, 1, 8, 8) and np.load(path)["y"].tolist() == [*range(10)]
    assert "leave --within out" in sentence("attack", "digits-cnn", *options, "--within", "linf=0.1")


def test_export_writes_a_file_that_onnx_runtime_runs(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "small.onnx"
    found = answer("export", small[0], *DIGITS, "--to", "onnx", "--out", path)
    assert found["bytes"] == path.stat().st_size
    assert found["same"] is True
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape[1:] == [1, 8, 8]
    kept = json.loads((Path(small[0]) / "evidence.json").read_text())["context"]["exports"]["onnx"]
    assert kept == {name: found[name] for name in found if name != "path"}


def test_other_forms_are_exported_beside_the_weights(small):
    for form, place in (("onnxruntime", "model.ort.onnx"), ("openvino", "model.xml")):
        found = answer("export", small[0], *DIGITS, "--to", form)
        assert found["same"] is True and Path(found["path"]) == Path(small[0]) / place
    kept = json.loads((Path(small[0]) / "evidence.json").read_text())["context"]["exports"]
    assert {"onnxruntime", "openvino"} <= kept.keys()
    said = sentence("export", small[0], *DIGITS, "--to", "compressed-tensors")
    assert "holds models of Transformers" in said
    assert "did you mean 'onnx'" in sentence("export", small[0], *DIGITS, "--to", "onx")


def test_methods_lists_the_catalogue():
    found = answer("methods")
    assert [line["slug"] for line in found["methods"]] == [system.slug for system in SYSTEMS]
    assert {line["room"] for line in answer("methods", "--room", "attacks")["methods"]} == {"attacks"}
    assert {line["room"] for line in answer("methods", "--room", "compress")["methods"]} == {"compression"}
    assert "did you mean 'attacks'" in sentence("methods", "--room", "atacks")
    learnt = answer("methods", "--where", "rounding=learnt", "--where", "what=activations")["methods"]
    assert "brecq" in [line["slug"] for line in learnt] and "rtn" not in [line["slug"] for line in learnt]
    assert all("learnt" in line["traits"]["rounding"] for line in learnt)
    assert "did you mean 'dyadic'" in sentence("methods", "--where", "arithmetic=diadic")
    assert "rounding: second-order" in " ".join(call("methods", "--traits")[1].split())
    code, text, _ = call("methods")
    assert code == 0
    assert "quantization-survey" in text


@pytest.mark.parametrize(("measured", "code"), [(0.1, 0), (0.9, 1)])
def test_reproduce_tells_whether_the_bars_are_reached(monkeypatch, tmp_path, measured, code):
    module = pytest.importorskip("netweight.reproduce.awq")
    monkeypatch.setenv("NETWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        module, "reproduce", lambda *, seed, quick: Claim([Bar("e", measured, 0.5, "at most")])
    )
    found = answer("reproduce", "awq", "--quick", "--seeds", "2", code=code)
    assert (found["slug"], found["passed"], found["quick"], found["seeds"]) == ("awq", not code, True, [0, 1])
    status, text, _ = call("reproduce", "awq", "--quick", "--seeds", "1")
    assert status == code
    assert found["claim"].split()[0] in text
    assert "not recorded" in text


MISTAKES = [
    (("compress", "digits-cnn", *DIGITS, "--budget", "bitz=4"), "did you mean 'bits'"),
    (("compress", "digits-cnn", *DIGITS, "--budget", "bits=4", "--method", "gtpq"), "did you mean 'gptq'"),
    (
        ("compress", "digits-cnn", *DIGITS, "--budget", "bits=4", "--metric", "accurcy"),
        "did you mean 'accuracy'",
    ),
    (("compress", "no.onnx", *DIGITS, "--budget", "bits=4"), "no.onnx"),
    (("plan", "digits-cnn", "--data", "no.npz", "--budget", "bits=4"), "no.npz"),
    (("attack", "digits-cnn", *DIGITS), "--within is missing"),
    (("attack", "digits-cnn", *DIGITS, "--within", "linf=x"), "'x' is not a number"),
    (("attack", "digits-cnn", *DIGITS, "--within", "linf=0.1", "--method", "rtn"), "'rtn' is no attack"),
    (("attack", "digits-cnn", *DIGITS, "--within", "linf=0.1", "--method", "disagree"), "belong together"),
    (("verify", "digits-cnn", *DIGITS, "--within", "linf=0.1", "--method", "idp"), "ibp"),
    (("reproduce",), "one SLUG or --all"),
    (("reproduce", "awq", "--all"), "one SLUG or --all"),
    (("reproduce", "pgd"), "has no reproduction of its own"),
    (("bench", "al"), "unknown bench 'al'"),
]


@pytest.mark.parametrize(
    ("args", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_a_mistake_is_named_in_one_sentence(args, words):
    assert words in sentence(*args)


def test_a_folder_that_is_not_ours_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    message = sentence("compress", "digits-cnn", *DIGITS, "--budget", "bits=4", "--out", tmp_path)
    assert "--out" in message
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
