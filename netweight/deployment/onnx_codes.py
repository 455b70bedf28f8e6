"""The same ONNX graph of 8-bit codes, in the form that ONNX Runtime is fastest at. Nothing computed changes.

moved      slices, zero padding, reshaping and maxima act on codes, not on decoded values
sliced     slices in a row become one
pooled     a mean over all places becomes GlobalAveragePool, which is fused; ReduceMean is not
widened    inputs of a convolution are filled up to a multiple of 4 channels, with weights of 0: the
           kernel that needs no copy of every window (MlasConvSym) takes no others
"""

from __future__ import annotations

from typing import Any

import numpy as np

from netweight.core.errors import need

MOVES = (
    "Slice",
    "Pad",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Gather",
    "MaxPool",
)
PACK = 4  # channels that one instruction multiplies


def tidy(proto: Any) -> None:
    """All of it, in place."""
    for change in (pooled, moved, sliced, widened):
        rank = ranks(proto)
        change(proto.graph, rank)
        cleaned(proto.graph)


def ranks(proto: Any) -> dict[str, int]:
    """How many axes each value has, where that is known."""
    known = need("onnx").shape_inference.infer_shapes(proto).graph
    values = [*known.value_info, *known.input, *known.output]
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


def cleaned(graph: Any) -> None:
    """Without nodes and tensors that nothing reads."""
    kept: list[Any] = []
    wanted = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(type(node).FromString(node.SerializeToString()))
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(kept[::-1])
    tensors = [type(t).FromString(t.SerializeToString()) for t in graph.initializer if t.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def decoders(graph: Any) -> dict[str, Any]:
    """By output, the DequantizeLinear nodes with one scale."""
    return {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and not node.attribute
    }


def moved(graph: Any, rank: dict[str, int]) -> None:
    """Move what only moves values in front of the decoding."""
    helper, known, made = need("onnx").helper, decoders(graph), []
    for node in graph.node:
        source = known.get(node.input[0]) if node.op_type in MOVES else None
        if source is None:
            made.append(node)
            continue
        codes, scale, zero = source.input
        output = node.output[0]
        again = type(node).FromString(node.SerializeToString())
        again.input[0], again.output[0] = codes, f"{output}.codes"
        if node.op_type == "Pad":  # with the code of 0
            again.input[:] = [codes, node.input[1], zero, *node.input[3:]]
        known[output] = helper.make_node("DequantizeLinear", [f"{output}.codes", scale, zero], [output])
        made += [again, known[output]]
    put(graph, made)


def sliced(graph: Any, rank: dict[str, int]) -> None:
    """One slice for two in a row, where they are constant and of different axes."""
    tensors = constants(graph)
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        before = makers.get(node.input[0]) if node.op_type == "Slice" else None
        while before is not None and before.op_type == "Slice":
            parts = [ranges(each, tensors) for each in (before, node)]
            if None in parts or set(parts[0][2]) & set(parts[1][2]):
                break
            joined = [np.concatenate(pair) for pair in zip(*parts)]
            names = [
                f"{node.output[0]}.{what}.{before.output[0]}" for what in ("starts", "ends", "axes", "steps")
            ]
            for name, values in zip(names, joined):
                graph.initializer.append(need("onnx").numpy_helper.from_array(values, name))
                tensors[name] = values
            node.input[:] = [before.input[0], *names]
            before = makers.get(node.input[0])


def ranges(node: Any, tensors: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    """starts, ends, axes and steps of a slice, None where they are not all said in constants."""
    if len(node.input) < 4 or any(name not in tensors for name in node.input[1:]):
        return None
    found = [tensors[name] for name in node.input[1:]]
    return found if len(found) == 4 else [*found, np.ones_like(found[0])]


def pooled(graph: Any, rank: dict[str, int]) -> None:
    """GlobalAveragePool for a mean over all places of a rounded value that is rounded again."""
    helper, tensors, known = need("onnx").helper, constants(graph), decoders(graph)
    made = []
    for node in graph.node:
        readers = [each for each in graph.node if set(node.output) & set(each.input)]
        rounded = [each.op_type for each in readers] == ["QuantizeLinear"]
        if not (rounded and _over_places(node, tensors, rank) and node.input[0] in known):
            made.append(node)
            continue
        (after,) = readers
        decoded = next(d for d in known.values() if d.input[0] == after.output[0])
        scale, zero = after.input[1:]
        flat = [a.i for a in node.attribute if a.name == "keepdims"] == [0]
        name = node.output[0]
        wide = f"{name}.wide" if flat else decoded.output[0]
        made += [
            helper.make_node("GlobalAveragePool", [node.input[0]], [f"{name}.mean"]),
            helper.make_node("QuantizeLinear", [f"{name}.mean", scale, zero], [f"{name}.codes"]),
            helper.make_node("DequantizeLinear", [f"{name}.codes", scale, zero], [wide]),
        ]
        if flat:
            made.append(helper.make_node("Flatten", [wide], [decoded.output[0]], axis=1))
        decoded.output[0] = f"{name}.unread"
    put(graph, made)


def _over_places(node: Any, tensors: dict[str, np.ndarray], rank: dict[str, int]) -> bool:
    """Whether it is a mean over all axes but examples and channels."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in tensors:
        return False
    count = rank.get(node.input[0], 0)
    return count > 2 and {int(a) % count for a in tensors[node.input[1]]} == set(range(2, count))


def widened(graph: Any, rank: dict[str, int]) -> None:
    """Fill up the input channels of convolutions."""
    onnx, tensors, known = need("onnx"), constants(graph), decoders(graph)
    weights = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    made = []
    for node in graph.node:
        source = known.get(node.input[0]) if node.op_type == "Conv" else None
        weight = weights.get(node.input[1]) if source is not None else None
        codes = None if weight is None else tensors.get(weight.input[0])
        grouped = any(a.name == "group" and a.i != 1 for a in node.attribute)
        shared = codes is not None and sum(node.input[1] in each.input for each in graph.node) > 1
        missing = 0 if codes is None or grouped or shared else -codes.shape[1] % PACK
        if missing and codes is not None and codes.dtype == np.int8:
            filled = np.pad(codes, [(0, 0), (0, missing), *[(0, 0)] * (codes.ndim - 2)])
            pads = np.zeros(2 * codes.ndim, np.int64)
            pads[codes.ndim + 1] = missing
            name = node.output[0]
            graph.initializer.append(onnx.numpy_helper.from_array(filled, f"{weight.input[0]}.filled"))
            graph.initializer.append(onnx.numpy_helper.from_array(pads, f"{weight.input[0]}.pads"))
            inputs = [source.input[0], f"{weight.input[0]}.pads", source.input[2]]
            weight.input[0] = f"{weight.input[0]}.filled"
            made.append(onnx.helper.make_node("Pad", inputs, [f"{name}.filled"]))
            inputs = [f"{name}.filled", *source.input[1:]]
            made.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}.wide"]))
            node.input[0] = f"{name}.wide"
        made.append(node)
    put(graph, made)


def constants(graph: Any) -> dict[str, np.ndarray]:
    """The tensors of the graph and of its Constant nodes."""
    onnx = need("onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        for said in node.attribute if node.op_type == "Constant" else ():
            value = onnx.helper.get_attribute_value(said)
            whole = isinstance(value, onnx.TensorProto)
            found[node.output[0]] = onnx.numpy_helper.to_array(value) if whole else np.array(value)
    return found


def put(graph: Any, nodes: list[Any]) -> None:
    """These nodes in place of all."""
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
