"""Integer programmes by name against all choices, and what the solver says where there is none."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.core.milp import Programme


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(0, 25),
)
def test_the_best_of_all_choices(things, room):
    p = Programme()
    for k, (cost, _) in enumerate(things):
        p.binary(("take", k), cost=cost)
    p.row([(("take", k), size) for k, (_, size) in enumerate(things)], high=room)
    found = p.solve()
    choices = [
        c
        for c in itertools.product((0, 1), repeat=len(things))
        if sum(b * s for b, (_, s) in zip(c, things)) <= room
    ]
    best = min(sum(b * cost for b, (cost, _) in zip(c, things)) for c in choices)
    assert found.status == "optimal"
    assert found.value == pytest.approx(best) and found.bound == pytest.approx(best)
    chosen = tuple(int(found.on(("take", k))) for k in range(len(things)))
    assert sum(b * cost for b, (cost, _) in zip(chosen, things)) == best


def test_factors_of_one_name_add_up_and_reals_stay_real():
    p = Programme()
    p.variable("x", cost=-1)
    p.row([("x", 1), ("x", 3)], high=2)
    assert p.solve()["x"] == pytest.approx(0.5)


def test_no_solution_is_said_and_silent(capfd):
    p = Programme()
    p.binary("x", low=1)
    p.row([("x", 1)], high=0)
    found = p.solve()
    assert found.status == "infeasible" and found.gap != found.gap or math.isinf(found.value)
    assert not found.values
    assert capfd.readouterr().out == ""


def test_nonsense_is_named():
    p = Programme()
    p.binary("x")
    with pytest.raises(BadInput, match="x: the programme has this variable already"):
        p.binary("x")
    with pytest.raises(BadInput, match="y: no such variable"):
        p.row([("y", 1)], high=1)
    with pytest.raises(BadInput, match=r"z: no number lies in \[2, 1\]"):
        p.variable("z", low=2, high=1)
