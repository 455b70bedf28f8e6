"""Seconds of one call of a module, measured on the device of its input."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

TIMED, WARM_UP = 7, 2  # runs of which the median counts; runs before them


@torch.no_grad()
def seconds(module: nn.Module, x: Tensor) -> float:
    """The median of `TIMED` calls."""
    taken = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM_UP:])
