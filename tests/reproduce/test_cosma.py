"""The quick reproduction of COSMA reaches its bars; its parts are what they say."""

import math

from netweight.deployment.scratchpad.exhaustive import random_workload
from netweight.reproduce import cosma


def test_quick():
    bars = cosma.reproduce(quick=True).bars
    assert [(bar.bar, bar.passed) for bar in bars] == [(0, True), (0, True)]


def test_cuts_are_means_over_what_a_baseline_moves():
    rows = [
        {"graph": "a", "b": 10, "ours": 5},
        {"graph": "a", "b": 0, "ours": 0},
        {"graph": "c", "b": 4, "ours": 4},
    ]
    assert cosma.cut(rows, "b") == 0.25
    assert cosma.counted(rows, "b") == 2
    assert math.isnan(cosma.cut([{"b": 0, "ours": 0}], "b"))


def test_divide_and_conquer_is_held_against_the_best():
    assert 1 <= cosma.ratio(random_workload(16, 4, 1)) <= 1.3


def test_the_programme_agrees_with_the_search():
    (row,) = cosma.programmes(0, count=1)
    assert row["programme"] == row["search"]
