"""How long the planner takes: 1,000 layers with 8 options each under two ceilings, exact."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from netweight.core.plan import Budget, Option, allocate

BITS = (2, 3, 4, 5, 6, 8, 16, 32)


def bench(*, runs: int = 7, layers: int = 1000) -> dict[str, Any]:
    """Median, smallest and largest seconds over `runs` different random problems."""
    seconds = []
    for seed in range(runs):
        options, budget = problem(layers, seed)
        start = time.perf_counter()
        allocate(options, budget)
        seconds.append(time.perf_counter() - start)
    return {
        "layers": layers,
        "options_per_layer": len(BITS),
        "ceilings": 2,
        "runs": runs,
        "seconds_median": statistics.median(seconds),
        "seconds_least": min(seconds),
        "seconds_most": max(seconds),
    }


def problem(layers: int, seed: int) -> tuple[list[Option], Budget]:
    """Layers of very different sizes and sensitivities; bits and bit operations both bind."""
    rng = np.random.default_rng(seed)
    weights, macs, weight_of_error = (10 ** rng.uniform(*r, layers) for r in ((3, 6), (5, 8), (-3, 1)))
    options = [
        Option(
            f"layer{i}",
            "rtn",
            {"bits": b},
            {"bits": weights[i] * b, "weights": weights[i], "bops": macs[i] * b * 32},
            float(weight_of_error[i] * 4.0**-b * rng.uniform(0.8, 1.2)),
        )
        for i in range(layers)
        for b in BITS
    ]
    return options, Budget(bits=4.0, bops=float(macs.sum() * 4.2 * 32))
