"""How long a packed 4-bit Linear takes for one token, against float32, in turns; and what memory speed
allows.

The bound is the time that reading the weight once takes at the memory bandwidth measured in the same run (a
large copy, read and write counted): no product of one token can be faster than that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from netweight.compression.quantize.rtn import RTN, encode
from netweight.nn.kernels import fast


def bench(*, sizes: tuple[int, ...] = (1024, 2048, 4096), runs: int = 31, threads: int = 1) -> dict[str, Any]:
    """Median milliseconds for a square layer of each size: float32, torch's 4-bit product, decoding on each
    call."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bandwidth = copy_speed()
        return {
            "threads": threads,
            "bytes_per_second": bandwidth,
            "rows": [one(n, runs, bandwidth) for n in sizes],
        }
    finally:
        torch.set_num_threads(before)


def one(size: int, runs: int, bandwidth: float) -> dict[str, Any]:
    """One size: the three ways in turns."""
    generator = torch.Generator().manual_seed(size)
    like = nn.Linear(size, size, bias=False)
    like.weight = nn.Parameter(torch.randn(size, size, generator=generator) * 0.02)
    form = encode(like.weight.detach(), RTN(bits=4, group=64))
    stored = form.layer(like)
    quick, kernels = fast(nn.Sequential(stored))
    x = torch.randn(1, size, generator=generator)
    with torch.inference_mode():
        seconds = in_turns(
            {"float32": lambda: like(x), "int4": lambda: quick(x), "decode": lambda: stored(x)}, runs
        )
        off = (quick(x) - stored(x)).abs().max() / stored(x).abs().max()
    return {
        "size": size,
        "kernel": kernels["0"],
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "float32_over_int4": seconds["float32"] / seconds["int4"],
        "bound_ms": 1e3 * form.bits() / 8 / bandwidth,
        "relative_difference": float(off),
    }


def in_turns(ways: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of each way, called A B C A B C after three calls to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(runs + 3):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_speed() -> float:
    """Bytes per second of a 256 MB copy, read and write counted: the best of five."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    best = min(in_turns({"copy": lambda: target.copy_(source)}, 1)["copy"] for _ in range(5))
    return 2 * source.numel() * 4 / best
