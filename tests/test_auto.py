"""`--method auto` tries plans of all methods, keeps the one that moves least, and says what it tried."""

import math

import pytest
import torch

from netweight import auto, pipeline
from netweight.core import catalogue
from netweight.core.compressed import Change, Compressed, assemble
from netweight.core.errors import ImpossibleBudget
from netweight.core.plan import Budget, Option, Plan
from netweight.core.task import Task, outputs
from netweight.data import digits
from netweight.evidence.sensitivity import divergence, divergences
from netweight.models.digits_cnn import digits_cnn
from netweight.planning import alone, float_bytes
from netweight.resume import Work
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task


def measured(model, task, small):
    data = task.calibration.take(auto.JUDGED)
    return divergence(outputs(model, data), outputs(small.model, data))


@pytest.mark.parametrize("budget", [Budget(bits=4), Budget(bits=3), Budget(share=0.3)], ids=str)
def test_no_single_method_is_better(budget):
    model, task = tiny_model(), tiny_task()
    small = auto.best(model, task, budget)
    data = task.calibration.take(auto.JUDGED)
    kept = divergences(outputs(model, data), outputs(small.model, data))
    assert float(kept.mean()) == pytest.approx(next(iter(small.plan.tried.values())), rel=1e-9)
    for method in ("gptq", "rtn", "magnitude", "nm-magnitude", "awq", "equalize"):
        try:
            plan, change = alone(model, task, budget, method)
        except ImpossibleBudget:
            continue
        other = divergences(outputs(model, data), outputs(assemble(model, change, plan).model, data))
        assert not auto.Trial(method, plan, change, other).better(
            auto.Trial("kept", small.plan, change, kept)
        ), method


def test_a_plan_gives_way_only_to_what_is_surely_better():
    g = torch.Generator().manual_seed(0)
    base, noise = torch.rand(400, generator=g).double(), torch.randn(400, generator=g).double()

    def trial(name, each):
        return auto.Trial(name, Plan({}), Change({}), each)

    first = trial("first", base + 1)
    lucky = trial("lucky", base + 0.99 + 0.2 * (noise - noise.mean()))  # 0.01 better, one standard error
    sure = trial("sure", base + 0.97 + 0.2 * (noise - noise.mean()))  # three of them
    lost = trial("lost", torch.full((400,), math.inf).double())
    assert auto.choose([first, lucky, lost]) is first
    assert auto.choose([first, lucky, sure]) is sure
    assert auto.choose([sure, first]) is sure
    assert auto.choose([lost, lucky, first]) is not lost
    alike = trial("alike", base + 0.999)  # better on every single example
    assert auto.choose([first, alike]) is alike


def test_the_budget_holds_whatever_came_first():
    model = digits_cnn()
    task = Task(digits.calibration().take(64), digits.test().take(32))
    limit = float_bytes(model) // 6
    for trial in auto.trials(model, task, Budget(size=limit)):
        assert trial.plan.cost("bits") + trial.plan.fixed <= 8 * limit
        small = assemble(model, trial.change, trial.plan)
        assert {*trial.change.packed} <= {*trial.plan.choices}
        assert math.isfinite(trial.distortion) and trial.distortion == pytest.approx(
            divergence(outputs(model, task.calibration), outputs(small.model, task.calibration)), rel=1e-6
        )
    names = [trial.name for trial in auto.trials(model, task, Budget(bits=4))]
    assert len({*names}) == len(names) >= 2 and any("after" in name for name in names)


def test_the_plan_says_what_was_tried_and_is_read_back(tmp_path):
    model, task = tiny_model(), tiny_task()
    small = pipeline.compress(model, task, Budget(bits=3))
    assert len(small.plan.tried) >= 2 and min(small.plan.tried.values()) >= 0
    small.save(tmp_path / "small")
    again = Compressed.load(tmp_path / "small", like=model)
    assert again.plan == small.plan
    x = task.test.x
    assert torch.equal(again.model(x), small.model(x))


def test_words_too():
    model, task = tiny_language_model(), tiny_text_task()
    small = auto.best(model, task, Budget(bits=4))
    assert small.plan.bits_per_weight <= 4 and len(small.plan.tried) >= 2


def test_a_network_that_cannot_be_captured_is_planned_as_it_is():
    class Strange(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, x):
            return self.inner(x) if x.sum() > -1e9 else x  # depends on data: no graph

    small = auto.best(Strange().eval(), tiny_task(), Budget(bits=4))
    assert small.plan.after == "" and small.plan.bits_per_weight <= 4


def test_learning_methods_are_tried_only_when_asked(monkeypatch):
    model, task = tiny_model(), tiny_task()
    seen = []

    def one(model_, task_, budget, method, *, distortion):
        seen.append(method)
        raise ImpossibleBudget("not this time")

    monkeypatch.setattr(auto, "alone", one)
    auto.best(model, task, Budget(bits=4))
    assert seen == []
    auto.best(model, task, Budget(bits=4), thorough=True)
    assert {"adaround", "awq"} <= {*seen} and "gptq" not in seen


def test_the_impossible_is_said_with_the_smallest_possible():
    with pytest.raises(ImpossibleBudget, match="smallest possible"):
        auto.best(tiny_model(), tiny_task(), Budget(bits=0.1))


def test_biases_that_would_not_fit_are_left():
    model, task = tiny_model(), tiny_task()
    plan, change = alone(model, task, Budget(bits=4), "rtn")
    free = auto.shifted(model, task, change, plan, Budget(bits=4))
    assert free is not None and len(free.biases) == len(change.packed)
    full = Plan(plan.choices, fixed=8.0 * float_bytes(model))
    bare = [name for name in change.packed if model.get_submodule(name).bias is None]
    if bare:
        assert auto.shifted(model, task, change, full, Budget(size=float_bytes(model))) is None


def test_a_killed_run_goes_on_with_the_layers_it_has(tmp_path, monkeypatch):
    model, task = tiny_model(), tiny_task()
    work = Work.open(tmp_path / "small", {"what": "test"}, resume=False)
    first = auto.best(model, task, Budget(bits=4), work=work)
    kept = Work.open(tmp_path / "small", {"what": "test"}, resume=True)
    done = []
    real = catalogue.method

    def watched(slug):
        function = real(slug)

        def run(*given):
            done.append(slug)
            return function(*given)

        return run

    from netweight import planning

    monkeypatch.setattr(planning.catalogue, "method", watched)
    again = auto.best(model, task, Budget(bits=4), work=kept)
    assert again.plan == first.plan
    priced_once = len(done)
    fresh = auto.best(model, task, Budget(bits=4))
    assert len(done) - priced_once > priced_once and fresh.plan == first.plan


def test_plans_of_one_base_are_not_repeated():
    model = tiny_model()
    layer = "0"
    weights = {"weights": 72.0}
    options = [
        Option(layer, "rtn", {}, {"bits": 10.0, **weights}, 1.0),
        Option(layer, "gptq", {}, {"bits": 10.0, **weights}, 0.5),
        Option(layer, "keep", {}, {"bits": 999.0, **weights}, 0.0),
    ]
    base = auto.Base("", (), model)
    found = dict(auto.plans(base, model, options, Budget(bits=1)))
    assert {*found} == {"rtn", "gptq"}  # all of them mixed is gptq alone here
    assert all(plan.choices[layer].method == name for name, plan in found.items())


def test_other_methods_beside_it_do_not_spoil_the_plan_of_one():
    """Their errors point elsewhere; one price per output error for all of them cost ResNet-20 12 %."""
    task = Task(digits.calibration().take(128), digits.test().take(64))
    for bits in (3, 4):
        tried = {trial.name: trial for trial in auto.trials(digits_cnn(), task, Budget(bits=bits))}
        plan, change = alone(digits_cnn(), task, Budget(bits=bits), "gptq")
        small = assemble(digits_cnn(), change, plan)
        assert tried["gptq"].plan.choices == plan.choices
        assert tried["gptq"].distortion == pytest.approx(measured(digits_cnn(), task, small), rel=1e-6)
        assert tried["gptq"].distortion < 0.01  # pricing a layer at nothing gave 0.5 and more


def test_outputs_that_would_fill_the_memory_are_measured_on_fewer_examples(monkeypatch):
    model, task = tiny_model(), tiny_task()
    assert auto.judged(model, task.calibration) == auto.JUDGED
    monkeypatch.setattr(auto, "OUTPUTS", 3 * outputs(model, task.calibration.take(1)).numel())
    assert auto.judged(model, task.calibration) == 3


def test_later_bases_are_priced_with_the_methods_that_were_of_use(monkeypatch):
    asked = []
    real = auto.priced

    def watched(*given, among, **how):
        asked.append(among)
        return real(*given, among=among, **how)

    monkeypatch.setattr(auto, "priced", watched)
    tried = auto.trials(tiny_model(), tiny_task(), Budget(bits=4))
    first = [trial for trial in tried if not trial.plan.after and "corrected" not in trial.name]
    used = {option.method for trial in first for option in trial.plan.choices.values()}
    assert asked[0] is None and len(asked) >= 2 and all(among == used for among in asked[1:])
