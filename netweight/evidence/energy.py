"""What the two networks take in energy: joules of one inference, and of a training run that was metered.

Each row says whether its joules are measured or modelled (`netweight.inspection.counters`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from netweight.core import io
from netweight.core.errors import BadInput
from netweight.core.intervals import quantile_interval
from netweight.core.result import Row
from netweight.evidence.average import evaluating
from netweight.evidence.cost import COST
from netweight.inspection.energy import energy

RUNS, SECONDS = 9, 10.0  # turns at most, and when to stop
FILE = "training.json"  # of a folder that `netweight train` wrote


def row(original: nn.Module, small: nn.Module, x: Tensor) -> Row:
    """Median joules of one forward pass of x, in turns, each network on its own device."""
    devices = [
        next((t.device for t in chain(m.parameters(), m.buffers())), x.device) for m in (original, small)
    ]
    ways = {
        name: partial(model, x.to(device))
        for name, model, device in zip(("before", "after"), (original, small), devices)
    }
    device = next((device for device in devices if device.type == "cuda"), devices[0])
    with evaluating(original), evaluating(small):
        found = energy(ways, runs=RUNS, device=device, limit=SECONDS)
    before, after = found["before"], found["after"]
    low, high = quantile_interval(np.array(after.all), 0.5)
    known, turns = "measured" if after.measured else "modelled", len(after.all)
    how = f"{known}: {after.how}; one example, the median of {turns} turns"
    return Row(
        COST, "energy per inference", before.joules, after.joules, low, high, turns, how, known, "joules"
    )


def training_rows(original: str | Path, small: str | Path) -> list[Row]:
    """The joules of the training run of folders that `netweight train` wrote; none where neither is one."""
    joules, said = [], []
    for place in (original, small):
        found = training(Path(place))
        joules.append(float(found["joules"]) if found else math.nan)
        said += [found] if found else []
    if not said:
        return []
    how, known = (str(said[-1][name]) for name in ("how", "known"))
    return [Row(COST, "energy of training", *joules, math.nan, math.nan, 1, how, known, "joules")]


def training(folder: Path) -> Mapping[str, Any] | None:
    """What `netweight train` metered, None for anything that has no such file."""
    file = folder / FILE
    if not file.is_file():
        return None
    found = io.read_json(file, "what a training run took")
    energy = found.get("energy") if isinstance(found, dict) else None
    if not isinstance(energy, dict) or not isinstance(energy.get("joules"), int | float):
        raise BadInput(f"{file}: it does not say what training took in joules; train again or remove it")
    return {"how": "", "known": "", **energy}
