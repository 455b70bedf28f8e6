"""The first answer: what compression did on average, measured on the test data, with intervals.

Per example: the metric of both networks and its paired difference; whether the prediction flipped;

    KL(p | q) = sum_c p_c (log p_c - log q_c),        p, q the softmax of the two networks' scores.

Over all examples: the largest difference of two outputs, and the expected calibration error over 15 equal
bins B of the confidence (Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599),

    ECE = sum_B |B| / n  | share right in B - mean confidence in B |.

A sequence (`b t k` outputs) is one example: its tokens depend on one another, its number is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netweight.core import intervals
from netweight.core.errors import BadInput
from netweight.core.result import AVERAGE, Row
from netweight.core.task import IGNORED, METRICS, Data, Metric, Task, over_tokens

BINS = 15
SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Measured:
    """rows: of the table. flipped: test examples with a changed prediction (sequences: of any token)."""

    rows: list[Row]
    flipped: list[int]


@dataclass
class Seen:
    """What is kept of each example while the data streams by: lists of one array per batch."""

    judged: list[Float[np.ndarray, "b 2"]] = field(default_factory=list)  # the metric of both networks
    flips: list[Float[np.ndarray, " b"]] = field(default_factory=list)  # share of changed predictions
    divergence: list[Float[np.ndarray, " b"]] = field(default_factory=list)
    apart: float = 0.0  # largest difference of two outputs
    bins: Float[np.ndarray, "2 bins 3"] = field(default_factory=lambda: np.zeros((2, BINS, 3)))


def accuracy(model: nn.Module, data: Data) -> float:
    """The share of right predictions, of tokens for sequences."""
    return float(scores(model, data, METRICS["accuracy"]).mean())


def scores(model: nn.Module, data: Data, metric: Metric) -> Float[Tensor, " b"]:
    """The metric of every example, in the order of the data; raises `BadInput` where there are no labels."""
    if data.y is None:
        raise BadInput(f"{data.name}: {metric.name} needs labels, but the data has none; give y beside x")
    with evaluating(model):
        return torch.cat([metric.of(run(model, x), y).float() for x, y in data])


def measure(original: nn.Module, small: nn.Module, task: Task) -> Measured:
    """Both networks on the test data, batch by batch.

    Without labels only what compares the two networks is measured; without classes (real-valued targets)
    flips, divergence and calibration are left out.
    """
    seen, judge, n = Seen(), task.judge, len(task.test)
    with evaluating(original), evaluating(small):
        for x, y in task.test:
            look(seen, run(original, x), run(small, x), y, judge)
    table: list[Row] = []
    if seen.judged:
        table += judged_rows(np.concatenate(seen.judged), judge)
    flipped: list[int] = []
    if seen.flips:
        flips = np.concatenate(seen.flips)
        flipped = flips.nonzero()[0].tolist()
        table += flip_rows(flips)
        table.append(divergence_row(np.concatenate(seen.divergence)))
        if seen.bins[0, :, 0].sum():
            before, after = (calibration_error(bins) for bins in seen.bins)
            how = f"{BINS} equal bins of the confidence; biased upwards, hence no interval"
            table.append(
                Row(
                    AVERAGE,
                    "calibration error",
                    before,
                    after,
                    math.nan,
                    math.nan,
                    n,
                    how,
                    "float32",
                    "share",
                )
            )
    table.append(
        Row(
            AVERAGE, "largest output difference", 0.0, seen.apart, math.nan, math.nan, n,
            "the maximum over these examples and all outputs", "float32", "output units",
        )
    )  # fmt: skip
    return Measured(table, flipped)


def look(
    seen: Seen, f: Float[Tensor, "b ..."], g: Float[Tensor, "b ..."], y: Tensor | None, judge: Metric
) -> None:
    """Add one batch of outputs of the original (f) and the compressed network (g) to what is kept."""
    if f.shape != g.shape:
        raise BadInput(
            f"the networks give outputs of {tuple(f.shape)} and {tuple(g.shape)}; compare two of one task"
        )
    if y is not None:
        seen.judged.append(torch.stack([judge.of(f, y), judge.of(g, y)], 1).double().numpy())
    seen.apart = float(np.maximum(seen.apart, float((f - g).abs().max())))  # keeps NaN
    if not has_classes(f, y, judge):
        return
    for kept, values in (
        (seen.flips, (f.argmax(-1) != g.argmax(-1)).double()),
        (seen.divergence, divergence(f, g)),
    ):
        padded = y is not None and y.ndim > 1
        kept.append((over_tokens(values, y) if padded else per_example(values)).numpy())
    if y is not None:
        for bins, outputs in zip(seen.bins, (f, g)):
            bins += confidence_bins(outputs, y)


def has_classes(outputs: Float[Tensor, "b ..."], y: Tensor | None, judge: Metric) -> bool:
    """Whether the last axis of the outputs holds one score for each class."""
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        return False
    return judge.name != "mse" if y is None else not y.is_floating_point() and y.shape == outputs.shape[:-1]


def per_example(values: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The mean over the tokens of each example."""
    return values.reshape(len(values), -1).mean(1)


def divergence(f: Float[Tensor, "*b k"], g: Float[Tensor, "*b k"]) -> Float[Tensor, " *b"]:
    """KL(p | q) in nats, in float64: at small differences float32 gives noise below zero."""
    p, q = f.double().log_softmax(-1), g.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def confidence_bins(outputs: Float[Tensor, "*b k"], y: Int[Tensor, " *b"]) -> Float[np.ndarray, "bins 3"]:
    """Of each bin: how many predictions, how many right, and the sum of their confidences.

    Labels that are `IGNORED` are left out.
    """
    counted = y.reshape(-1) != IGNORED
    confidence, chosen = (part.reshape(-1)[counted] for part in outputs.float().softmax(-1).max(-1))
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    ones, right = torch.ones_like(confidence), (chosen == y.reshape(-1)[counted]).float()
    return torch.stack(
        [
            torch.zeros(BINS, dtype=torch.float64).index_add(0, place, v.double())
            for v in (ones, right, confidence)
        ],
        1,
    ).numpy()


def calibration_error(bins: Float[np.ndarray, "bins 3"]) -> float:
    """ECE of the counted bins."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def judged_rows(judged: Float[np.ndarray, "b 2"], judge: Metric) -> list[Row]:
    """The metric of both networks, and how much the compressed one gained or lost."""
    n, rate = len(judged), intervals.is_rate(judged)
    before, after = (judge.summary(float(mean)) for mean in judged.mean(0))
    low, high = (judge.summary(end) for end in intervals.mean_interval(judged[:, 1], seed=SEED))
    how = f"{'Clopper-Pearson' if rate else 'bootstrap'} over the examples"
    first = Row(AVERAGE, judge.name, before, after, low, high, n, how, "float32", judge.unit)
    if rate:
        moved = judged[:, 1] - judged[:, 0]
        low, high = intervals.paired_difference(int((moved > 0).sum()), int((moved < 0).sum()), n)
        how = "shares gained and lost on the same examples, Clopper-Pearson each"
    else:
        low, high = bootstrap_difference(judged, judge)
        how = "bootstrap over the same examples"
    change = Row(
        AVERAGE, f"{judge.name} change", 0.0, after - before, low, high, n, how, "float32", judge.unit
    )
    return [first, change]


def bootstrap_difference(judged: Float[np.ndarray, "b 2"], judge: Metric) -> tuple[float, float]:
    """The interval of the difference of the two summaries, both on the same resampled examples."""
    if len(judged) == 1:
        return -math.inf, math.inf
    means = intervals.resampled_means(judged, seed=SEED)
    with np.errstate(invalid="ignore"):
        moved = np.array([judge.summary(float(b)) - judge.summary(float(a)) for a, b in means])
    return intervals.percentiles(moved)


def flip_rows(flips: Float[np.ndarray, " b"]) -> list[Row]:
    """The share of changed predictions, and what it is at most for inputs drawn like these."""
    n, rate, share = len(flips), intervals.is_rate(flips), float(flips.mean())
    low, high = intervals.mean_interval(flips, seed=SEED)
    how = "Clopper-Pearson over the examples" if rate else "share of tokens, bootstrap over the sequences"
    most = intervals.upper_mean(flips)
    proof = "one-sided Clopper-Pearson" if rate else "Hoeffding over the sequences"
    return [
        Row(AVERAGE, "flipped predictions", 0.0, share, low, high, n, how, "counted", "share"),
        Row(
            AVERAGE, "flipped at most, 99% sure", 0.0, most, math.nan, math.nan, n,
            f"{proof}: with 99% confidence at most this share of all such inputs flips", "float64", "share",
        ),
    ]  # fmt: skip


def divergence_row(divergences: Float[np.ndarray, " b"]) -> Row:
    """How far the compressed network's probabilities are from the original's, in the mean."""
    low, high = intervals.bootstrap_mean(divergences, seed=SEED)
    how = "KL(original | compressed), bootstrap over the examples"
    n, mean = len(divergences), float(divergences.mean())
    return Row(AVERAGE, "divergence", 0.0, mean, low, high, n, how, "float64", "nats")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def run(model: nn.Module, x: Tensor) -> Float[Tensor, "b ..."]:
    """Outputs on the CPU in float32; x goes to the model's device."""
    device = next((t.device for t in chain(model.parameters(), model.buffers())), x.device)
    return model(x.to(device)).float().cpu()
