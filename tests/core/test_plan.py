"""Plans: the least distortion by brute force, budgets, the smallest possible, JSON, and nonsense."""

import itertools
import json
import math
import os
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core import catalogue, knapsack
from netweight.core.errors import BadInput, ImpossibleBudget
from netweight.core.plan import Budget, KnowsBits, Option, PlacesBits, Plan, allocate

NUMBERS = st.integers(0, 12)  # small whole numbers make ties and exact fits


@st.composite
def problems(draw, ceilings: int):
    layers = draw(st.integers(1, 5))
    numbers = NUMBERS if draw(st.booleans()) else st.floats(0, 1, width=16)
    options = []
    for layer in range(layers):
        for choice in range(draw(st.integers(1, 5))):
            cost = {"bits": float(draw(numbers)) + 1, "weights": 2.0, "bops": float(draw(numbers)) + 1}
            options.append(Option(f"l{layer}", "rtn", {"choice": choice}, cost, float(draw(numbers))))
    shares = [draw(st.floats(0, 1)) for _ in range(ceilings)]
    return options, shares


def all_plans(options):
    layers = {}
    for option in options:
        layers.setdefault(option.layer, []).append(option)
    return list(itertools.product(*layers.values()))


def total(plan, name):
    return sum(option.cost["bits" if name == "size" else name] for option in plan)


def between(plans, name, share):
    """A ceiling somewhere between the smallest and the largest possible."""
    costs = [total(plan, name) for plan in plans]
    return min(costs) + share * (max(costs) - min(costs))


def brute_force(plans, ceilings):
    fit = [p for p in plans if all(total(p, n) <= c * (1 + 1e-12) for n, c in ceilings.items())]
    return min((sum(o.distortion for o in plan) for plan in fit), default=None)


@settings(max_examples=200, deadline=None)
@given(problems(1))
def test_one_ceiling_is_solved_exactly(problem):
    options, (share,) = problem
    plans = all_plans(options)
    budget = Budget(bits=between(plans, "bits", share) / (2 * len(plans[0])))
    plan = allocate(options, budget)
    assert plan.cost("bits") <= budget.bits * plan.cost("weights") * (1 + 1e-12)
    assert plan.distortion == pytest.approx(brute_force(plans, budget.ceilings(2 * len(plans[0]))), abs=1e-9)
    assert list(plan.choices) == list(dict.fromkeys(option.layer for option in options))
    assert all(plan.choices[name].layer == name for name in plan.choices)


@settings(max_examples=200, deadline=None)
@given(problems(2))
def test_two_ceilings_are_solved_exactly_or_refused_with_the_smallest_possible(problem):
    options, (share, other) = problem
    plans = all_plans(options)
    budget = Budget(size=math.ceil(between(plans, "bits", share) / 8), bops=between(plans, "bops", other))
    expected = brute_force(plans, budget.ceilings(0))
    if expected is not None:
        plan = allocate(options, budget)
        assert plan.distortion == pytest.approx(expected, abs=1e-9)
        assert plan.cost("bits") <= 8 * budget.size and plan.cost("bops") <= budget.bops * (1 + 1e-12)
        return
    with pytest.raises(
        ImpossibleBudget, match="with size within theirs: the smallest possible is bops="
    ) as refused:
        allocate(options, budget)
    possible = float(re.search(r"is bops=(\S+)$", str(refused.value))[1])
    allocate(options, Budget(size=budget.size, bops=possible))
    with pytest.raises(ImpossibleBudget):
        allocate(options, Budget(size=budget.size, bops=possible * 0.998))  # it is given in four digits


@settings(deadline=None)
@given(problems(0), st.sampled_from(["bits", "size", "bops"]), st.floats(1e-3, 1e9))
def test_an_impossible_budget_names_the_smallest_that_works(problem, name, unit):
    options = [
        Option(o.layer, o.method, o.settings, {**o.cost, "bops": o.cost["bops"] * unit}, o.distortion)
        for o in problem[0]
    ]
    with pytest.raises(ImpossibleBudget, match=f"^budget {name}=.* cannot be met: the smallest") as refused:
        allocate(options, Budget(**{name: 1e-6 if name != "size" else 1}), fixed=100.0)
    possible = float(re.search(rf"is {name}=(\S+)$", str(refused.value))[1])
    plan = allocate(options, Budget(**{name: int(possible) if name == "size" else possible}), fixed=100.0)
    if name == "size":
        assert possible - 1 < (plan.cost("bits") + 100) / 8 <= possible
    with pytest.raises(ImpossibleBudget):
        allocate(
            options, Budget(**{name: int(possible) - 1 if name == "size" else possible * 0.998}), fixed=100.0
        )


def option(layer, bits, distortion, **more):
    return Option(layer, "rtn", {"bits": bits}, {"bits": bits * 10.0, "weights": 10.0, **more}, distortion)


def test_without_a_ceiling_the_best_is_taken_and_the_first_of_equals():
    options = [
        option("a", 4, 1.0),
        option("a", 8, 0.5),
        option("b", 3, 2.0),
        option("b", 2, 2.0),
        option("a", 9, 0.5),
    ]
    plan = allocate(options, Budget())
    assert [o.settings["bits"] for o in plan.choices.values()] == [8, 3]
    assert plan.distortion == 2.5 and plan.bits_per_weight == 5.5 and plan.cost("latency") == 0
    twins = [
        Option(layer, method, {}, {"bits": 5.0, "weights": 1.0}, 1.0)
        for layer in "ab"
        for method in ("x", "y")
    ]
    rest = [Option(layer, "z", {}, {"bits": 9.0, "weights": 1.0}, 0.0) for layer in "ab"]
    tight = allocate([*twins, *rest], Budget(bits=5))
    assert [o.method for o in tight.choices.values()] == ["x", "x"]


def test_fixed_bits_count_against_the_size_alone():
    options = [option("a", 4, 1.0), option("a", 8, 0.0)]
    assert allocate(options, Budget(size=10)).choices["a"].settings["bits"] == 8
    assert allocate(options, Budget(size=10), fixed=1.0).choices["a"].settings["bits"] == 4
    assert allocate(options, Budget(bits=8), fixed=1e9).choices["a"].settings["bits"] == 8
    assert allocate(options, Budget(size=10), fixed=1.0).fixed == 1.0


def test_a_ceiling_is_kept_to_the_last_bit():
    big = 2.0**40  # the tolerance of a solver would let one bit more through
    options = [Option("a", "x", {}, {"bits": big + 8, "weights": 1.0}, 0.0)]
    options += [Option("a", "y", {}, {"bits": big, "weights": 1.0}, 1.0), option("b", 4, 0.0)]
    assert allocate(options, Budget(size=int(big / 8) + 5)).choices["a"].method == "y"
    assert allocate(options, Budget(size=int(big / 8) + 6)).choices["a"].method == "x"


def test_what_is_missing_is_named():
    with pytest.raises(BadInput, match=r"^a: rtn\(bits=4\) has no known latency, which the budget limits$"):
        allocate([option("a", 4, 1.0)], Budget(latency=1.0))
    with pytest.raises(BadInput, match="has no known weights"):
        allocate([Option("a", "rtn", {}, {"bits": 4.0}, 0.0)], Budget(bits=4))
    with pytest.raises(BadInput, match="in_bytes"):
        allocate([option("a", 4, 1.0)], Budget(share=0.25))
    for cost, distortion in (({"bits": math.inf}, 0.0), ({}, math.nan)):
        with pytest.raises(ValueError, match="^a: cost and distortion must be finite"):
            Option("a", "rtn", {}, cost, distortion)
    assert allocate([], Budget(bits=4)).choices == {} and math.isnan(Plan().bits_per_weight)


def test_budgets_are_parsed():
    assert Budget.parse("bits=4") == Budget(bits=4.0)
    assert Budget.parse("size=25%") == Budget(share=0.25)
    assert Budget.parse(" size = 120k , bops=1e9,latency=0.5") == Budget(size=120_000, bops=1e9, latency=0.5)
    assert [Budget.parse(f"size={s}").size for s in ("7", "1.5M", "2G")] == [7, 1_500_000, 2_000_000_000]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bit=4", "unknown budget 'bit'; did you mean 'bits'"),
        ("share=1", "unknown budget 'share'"),
        ("", "unknown budget ''"),
        ("bits=four", "'four' is not a number"),
        ("bits", "'' is not a number"),
        ("size=nan", "'nan' is not a number"),
        ("size=1e999", "'1e999' is not a number"),
        ("size=x%", "'x' is not a number"),
        ("bits=0", "budget bits=0.0: a ceiling is a positive number"),
        ("size=0.4", "budget size=0: a ceiling"),
        ("bits=-1", "budget bits=-1.0: a ceiling"),
        ("bits=4,bits=3", "bits is given twice"),
        ("size=10%,size=9", "size is given twice"),
    ],
)
def test_budgets_that_make_no_sense(text, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        Budget.parse(text)


def test_shares_become_bytes():
    assert Budget(share=0.25, bits=3).in_bytes(1001) == Budget(size=250, bits=3)
    assert Budget(share=0.25, size=100).in_bytes(1000) == Budget(size=100)
    assert Budget(share=0.25, size=300).in_bytes(1000) == Budget(size=250)
    assert Budget(bits=4).in_bytes(1000) == Budget(bits=4)
    assert Budget(bits=3, size=10, bops=5.0).ceilings(20.0) == {"bits": 60.0, "size": 80.0, "bops": 5.0}


def test_plans_survive_json():
    choice = Option(
        "a", "clip", {"bits": 4, "range": "mse", "widths": (1, 2), "x": None}, {"bits": 40.0}, 0.1
    )
    plan = Plan({"a": choice, "b": option("b", 2, 1e-9)}, 12.5)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and choice.label == "clip(bits=4)"
    assert Option("a", "keep", {}, {}, 0.0).label == "keep"
    row = plan.to_json()["choices"][0]
    wrong = [
        None,
        [],
        {"choices": 3, "fixed": 0},
        {"choices": [row]},
        {"choices": [{"layer": "a"}], "fixed": 0},
    ]
    wrong += [
        {"choices": [{**row, "cost": 3}], "fixed": 0},
        {"choices": [{**row, "settings": 3}], "fixed": 0},
    ]
    for content in wrong:
        with pytest.raises(BadInput, match="^not a plan of netweight"):
            Plan.from_json(content)


def random_problem(layers, seed):
    rng = np.random.default_rng(seed)
    values = [rng.uniform(0, 1, 8) * rng.uniform(0, 1) for _ in range(layers)]
    costs = [
        np.column_stack([rng.permutation(8.0 - 8 * np.argsort(v).argsort() / 9), rng.uniform(1, 8, 8)])
        for v in values
    ]
    return values, costs, [layers * 4.0, layers * 4.0]


def test_when_too_much_is_open_the_integer_programme_agrees(monkeypatch, capfd):
    for seed in range(4):
        values, costs, ceilings = random_problem(12, seed)
        listed = knapsack.solve(values, costs, ceilings)
        with monkeypatch.context() as patch:
            patch.setattr(knapsack, "STATES", 3)
            programmed = knapsack.solve(values, costs, ceilings)
        worth = [sum(v[i] for v, i in zip(values, picks)) for picks in (listed, programmed)]
        assert worth[0] == pytest.approx(worth[1], rel=1e-6) and worth[0] <= worth[1] + 1e-12
        assert (sum(c[i] for c, i in zip(costs, programmed)) <= np.array(ceilings) * (1 + 1e-12)).all()
    assert capfd.readouterr().out == ""


def test_the_list_alone_is_as_good_as_the_integer_programme(monkeypatch):
    for seed in range(40):
        values, costs, ceilings = random_problem(14, seed)
        problem = knapsack.Problem(
            np.repeat(np.arange(14), 8), np.concatenate(values), np.concatenate(costs), np.array(ceilings)
        )
        best = problem.worth(knapsack.programme(problem))
        with monkeypatch.context() as patch:
            patch.setattr(knapsack, "programme", lambda _: pytest.fail("the list was not enough"))
            picks = knapsack.solve(values, costs, ceilings)
        assert sum(v[i] for v, i in zip(values, picks)) <= best * (1 + 1e-12)


def test_the_bound_is_tight_and_holds():
    values, costs, ceilings = random_problem(300, 3)
    problem = knapsack.Problem(
        np.repeat(np.arange(300), 8), np.concatenate(values), np.concatenate(costs), np.array(ceilings)
    )
    m = knapsack.multipliers(problem)
    plan = knapsack.good_plan(problem, m)
    assert 0 < knapsack.gap_of(problem, m, plan) < 0.01 * problem.worth(plan)


def test_partners_are_looked_for_in_the_whole_window():
    group, value = np.array([0, 0, 1, 1]), np.array([0.0, 0.0, 0.0, 0.1])
    problem = knapsack.Problem(group, value, np.array([[0.0], [0.01], [0.1], [0.0]]), np.array([1.02]))
    plan = knapsack.listed(problem, np.array([1.0]), 1.0)  # of all plans those with the third option are best
    assert list(plan)[1] == 2


def test_of_options_that_match_the_first_is_left():
    values, costs = (
        [np.array([1.0, 1.0, 2.0, 0.5])],
        [np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])],
    )
    assert knapsack.undominated(values, costs).tolist() == [True, False, False, True]


def test_nothing_reaches_standard_output(capfd):
    with knapsack.silent():
        os.write(1, b"a solver's remark")
    os.write(1, b"heard")
    assert capfd.readouterr().out == "heard"


def test_the_integer_programme_alone_finds_a_plan_or_says_there_is_none(monkeypatch):
    monkeypatch.setattr(knapsack, "good_plan", lambda *_: None)
    values, costs = [np.array([0.0, 1.0])] * 2, [np.array([[2.0], [1.0]])] * 2
    assert knapsack.solve(values, costs, [3.0]) in ([0, 1], [1, 0])
    assert knapsack.solve(values, costs, [2.0]) == [1, 1]
    tight = 2 - 1e-9  # within a solver's tolerance of a plan, and no plan
    assert knapsack.solve(values, costs, [tight]) is None


def test_plans_are_the_same_every_time_and_large_ones_take_a_moment():
    values, costs, ceilings = random_problem(300, 0)
    start = time.perf_counter()
    first = knapsack.solve(values, costs, ceilings)
    assert time.perf_counter() - start < 5  # 0.2 s where nothing else runs
    assert knapsack.solve(values, costs, ceilings) == first


def test_settings_that_share_out_bits_or_count_their_own_are_told_apart():
    made = {s.slug: catalogue.settings(s.slug)() for s in catalogue.SYSTEMS if s.settings}
    assert "hawq-v3" in {slug for slug, settings in made.items() if isinstance(settings, PlacesBits)}
    assert "jlcm" in {slug for slug, settings in made.items() if isinstance(settings, KnowsBits)}
    assert not isinstance(made["awq"], PlacesBits | KnowsBits)
    assert made["jlcm"].stored_bits((8, 16)) > 0
    small = made["hawq-v3"].within(Budget(size=1000), 64.0)
    assert type(small) is type(made["hawq-v3"]) and (small.size, small.beside) == (1000, 64.0)
