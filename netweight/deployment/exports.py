"""The forms that other runtimes load, and what each gave when it was opened there.

    onnx                 model.onnx, any ONNX runtime                    deployment/onnx.py
    onnx-int8            model.int8.onnx, integers between layers too     deployment/onnx_int8.py
    onnxruntime          model.ort.onnx, with ONNX Runtime's MatMulNBits deployment/matmulnbits.py
    openvino             model.xml and model.bin                         deployment/openvino.py
    compressed-tensors   a folder for Transformers and vLLM              deployment/compressed_tensors.py
    integer              a folder of integer operators alone             deployment/integer_onnx.py

Every file is opened in its runtime before it is written, and compared with the network; `export` keeps what
came out in the folder's evidence.json.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from netweight.core import io
from netweight.core.compressed import Compressed
from netweight.core.errors import unknown
from netweight.core.result import Evidence
from netweight.core.task import Task
from netweight.deployment import compressed_tensors, integer_onnx, onnx, onnx_int8, openvino

PLACES = {
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "onnxruntime": "model.ort.onnx",
    "openvino": "model.xml",
    "compressed-tensors": "compressed-tensors",
    "integer": "integer",
}
COMPARED = 8  # test examples that both run


def export(small: Compressed, task: Task, to: str, path: Path) -> dict[str, Any]:
    """Write one form at `path`; gives what came out beside the network itself, and the bytes written.

    `same` says whether the outputs agree. Raises `BadInput` for a form that is none of `PLACES`, and
    `DoesNotFit` where the form cannot hold the network.
    """
    x = task.test.take(COMPARED).x
    if to == "onnx":
        made = onnx.export(small, path, x)
    elif to == "onnx-int8":
        made = onnx_int8.export(small, path, task.calibration, x)
    elif to == "onnxruntime":
        made = onnx.export(small, path, x, low_bit_products=True)
    elif to == "openvino":
        made = openvino.export(small, path, x)
    elif to == "compressed-tensors":
        made = compressed_tensors.export(small, path, x)
    elif to == "integer":
        made = integer_onnx.export(small, path, task.calibration, x)
    else:
        raise unknown("form", to, PLACES)
    parts = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".bin")]
    written = sum(part.stat().st_size for part in parts if part.exists())
    return {"path": str(path), "bytes": written, **asdict(made)}


def record(folder: Path, to: str, made: dict[str, Any]) -> None:
    """Keep what an export gave in the evidence of that folder, if it has any."""
    file = folder / "evidence.json"
    if file.exists():
        evidence = Evidence.from_json(io.read_json(file, "the evidence of a compressed network"))
        kept = {name: value for name, value in made.items() if name != "path"}
        evidence.context["exports"] = {**evidence.context.get("exports", {}), to: kept}
        evidence.save(folder)
