"""A compressed network as an ONNX file in which packed weights stay integers.

Each weight on a uniform grid is stored as codes (uint4 up to 4 bits, uint8 above), scales and zero points in
front of a DequantizeLinear node, (code - zero) scale, one scale for the tensor, per row, or per block of
inputs (operator set 21); a symmetric 8-bit grid as int8 with zero point 0. Runtimes decode such weights when
they load the file or fuse them into integer products. Weights in any other stored form are written as they
decode. Static rounding of activations is a pair QuantizeLinear, DequantizeLinear; dynamic rounding is written
as the arithmetic it is. With `low_bit_products`, linear layers of at most 4 bits become MatMulNBits, ONNX
Runtime's own operator (`deployment/matmulnbits.py`). Before a file is written it is run in ONNX Runtime on
the examples given, and compared with the network that was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor, nn

from netweight.core import io
from netweight.core.compressed import Compressed, replace
from netweight.core.errors import DoesNotFit, need
from netweight.core.grid import PER_ROW, PER_TENSOR
from netweight.deployment import matmulnbits
from netweight.deployment.reopened import wanted
from netweight.nn.fake import Static
from netweight.nn.packed import Affine

OPSET = 21
LARGEST = (1 << 31) - 1  # bytes of a protobuf message
CLOSE = 1e-4  # of the largest output


@dataclass(frozen=True)
class Exported:
    """What came out of ONNX Runtime beside the network itself.

    largest_difference: between outputs, in their units, with products in float32. same: whether that is at
    most 1e-4 of the largest output (at least 1). default_difference: with the default settings of the
    runtime, which rounds the inputs of some products to 8 bits. same_class: share of examples (tokens) whose
    largest output is the same then. integer_weights: how many of the `packed_weights` stay codes in the file.
    """

    examples: int
    largest_difference: float
    same: bool
    default_difference: float
    same_class: float
    integer_weights: int
    packed_weights: int


class Opened(nn.Module):
    """The float twin as a function of its input and of some of its weights, which so stay named inputs."""

    def __init__(self, plain: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.plain, self.names = plain, names

    def forward(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The outputs with these weights."""
        return torch.func.functional_call(self.plain, dict(zip(self.names, weights)), (x,))


class Quantized(nn.Module):
    """Static rounding as the pair of operators that runtimes look for, with the function of `fake.Static`."""

    def __init__(self, rounding: Static) -> None:
        super().__init__()
        self.top = 2**rounding.bits - 1
        self.register_buffer("scale", rounding.scale.float(), persistent=False)
        self.register_buffer("zero", rounding.zero.to(torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        if self.top < 255:  # QuantizeLinear clips at 255
            x = torch.minimum(x, (self.top - self.zero.float()) * self.scale)
        extra = {"shape": x.shape, "version": OPSET}
        linear = torch.onnx.ops.symbolic
        codes = linear("QuantizeLinear", (x, self.scale, self.zero), dtype=torch.uint8, **extra)
        return linear("DequantizeLinear", (codes, self.scale, self.zero), dtype=torch.float32, **extra)


def export(
    small: Compressed, path: str | Path, x: Num[Tensor, "b ..."], *, low_bit_products: bool = False
) -> Exported:
    """Write the network as an ONNX file at `path` (whole or not at all), and compare the two on x.

    low_bit_products: write MatMulNBits where it applies, which ONNX Runtime alone can run. Any number of
    examples may be run at once where the network allows it. Raises `MissingExtra` without onnx, onnxruntime
    and onnxscript, and `DoesNotFit` where an operator has no counterpart in ONNX.
    """
    onnx = need("onnx")
    for package in ("onnxruntime", "onnxscript"):
        need(package)
    forms = integer_forms(small)
    proto = traced(paired(small.plain().eval().cpu()), tuple(forms), x.cpu())
    for name, form in forms.items():
        if not (low_bit_products and matmulnbits.store(proto.graph, name, form)):
            store(proto.graph, name, form)
    if low_bit_products:
        proto.opset_import.append(onnx.helper.make_opsetid(matmulnbits.DOMAIN, 1))
    kept = [value for value in proto.graph.input if value.name not in forms]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    if proto.ByteSize() > LARGEST:
        raise DoesNotFit(
            f"{path}: the network takes {proto.ByteSize()} bytes, more than one ONNX file can hold"
        )
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    made = compared(small, content, x, len(forms))
    io.write_bytes(path, content)
    return made


def paired(plain: nn.Module) -> nn.Module:
    """The network with every static rounding of at most 8 bits as a pair of operators, in place."""
    for name, module in list(plain.named_modules()):
        if isinstance(module, Static) and module.bits <= 8:
            replace(plain, name, Quantized(module))
    return plain


def integer_forms(small: Compressed) -> dict[str, Affine]:
    """The weights on a uniform grid, by the name of the parameter in the float twin."""
    return {
        f"{name}.layer.weight" if name in small.change.activations else f"{name}.weight": form
        for name, form in small.packed.items()
        if isinstance(form, Affine) and form.dtype == "float32"
    }


def traced(plain: nn.Module, names: tuple[str, ...], x: Tensor) -> Any:
    """The ModelProto of the float twin with the named weights as further inputs of these names."""
    parameters = dict(plain.named_parameters())
    weights = [parameters[name].detach() for name in names]
    x = x if len(x) > 1 else torch.cat([x, x])  # with one example the exporter would fix the batch at one
    shapes = ({0: torch.export.Dim.AUTO}, [None] * len(weights))
    try:
        with quiet():
            program = torch.onnx.export(
                Opened(plain, names),
                (x, weights),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=["input", *names],
                output_names=["output"],
                optimize=False,
                verbose=False,
            )
            need("onnxscript.optimizer").fold_constants(program.model)
            need("onnxscript.optimizer").remove_unused_nodes(program.model)
    except Exception as error:  # the exporter raises anything
        while error.__cause__ is not None:
            error = error.__cause__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DoesNotFit(
            f"{type(plain).__name__}: it cannot be written as ONNX ({reason}); replace that operator"
        ) from error
    return tidied(program.model_proto)


def tidied(proto: Any) -> Any:
    """Without the exporter's notes, and with the names of the parameters as the network has them."""
    names = {tensor.name: tensor.name.removeprefix("plain.") for tensor in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        tensor.name = names[tensor.name]
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for name in ("value_info", "metadata_props"):
        proto.graph.ClearField(name)
    proto.producer_name = "netweight"
    return proto


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings about its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def store(graph: Any, name: str, form: Affine) -> None:
    """Let the value `name` of the graph come from stored codes instead of an input.

    Where all that happens to it is a transposition, the transposed codes are stored: the product then reads
    them.
    """
    helper = need("onnx").helper
    readers = [node for node in graph.node if name in node.input]
    turned = len(readers) == 1 and readers[0].op_type == "Transpose" and len(form.shape) == 2
    target = readers[0].output[0] if turned else name
    codes, scale, zero, settings = laid_out(form, turned)
    types = need("onnx").TensorProto
    kind = types.UINT4 if form.bits_per_code <= 4 else types.UINT8
    if form.bits_per_code == 8 and form.zero is None:  # what products of 8-bit integers are made for
        codes, zero, kind = codes.astype(np.int16) - 128, zero.astype(np.int16) - 128, types.INT8
    graph.initializer.extend(
        [
            integers(f"{name}.codes", codes, kind),
            need("onnx").numpy_helper.from_array(scale, f"{name}.scale"),
            integers(f"{name}.zero", zero, kind),
        ]
    )
    inputs = [f"{name}.{part}" for part in ("codes", "scale", "zero")]
    whole = codes.ndim == len(form.shape)
    nodes = [helper.make_node("DequantizeLinear", inputs, [target if whole else f"{name}.flat"], **settings)]
    if not whole:
        shape = np.array(form.shape, dtype=np.int64)
        graph.initializer.append(need("onnx").numpy_helper.from_array(shape, f"{name}.shape"))
        nodes.append(helper.make_node("Reshape", [f"{name}.flat", f"{name}.shape"], [target]))
    rest = [node for node in graph.node if not (turned and node is readers[0])]
    kept = [type(node).FromString(node.SerializeToString()) for node in rest]
    del graph.node[:]
    graph.node.extend([*nodes, *kept])


def laid_out(form: Affine, turned: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Codes, scales and zeros as DequantizeLinear takes them, and its settings; `turned`: transposed."""
    codes, scale, zero = form.integers(), form.scale.float(), form.zeros()
    axis = 1 if turned else 0
    settings = {"axis": axis}
    if form.group == PER_TENSOR:
        scale, zero, settings = scale.reshape(()), zero.reshape(()), {}
    elif form.group == PER_ROW:
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    else:
        codes = codes.reshape(len(codes), -1)
        settings = {"axis": 1 - axis, "block_size": form.group}
        scale, zero = (scale.T, zero.T) if turned else (scale, zero)
    codes = codes.T if turned else codes
    return codes.contiguous().numpy(), scale.contiguous().numpy(), zero.contiguous().numpy(), settings


def integers(name: str, values: np.ndarray, kind: int) -> Any:
    """A tensor of (u)int8, or of uint4 with two codes a byte, the first one low."""
    helper, proto = need("onnx").helper, need("onnx").TensorProto
    flat = values.reshape(-1).astype(np.int8 if kind == proto.INT8 else np.uint8)
    if kind == proto.UINT4:
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        flat = flat[0::2] | (flat[1::2] << 4)
    return helper.make_tensor(name, kind, values.shape, flat.tobytes(), raw=True)


def compared(small: Compressed, content: bytes, x: Tensor, integer_weights: int) -> Exported:
    """The file's outputs in ONNX Runtime on the CPU beside those of the network."""
    expected = wanted(small, x)
    precise, default = outputs(content, x, precise=True), outputs(content, x, precise=False)
    difference = float((precise - expected).abs().max())
    same_class = default.argmax(-1) == expected.argmax(-1)
    return Exported(
        examples=len(x),
        largest_difference=difference,
        same=math.isfinite(difference) and difference <= CLOSE * max(1.0, float(expected.abs().max())),
        default_difference=float((default - expected).abs().max()),
        same_class=float(same_class.float().mean()),
        integer_weights=integer_weights,
        packed_weights=len(small.packed),
    )


def outputs(content: bytes, x: Tensor, *, precise: bool) -> Tensor:
    """What ONNX Runtime gives on the CPU; `precise`: with float32 inputs to every product."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if precise:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.cpu().numpy()})[0])
