"""A compressed network as an OpenVINO model (an .xml of operators, a .bin of tensors), by way of ONNX.

Packed weights stay integers: OpenVINO reads the DequantizeLinear nodes of `deployment/onnx.py` and multiplies
low-bit weights itself. Before the two files are written the model is compiled for the CPU and compared with
the network, with products in float32; left alone, OpenVINO may round the inputs of such products to 8 bits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from netweight.core import io
from netweight.core.compressed import Compressed
from netweight.core.errors import DoesNotFit, need
from netweight.deployment import onnx
from netweight.deployment.reopened import Reopened, reopened


def export(small: Compressed, path: str | Path, x: Num[Tensor, "b ..."]) -> Reopened:
    """Write `path` (.xml) and the .bin beside it, and compare them with the network on x.

    Raises `MissingExtra` without openvino or onnx, `DoesNotFit` where one of them cannot say the network.
    """
    openvino = need("openvino")
    path = Path(path).with_suffix(".xml")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.onnx"
        first = onnx.export(small, written, x)
        try:
            model = openvino.Core().read_model(written)
            openvino.save_model(model, Path(folder) / "model.xml", compress_to_fp16=False)
            found = outputs(openvino, Path(folder) / "model.xml", x)
        except RuntimeError as error:  # what OpenVINO raises for anything it does not know
            reason = (str(error).strip() or "no reason given").splitlines()[-1]
            raise DoesNotFit(
                f"{path}: OpenVINO cannot run this network ({reason}); export it as onnx"
            ) from error
        made = reopened(small, x, found, first.integer_weights)
        for suffix in (".bin", ".xml"):  # the .xml last: it says that both are there
            io.write_bytes(path.with_suffix(suffix), (Path(folder) / f"model{suffix}").read_bytes())
    return made


def outputs(openvino: Any, path: Path, x: Tensor) -> Tensor:
    """What the compiled model gives on the CPU, with products in float32."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return torch.from_numpy(compiled([x.cpu().numpy()])[0].copy())
