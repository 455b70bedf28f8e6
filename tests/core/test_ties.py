"""Tied layers: found by the tensor they read, planned as one choice, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import DoesNotFit, ImpossibleBudget
from netweight.core.plan import Budget, Option
from netweight.core.ties import allocate_tied, in_order, readers


class Residual(nn.Module):
    """Two branches read the same tensor; one more layer follows; one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.down = nn.Conv1d(3, 4, 1)
        self.main = nn.Conv1d(3, 4, 3, padding=1)
        self.second = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        x = torch.relu(x)
        return self.head((self.second(torch.relu(self.main(x))) + self.down(x)).mean(-1))


def test_readers_of_one_tensor_and_the_order_of_calls():
    model, x = Residual(), torch.randn(1, 3, 5)
    layers = ["unused", "head", "down", "main", "second"]
    inputs = in_order(model, x, layers)
    assert list(inputs) == ["main", "second", "down", "head"]
    assert readers(inputs) == [("main", "down")]
    assert torch.equal(inputs["main"], x.relu())


def option(layer, bits, cost, distortion):
    return Option(layer, "m", {"bits": bits}, {"bits": cost, "weights": 1.0}, distortion)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_plans_are_the_best_of_all_that_keep_to_the_ties(seed, share):
    generator = torch.Generator().manual_seed(seed)
    costs = (torch.rand(5, 3, generator=generator) * 100 + 1).tolist()
    losses = torch.rand(5, 3, generator=generator).tolist()
    names, ties = "abcde", [("b", "d", "not planned")]
    options = [option(name, b, costs[i][b], losses[i][b]) for i, name in enumerate(names) for b in range(3)]
    plans = [p for p in itertools.product(range(3), repeat=5) if p[1] == p[3]]
    totals = sorted(sum(costs[i][b] for i, b in enumerate(p)) for p in plans)
    limit = totals[int(share * (len(totals) - 1))]
    least = min(
        sum(losses[i][b] for i, b in enumerate(p))
        for p in plans
        if sum(costs[i][b] for i, b in enumerate(p)) <= limit + 1e-9
    )
    plan = allocate_tied(options, Budget(bits=limit / 5), ties)
    assert list(plan.choices) == list(names)
    assert plan.choices["b"].settings == plan.choices["d"].settings
    assert plan.distortion == pytest.approx(least) and plan.cost("bits") <= limit * (1 + 1e-9)


def test_tied_layers_choose_among_what_they_share():
    options = [option("a", 8, 8.0, 0.0), option("b", 4, 4.0, 1.0), option("b", 8, 8.0, 0.0)]
    plan = allocate_tied(options, Budget(bits=8), [("a", "b")])
    assert [o.settings["bits"] for o in plan.choices.values()] == [8, 8]
    with pytest.raises(ImpossibleBudget, match="bits=8"):
        allocate_tied(options, Budget(bits=6), [("a", "b")])
    assert allocate_tied(options, Budget(bits=6), []).choices["b"].settings["bits"] == 4
    with pytest.raises(DoesNotFit, match="a, b: these layers are tied"):
        allocate_tied(options[:2], Budget(bits=8), [("a", "b")])


def test_what_the_file_holds_besides_counts():
    options = [option("a", 4, 4.0, 1.0), option("a", 8, 8.0, 0.0)]
    assert allocate_tied(options, Budget(size=1), []).choices["a"].settings["bits"] == 8
    assert allocate_tied(options, Budget(size=1), [], fixed=4.0).choices["a"].settings["bits"] == 4
