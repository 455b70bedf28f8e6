"""What attacks find: networks whose robust accuracy is known, hidden gradients, and what is kept of it."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.intervals import clopper_pearson, paired_difference
from netweight.core.perturbation import BitFlips, Linf
from netweight.core.result import FOUND
from netweight.core.task import Data, Task
from netweight.evidence.found import NUMBERS, SHOWN, Attacked, measure, search, verdict

NOTHING = Attacked([], torch.zeros(1, 2) > 0, torch.zeros(1) > 0, torch.zeros(1, 1), [])


def threshold(at: float) -> nn.Module:
    """Class 1 above `at`; the slope of a score is 1."""
    model = nn.Linear(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -at])
    return model


class Rounded(nn.Module):
    """The same function with no gradient to follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores whose slope is hidden."""
        return self.inner((x * 1000).round() / 1000 + 0 * x)


def line(count: int = 101, **how) -> Data:
    x = torch.linspace(0, 1, count)[:, None]
    return Data(x, (x[:, 0] > 0.5).long(), 40, **how)


def task_of(data: Data) -> Task:
    return Task(data, data)


def test_shares_of_networks_with_known_margins():
    found = search(threshold(0.5), threshold(0.3), task_of(line()), Linf(0.1001), limit=101)
    attacked, _, _, _, parted = found.rows
    x = line().x[:, 0]
    held = torch.stack([(x - 0.5).abs() > 0.1001, (x < 0.1999) | (x > 0.5)], 1)
    clear = (
        ((x - 0.2).abs() > 0.002)
        & ((x - 0.4).abs() > 0.002)
        & ((x - 0.5).abs() > 0.002)
        & ((x - 0.6).abs() > 0.002)
    )
    assert torch.equal(~found.broken[clear], held[clear])
    assert attacked.question == parted.question == FOUND and attacked.n == parted.n == 101
    assert attacked.quantity == "accuracy under attack" and parted.quantity == "disagreement found"
    assert attacked.original == int((~found.broken[:, 0]).sum()) / 101
    count = int((~found.broken[:, 1]).sum())
    assert attacked.compressed == count / 101 and (attacked.low, attacked.high) == clopper_pearson(count, 101)
    assert "pgd; linf=0.1001, steps 40" in attacked.method
    inside = (x > 0.201) & (x < 0.499)
    assert (
        found.parted[inside].all() and not found.parted[x < 0.199].any() and not found.parted[x > 0.501].any()
    )
    assert parted.compressed == int(found.parted.sum()) / 101 and parted.original == 0
    assert Linf(0.1001).contains(found.points, line().x).all()


def test_a_hidden_gradient_does_not_look_robust():
    data = task_of(line())
    open_, hidden = threshold(0.5), Rounded(threshold(0.5))
    alone = search(hidden, hidden, data, Linf(0.2), limit=101)
    beside = search(open_, hidden, data, Linf(0.2), limit=101)
    assert beside.broken[:, 1].sum() > alone.broken[:, 1].sum()
    assert (beside.broken[:, 0] == beside.broken[:, 1]).float().mean() > 0.97


def test_without_labels_predictions_are_held():
    data = Data(line().x, None)
    found = search(threshold(0.5), threshold(0.3), task_of(data), Linf(0.1001), limit=101)
    assert found.rows[0].quantity == "unchanged under attack"
    x = data.x[:, 0]
    assert (
        not found.broken[((x - 0.3).abs() > 0.102), 1].any()
        and found.broken[((x - 0.3).abs() < 0.098), 1].all()
    )


def test_the_valid_range_and_the_limit_are_kept():
    edge = Data(torch.ones(6, 1), torch.zeros(6).long(), low=0.0, high=1.0)
    found = search(threshold(1.05), threshold(1.05), task_of(edge), Linf(0.1), limit=4)
    assert not found.broken.any() and len(found.broken) == len(found.points) == found.rows[0].n == 4
    free = search(threshold(1.05), threshold(1.05), task_of(Data(edge.x, edge.y)), Linf(0.1), limit=4)
    assert free.broken.all()
    with pytest.raises(BadInput, match="outside its valid range"):
        search(
            threshold(0),
            threshold(0),
            task_of(Data(2 * edge.x, edge.y, low=0.0, high=1.0)),
            Linf(0.1),
            limit=9,
        )


def test_what_compressing_did_and_what_carries_over():
    """One network looks at the first number, the other, at another threshold, at the second: none carries."""
    both = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for at, (model, bias) in enumerate(zip(both, (0.5, 0.45), strict=True)):
        model.weight.data = torch.zeros(2, 2).index_put(
            (torch.tensor(1), torch.tensor(at)), torch.tensor(1.0)
        )
        model.bias.data = torch.tensor([0.0, -bias])
    data = Data(line().x.expand(-1, 2).contiguous(), line().y)
    found = search(*both, task_of(data), Linf(0.1001), limit=101)
    held, change, on_original, on_compressed, _ = found.rows
    broken = found.broken
    gained, lost = int((broken[:, 0] & ~broken[:, 1]).sum()), int((~broken[:, 0] & broken[:, 1]).sum())
    assert gained and lost and change.compressed == pytest.approx((gained - lost) / 101)
    assert change.low <= change.compressed <= change.high
    assert (change.low, change.high) == paired_difference(gained, lost, 101)
    assert on_original.original == held.original and on_original.compressed > held.compressed + 0.1
    assert on_compressed.compressed == held.compressed and on_compressed.original > held.original + 0.1
    assert verdict(change).startswith("101 examples do not tell")
    assert verdict(replace(change, low=0.01)).startswith("Compressing gained robustness:")
    assert verdict(replace(change, high=-0.01)).startswith("Compressing lost robustness:")


def test_the_ensemble_finds_what_a_hidden_gradient_hides():
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Class 1 above 0.5; constant elsewhere."""
            return threshold(0.5)((x * 20).round() / 20)

    data = task_of(line())
    by_pgd = search(Steps(), Steps(), data, Linf(0.2), steps=5, limit=101).rows[0].compressed
    by_all = search(Steps(), Steps(), data, Linf(0.2), by="ensemble", steps=5, limit=101).rows[0].compressed
    assert by_all <= 0.65 and by_all < by_pgd - 0.1


def test_disagreements_are_json_and_real():
    data, original, small = line(), threshold(0.5), threshold(0.3)
    found = search(original, small, task_of(data), Linf(0.05), limit=101)
    assert json.loads(json.dumps(found.disagreements)) == found.disagreements
    assert len(found.disagreements) == SHOWN < found.parted.sum()
    assert [d["example"] for d in found.disagreements] == found.parted.nonzero()[:SHOWN, 0].tolist()
    for item in found.disagreements:
        point, clean = torch.tensor([item["point"]]), torch.tensor([item["input"]])
        assert original(point).argmax(1).item() == item["original"] == 0 and item["compressed"] == 1
        assert small(point).argmax(1).item() == 1 and torch.equal(clean[0], data.x[item["example"]])
        assert item["moved"] == pytest.approx((point - clean).abs().max().item()) and item["moved"] <= 0.05
    wide = Data(torch.full((1, NUMBERS + 1), 0.4))
    first, second = (nn.Sequential(nn.Linear(NUMBERS + 1, 1, bias=False), threshold(at)) for at in (0.5, 0.3))
    for model in (first, second):
        model[0].weight.data = torch.full((1, NUMBERS + 1), 1 / (NUMBERS + 1))
    shown = search(first, second, task_of(wide), Linf(0.01), limit=1).disagreements
    assert len(shown) == 1 and not {"input", "point"} & shown[0].keys()


def test_measure_searches_harder_when_thorough(monkeypatch):
    asked = []
    monkeypatch.setattr("netweight.evidence.found.search", lambda *args, **how: asked.append(how) or NOTHING)
    model = threshold(0.5)
    measure(model, model, task_of(line()), Linf(0.1), seed=3)
    measure(model, model, task_of(line()), Linf(0.1), thorough=True, seed=4)
    assert asked == [{"seed": 3, "limit": 200}, {"by": "ensemble", "steps": 100, "seed": 4, "limit": 1000}]


def test_settings_reach_the_attacks(monkeypatch):
    asked = []
    import netweight.evidence.found as module

    for name in ("pgd", "disagree"):
        attack = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, attack=attack, **how: asked.append(how) or attack(*a, **how)
        )
    search(threshold(0.5), threshold(0.3), task_of(line(5)), Linf(0.1), steps=2, seed=7, limit=5)
    assert asked == [{"steps": 2, "seed": 7}] * 3


def test_an_attack_that_leaves_the_set_is_a_bug(monkeypatch):
    class Leaky:
        points, hit = torch.full((5, 1), 9.0), torch.zeros(5, dtype=torch.bool)

    monkeypatch.setattr("netweight.evidence.found.pgd", lambda *a, **how: Leaky())
    with pytest.raises(AssertionError, match="left the set linf=0.1"):
        search(threshold(0.5), threshold(0.3), task_of(line(5)), Linf(0.1), limit=5)


def test_refuses_sets_that_do_not_lie_around_inputs():
    with pytest.raises(DoesNotFit, match="bitflips=1 is no set of inputs"):
        search(threshold(0.5), threshold(0.3), task_of(line()), BitFlips(1), limit=5)
