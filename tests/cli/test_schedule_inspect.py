"""netweight schedule and netweight inspect on the built-in digits network, as a user calls them."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from netweight.cli.common import command
from netweight.cli.inspect import inspect
from netweight.cli.schedule import schedule

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
for function in (schedule, inspect):
    app.command(function.__name__)(command(function))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def test_schedule_answers_and_draws(tmp_path):
    drawn = tmp_path / "stays.svg"
    code, out, err = call(
        "schedule", "digits-cnn", "--data", "digits", "--memory", "1.5x", "--plot", drawn, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["memory"] == int(1.5 * found["least_memory"])
    assert found["compulsory"] == found["bound"] == found["traffic"] and found["proven"]
    assert sorted(found["order"]) == sorted(set(found["order"])) and len(found["order"]) == found["operators"]
    assert {"tensor", "start", "stop", "address"} == set(found["stays"][0])
    picture = drawn.read_text()
    assert picture.startswith("<svg") and "KiB" in picture and picture.count("<path") > len(found["stays"])
    code, text, _ = call("schedule", "digits-cnn", "--data", "digits")
    assert code == 0 and "order:" in text and "gap: 0" in text
    assert max(map(len, text.splitlines())) <= 80


def test_inspect_energy_answers():
    code, out, err = call("inspect", "energy", "digits-cnn", "--data", "digits", "--ratio", "2000", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["balance"] == 2000 and found["fit"] is None and "not joules" in found["how"]
    assert [one["layer"] for one in found["layers"]] == ["1", "4"]
    assert found["layers"][1]["recommended"] == found["group_size"]
    assert found["energy_recommended"] < found["energy"]
    code, text, _ = call("inspect", "energy", "digits-cnn", "--data", "digits", "--ratio", "2000")
    assert code == 0 and "16 > 32" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("schedule", "digits-cnn", "--data", "digits", "--memory", "many"), "memory=many: expected bytes"),
        (("schedule", "digits-cnn", "--data", "digits", "--memory", "1k"), "the smallest possible memory is"),
        (("schedule", "digits-cnn", "--data", "digits", "--method", "milb"), "did you mean 'milp'"),
        (("inspect", "enrgy", "digits-cnn", "--data", "digits"), "did you mean 'energy'"),
        (("inspect", "energy", "digits-cnn", "--data", "digits", "--ratio", "-1"), "not below 0"),
    ],
)
def test_a_mistake_is_named_in_one_sentence(args, words):
    code, out, err = call(*args)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_units():
    from netweight.cli.schedule import size
    from netweight.deployment.scratchpad.exhaustive import random_workload

    work = random_workload(5, 2, 0)
    assert [size(text, work) for text in ("65536", "64k", "64Ki", "1M", "2x")] == [
        65536, 64000, 65536, 1000000, 2 * work.least,
    ]  # fmt: skip
