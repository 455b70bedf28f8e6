"""Sharpness-aware steps: a second gradient, taken at weights some way up the first one.

With g = dL/dw at the weights w, and |g| its norm over all weights that are moved,

    w' = w + (rho / |g| - alpha) g,        g' = dL/dw at w',

    SAM    alpha = 0, the step is made with g'          Foret et al., "Sharpness-Aware Minimization for
           Efficiently Improving Generalization", ICLR 2021, arXiv:2010.01412
    SAGM   the step is made with g + g'                 Wang et al., "Sharpness-Aware Gradient Matching for
           Domain Generalization", CVPR 2023, arXiv:2303.10353

No gradient passes through g. Weights come back bit for bit, and buffers (running statistics of norms) stay as
the first pass left them: what the network remembers is of its own weights alone.

    train(model, data, loss, how, hooks=Hooks(passes=sagm(rho=0.05, alpha=1e-3)))

Differs from the papers: SAGM's official code steps with (g + g') / 2; with Adam that is the same, with SGD it
is half the rate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.training import distributed
from netweight.training.checkpoint import Running
from netweight.training.loop import Moment

Once = Callable[[], Tensor]
Passes = Callable[[Running, Once, Moment], Tensor]
Moved = Callable[[nn.Module], Sequence[nn.Parameter]]

SMALLEST = 1e-12  # added to |g|: no gradient moves nothing


def all_weights(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that requires a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def sam(rho: float = 0.05, moved: Moved = all_weights) -> Passes:
    """`Hooks.passes` of SAM. moved: the parameters that are taken up the gradient; all are trained."""
    check(rho, 0.0)

    def passes(run: Running, once: Once, at: Moment) -> Tensor:
        return both(run, once, moved(run.model), rho, 0.0)[0]

    return passes


def sagm(rho: float = 0.05, alpha: float = 1e-3, moved: Moved = all_weights) -> Passes:
    """`Hooks.passes` of SAGM. moved: the parameters that are taken up the gradient; all are trained."""
    check(rho, alpha)

    def passes(run: Running, once: Once, at: Moment) -> Tensor:
        loss, first = both(run, once, moved(run.model), rho, alpha)
        add(first)
        return loss

    return passes


def check(rho: float, alpha: float) -> None:
    """Raises `BadInput` unless both are numbers from 0 on."""
    if not all(math.isfinite(value) and value >= 0 for value in (rho, alpha)):
        raise BadInput(
            f"rho={rho}, alpha={alpha}: both are numbers from 0 on; give for example 0.05 and 1e-3"
        )


def both(
    run: Running, once: Once, moved: Sequence[nn.Parameter], rho: float, alpha: float
) -> tuple[Tensor, Mapping[nn.Parameter, Tensor]]:
    """The loss and g of each parameter; g' lies in the parameters' `.grad` afterwards.

    Gradients are as the loop's scaler has them: in float16 multiplied by its scale.
    """
    loss = once()
    first = {p: p.grad for p in run.model.parameters() if p.grad is not None}
    present = [p for p in moved if p in first]
    with torch.no_grad():
        scale = run.scaler.get_scale()
        far = rho / (distributed.norm([first[p] for p in present]) / scale + SMALLEST) - alpha
    for p in first:
        p.grad = None
    with put_back(run.model, present):
        with torch.no_grad():
            for p in present:
                p.add_(first[p] * (far / scale))
        once()
    return loss, first


@torch.no_grad()
def add(first: Mapping[nn.Parameter, Tensor]) -> None:
    """Add these gradients to those that lie in `.grad`."""
    for p, gradient in first.items():
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)


@contextlib.contextmanager
def put_back(model: nn.Module, moved: Sequence[nn.Parameter]) -> Iterator[None]:
    """Afterwards those parameters and all buffers of the model have the values from before, bit for bit."""
    with torch.no_grad():
        weights = [p.clone() for p in moved]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for p, kept in zip(moved, weights, strict=True):
                p.copy_(kept)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
