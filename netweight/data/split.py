"""The parts of a data set: what is calibrated on, what is tested on, and what may be trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from netweight.core.errors import BadInput
from netweight.core.task import Data

MOST = 1024  # calibration examples


@dataclass(frozen=True)
class Split:
    """calibration and test share no example. more: makes the training examples, where there are some."""

    calibration: Data
    test: Data
    more: Callable[[], Data] | None = None

    @functools.cached_property
    def train(self) -> Data | None:
        """What methods that train may use, made on first use; calibration is a part of it."""
        return self.more() if self.more else None


def at_random(data: Data, seed: int = 0) -> Split:
    """A quarter of the examples, at most 1024, to calibrate on, the others to test on; fixed by the seed."""
    if len(data) < 2:
        raise BadInput(
            f"{data.name}: one example cannot be split into calibration and test; give at least two"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    count = calibration_count(len(data))
    return Split(part(data, order[:count], "calibration"), part(data, order[count:].sort().values, "test"))


def in_order(data: Data) -> Split:
    """The same shares, with the first examples to calibrate on: neighbouring windows of a text are alike."""
    if len(data) < 2:
        raise BadInput(
            f"{data.name}: one window cannot be split into calibration and test; give a longer text"
        )
    count = calibration_count(len(data))
    return Split(part(data, slice(0, count), "calibration"), part(data, slice(count, None), "test"))


def calibration_count(examples: int) -> int:
    """How many of so many examples are calibrated on: a quarter, at least 1 and at most 1024."""
    return max(1, min(MOST, examples // 4))


def part(data: Data, which: torch.Tensor | slice, name: str) -> Data:
    """Those examples, with the part's name behind the data's."""
    return replace(data.rows(which), name=f"{data.name} ({name})")
