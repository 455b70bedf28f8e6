"""What the loop does with the loss and its gradients before the optimizer moves: clip them, or stop."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from netweight.core.errors import BadInput, NetweightError
from netweight.training import distributed
from netweight.training.checkpoint import Running
from netweight.training.settings import Training


class Diverged(NetweightError):
    """The loss or its gradient is not finite; the model holds the weights of the last good step."""


def of_many(value: Callable[[], Tensor]) -> Tensor:
    """The loss; raises `BadInput` where batch norm is given one number per channel."""
    try:
        return value()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BadInput("batch norm has no variance of one example; give another --batch") from error


def clip_or_stop(run: Running, value: Tensor, how: Training, where: str) -> None:
    """Clip the gradients; raises `Diverged` where they or the loss are not finite.

    where: the step, in words. In float16 a gradient that is not finite is no failure: its step is left out
    and the loss scaled less.
    """
    parameters = [(name, p) for name, p in run.model.named_parameters() if p.grad is not None]
    norm = distributed.norm([p.grad for _, p in parameters])
    scaled = run.scaler.is_enabled() and math.isfinite(value.item())
    if not scaled and not (math.isfinite(value.item()) and math.isfinite(norm.item())):
        broken = next((name for name, p in parameters if not p.grad.isfinite().all()), None)
        first = f", first at {broken}" if broken else ""
        raise Diverged(
            f"training diverged in {where}: the loss is {value.item():g}, "
            f"the norm of its gradient {norm.item():g}{first}; lower the rate ({how.rate:g}) or clip the "
            "gradient; a checkpoint of the last whole epoch is left as it is"
        )
    if how.clip is not None:
        nn.utils.clip_grads_with_norm_([p for _, p in parameters], how.clip, norm, foreach=False)
