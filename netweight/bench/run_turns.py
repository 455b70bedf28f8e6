"""Ways to do the same thing, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3


def in_turns(ways: Mapping[str, Sequence[Callable[[], Any]]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way in each turn. A turn calls every way once, in an order that is drawn anew.

    A way is a list of calls that take turns too: one for each copy of its weights.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(0)
    for turn in range(runs + WARM_UP):
        for index in torch.randperm(len(names), generator=generator).tolist():
            call = ways[names[index]][turn % len(ways[names[index]])]
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                seconds[names[index]].append(time.perf_counter() - start)
    return seconds


def ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """The median over turns of one time over the other, both from the same turn: what slows both cancels."""
    return statistics.median(a / b for a, b in zip(slow, quick, strict=True))


def milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median and least of each way, by name and unit."""
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    return medians | {f"{name}_least_ms": 1e3 * min(values) for name, values in seconds.items()}


def read_speed(buffers: tuple[Tensor, Tensor], runs: int) -> float:
    """Bytes per second: the best of sums over the first, and of copies to the second, writing counted."""
    source, target = buffers
    taken = in_turns({"sum": [lambda: source.sum()], "copy": [lambda: target.copy_(source)]}, runs)
    return source.numel() * source.element_size() * max(1 / min(taken["sum"]), 2 / min(taken["copy"]))


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """torch with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def session(content: bytes | str, threads: int) -> Any:
    """An ONNX Runtime session on the CPU whose threads sleep between calls, so that other ways are not
    slowed."""
    from netweight.core.errors import need

    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
