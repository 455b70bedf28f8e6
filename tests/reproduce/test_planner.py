"""The planner beside single methods on the embedded network, and what its table has to say."""

import pytest

from netweight.core import catalogue
from netweight.core.plan import Budget
from netweight.reproduce import planner


def test_quick():
    claim = planner.reproduce(quick=True)
    (bar,) = claim.bars
    assert bar.passed and bar.measured > 0.5, claim.figures
    (rows,) = claim.figures["digits"].values()
    assert rows["ratio"] == pytest.approx(rows["test"][rows["chosen"]] / rows["test"][rows["best single"]])
    assert {*rows["calibration"]} <= {*rows["test"]} and rows["chosen"] in rows["calibration"]
    assert catalogue.find(rows["best single"]).settings and rows["bits per weight"] <= 3


def test_seeds_draw_other_calibration_examples():
    (first,), (second,) = planner.quick_subjects(0), planner.quick_subjects(1)
    assert len(first.task.calibration) == len(second.task.calibration) == 128
    assert (first.task.calibration.x != second.task.calibration.x).any()
    assert (first.task.test.x == second.task.test.x).all()


def test_budgets_are_said_in_a_word():
    assert planner.said(Budget(bits=3)) == "bits=3" and planner.said(Budget(share=0.15)) == "size=15%"
