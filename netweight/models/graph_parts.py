"""The parts of a graph network that are rounded, how many numbers each holds, and what they are rounded to.

A block (`graph_block`) has the weights `linear`, `shortcut` and `vectors` (left and right of attention), and
the activations `input`, `message`, `links` and `sums`. Weights are binary, ternary, or fixed point of so many
bits behind the largest; activations are fixed point, a.b for a bits before the point and b behind.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from netweight.core.compressed import Change
from netweight.core.compressed import replace as put
from netweight.core.errors import DoesNotFit
from netweight.data.graphs import Graph
from netweight.models.graph_block import TAPS, Choice, GraphNetwork
from netweight.models.graph_sums import LEARNT, vectors_of
from netweight.nn.fixed_point import WEIGHTS, Fixed, Rounding, weight_rounding
from netweight.nn.quantized import Roundings, attach, finished

KEPT = ("linear", "shortcut", "vectors")  # weights
FLOAT = 32  # bits of a number that is not rounded


@dataclass(frozen=True)
class Parts:
    """What each part of a block is rounded to: a name of `nn.fixed_point`, or "" for nothing."""

    linear: str = ""
    shortcut: str = ""
    vectors: str = ""
    input: str = ""
    message: str = ""
    links: str = ""
    sums: str = ""

    @classmethod
    def same(cls, weights: str, activations: str) -> Parts:
        """One rounding for all weights, one for all activations."""
        return cls(*[weights] * len(KEPT), *[activations] * len(TAPS))


def bits_of(part: str, name: str) -> int:
    """Bits of a number of that part under a rounding of that name; raises `BadInput` for another name."""
    if not name:
        return FLOAT
    if part in TAPS:
        return Fixed.parse(name).bits
    weight_rounding(name)
    return WEIGHTS[name]


def elements(graph: Graph, before: int, choice: Choice, classes: int = 0) -> dict[str, int]:
    """Numbers in each part of a block that is there. before: features of its input; classes: of a last block.

    Features count with their zeros: it is what an accelerator keeps a buffer for.
    """
    out = choice.heads * (classes or choice.width // choice.heads)
    links = graph.edges.shape[1] + graph.nodes
    found = {
        "linear": out * before,
        "shortcut": (classes or choice.width) * before if choice.shortcut else 0,
        "vectors": len(vectors_of(choice.attention)) * out,
        "input": graph.nodes * before,
        "message": graph.nodes * out,
        "links": links * (choice.heads if choice.attention in LEARNT else 1),
        "sums": graph.nodes * out,
    }
    return {name: count for name, count in found.items() if count}


def each_block(graph: Graph, choices: Sequence[Choice]) -> list[dict[str, int]]:
    """`elements` of every block."""
    widths = [graph.width, *(choice.width for choice in choices[:-1])]
    last = [0] * (len(choices) - 1) + [graph.classes]
    return [elements(graph, *each) for each in zip(widths, choices, last)]


def weight_bits(graph: Graph, choices: Sequence[Choice], parts: Sequence[Parts]) -> int:
    """Bits of all weights as codes, without steps and biases."""
    return sum(
        count * bits_of(name, getattr(part, name))
        for counts, part in zip(each_block(graph, choices), parts)
        for name, count in counts.items()
        if name in KEPT
    )


def buffer_bits(graph: Graph, choices: Sequence[Choice], parts: Sequence[Parts]) -> int:
    """Bits of what goes into and comes out of a block, of the block where it is most."""
    return max(
        sum(counts[name] * bits_of(name, getattr(part, name)) for name in ("input", "sums"))
        for counts, part in zip(each_block(graph, choices), parts)
    )


def rounded(network: GraphNetwork, parts: Sequence[Parts]) -> nn.Module:
    """A copy of the network whose parts are rounded on each call, to be trained.

    Raises `DoesNotFit` unless there are parts for each block.
    """
    if len(parts) != len(network.blocks):
        raise DoesNotFit(f"{len(parts)} roundings do not fit {len(network.blocks)} blocks; give one for each")

    def rule(name: str, layer: nn.Module) -> Roundings | None:
        _, block, last = name.split(".")
        how = getattr(parts[int(block)], last if last in KEPT else "vectors")
        return Roundings(weight_rounding(how)) if how else None

    model = attach(network, rule)
    for index, part in enumerate(parts):
        for tap in TAPS:
            if getattr(part, tap):
                put(model, f"blocks.{index}.{tap}", Rounding(Fixed.parse(getattr(part, tap))))
    return model


def shipped(model: nn.Module) -> tuple[nn.Module, Change]:
    """The float network, and the Change that makes of it what was trained, bit for bit."""
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    taps = {name: layer for name, layer in model.named_modules() if isinstance(layer, Rounding)}
    for name in taps:
        put(model, name, nn.Identity())
    plain, change = finished(model)
    activations = {name: layer.format.stored(device) for name, layer in taps.items()}
    return plain, replace(change, activations={**change.activations, **activations})
