"""The network that an attack works on: its class scores, the inputs, and the classes they shall leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit


@dataclass(frozen=True)
class Victim:
    """Inputs `b *in` on the network's device, and the class of each that is to be left.

    scores: points -> class scores `b classes`. clean: the scores of x. Points carry the gradient of scores,
    parameters do not.
    """

    scores: Callable[[Tensor], Tensor]
    x: Float[Tensor, "b *in"]
    of: Int[Tensor, " b"]
    clean: Float[Tensor, "b classes"]

    def wrong(self, s: Float[Tensor, "k *in"], rows: Int[Tensor, " k"]) -> Bool[Tensor, " k"]:
        """Which points of these rows have another class than the one to be left; without gradients."""
        with torch.no_grad():
            return self.scores(s).argmax(1) != self.of[rows]


@contextmanager
def victim(
    model: nn.Module, x: Num[Tensor, "b *in"], y: Int[Tensor, " b"] | None, by: str
) -> Iterator[Victim]:
    """The network in evaluation mode while an attack of this name runs; its modes come back afterwards.

    y: class numbers; None stands for the network's own predictions. Raises as `check_inputs` does, and
    `DoesNotFit` for outputs that are not `b classes` with two classes or more.
    """
    check_inputs(x, by)
    with evaluated(model):
        x = x.to(device_of(model, x))

        def scores(s: Tensor) -> Tensor:
            return class_scores(model(s))

        with torch.no_grad():
            clean = scores(x)
        if clean.ndim != 2 or clean.shape[1] < 2:
            raise DoesNotFit(
                f"{by} needs class scores `b classes`, but the network gives {tuple(clean.shape)}"
            )
        yield Victim(scores, x, clean.argmax(1) if y is None else y.to(x.device), clean)


def check_inputs(x: Num[Tensor, "b *in"], by: str) -> None:
    """Raises `DoesNotFit` for whole numbers and `BadInput` for NaN or Inf: nothing an attack can move."""
    if not x.is_floating_point():
        raise DoesNotFit(
            f"{by} moves inputs by small amounts, but these are whole numbers; attack embeddings"
        )
    if not bool(x.isfinite().all()):
        raise BadInput(f"{by}: an input holds NaN or Inf; remove or repair it first")


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; the mode of each module comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Where the network is; where it has no weights, where x is."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), x.device)


def class_scores(output: Any) -> Tensor:
    """The scores in what a network gives: a tensor, the first of several, or `.logits` (Transformers)."""
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple | list) else output


def passes_gradients(v: Victim) -> bool:
    """Whether the scores depend on the inputs in a way that gradients are passed on at all."""
    with torch.enable_grad():
        return v.scores(v.x[:1].detach().requires_grad_()).requires_grad


def margin(scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The best other score minus y's: above 0 where the class is left."""
    own = scores.gather(1, y[:, None])
    return (scores.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own)[:, 0]


def other_classes(scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"], most: int) -> Int[Tensor, "k b"]:
    """The classes other than y, best first, at most so many: one row for each rank."""
    ranked = scores.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    return ranked[:, : min(most, scores.shape[1] - 1)].T
