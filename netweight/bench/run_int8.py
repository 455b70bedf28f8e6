"""ResNet-20 on 8-bit integers in ONNX Runtime: as we export it, as ONNX Runtime's own tool makes it, and in
float32.

The same network (batch norms folded) and the same calibration images go into all of them. Ours: `hawq-v3`
with 8 bits everywhere, then `export --to onnx-int8`. Theirs: `quantize_static` after `quant_pre_process`,
pairs of QuantizeLinear and DequantizeLinear, weights per channel, its own choice of operators: once as it
comes (signed codes of activations), and once with unsigned ones, which its manual recommends on x86.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from netweight.bench.run_turns import in_turns, milliseconds, ratio, session
from netweight.compression.quantize.hawq_v3 import HAWQV3, folded, hawq_v3
from netweight.core.compressed import Compressed, assemble, weighted
from netweight.core.errors import need
from netweight.core.plan import Plan
from netweight.core.result import Bar
from netweight.core.rewrite import rewritten
from netweight.core.task import Data, Task
from netweight.deployment import onnx, onnx_int8

PEERS = ("onnxruntime_default", "onnxruntime_unsigned")
CHUNK = 32  # calibration images that the tool reads at once
COMPARED = 16


def int8(
    model: nn.Module, task: Task, runs: int, threads: tuple[int, ...], batches: tuple[int, ...]
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows of times for each number of threads and batch size, a row of accuracies; and the bars."""
    files, exported = written(model, task)
    rows: list[dict[str, Any]] = [accuracies(files, task.test, exported)]
    held = []
    for count in threads:
        sessions = {name: session(content, count) for name, content in files.items()}
        for batch in batches:
            x = {"input": task.test.x[:batch].numpy()}
            ways = {name: [lambda each=each, x=x: each.run(None, x)] for name, each in sessions.items()}
            taken = in_turns(ways, runs if batch > 8 else 8 * runs)
            over = {
                f"{name}_over_ours": ratio(taken[name], taken["ours"]) for name in files if name != "ours"
            }
            network = "int8 ResNet-20"
            rows.append({"network": network, "threads": count, "batch": batch, **milliseconds(taken), **over})
            name = f"ONNX Runtime's own int8 (the faster) / ours, batch {batch}"
            if count == 1:
                held.append(Bar(name, min(over[f"{peer}_over_ours"] for peer in PEERS), 1.0, "at least"))
    return rows, held


def accuracies(files: Mapping[str, bytes], test: Data, exported: onnx_int8.Int8Exported) -> dict[str, Any]:
    """Share of test images that each gets right, and how far ours is from its simulation."""
    assert test.y is not None
    return {
        "network": "int8 ResNet-20, accuracy",
        "images": len(test),
        **{
            name: float((onnx.outputs(content, test.x, precise=False).argmax(1) == test.y).float().mean())
            for name, content in files.items()
        },
        "from_simulation": exported.largest_difference,
        "from_rounded_inputs_alone": exported.from_network,
    }


def written(model: nn.Module, task: Task) -> tuple[dict[str, bytes], onnx_int8.Int8Exported]:
    """The files by name: float32, ours, and those of ONNX Runtime's tool."""
    layers = weighted(model)
    plain = rewritten(model, folded(model, task.calibration, layers)).eval()
    small = eight_bits(model, task, layers)
    with tempfile.TemporaryDirectory() as place:
        ours = Path(place) / "ours.onnx"
        exported = onnx_int8.export(small, ours, task.calibration, task.test.x[:COMPARED])
        floats = onnx.traced(plain, (), task.calibration.x[:2]).SerializeToString()
        made = {"float32": floats, "ours": ours.read_bytes()}
        (Path(place) / "float.onnx").write_bytes(floats)
        made |= {peer: own(Path(place), task.calibration, unsigned=peer == PEERS[1]) for peer in PEERS}
    return made, exported


def eight_bits(model: nn.Module, task: Task, layers: list[str]) -> Compressed:
    """The network with 8-bit weights and inputs; with one width to choose from, sharpness does not matter."""
    settings = HAWQV3(bits=(8,), probes=1, examples=16)
    return assemble(model, hawq_v3(model, task.blind(), layers, settings), Plan())


def own(place: Path, calibration: Data, *, unsigned: bool) -> bytes:
    """What ONNX Runtime's tool makes of float.onnx."""
    need("onnxruntime")
    tool = importlib.import_module("onnxruntime.quantization")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")

    class Images(tool.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration.x.split(CHUNK))

        def get_next(self) -> dict[str, Any] | None:
            """The next images."""
            x = next(self.left, None)
            return None if x is None else {"input": x.numpy()}

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # without symbolic shapes, which fail on a constant that is a list
        shapes.quant_pre_process(place / "float.onnx", place / "ready.onnx", skip_symbolic_shape=True)
        tool.quantize_static(
            place / "ready.onnx",
            place / "own.onnx",
            Images(),
            quant_format=tool.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tool.QuantType.QUInt8 if unsigned else tool.QuantType.QInt8,
        )
    finally:
        logging.disable(before)
    return (place / "own.onnx").read_bytes()
