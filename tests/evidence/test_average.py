"""What is measured on average: by hand, by definition, for classes, tokens, numbers and missing labels."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from netweight.core.errors import BadInput
from netweight.core.intervals import clopper_pearson, paired_difference, upper_bound
from netweight.core.result import AVERAGE, Evidence
from netweight.core.task import IGNORED, METRICS, Data, Task, outputs
from netweight.evidence.average import (
    accuracy,
    calibration_error,
    confidence_bins,
    divergence,
    measure,
    scores,
)


class Given(nn.Module):
    """Looks the outputs of example number x up in a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        return self.table[x.flatten().long()]


def numbered(count: int, y: torch.Tensor | None, batch: int = 3) -> Data:
    return Data(torch.arange(float(count))[:, None], y, batch)


def task_of(data: Data, metric: str = "accuracy") -> Task:
    return Task(data, data, metric)


def onehot(*classes: int, k: int = 3) -> torch.Tensor:
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(classes), k)


def test_shares_by_hand():
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    original, small = Given(onehot(0, 1, 2, 0, 1, 2, 0, 0)), Given(onehot(0, 1, 2, 0, 2, 0, 0, 1))
    found = measure(original, small, task_of(numbered(8, y)))
    rows = Evidence(found.rows)
    assert found.flipped == [4, 5, 7] and all(row.question == AVERAGE and row.n == 8 for row in rows.rows)
    row = rows["accuracy"]
    assert (row.original, row.compressed, row.unit) == (7 / 8, 6 / 8, "share")
    assert (row.low, row.high) == clopper_pearson(6, 8)
    row = rows["accuracy change"]
    assert (row.original, row.compressed) == (0.0, -1 / 8) and (row.low, row.high) == paired_difference(
        1, 2, 8
    )
    row = rows["flipped predictions"]
    assert (row.original, row.compressed) == (0.0, 3 / 8) and (row.low, row.high) == clopper_pearson(3, 8)
    assert rows["flipped at most, 99% sure"].compressed == upper_bound(3, 8, 0.99)
    assert rows["largest output difference"].compressed == 4.0
    p = torch.tensor([4.0, 0.0, 0.0]).double().softmax(0)
    each = float((p * (p.log() - p.roll(1).log())).sum())
    assert rows["divergence"].compressed == pytest.approx(3 / 8 * each)
    assert rows["divergence"].low < 3 / 8 * each < rows["divergence"].high
    sure = math.exp(4) / (math.exp(4) + 2)
    assert rows["calibration error"].original == pytest.approx(abs(7 / 8 - sure), abs=1e-6)
    assert rows["calibration error"].compressed == pytest.approx(abs(6 / 8 - sure), abs=1e-6)


def test_the_same_network_twice_differs_in_nothing():
    table = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    found = measure(Given(table), Given(table), task_of(numbered(20, table.argmax(1))))
    rows = Evidence(found.rows)
    assert (
        found.flipped == []
        and rows["divergence"].compressed == rows["largest output difference"].compressed == 0
    )
    assert rows["accuracy change"].low < 0 < rows["accuracy change"].high  # twenty examples prove little


def test_batches_do_not_matter():
    g = torch.Generator().manual_seed(0)
    f, h = Given(torch.randn(30, 5, generator=g)), Given(torch.randn(30, 5, generator=g))
    y = torch.randint(0, 5, (30,), generator=g)
    first, second = (measure(f, h, task_of(numbered(30, y, batch), "loss")) for batch in (1, 30))
    assert first.flipped == second.flipped
    for one, other in zip(first.rows, second.rows):
        assert one.quantity == other.quantity and one.compressed == pytest.approx(other.compressed, rel=1e-5)
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-5, nan_ok=True)


def test_perplexity_of_sequences_is_measured_over_sequences():
    g = torch.Generator().manual_seed(0)
    f, h = torch.randn(12, 7, 5, generator=g), torch.randn(12, 7, 5, generator=g)
    h = f + 0.5 * h
    y = torch.randint(0, 5, (12, 7), generator=g)
    data = Data(torch.arange(12)[:, None], y, 5)
    found = measure(Given(f), Given(h), task_of(data, "perplexity"))
    rows = Evidence(found.rows)
    losses = [nn.functional.cross_entropy(t.mT, y, reduction="none").mean(1) for t in (f, h)]
    for value, loss in zip((rows["perplexity"].original, rows["perplexity"].compressed), losses):
        assert value == pytest.approx(loss.mean().exp().item(), rel=1e-5)
    row = rows["perplexity change"]
    assert row.compressed == pytest.approx(rows["perplexity"].compressed - rows["perplexity"].original)
    assert row.low < row.compressed < row.high and rows["perplexity"].low < rows["perplexity"].compressed
    flips = (f.argmax(-1) != h.argmax(-1)).float().mean(1)
    assert rows["flipped predictions"].compressed == pytest.approx(flips.mean().item())
    assert found.flipped == flips.nonzero()[:, 0].tolist() and 0 < len(found.flipped) <= 12
    assert rows["flipped predictions"].n == 12 and "Hoeffding" in rows["flipped at most, 99% sure"].method
    assert rows["divergence"].compressed == pytest.approx(float(divergence(f, h).mean()))


def test_numbers_have_no_classes():
    target = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    found = measure(Given(target + 1.0), Given(target + 2.0), task_of(numbered(9, target), "mse"))
    assert [row.quantity for row in found.rows] == ["mse", "mse change", "largest output difference"]
    rows = Evidence(found.rows)
    assert rows["mse"].original == pytest.approx(1.0, rel=1e-5) and rows["mse"].compressed == pytest.approx(
        4.0, rel=1e-5
    )
    assert rows["mse change"].low == pytest.approx(3.0, rel=1e-4) and found.flipped == []


def test_without_labels_the_networks_are_held_against_each_other():
    found = measure(Given(onehot(0, 1, 2)), Given(onehot(0, 1, 1)), task_of(numbered(3, None)))
    assert found.flipped == [2]
    names = [row.quantity for row in found.rows]
    assert names[0] == "flipped predictions" and not {"accuracy", "calibration error"} & set(names)


def test_one_example_proves_nothing():
    rows = Evidence(
        measure(Given(onehot(0)), Given(onehot(0)), task_of(numbered(1, torch.tensor([0])), "loss")).rows
    )
    assert (rows["loss"].low, rows["loss"].high) == (-math.inf, math.inf)
    assert (rows["loss change"].low, rows["loss change"].high) == (-math.inf, math.inf)


def test_nan_outputs_are_shown_and_not_swallowed():
    broken = onehot(0, 1, 2)
    broken[1] = math.nan
    rows = Evidence(
        measure(Given(onehot(0, 1, 2)), Given(broken), task_of(numbered(3, torch.tensor([0, 1, 2])))).rows
    )
    assert math.isnan(rows["largest output difference"].compressed) and math.isnan(
        rows["divergence"].compressed
    )


def test_calibration_error_by_definition():
    g = torch.Generator().manual_seed(0)
    out, y = 2 * torch.randn(500, 4, generator=g), torch.randint(0, 4, (500,), generator=g)
    sure, chosen = out.softmax(1).max(1)
    modest = (sure * 15).int() % 2 == 0  # too modest in every other bin, too sure in the rest
    y = torch.where(modest, chosen, y)
    total = 0.0
    for left in np.arange(15) / 15:
        inside = (sure > left) & (sure <= left + 1 / 15)
        if inside.any():
            right = (chosen[inside] == y[inside]).float().mean()
            total += inside.float().mean().item() * abs(right.item() - sure[inside].mean().item())
    assert calibration_error(confidence_bins(out, y)) == pytest.approx(total, abs=1e-5)


def test_divergence_is_exact_for_small_changes():
    g = torch.Generator().manual_seed(0)
    f, d = torch.randn(6, 10, generator=g), torch.randn(6, 10, generator=g)
    near = (f.double() + 1e-6 * d).float()
    moved = near.double() - f.double()
    p = f.double().softmax(1)
    quadratic = 0.5 * ((p * moved**2).sum(1) - (p * moved).sum(1) ** 2)  # the Fisher form
    assert torch.allclose(divergence(f, near), quadratic, rtol=1e-3)


def test_accuracy_modes_and_missing_labels():
    model = nn.Sequential(nn.Dropout(0.99), nn.Linear(4, 3)).train()
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    data = Data(x, model[1](x).argmax(1), 7)
    before = torch.get_rng_state()
    assert accuracy(model, data) == 1.0 and model.training and torch.equal(torch.get_rng_state(), before)
    each = scores(model, data, METRICS["loss"])
    assert torch.allclose(each, METRICS["loss"].of(outputs(model, data), data.y)) and not each.requires_grad
    with pytest.raises(BadInput, match="accuracy needs labels"):
        accuracy(model, Data(x))
    with pytest.raises(BadInput, match=r"outputs of \(7, 3\) and \(7, 2\)"):
        measure(model, nn.Linear(4, 2), task_of(data))


def test_padded_labels_count_for_nothing():
    """What the networks give where the label is -100 changes neither flips, divergence nor calibration."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(6, 4, 3, generator=g)
    y = torch.randint(3, (6, 4), generator=g)
    y[:, 2:] = IGNORED
    other = table + 0.5 * torch.randn(6, 4, 3, generator=g)
    wild = other.clone()
    wild[:, 2:] = 9 * torch.randn(6, 2, 3, generator=g)
    padded, moved = (
        measure(Given(table), Given(each), task_of(numbered(6, y))).rows for each in (other, wild)
    )
    short = measure(Given(table[:, :2]), Given(other[:, :2]), task_of(numbered(6, y[:, :2]))).rows
    for one, two, three in zip(padded, moved, short, strict=True):
        if one.quantity != "largest output difference":
            assert one.compressed == pytest.approx(two.compressed) == pytest.approx(three.compressed)
