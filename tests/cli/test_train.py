"""netweight train: a folder that every other command takes, resuming, and one sentence for a mistake."""

import json

import pytest
import torch
from typer.testing import CliRunner

from netweight import pipeline
from netweight.cli.main import app
from netweight.cli.train import training_data
from netweight.core.perturbation import Linf
from netweight.data import digits
from netweight.models.digits_cnn import digits_cnn
from netweight.training import loop
from netweight.training.certified import Certified, certified
from netweight.training.chance import restarted
from netweight.training.loop import Training
from netweight.verification.bounds import certify

DIGITS = ("--data", "digits")
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
    assert len(training_data(str(tmp_path / "images.npz"), digits_cnn())) == 20
    assert len(training_data("digits", digits_cnn())) == 1257


@pytest.mark.parametrize(
    ("options", "words"),
    [
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
