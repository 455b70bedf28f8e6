"""An ONNX file as a torch.nn.Module.

    model = read("model.onnx")            # or model.onnx.gz

Files are hostile: sizes are checked, external data has to lie beside the file, and no code of the file is
run. How nodes become layers and steps: `onnx_build`; what each operator computes: `onnx_ops`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netweight.core import io
from netweight.core.errors import BadInput, need
from netweight.core.origin import Origin, mark, origin_of
from netweight.models.onnx_build import LARGEST, READ, build

ARCHITECTURE = "architecture.onnx"
KEPT = 64  # tensors of at most that many numbers stay in the architecture: they may decide shapes


def read(path: str | Path) -> nn.Module:
    """The network of a .onnx or .onnx.gz file, in eval mode, marked with where it comes from.

    Raises `BadInput` for a file that is truncated, too large, not a network of one input and one output, or
    that uses an operator that is not known; the sentence names the operator and the node.
    """
    path = io.existing_file(path, "an ONNX network", at_most=LARGEST)
    content = path.read_bytes()
    name = path.name
    if name.endswith(".gz"):
        name, content = name.removesuffix(".gz"), _unpacked(path)
    proto = _parsed(content, str(path))
    for tensor in _tensors(proto.graph):
        _bring(tensor, path)
    _check(proto, str(path))
    model = build(proto, str(path))
    return mark(model, Origin("onnx", name, {ARCHITECTURE: _bare(proto)}))


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one input of a network that `read` gave, its first axis 1 where the file leaves it open.

    None for a network from elsewhere.
    """
    origin = origin_of(model)
    if origin is None or origin.kind != "onnx" or ARCHITECTURE not in origin.files:
        return None
    graph = _parsed(origin.files[ARCHITECTURE], ARCHITECTURE).graph
    stored = {tensor.name for tensor in graph.initializer}
    (value,) = (value for value in graph.input if value.name not in stored)
    return tuple(size.dim_value or 1 for size in value.type.tensor_type.shape.dim)


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The same network, marked, with arbitrary weights, from the architecture that `read` noted."""
    if ARCHITECTURE not in files:
        raise BadInput(f"{target}: there is no {ARCHITECTURE} beside the weights; the folder is not whole")
    proto = _parsed(files[ARCHITECTURE], ARCHITECTURE)
    total = sum(math.prod(t.dims) for t in proto.graph.initializer)
    if not 0 <= 4 * total <= LARGEST or any(n < 0 for t in proto.graph.initializer for n in t.dims):
        raise BadInput(f"{ARCHITECTURE}: its tensors hold {total} numbers, more than {LARGEST} bytes")
    generator = torch.Generator().manual_seed(0)
    for tensor in proto.graph.initializer:
        if tensor.data_location or not (tensor.raw_data or _typed(tensor)):
            values = torch.rand(tuple(tensor.dims), generator=generator)
            tensor.CopyFrom(need("onnx.numpy_helper").from_array(values.numpy(), tensor.name))
    _check(proto, ARCHITECTURE)
    return mark(build(proto, ARCHITECTURE), Origin("onnx", target, dict(files)))


def _unpacked(path: Path) -> bytes:
    """The content of a gzip file of at most `LARGEST` bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: not a whole gzip file ({error}); fetch or write it again") from error
    if len(content) > LARGEST:
        raise BadInput(f"{path}: unpacks to more than the {LARGEST} bytes that an ONNX network may have")
    return content


def _parsed(content: bytes, where: str) -> Any:
    """The ModelProto."""
    onnx = need("onnx")
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf has its own
        raise BadInput(f"{where}: not an ONNX network, or a truncated one; write it again") from error
    if not proto.graph.node or not proto.opset_import:
        raise BadInput(f"{where}: there is no network in it; expected an ONNX file")
    return proto


def _tensors(graph: Any) -> list[Any]:
    """All stored tensors: initializers, and the values of nodes."""
    held = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    return [*graph.initializer, *held]


def _bring(tensor: Any, path: Path) -> None:
    """Read external data of a tensor, which has to lie beside the file."""
    if not tensor.data_location:
        return
    said = {entry.key: entry.value for entry in tensor.external_data}
    file = io.existing_file(io.inside(path.parent, said.get("location", "")), f"the data of {tensor.name!r}")
    try:
        start, length = int(said.get("offset", 0)), int(said.get("length", -1))
    except ValueError as error:
        raise BadInput(
            f"{path}: the place of tensor {tensor.name!r} is not a number; write it again"
        ) from error
    size = file.stat().st_size
    length = size - start if length < 0 else length
    if start < 0 or start + length > size or length > LARGEST:
        raise BadInput(
            f"{path}: tensor {tensor.name!r} lies past the end of {file.name}; the data is not whole"
        )
    with file.open("rb") as stream:
        stream.seek(start)
        tensor.raw_data = stream.read(length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _check(proto: Any, where: str) -> None:
    """Unknown operators, and what the checker of ONNX finds: wrong sizes, attributes or names."""
    onnx = need("onnx")
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in READ:
            name = node.name or next(iter(node.output), "")
            raise BadInput(
                f"{where}: operator {node.op_type!r} of node {name!r} is not known; "
                "export the network with standard operators, or give it as a PyTorch module"
            )
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # ValidationError, and whatever protobuf raises for large files
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{where}: not a valid ONNX network ({reason}); export it again") from error


def _bare(proto: Any) -> bytes:
    """The network without its large weights: their names and shapes stay."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        if math.prod(tensor.dims) > KEPT and tensor.data_type == 1:
            for part in ("raw_data", "float_data"):
                tensor.ClearField(part)
    return bare.SerializeToString(deterministic=True)


def _typed(tensor: Any) -> bool:
    return any(getattr(tensor, f"{kind}_data") for kind in ("float", "int32", "int64", "double", "uint64"))
