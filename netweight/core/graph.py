"""One typed graph of a network, from `torch.export` in core ATen operators.

    graph = capture(model, x)             # the model in evaluation mode, at the batch size of x
    y = evaluate(graph, x)                # the same outputs
    layer_macs(graph)                     # multiply-accumulates of each layer for one example

Bounds and cost models read this graph; there is no second tracer. Every operator is one of core ATen, but
that linear, matmul, pools, normalisations, softmax and smooth activations stay whole (`WHOLE`), and attention
is split into two products and a softmax. What does not depend on an input is evaluated once and becomes a
constant; copies and dropout are dropped. A packed layer appears with its decoded weight.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.compressed import Compressed, replace
from netweight.core.errors import DoesNotFit

# fmt: off
WHOLE = frozenset([
    "linear", "matmul", "layer_norm", "rms_norm", "group_norm", "instance_norm", "max_pool1d",
    "max_pool2d", "max_pool3d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "silu", "hardswish", "hardsigmoid", "mish", "softplus", "gelu", "softmax",
    "log_softmax",
])
COPIES = frozenset([
    "aten.alias", "aten.clone", "aten.detach", "aten.dropout", "aten.lift_fresh_copy",
    "aten.contiguous", "aten.native_dropout",
])
# fmt: on
VIEWS = frozenset(["aten.view", "aten._unsafe_view"])
FILLED = frozenset(["aten.full_like", "aten.zeros_like", "aten.ones_like"])
FIRST_OF = frozenset(["aten._native_batch_norm_legit_no_training"])  # tuples of which only item 0 matters


@dataclass(frozen=True)
class Ref:
    """The value of a node, an input or a constant, by name."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator call.

    op: "aten.convolution" or "getitem". overload: its ATen overload. params: every argument by its name in
    the ATen schema, defaults included, with a `Ref` where a tensor stands. inputs: the names those refer to,
    in order. shape, dtype: of the result (of its first item for a tuple). layer: path of the module that made
    it, "" for the whole network.
    """

    name: str
    op: str
    overload: str
    inputs: tuple[str, ...]
    params: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str


@dataclass(frozen=True, eq=False)
class Graph:
    """nodes: in an order of evaluation. inputs: Nodes of op "input". outputs: names. constants: by name.

    sources: the parameter or buffer of the model that a constant is; some are read by `folded` alone.
    folded: the operators that were evaluated into constants, in order.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    sources: Mapping[str, str] = field(default_factory=dict)
    folded: tuple[Node, ...] = ()

    @property
    def batch(self) -> int:
        """The number of examples it was captured for; shapes inside it hold for that number alone."""
        return self.inputs[0].shape[0]


def capture(model: nn.Module | Compressed, *x: Tensor) -> Graph:
    """The graph of the model for inputs of the shapes of x; the model and its mode stay as they are.

    Raises `DoesNotFit` where the model's control flow depends on values, or x does not fit it.
    """
    model = model.plain() if isinstance(model, Compressed) else _decoded(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own internals
            exported = torch.export.export(model, tuple(x), strict=False).run_decompositions(_table())
    except Exception as error:  # the exporter raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DoesNotFit(
            f"{type(model).__name__}: it cannot be captured as one graph for inputs of "
            f"{[tuple(t.shape) for t in x]} ({reason}); use inputs that fit and no control flow on values"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _read(exported)


def evaluate(graph: Graph, *x: Tensor) -> Any:
    """What the network gives for inputs of the captured shapes; a tuple where it has several outputs."""
    found = run(graph, x, call)
    return found[0] if len(found) == 1 else found


def live(graph: Graph, tensors: Mapping[str, Tensor]) -> Graph:
    """The graph with its constants computed anew from parameters and buffers by name, gradients included.

    Names that are not given keep the values of the capture. So a graph captured once follows a network in
    training: `live(graph, {**dict(model.named_parameters()), **dict(model.named_buffers())})`.
    """
    values = dict(graph.constants)
    values.update({name: tensors[source] for name, source in graph.sources.items() if source in tensors})
    for node in graph.folded:
        if all(name in values for name in node.inputs):
            values[node.name] = call(node, filled(node.params, values))
    return with_fields(graph, constants={name: values[name] for name in graph.constants})


def run(graph: Graph, x: Sequence[Any], step: Callable[[Node, dict[str, Any]], Any]) -> tuple[Any, ...]:
    """Walk the graph with values of any kind: `step(node, params)` gives a node's, with its params filled in.

    Inputs start as x, constants are tensors; a value is dropped after its last use. Returns the outputs.
    """
    values: dict[str, Any] = {**graph.constants, **{node.name: v for node, v in zip(graph.inputs, x)}}
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    for index, node in enumerate(graph.nodes):
        values[node.name] = step(node, filled(node.params, values))
        for name in node.inputs:
            if last[name] == index and name not in graph.outputs:
                values.pop(name, None)
    return tuple(values[name] for name in graph.outputs)


def call(node: Node, params: Mapping[str, Any]) -> Any:
    """The operator itself on tensors."""
    if node.op == "getitem":
        return params["self"][params["index"]]
    if node.op in FIRST_OF:  # the same numbers through the operator that torch.vmap knows
        p = {name: value for name, value in params.items() if name != "momentum"}
        return torch.nn.functional.batch_norm(**p)
    return getattr(getattr(torch.ops.aten, node.op.removeprefix("aten.")), node.overload)(**params)


def layer_macs(graph: Graph) -> dict[str, int]:
    """Multiply-accumulates for one example of each layer that has any: products of matrices and convolutions.

    Products that stand in no module of their own count for the module around them ("" for the whole network).
    """
    shapes = {node.name: node.shape for node in (*graph.nodes, *graph.inputs)}
    shapes.update({name: tuple(tensor.shape) for name, tensor in graph.constants.items()})
    counts: dict[str, int] = {}
    for node in graph.nodes:
        count = _macs(node, shapes)
        if count:
            counts[node.layer] = counts.get(node.layer, 0) + count // graph.batch
    return counts


def macs(model: nn.Module | Compressed, *x: Tensor) -> int:
    """Multiply-accumulates of the whole network for one example of x."""
    return sum(layer_macs(capture(model, *x)).values())


def _macs(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of one node for the whole batch."""

    def shape(name: str) -> tuple[int, ...]:
        return shapes[node.params[name].name]

    match node.op:
        case "aten.linear":
            return math.prod(node.shape) * shape("weight")[1]
        case "aten.convolution":
            weight = shape("weight")
            outer = shape("input") if node.params["transposed"] else node.shape
            return math.prod(outer) * math.prod(weight[1:])
        case "aten.matmul":
            return math.prod(node.shape) * shape("self")[-1]
        case "aten.mm" | "aten.bmm":
            return math.prod(node.shape) * shape("self")[-1]
        case "aten.addmm":
            return math.prod(node.shape) * shape("mat1")[-1]
        case "aten.baddbmm":
            return math.prod(node.shape) * shape("batch1")[-1]
    return 0


def _decoded(model: nn.Module) -> nn.Module:
    """The model with each packed layer as its float layer; the model itself where it has none."""
    packed = [
        name for name, module in model.named_modules() if hasattr(module, "form") and hasattr(module, "plain")
    ]
    if not packed:
        return model
    if packed == [""]:
        return model.plain()  # type: ignore[operator]
    twin = copy.deepcopy(model)
    for name in packed:
        replace(twin, name, twin.get_submodule(name).plain())  # type: ignore[operator]
    return twin


def _table() -> dict[Any, Callable[..., Any]]:
    """How operators are split: torch's table without `WHOLE`, and attention our way."""
    table = torch.export.default_decompositions()
    for overload in list(table):
        if overload.namespace == "aten" and overload._schema.name.removeprefix("aten::") in WHOLE:
            table.pop(overload)
    table[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    return table


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T s + mask) v."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = torch.where(later, -torch.inf, scores)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, -torch.inf) if masked else scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def _read(exported: Any) -> Graph:
    """The exported program as a Graph."""
    signature = exported.graph_signature
    stored = {**exported.state_dict, **exported.constants}
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    constants: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    folded: list[Node] = []
    inputs: list[Node] = []
    nodes: dict[str, Node] = {}
    same: dict[str, str] = {}  # a dropped node: the one that has its value
    outputs: tuple[str, ...] = ()
    for found in exported.graph.nodes:
        if found.op == "placeholder":
            if found.name in targets:
                constants[found.name] = stored[targets[found.name]].detach()
                if found.name not in signature.inputs_to_lifted_tensor_constants:
                    sources[found.name] = targets[found.name]
            elif found.name in signature.user_inputs:
                inputs.append(_typed(found, Node(found.name, "input", "", (), {}, (), torch.float32, "")))
        elif found.op == "output":
            outputs = tuple(same.get(a.name, a.name) for a in found.args[0] if isinstance(a, torch.fx.Node))
        elif "val" in found.meta:  # what has no value asserts something
            node = _node(found, same)
            instead = _same_as(node, nodes)
            if instead is not None:
                same[node.name] = instead
            elif node.op in FILLED:
                like = torch.zeros(node.shape, dtype=node.dtype, device=found.meta["val"].device)
                constants[node.name] = call(node, {**node.params, "self": like})
            elif all(name in constants for name in node.inputs):
                folded.append(node)
                with torch.no_grad():
                    constants[node.name] = call(node, filled(node.params, constants))
            else:
                nodes[node.name] = node
    used = {name for node in nodes.values() for name in node.inputs} | set(outputs)
    again = {name for node in folded for name in node.inputs} - {node.name for node in folded}
    used |= again - sources.keys()  # what `live` cannot find in the model
    kept = {name: tensor for name, tensor in constants.items() if name in used}
    return Graph(tuple(nodes.values()), tuple(inputs), outputs, kept, sources, tuple(folded))


def _node(found: torch.fx.Node, same: Mapping[str, str]) -> Node:
    """One call of the exported graph with its arguments by name."""
    inputs: list[str] = []

    def own(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            name = same.get(value.name, value.name)
            inputs.append(name)
            return Ref(name)
        return [own(v) for v in value] if isinstance(value, list | tuple) else value

    stack = list((found.meta.get("nn_module_stack") or {"": ("", None)}).values())
    layer = str(stack[-1][0]).split("@")[0]
    if found.target is operator.getitem:
        params = {"self": own(found.args[0]), "index": found.args[1]}
        op, overload = "getitem", ""
    else:
        schema = found.target._schema  # type: ignore[union-attr]
        params = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        params.update({a.name: own(value) for a, value in zip(schema.arguments, found.args)})
        params.update({name: own(value) for name, value in found.kwargs.items()})
        op, overload = schema.name.replace("::", "."), schema.overload_name or "default"
        if op in VIEWS:  # a view asks for a memory layout, which a dropped copy may have made
            op, params = "aten.reshape", {"self": params["self"], "shape": params["size"]}
    return _typed(found, Node(found.name, op, overload, tuple(inputs), params, (), torch.float32, layer))


def _typed(found: torch.fx.Node, node: Node) -> Node:
    """The node with shape and dtype of its (first) value."""
    value = found.meta["val"]
    first = value[0] if isinstance(value, list | tuple) else value
    shape, dtype = (tuple(first.shape), first.dtype) if isinstance(first, Tensor) else ((), torch.int64)
    return Node(node.name, node.op, node.overload, node.inputs, node.params, shape, dtype, node.layer)


def _same_as(node: Node, nodes: Mapping[str, Node]) -> str | None:
    """The name of an earlier node with the same value, where this one is a copy of it."""
    before = nodes.get(node.inputs[0]) if node.inputs else None
    if node.op in COPIES:
        return node.inputs[0]
    if node.op == "aten._to_copy" and before is not None and before.dtype == node.dtype:
        return node.inputs[0]
    if node.op == "getitem" and before is not None and before.op in FIRST_OF:
        return node.inputs[0]
    if node.op == "aten.add" and len(node.inputs) == 2 and node.params["alpha"] == 1:
        value, change = node.inputs[0], nodes.get(node.inputs[1])
        if change is not None and change.op == "aten.sub" and change.params["alpha"] == 1:
            plus, minus = (*change.inputs, "", "")[:2]  # straight-through: v + (w - w) = v, v + (w - v) = w
            return value if plus == minus else plus if minus == value else None
    return None


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Params with the values that their Refs name."""
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, Mapping):
        return {key: filled(v, values) for key, v in value.items()}
    return [filled(v, values) for v in value] if isinstance(value, list | tuple) else value
