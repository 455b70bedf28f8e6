"""Where the channels of a network may be scaled: one producer and all layers that read it.

    y = consumer(g(producer(x))),    g homogeneous in each channel: g(y / s) = g(y) / s  for s > 0

Then `core.rewrite.Scale` is exact. In decoder blocks of transformers the sites are known by name; in every
other network they are found on the graph of `core.graph`, so that a residual stream, a GELU or a second
reader rules a site out.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, weight_of
from netweight.core.graph import Graph, Node, capture
from netweight.core.task import Data

ROTARY = (  # producer, consumers, the module at whose output the change is judged ("": at each consumer's)
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    ("self_attn.v_proj", ("self_attn.o_proj",), ""),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ("mlp.up_proj", ("mlp.down_proj",), ""),
)
OPT = (
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    ("self_attn.v_proj", ("self_attn.out_proj",), ""),
    ("final_layer_norm", ("fc1",), ""),
    ("fc1", ("fc2",), ""),
)
BLOCKS = {  # class of a decoder block: its sites
    "OPTDecoderLayer": OPT,
    "LlamaDecoderLayer": ROTARY,
    "MistralDecoderLayer": ROTARY,
    "Qwen2DecoderLayer": ROTARY,
    "Qwen3DecoderLayer": ROTARY,
}
NORMS = {  # what divides its output if gain and bias are divided
    "aten._native_batch_norm_legit_no_training": nn.modules.batchnorm._BatchNorm,
    "aten.layer_norm": nn.LayerNorm,
    "aten.rms_norm": nn.RMSNorm,
}
PRODUCTS = {"aten.linear": (nn.Linear,), "aten.convolution": WEIGHTED}
HOMOGENEOUS = frozenset(
    ["aten.relu", "aten.leaky_relu"]
    + [f"aten.{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)]
    + ["aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices"]
)


@dataclass(frozen=True)
class Site:
    """One place.

    producer: a norm, Linear or Conv. consumers: all layers that read it. inspected: the module at whose
    output a change of the consumers is judged, "" for each consumer's own output.
    """

    producer: str
    consumers: tuple[str, ...]
    inspected: str = ""

    def norm(self, model: nn.Module) -> bool:
        """Whether the producer is a norm."""
        return not isinstance(model.get_submodule(self.producer), WEIGHTED)


def sites(model: nn.Module, data: Data) -> list[Site]:
    """All sites of the model; the first inputs of `data` are used where it has no known blocks.

    Kept in `Data.memo` for as long as the model consists of the same modules. Raises `DoesNotFit` for a model
    that is captured neither by name nor as one graph.
    """
    blocks = [(name, block) for name, block in model.named_modules() if type(block).__name__ in BLOCKS]
    if blocks:
        return [site for name, block in blocks for site in _in_block(block, f"{name}." if name else "")]
    parts = [id(module) for module in model.modules()]
    kept = data.memo.get("sites")
    if kept is None or kept[0]() is not model or kept[1] != parts:
        kept = data.memo["sites"] = (weakref.ref(model), parts, _on_graph(model, _graph(model, data)))
    return kept[2]


def foldable(model: nn.Module, data: Data) -> list[tuple[str, str]]:
    """(layer, batch norm) pairs in which the norm alone reads the layer; each may be folded."""
    graph = _graph(model, data)
    readers, by_name = _readers(graph), {node.name: node for node in graph.nodes}
    found = []
    for node in graph.nodes:
        before = by_name.get(node.inputs[0]) if node.inputs else None
        if (
            before is not None
            and isinstance(_module(model, node), nn.modules.batchnorm._BatchNorm)
            and isinstance(_module(model, before), WEIGHTED)
            and len(readers[before.name]) == 1
            and _once(graph, node) and _once(graph, before)
        ):  # fmt: skip
            found.append((before.layer, node.layer))
    return found


def column_ranges(model: nn.Module, layer: str) -> Float[Tensor, " in"]:
    """max |W_:j| of each input channel, over outputs and kernel positions."""
    weight, parts = weight_of(model, layer), getattr(model.get_submodule(layer), "groups", 1)
    return weight.abs().reshape(parts, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).reshape(-1)


def _in_block(block: nn.Module, prefix: str) -> list[Site]:
    """The sites of a decoder block that are exact in it."""
    found = []
    for producer, consumers, inspected in BLOCKS[type(block).__name__]:
        if _exact(block, producer, consumers):
            found.append(
                Site(
                    prefix + producer,
                    tuple(prefix + name for name in consumers),
                    prefix + inspected if inspected else "",
                )
            )
    return found


def _exact(block: nn.Module, producer: str, consumers: Sequence[str]) -> bool:
    """What names do not say: a norm with a gain before its part, no grouped queries, a plain ReLU."""
    source, reader = block.get_submodule(producer), block.get_submodule(consumers[0])
    if not isinstance(source, nn.Linear):
        return getattr(block, "do_layer_norm_before", True) and source.weight is not None
    if producer == "fc1" and not isinstance(block.activation_fn, nn.ReLU):
        return False
    return len(source.weight) == reader.weight.shape[1]


def _graph(model: nn.Module, data: Data) -> Graph:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return capture(model, data.x[:2].to(device))


def _on_graph(model: nn.Module, graph: Graph) -> list[Site]:
    readers = _readers(graph)
    found = []
    for node in graph.nodes:
        producer = _module(model, node)
        if producer is None or getattr(producer, "weight", None) is None or not _once(graph, node):
            continue
        consumers = _consumers(model, graph, readers, node)
        if consumers and _same_channels(node, producer, [model.get_submodule(name) for name in consumers]):
            found.append(Site(node.layer, tuple(consumers)))
    return found


def _consumers(model: nn.Module, graph: Graph, readers: dict[str, list[Node]], node: Node) -> list[str]:
    """The layers that read the node through homogeneous maps; [] if anything else does."""
    found: list[str] = []
    if node.name in graph.outputs:
        return []
    for reader in readers[node.name]:
        first = reader.inputs[0] == node.name and reader.inputs.count(node.name) == 1
        if first and reader.op in PRODUCTS and isinstance(_module(model, reader), PRODUCTS[reader.op]):
            if not _once(graph, reader):
                return []
            found.append(reader.layer)
        elif first and (reader.op in HOMOGENEOUS or reader.op == "getitem" and reader.params["index"] == 0):
            beyond = _consumers(model, graph, readers, reader)
            if not beyond:
                return []
            found += beyond
        else:
            return []
    return found


def _readers(graph: Graph) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {node.name: [] for node in graph.nodes}
    for node in graph.nodes:
        for name in set(node.inputs) & readers.keys():
            readers[name].append(node)
    return readers


def _module(model: nn.Module, node: Node) -> nn.Module | None:
    """The layer or norm that the node is the whole of; None for other operators."""
    kinds = PRODUCTS.get(node.op) or NORMS.get(node.op)
    if kinds is None or not node.layer:
        return None
    module = model.get_submodule(node.layer)
    return module if isinstance(module, kinds) else None


def _once(graph: Graph, node: Node) -> bool:
    """Whether the layer is called once, with a weight that no other node reads."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return all(
        other is node or (other.layer != node.layer or other.op != node.op) and weight not in other.inputs[1:]
        for other in graph.nodes
    )


def _same_channels(node: Node, producer: nn.Module, consumers: Sequence[nn.Module]) -> bool:
    """Whether the producer's output channels are the input channels of every consumer, on the same axis."""
    last = not isinstance(producer, WEIGHTED[1:]) and (
        len(node.shape) == 2 or not isinstance(producer, nn.modules.batchnorm._BatchNorm)
    )
    for consumer in consumers:
        inputs = consumer.in_features if isinstance(consumer, nn.Linear) else consumer.in_channels
        if inputs != len(producer.weight) or isinstance(consumer, nn.Linear) != last:
            return False
    return True
