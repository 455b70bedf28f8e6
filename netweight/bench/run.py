"""How fast compressed networks run: 4-bit layers for one token, and ResNet-20 on 8-bit integers.

All ways of a comparison are called in turns; times are medians, a ratio is the median of the ratios of the
turns. See `run_decode` for the layers and the bound by memory speed, `run_int8` for the network.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from torch import nn

from netweight.bench.run_decode import BUFFER, bars, decode
from netweight.bench.run_int8 import int8
from netweight.bench.run_turns import on_threads
from netweight.core.errors import BadInput
from netweight.core.task import Task

SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
CALIBRATION, IMAGES = 256, 1000


def bench(
    *,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    runs: int = 31,
    threads: tuple[int, ...] = (1, 2),
    group: int = 64,
    batches: tuple[int, ...] = (1, 32),
    buffer: int = BUFFER,
    network: tuple[nn.Module, Task] | None = None,
) -> dict[str, Any]:
    """Milliseconds and ratios of both; the bars are those of one thread.

    sizes: inputs and outputs of each layer. group: inputs that share a scale of 4-bit codes. buffer: numbers
    that are read for the speed of memory. network: in place of the fine-tuned ResNet-20 with 256 calibration
    and 1,000 test images of CIFAR-10; where these are not there, "skipped" says so. Raises `MissingExtra`
    without onnx, onnxruntime and onnxscript.
    """
    layers = decode(sizes, runs, threads, group, buffer)
    networks: list[dict[str, Any]]
    try:
        model, task = network or resnet20()
    except BadInput as missing:
        networks, held = [{"network": "int8 ResNet-20", "skipped": str(missing)}], []
    else:
        with on_threads(1):
            networks, held = int8(model, task, runs, threads, batches)
    return {
        "processors": os.cpu_count(),
        "times": "medians over turns; each call reads weights that the cache does not hold",
        "rows": [*layers, *networks],
        "bars": [{**asdict(bar), "reached": bar.passed} for bar in [*bars(layers), *held]],
    }


def resnet20() -> tuple[nn.Module, Task]:
    """The network and its images."""
    from netweight.data.images import cifar10
    from netweight.models.resnet_tuned import tuned_resnet20

    data = cifar10()
    task = Task(calibration=data.calibration().take(CALIBRATION), test=data.test().take(IMAGES))
    return tuned_resnet20().eval(), task
