"""Calls of a module are recorded with all that it was given, and replaying them gives the same."""

import pytest
import torch
from torch import nn

from netweight.core.calls import first, recorded
from netweight.core.task import Data
from netweight.testing import tiny_language_model, tiny_model, tiny_task


class Pair(nn.Module):
    """Gives two things, and takes a factor by name."""

    def forward(self, x: torch.Tensor, *, factor: float) -> tuple[torch.Tensor, str]:
        return x * factor, "more"


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.last = nn.Linear(3, 3), Pair(), nn.Linear(3, 3)
        self.reached = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.pair(self.first(x), factor=2.0)
        self.reached += 1
        return self.last(x)


def test_arguments_names_and_the_first_output():
    model, data = Around().train(), Data(torch.rand(5, 3), batch=2)
    calls = recorded(model, "pair", data)
    assert [len(args[0]) for args, _, _ in calls] == [2, 2, 1] and model.reached == 0  # it stops behind
    for (args, extra, output), (x, _) in zip(calls, data):
        assert dict(extra) == {"factor": 2.0} and torch.equal(args[0], model.first(x))
        assert torch.equal(output, first(model.pair(*args, **extra))) and not output.requires_grad
    assert model.training and not model.pair._forward_hooks


def test_the_model_itself():
    model, task = tiny_model(), tiny_task()
    calls = recorded(model, "", task.calibration)
    assert torch.equal(torch.cat([output for _, _, output in calls]), model(task.calibration.x).detach())


def test_modes_are_those_from_before_also_after_an_error():
    model = tiny_language_model()
    model.norm.train()
    with pytest.raises(IndexError):
        recorded(model, "head", Data(torch.full((2, 3), 99)))
    assert model.norm.training and not model.training and not model.head._forward_hooks
