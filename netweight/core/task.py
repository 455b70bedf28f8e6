"""What a network is judged on: data and the judgement. The network itself is given beside it.

    task = Task(calibration=calib, test=test, metric="accuracy")
    small = compress(model, task, Budget(bits=4))

A method is given `task.blind()`, in which reading the test data raises, so that no method can tune on
what evidence will be measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from netweight.core.errors import BadInput, unknown

IGNORED = -100  # a label that counts for nothing (padding), as in torch's cross-entropy


@dataclass(frozen=True, eq=False)
class Data:
    """Examples in memory, handed out as (x, y) batches as often as asked, always in the same order.

    x: `b *in`, floating point in the units of the data (images: 0 to 1), or int64 token ids.
    y: `b` class numbers, `b t` next tokens (`IGNORED` where there is none), `b *out` float targets, or None
    where there are no labels.
    batch: examples per batch; the last batch may be smaller.
    low, high: the range that a valid input lies in (0 and 1 for images), None where there is none.
    memo: room for what is computed once per data set (see `core.moments.grams`); never part of equality.
    domain: `b` whole numbers that say which domain an example is of (see `data.domains`), or None.
    """

    x: Tensor
    y: Tensor | None = None
    batch: int = 100
    name: str = "data"
    classes: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    domain: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise BadInput(f"{self.name}: there are no examples; at least one is needed")
        if self.y is not None and len(self.y) != len(self.x):
            raise BadInput(
                f"{self.name}: {len(self.x)} examples but {len(self.y)} labels; give one label each"
            )
        if self.domain is not None and (
            self.domain.shape != (len(self.x),) or self.domain.is_floating_point()
        ):
            raise BadInput(
                f"{self.name}: domains of shape {tuple(self.domain.shape)} and {self.domain.dtype} for "
                f"{len(self.x)} examples; give one whole number or name each"
            )
        if self.batch < 1:
            raise BadInput(f"{self.name}: a batch needs at least one example, got batch={self.batch}")
        for what, values in (("examples", self.x), ("labels", self.y)):
            if values is not None and values.is_floating_point() and not values.isfinite().all():
                raise BadInput(f"{self.name}: the {what} hold NaN or Inf; remove or repair those rows first")

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(self), self.batch):
            stop = start + self.batch
            yield self.x[start:stop], None if self.y is None else self.y[start:stop]

    def take(self, count: int) -> Data:
        """The first `count` examples (all, if there are fewer)."""
        return self.rows(slice(0, count))

    def rows(self, which: Tensor | slice) -> Data:
        """Those examples, in that order."""
        y, domain = (None if each is None else each[which] for each in (self.y, self.domain))
        return replace(self, x=self.x[which], y=y, domain=domain, memo={})

    def batched(self, batch: int) -> Data:
        """The same examples in batches of another size."""
        return replace(self, batch=batch, memo={})


@dataclass(frozen=True)
class Metric:
    """One number per example, and how these become the one that is reported.

    of: (outputs `b *out`, y) -> `b` float; a rate gives 0 or 1 for each example.
    summary: the mean over examples -> the number reported (perplexity: exp).
    """

    name: str
    of: Callable[[Tensor, Tensor], Tensor]
    better: Literal["higher", "lower"] = "higher"
    unit: str = "share"
    summary: Callable[[float], float] = field(default=float)


def correct(outputs: Tensor, y: Tensor) -> Tensor:
    """1 where the largest output is y's; for sequences (`b t k`) the share of right tokens."""
    right = (outputs.argmax(-1) == y).float()
    return right if right.ndim == 1 else over_tokens(right, y)


def token_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood of y in nats, one number per example; `b k` or `b t k` outputs."""
    which = y if y.ndim == 1 else y.masked_fill(y == IGNORED, 0)
    log_p = outputs.float().log_softmax(-1).gather(-1, which.unsqueeze(-1)).squeeze(-1)
    return -log_p if log_p.ndim == 1 else -over_tokens(log_p, y)


def over_tokens(values: Tensor, y: Tensor) -> Tensor:
    """The mean of each example's values `b t` over its labels but `IGNORED`; 0 where there are none."""
    kept = (y != IGNORED).flatten(1)
    return values.flatten(1).where(kept, 0).sum(1) / kept.sum(1).clamp(min=1)


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over the outputs of each example."""
    return (outputs.reshape(len(y), -1) - y.reshape(len(y), -1)).pow(2).mean(1)


def exp(mean: float) -> float:
    """e to that power, infinity where it overflows: the perplexity of a mean loss."""
    return math.exp(mean) if mean < 700 else math.inf


METRICS = {
    "accuracy": Metric("accuracy", correct),
    "loss": Metric("loss", token_loss, "lower", "nats"),
    "perplexity": Metric("perplexity", token_loss, "lower", "per token", exp),
    "mse": Metric("mse", squared_error, "lower", "squared units"),
}


@dataclass(frozen=True)
class Task:
    """What a network is judged on.

    calibration: seen while compressing; labels optional. test: looked at by evidence alone.
    train: only methods that train ask for it. metric: a name of `METRICS` or a `Metric`.
    """

    calibration: Data
    test: Data
    metric: str | Metric = "accuracy"
    train: Data | None = None

    def __post_init__(self) -> None:
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)

    @property
    def judge(self) -> Metric:
        """The metric itself, looked up if it was given by name."""
        return METRICS[self.metric] if isinstance(self.metric, str) else self.metric

    def blind(self) -> Task:
        """The same task for a method: reading its test data raises."""
        return replace(self, test=Sealed())


class Sealed:
    """Test data that may not be read: whatever is asked of it raises."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("a method may not look at the test data")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a method may not look at the test data")

    def __len__(self) -> int:
        raise AssertionError("a method may not look at the test data")


@torch.no_grad()
def outputs(model: torch.nn.Module, data: Data) -> Tensor:
    """All outputs of the model in evaluation mode, `b *out`, on the CPU; the model's mode is restored.

    Data goes to the model's device batch by batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(x.to(device)).cpu() for x, _ in data])
    finally:
        model.train(was_training)
