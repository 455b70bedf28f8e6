"""What a network with several bit widths gives at each of them: the metric, measured on the test data."""

from __future__ import annotations

import math

from torch import nn

from netweight.core import intervals
from netweight.core.compressed import Compressed
from netweight.core.result import AVERAGE, Row
from netweight.core.task import Task
from netweight.evidence.average import scores
from netweight.nn.double_rounding import DoubleRounded
from netweight.nn.switchable import switched, widths_of


def trained(small: Compressed) -> tuple[int, ...]:
    """The widths that all switchable layers were trained for, highest first; none for any other network."""
    lists = [set(form.widths) for form in small.packed.values() if isinstance(form, DoubleRounded)]
    return tuple(sorted(set.intersection(*lists), reverse=True)) if lists else ()


def rows(original: nn.Module | None, small: Compressed, task: Task) -> list[Row]:
    """One row for every width, in all layers alike; empty for a network that cannot be switched.

    original: the float network beside it, None where there is none at hand. Without labels there is nothing
    to measure.
    """
    every = trained(small)
    if not every or task.test.y is None:
        return []
    before = math.nan if original is None else summary(original, task)[0]
    table = []
    for bits in every:
        model = switched(small, dict.fromkeys(widths_of(small), bits)).model
        value, low, high = summary(model, task)
        how = "the same stored codes decoded at this width, over the examples"
        quantity = f"{task.judge.name} at {bits} bits"
        table.append(
            Row(AVERAGE, quantity, before, value, low, high, len(task.test), how, "float32", task.judge.unit)
        )
    return table


def summary(model: nn.Module, task: Task) -> tuple[float, float, float]:
    """The metric on the test data and its 95% interval."""
    values = scores(model, task.test, task.judge).double().numpy()
    ends = intervals.mean_interval(values)
    value, low, high = (task.judge.summary(float(v)) for v in (values.mean(), *ends))
    return value, low, high
