"""The main job on the digits network: budgets hold, the model stays, files read back, kills lose nothing."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from netweight import pipeline, planning
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, ImpossibleBudget
from netweight.core.perturbation import Linf
from netweight.core.plan import Budget
from netweight.core.task import Task, outputs
from netweight.data import digits
from netweight.models.digits_cnn import digits_cnn


@pytest.fixture(scope="module")
def task():
    return Task(digits.calibration(), digits.test())


@pytest.fixture(scope="module")
def model():
    return digits_cnn()


@pytest.fixture(scope="module")
def small(model, task):
    return pipeline.compress(model, task, Budget(bits=4))


def test_budget_of_mean_bits_holds_on_what_is_stored_and_is_used(small):
    weights = sum(form.decode().numel() for form in small.packed.values())
    assert 3.8 <= small.bits() / weights <= 4.0


def test_model_and_test_data_are_untouched(model, task, small):
    fresh = digits_cnn()
    for (name, tensor), other in zip(model.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(tensor, other), name
    assert "moments" not in task.test.memo


def test_packed_network_and_its_float_twin_agree_and_keep_the_accuracy(model, task, small):
    packed, twin = outputs(small.model, task.test), outputs(small.plain(), task.test)
    assert torch.equal(packed, twin)
    assert not torch.equal(packed, outputs(model, task.test))
    assert float((packed.argmax(1) == task.test.y).float().mean()) > 0.95


def test_budget_of_size_is_the_size_of_the_file(model, task, tmp_path):
    limit = planning.float_bytes(model) // 5
    small = pipeline.compress(model, task, Budget(size=limit))
    small.save(tmp_path / "small")
    written = (tmp_path / "small" / "weights.safetensors").stat().st_size
    assert 0.75 * limit < written <= limit


def test_impossible_budget_names_the_smallest_possible_which_then_works(model, task):
    with pytest.raises(ImpossibleBudget, match="smallest possible is bits=") as caught:
        pipeline.plan(model, task, Budget(bits=1), method="rtn", distortion="output")
    least = float(str(caught.value).rpartition("=")[2])
    plan, _ = pipeline.plan(model, task, Budget(bits=least), method="rtn", distortion="output")
    assert plan.bits_per_weight <= least


def test_more_bits_never_distort_more(model, task):
    totals = [
        pipeline.plan(model, task, Budget(bits=b), method="rtn", distortion="network")[0].distortion
        for b in (3, 4, 6)
    ]
    assert totals[0] > totals[1] > totals[2] > 0


def test_three_answers_obey_their_order(model, task, small):
    few = Task(task.calibration, task.test.take(60))
    evidence = pipeline.compare(model, small, few, within=Linf(0.001, 0.0, 1.0))
    measured, found, possible = (evidence[q] for q in ("average", "worst found", "worst possible"))
    for side in ("original", "compressed"):
        assert getattr(possible, side) <= getattr(found, side) <= getattr(measured, side)
    assert possible.compressed > 0
    assert any(f"All {len(small.packed)} packed layers are decoded" in note for note in evidence.notes)
    assert evidence.from_json(json.loads(json.dumps(evidence.to_json()))).to_json() == evidence.to_json()


def test_nan_weights_are_refused_by_name(model, task):
    broken = copy.deepcopy(model)
    name, tensor = next(iter(broken.named_parameters()))
    tensor.data.view(-1)[0] = float("nan")
    with pytest.raises(BadInput, match=f"{name} holds NaN"):
        pipeline.compress(broken, task, Budget(bits=4))


def test_written_folder_is_whole_and_reads_back_bit_for_bit(model, task, small, tmp_path):
    out = tmp_path / "small"
    evidence = pipeline.compare(model, small, task)
    pipeline.write(out, model, small, evidence, task)
    assert {file.name for file in out.iterdir()} >= {
        "weights.safetensors",
        "plan.json",
        "evidence.json",
        "report.html",
    }
    again = pipeline.load(out)
    assert torch.equal(outputs(again.model, task.test), outputs(small.model, task.test))
    assert again.plan.to_json() == small.plan.to_json()


def test_foreign_folder_is_never_overwritten(model, task, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not netweight's"):
        pipeline.compress(model, task, Budget(bits=4), out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def start(out, *more):
    line = [
        sys.executable,
        "-m",
        "netweight",
        "compress",
        "digits-cnn",
        "--data",
        "digits",
        "--budget",
        "bits=4",
    ]
    return subprocess.Popen([*line, "--out", str(out), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_kill_in_the_middle_leaves_no_result_and_resume_ends_the_same(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = start(cut)
    waiting_for = tmp_path / "cut.partial" / "plan.json"
    while not waiting_for.exists() and first.poll() is None:
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not cut.exists()
    with pytest.raises(BadInput, match="not a folder that netweight wrote whole"):
        Compressed.load(tmp_path / "cut.partial")
    for out, more in ((cut, ["--resume"]), (whole, [])):
        run = start(out, *more)
        _, errors = run.communicate()
        assert run.returncode == 0, errors.decode()
    assert (cut / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert not (tmp_path / "cut.partial").exists()


def test_resume_refuses_the_work_of_another_budget(model, task, tmp_path):
    out = tmp_path / "small"
    pipeline.compress(model, task, Budget(bits=4), out=out)
    with pytest.raises(BadInput, match="run without --resume"):
        pipeline.compress(model, task, Budget(bits=5), out=out, resume=True)


def test_budget_of_latency_is_planned_on_times_measured_here(model, task):
    slow = pipeline.plan(model, task, Budget(latency=10.0), method="rtn", distortion="output")[0]
    assert all(option.method == "keep" for option in slow.choices.values())
    assert 0 < slow.cost("latency") < 10
    with pytest.raises(ImpossibleBudget, match="smallest possible is latency="):
        pipeline.plan(model, task, Budget(latency=1e-9), method="rtn", distortion="output")
