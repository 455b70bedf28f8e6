"""netweight train: a folder that every other command takes, resuming, and one sentence for a mistake."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given as given_values
from hypothesis import strategies as st
from typer.testing import CliRunner

import netweight
from netweight import pipeline
from netweight.cli.main import app
from netweight.cli.settings import given
from netweight.cli.train import METHODS, training_task
from netweight.core import catalogue
from netweight.core.errors import BadInput
from netweight.core.perturbation import Linf
from netweight.data import digits
from netweight.models.digits_cnn import digits_cnn
from netweight.training import loop
from netweight.training.certified import Certified, certified
from netweight.training.chance import restarted
from netweight.training.loop import Training
from netweight.training.weight_compander import WeightCompander, weight_compander
from netweight.verification.bounds import certify

DIGITS = ("--data", "digits")
COMPANDER = ("--method", "weight-compander", "--epochs", "2", "--batch", "256")
SHORT = ("--within", "linf=0.05", "--epochs", "2", "--batch", "256", "--bounds", "ibp")


def call(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def answer(*args, code: int = 0) -> dict:
    status, out, err = call(*args, "--json")
    assert status == code, err
    return json.loads(out)


@pytest.fixture(scope="module")
def robust(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "robust"
    said = answer("train", "digits-cnn", *DIGITS, *SHORT, "--out", out)
    return out, said


def test_it_writes_the_network_that_the_library_trains(robust):
    out, said = robust
    how = Training(2, 256, 2e-3, milestones=(1,), clip=8.0)
    wanted, losses = certified(
        digits_cnn(), digits.train(), Linf(0.05), how, Certified("ibp", natural=0, ramp=1)
    )
    small = pipeline.load(out)
    assert all(
        torch.equal(a, b) for a, b in zip(small.plain().state_dict().values(), wanted.state_dict().values())
    )
    assert said["losses"] == list(losses)
    assert said["last_loss"] == losses[-1]
    assert (said["out"], said["examples"], said["within"]) == (str(out), 1257, "linf=0.05")
    assert sorted(path.name for path in out.parent.iterdir()) == ["robust"]  # no checkpoint is left


def test_the_network_flows_on_unchanged(robust, tmp_path):
    out, _ = robust
    plain = pipeline.load(out).plain()
    x = digits.test().x[:20]
    proven = answer("verify", out, *DIGITS, "--within", "linf=0.002", "--limit", 20, "--method", "ibp")
    inside = Linf(0.002, 0.0, 1.0)
    assert proven["verdicts"] == certify(plain, digits.test().take(20), inside, method="ibp").verdicts
    rows = answer("compare", "digits-cnn", out, *DIGITS)["evidence"]["rows"]
    measured = next(row for row in rows if row["quantity"] == "accuracy")["compressed"]
    test = digits.test()
    with torch.no_grad():
        assert measured == pytest.approx((plain(test.x).argmax(1) == test.y).float().mean().item(), abs=1e-6)
    exported = answer("export", out, *DIGITS, "--out", tmp_path / "model.onnx")
    assert exported["same"]
    small = answer(
        "compress", out, *DIGITS, "--budget", "bits=8", "--method", "rtn", "--out", tmp_path / "small"
    )
    assert not small["missed"]
    assert plain(x).shape == (20, 10)


def test_a_stopped_run_resumes_to_the_same_network(robust, tmp_path, monkeypatch):
    _, said = robust
    out, real = tmp_path / "robust", loop.store

    def stops(path, what, run):
        real(path, what, run)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "store", stops)
    code, _, err = call("train", "digits-cnn", *DIGITS, *SHORT, "--out", out)
    assert code == 130
    assert "--resume" in err
    assert not out.exists()
    monkeypatch.setattr(loop, "store", real)
    assert (
        answer("train", "digits-cnn", *DIGITS, *SHORT, "--out", out, "--resume")["losses"] == said["losses"]
    )


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    out = tmp_path_factory.mktemp("compander") / "bounded"
    sets = ("--set", "strength=0.8", "--set", "learnt=true", "--set", "cosine=yes")
    return out, sets, answer("train", "digits-cnn", *DIGITS, *COMPANDER, *sets, "--out", out)


def test_a_method_of_the_catalogue_is_given_its_settings(bounded):
    out, _, said = bounded
    task = training_task("digits", digits_cnn())
    wanted = weight_compander(
        digits_cnn(), task, Training(2, 256, 1e-3, cosine=True), WeightCompander(0.8, learnt=True)
    )
    state, same = pipeline.load(out).plain().state_dict(), wanted.model.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert said["losses"] == list(wanted.losses)
    assert said["settings"] == {"strength": 0.8, "learnt": True}
    assert said["notes"]["a_and_b"].keys() == wanted.notes["a_and_b"].keys()
    assert (said["epochs"], said["processes"], said["method"]) == (2, 1, "weight-compander")
    assert [path.name for path in out.parent.iterdir()] == ["bounded"]


def test_a_killed_run_of_it_resumes_to_the_same_numbers(bounded, tmp_path):
    _, sets, said = bounded
    out = tmp_path / "bounded"
    words = ["train", "digits-cnn", *DIGITS, *COMPANDER, *sets, "--out", str(out)]
    script = KILLED.format(words=words)
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bounded.training"]
    code, _, err = call(*words, "--set", "strength=2", "--resume")
    assert code == 2 and "given twice" in err
    code, _, err = call(*words, "--rate", 0.5, "--resume")
    assert code == 2 and "the checkpoint is of other weights, data or settings" in err
    assert answer(*words, "--resume")["losses"] == said["losses"]


KILLED = """
import os, signal
from netweight.cli.main import app
from netweight.training import loop
real = loop.store
def killed(path, what, run):
    real(path, what, run)
    os.kill(os.getpid(), signal.SIGKILL)
loop.store = killed
app({words!r})
"""


def environment(**more):
    path = str(Path(netweight.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def test_two_processes_write_one_folder_and_print_one_answer(bounded, tmp_path):
    _, sets, said = bounded
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo to train over")
    words = ["train", "digits-cnn", *DIGITS, *COMPANDER, *sets, "--out", str(tmp_path / "two"), "--json"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*two, "-m", "netweight", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = json.loads(done.stdout)
    assert found["processes"] == 2
    assert found["losses"] == pytest.approx(said["losses"], rel=1e-4)
    x = digits.test().x[:50]
    with torch.no_grad():
        one, both = (pipeline.load(folder).plain()(x) for folder in (said["out"], tmp_path / "two"))
    assert torch.allclose(one, both, atol=0.02)  # Adam divides by what is nearly 0 at first
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_compress_sends_a_method_of_training_here(tmp_path):
    code, out, err = call(
        "compress", "digits-cnn", *DIGITS, "--budget", "bits=4", "--method", "weight-compander"
    )
    assert (code, out) == (2, "")
    assert "use netweight train --method weight-compander" in err and err.count("\n") == 1


def test_every_method_of_training_with_settings_is_offered():
    assert METHODS[0] == "certified"
    slugs = {
        s.slug for s in catalogue.SYSTEMS if s.room in ("training", "search") and s.method and s.settings
    }
    assert {*METHODS[1:]} == slugs >= {"weight-compander"}


@dataclasses.dataclass(frozen=True)
class Kinds:
    count: int = 1
    ratio: float | None = 0.5
    name: str = "a"
    pair: tuple[int, int] = (1, 2)
    several: tuple[float, ...] = ()
    on: bool = False


@given_values(
    count=st.integers(-9, 9),
    ratio=st.none() | st.floats(-1e3, 1e3),
    pair=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    several=st.lists(st.floats(-9, 9), max_size=4).map(tuple),
    on=st.booleans(),
)
def test_settings_survive_being_written_down(count, ratio, pair, several, on):
    wanted = Kinds(count, ratio, "b=c", pair, several, on)
    texts = [f"{field.name}={getattr(wanted, field.name)}" for field in dataclasses.fields(wanted)]
    assert Kinds(**given(texts, Kinds)[0]) == wanted


def test_settings_go_to_the_first_class_that_has_them_and_tuples_have_a_length():
    other = dataclasses.make_dataclass("Other", [("count", int), ("more", float)])
    assert given(["count=3", "more=2"], Kinds, other) == [{"count": 3}, {"more": 2.0}]
    with pytest.raises(BadInput, match="2 values with commas between them"):
        given(["pair=1,2,3"], Kinds)
    with pytest.raises(BadInput, match="expected a whole number"):
        given(["count=1.5"], Kinds)


def test_beginning_anew_and_moving_weights(tmp_path):
    options = ("--within", "linf=0", "--epochs", "2", "--batch", "256", "--weights", "l2=0.01", "--fresh")
    said = answer("train", "digits-cnn", *DIGITS, *options, "--out", tmp_path / "new")
    assert said["weights"] == "l2=0.01"
    assert said["losses"][0] > 1.5
    first, second = restarted(digits_cnn(), 0), restarted(digits_cnn(), 0)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first[1].weight, digits_cnn()[1].weight)
    assert not torch.equal(first[1].weight, restarted(digits_cnn(), 1)[1].weight)


def test_data_without_a_training_part_is_trained_on_what_it_is_calibrated_on(tmp_path):
    import numpy as np

    data = digits.train()
    np.savez(tmp_path / "images.npz", x=data.x[:80].numpy(), y=data.y[:80].numpy())
    task = training_task(str(tmp_path / "images.npz"), digits_cnn())
    assert (task.train, len(task.calibration)) == (None, 20)
    assert len(training_task("digits", digits_cnn()).train) == 1257
    said = answer(
        "train", "digits-cnn", "--data", tmp_path / "images.npz", *COMPANDER, "--out", tmp_path / "small"
    )
    assert said["examples"] == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            (*COMPANDER, "--out", "OUT", "--set", "strenght=2"),
            "unknown setting 'strenght'; did you mean 'strength'",
        ),
        ((*COMPANDER, "--out", "OUT", "--set", "strength=much"), "--set strength=much: expected a number"),
        (
            (*COMPANDER, "--out", "OUT", "--set", "learnt=perhaps"),
            "--set learnt=perhaps: expected true or false",
        ),
        ((*COMPANDER, "--out", "OUT", "--set", "strength"), "expected NAME=VALUE"),
        (
            (*COMPANDER, "--out", "OUT", "--set", "cosine=true", "--set", "cosine=no"),
            "--set cosine is given twice",
        ),
        (
            (*COMPANDER, "--out", "OUT", "--set", "strength=0"),
            "strength=0.0: a number of standard deviations",
        ),
        ((*COMPANDER, "--out", "OUT", "--set", "batch=3"), "give it as --batch"),
        ((*COMPANDER, "--out", "OUT", "--within", "linf=0.1"), "--within belongs to the method certified"),
        ((*COMPANDER, "--out", "OUT", "--precision", "float8"), "unknown precision 'float8'; did you mean"),
        (COMPANDER, "give its folder, for example --out robust"),
        ((), "--within is missing"),
        (("--within", "linf=0.1"), "give its folder, for example --out robust"),
        (("--within", "linf=0.1", "--out", "OUT", "--method", "certifed"), "did you mean 'certified'"),
        (("--within", "linf=0.1", "--out", "OUT", "--bounds", "crown"), "did you mean 'crown-ibp'"),
        (("--within", "linf=-1", "--out", "OUT"), "the radius is a number of at least 0"),
        (("--within", "rounding", "--out", "OUT"), "is no set of inputs to train for"),
        (("--within", "linf=0.1", "--out", "OUT", "--weights", "l1=1"), "give l2 or weightlinf"),
        (("--within", "linf=0.1", "--out", "OUT", "--rate", "0"), "the learning rate is a number above 0"),
    ],
)
def test_mistakes_are_one_sentence(options, words, tmp_path):
    args = [tmp_path / "x" if option == "OUT" else option for option in options]
    code, out, err = call("train", "digits-cnn", *DIGITS, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
