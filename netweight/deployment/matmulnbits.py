"""Linear layers of at most 4 bits as MatMulNBits, the operator of ONNX Runtime that multiplies packed codes.

    y = x W'^T,    W'_nk = (code_nk - zero_nb) scale_nb,    b = floor(k / block)

Codes lie row by row and block by block, two a byte, the first one low; a block is 16, 32, 64 .. inputs. A
row or the tensor as one group is written as blocks that all hold the same scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from netweight.core.errors import need
from netweight.nn.packed import Affine

DOMAIN = "com.microsoft"
SIZES = (256, 128, 64, 32, 16)  # inputs of a block


def store(graph: Any, name: str, form: Affine) -> bool:
    """Let the products that read the weight `name` multiply its codes; False, and nothing changed, elsewhere.

    It has to be a matrix of at most 4 bits that is read by one product alone, transposed.
    """
    block = block_of(form)
    readers = [node for node in graph.node if name in node.input]
    if not block or len(readers) != 1:
        return False
    (reader,) = readers
    if reader.op_type == "Transpose":
        products = [node for node in graph.node if reader.output[0] in node.input]
        if len(products) != 1 or products[0].op_type != "MatMul" or products[0].input[1] != reader.output[0]:
            return False
        gone, x, bias, output = [reader, products[0]], products[0].input[0], "", products[0].output[0]
    elif reader.op_type == "Gemm" and reader.input[1] == name and _plain(reader):
        bias = reader.input[2] if len(reader.input) > 2 else ""
        gone, x, output = [reader], reader.input[0], reader.output[0]
    else:
        return False
    _swap(graph, gone, _product(graph, name, form, block, (x, bias, output)))
    return True


def block_of(form: Affine) -> int:
    """The size of its blocks, 0 where the operator cannot hold the weight."""
    if len(form.shape) != 2 or form.bits_per_code > 4:
        return 0
    inputs = form.shape[1]
    sizes = [size for size in SIZES if inputs % size == 0]
    if form.group > 0:
        return form.group if form.group in sizes else 0
    return sizes[0] if sizes else 0


def blocks(form: Affine, block: int) -> tuple[UInt8[Tensor, "n b bytes"], Float[Tensor, "n b"], Tensor]:
    """Codes two a byte, scales, and zero points two a byte (`n ceil(b / 2)`)."""
    rows, inputs = form.shape
    count = inputs // block
    codes = form.integers().reshape(rows, count, block)
    scale, zero = (t.expand(rows, -1) if len(t) == 1 else t for t in (form.scale.float(), form.zeros()))
    scale, zero = (t.expand(rows, count) if t.shape[1] == 1 else t for t in (scale, zero))
    padded = torch.cat([zero, zero.new_zeros(rows, count % 2)], 1)
    return two_a_byte(codes), scale.contiguous(), two_a_byte(padded)


def two_a_byte(codes: UInt8[Tensor, ...]) -> UInt8[Tensor, ...]:
    """Pairs of 4-bit codes along the last axis, the first one low."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()


def _plain(gemm: Any) -> bool:
    """Whether y = A B^T + C without factors."""
    helper = need("onnx").helper
    said = {a.name: helper.get_attribute_value(a) for a in gemm.attribute}
    factors = said.get("alpha", 1.0) == 1.0 and said.get("beta", 1.0) == 1.0
    return factors and said.get("transB", 0) == 1 and said.get("transA", 0) == 0


def _product(graph: Any, name: str, form: Affine, block: int, ends: tuple[str, str, str]) -> Any:
    """The node, its tensors put into the graph."""
    onnx = need("onnx")
    x, bias, output = ends
    parts = dict(zip(("codes", "scale", "zero"), blocks(form, block)))
    for part, values in parts.items():
        array = np.ascontiguousarray(values.numpy())
        graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}.{part}"))
    inputs = [x, *(f"{name}.{part}" for part in parts)]
    return onnx.helper.make_node(
        "MatMulNBits",
        inputs + (["", bias] if bias else []),  # the empty one is an order of groups
        [output],
        domain=DOMAIN,
        K=form.shape[1],
        N=form.shape[0],
        bits=4,
        block_size=block,
        accuracy_level=1,  # products in float32; a session may ask for another
    )


def _swap(graph: Any, gone: list[Any], node: Any) -> None:
    """The graph with one node in place of others."""
    last = gone[-1]
    nodes = [node if n is last else n for n in graph.node if n is last or all(n is not g for g in gone)]
    kept = [type(n).FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(kept)
