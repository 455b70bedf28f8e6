"""What every command shares: exit codes, one sentence for a mistake, one JSON object on stdout."""

import errno
import json
import math
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from netweight.cli import common
from netweight.core.errors import BadInput
from netweight.core.progress import steps
from netweight.core.task import Data


def run(function, *args):
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(common.command(function))
    return CliRunner().invoke(app, list(args))


def raising(error):
    def fails() -> None:
        raise error

    return fails


MISTAKES = [
    (BadInput("x.npz: it is\nempty; give another"), 2, "netweight: x.npz: it is empty; give another"),
    (KeyboardInterrupt(), 130, "run the same command with --resume"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "no space is left on that disk"),
    (OSError(errno.EDQUOT, "Quota"), 2, "no space is left on that disk"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
    (MemoryError(), 2, "memory of this machine is full"),
    (ZeroDivisionError("division by zero"), 2, "unexpected ZeroDivisionError: division by zero"),
]


@pytest.mark.parametrize(("error", "code", "sentence"), MISTAKES, ids=lambda v: type(v).__name__)
def test_a_mistake_is_one_sentence_on_stderr(error, code, sentence):
    result = run(raising(error))
    assert result.exit_code == code
    assert result.stdout == ""
    assert sentence in result.stderr
    assert result.stderr.startswith("netweight: ")
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback_too():
    result = run(raising(BadInput("wrong")), "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("netweight: wrong\n")


@pytest.mark.parametrize(("kept", "code"), [(None, 0), (True, 0), (False, 1)])
def test_a_promise_that_does_not_hold_is_exit_code_1(kept, code):
    assert run(lambda: kept).exit_code == code


def test_usage_mistakes_are_exit_code_2():
    def needs(thing: str) -> None:
        raise AssertionError(thing)

    assert run(needs).exit_code == 2
    assert run(needs, "x", "--no-such-option").exit_code == 2


@pytest.mark.parametrize("as_json", [True, False])
def test_the_answer_is_all_that_stdout_holds(as_json):
    def works() -> None:
        with common.working():
            sys.stdout.write("a library talks")
            list(steps(range(3), "work"))
        content = {"value": math.nan, "deep": [math.inf, {"x": -math.inf}], "n": 3, "list": [1]}
        common.answer(content, lambda: common.lines({**content, "none": None}), as_json=as_json)

    result = run(works)
    assert "a library talks" in result.stderr
    if as_json:
        assert json.loads(result.stdout) == {
            "value": None,
            "deep": ["inf", {"x": "-inf"}],
            "n": 3,
            "list": [1],
        }
        assert result.stdout.count("\n") == 1
    else:
        assert result.stdout == "value: nan\nn: 3\nnone: none\n"


def test_the_metric_fits_the_labels():
    x, ids = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long)
    assert common.fitting(Data(x, torch.zeros(4, dtype=torch.long))) == "accuracy"
    assert common.fitting(Data(x)) == "accuracy"
    assert common.fitting(Data(x, torch.zeros(4, 1))) == "mse"
    assert common.fitting(Data(ids, ids)) == "perplexity"
    assert common.fitting(Data(ids, ids[:, 0])) == "accuracy"  # a class for each text
