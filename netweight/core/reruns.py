"""What a network gives when one layer has another weight, without running again what lies before it.

    graph = graph_of(model, x)            # once for all batches of that size
    for layer, index, y in reruns(model, graph, x, layers, weights): ...

The network runs once, layer by layer as on its graph (`core.graph`); where a layer is reached, the rest is
run once for each of its weights, on the values that are at hand there. A network that has no such graph is
run as a whole each time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.compressed import weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.graph import Graph, Node, call, capture, live, run

Found = tuple[str, int, Tensor]


def graph_of(model: nn.Module, x: Tensor) -> Graph | None:
    """The graph of the network for batches of that size; None where it has none."""
    try:
        return capture(model, x)
    except DoesNotFit:
        return None


def reruns(
    model: nn.Module,
    graph: Graph | None,
    x: Tensor,
    layers: Sequence[str],
    weights: Callable[[str], Iterable[Tensor]],
) -> Iterator[Found]:
    """(layer, place of the weight, outputs for x) for every weight of every layer, in evaluation mode.

    graph: of the model at this batch size. x: on the model's device. weights: those to try in a layer, in the
    shape of its own. Layers come in the order in which the network calls them. The model stays as it is.
    """
    first = {layer: graph and _first_reader(graph, f"{layer}.weight") for layer in layers}
    known = {layer: place for layer, place in first.items() if place is not None}
    if graph is not None:
        yield from _on_graph(graph, x, known, weights)
    rest = [layer for layer in layers if layer not in known]
    if rest:
        yield from _as_a_whole(copy.deepcopy(model).eval(), x, rest, weights)


def _on_graph(
    graph: Graph, x: Tensor, first: dict[str, int], weights: Callable[[str], Iterable[Tensor]]
) -> Iterator[Found]:
    """Walk the graph from layer to layer; `first`: the place of the node that reads a layer's weight."""
    rest, values, begun = graph, (x,), 0
    for layer in sorted(first, key=first.__getitem__):
        with torch.no_grad():
            before, rest = _cut(rest, first[layer] - begun)
            values, begun = run(before, values, call), first[layer]
        for index, weight in enumerate(weights(layer)):
            with torch.no_grad():
                y = run(live(rest, {f"{layer}.weight": weight}), values, call)[0]
            yield layer, index, y


def _cut(graph: Graph, place: int) -> tuple[Graph, Graph]:
    """The nodes before a place, and those from there on, which start from what the former leave them."""
    before, after = graph.nodes[:place], graph.nodes[place:]
    read = {name for node in after for name in node.inputs} | set(graph.outputs)
    at_hand = tuple(node for node in (*graph.inputs, *before) if node.name in read)
    return (
        replace(graph, nodes=before, outputs=tuple(node.name for node in at_hand)),
        replace(graph, nodes=after, inputs=tuple(map(_as_input, at_hand))),
    )


def _as_input(node: Node) -> Node:
    return replace(node, op="input", overload="", inputs=(), params={})


def _first_reader(graph: Graph, parameter: str) -> int | None:
    """The first node that reads the parameter, or what was computed from it; None if none does."""
    moved = {name for name, source in graph.sources.items() if source == parameter}
    for node in graph.folded:
        if moved & set(node.inputs):
            moved.add(node.name)
    return next((place for place, node in enumerate(graph.nodes) if moved & set(node.inputs)), None)


def _as_a_whole(
    net: Any, x: Tensor, layers: Sequence[str], weights: Callable[[str], Iterable[Tensor]]
) -> Iterator[Found]:
    """The whole network again for every weight, which is put in and taken out."""
    for layer in layers:
        own = weight_of(net, layer).clone()
        for index, weight in enumerate(weights(layer)):
            with torch.no_grad():
                net.get_submodule(layer).weight.copy_(weight)
                y = net(x)
                net.get_submodule(layer).weight.copy_(own)
            yield layer, index, y
