"""A compressed network as one that computes with integers alone: multiplications, additions and shifts.

    network = lower(small, data)          # an IntegerNetwork: int32 logits, worth network.scale each
    twin(network), simulation(network)    # its equals in float64 (nn.integer_twin)

Paper: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, arXiv:2011.10680, section 3.

A value of the graph is an integer q worth S q, S one number or one per channel. A layer with weights S_w q_w
(one S_w per row) and inputs on the grid S_x q_x (`StaticRounding`) gives, in int32 and worth S_w S_x each,

    acc = sum q_w q_x + round(b / (S_w S_x)).

What reads acc takes it to its own scale S_o by the dyadic number nearest S_w S_x / S_o. Where branches meet,
each is taken by its own dyadic number to one signed 16-bit scale, found on `data`, and then they are added as
integers. ReLU, max-pool and movements act on integers; an average is a sum whose division is part of S. The
logits share one scale, the finest of their rows that int32 holds.

Differs from the paper: the average pool keeps its sum, so no mean is rounded. A ReLU before a quantizer
whose grid starts at 0 is left to the clip of that quantizer (it commutes with rescaling). A row whose
bias would not fit int32 (a dead channel: almost no weight, some bias) is put on a coarser scale. The input
quantizer rounds half to even, like every quantizer of the network it was made of; shifts round half up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core import progress
from netweight.core.compressed import Compressed
from netweight.core.compressed import replace as put
from netweight.core.errors import DoesNotFit
from netweight.core.graph import Graph, Node, call, capture, run
from netweight.core.grid import PER_ROW, PER_TENSOR
from netweight.core.task import Data
from netweight.deployment.integer_draft import FINER, Draft, Layer, Value, refuse
from netweight.deployment.integer_operators import RULES, no_rule
from netweight.nn.dyadic import Dyadic
from netweight.nn.fake import StaticRounding
from netweight.nn.integer_network import INPUT, Call, IntegerNetwork, Reach
from netweight.nn.integer_steps import Rescale
from netweight.nn.packed import Affine

ROOM = 2.0**30  # the logits stay below


def lower(small: Compressed, data: Data) -> IntegerNetwork:
    """The compressed network on integers alone, on its device; `data` gives the scales where branches meet.

    Every Linear and convolution is packed as `Affine`, one scale per row or for the tensor, behind a
    `StaticRounding` of its input, batch norms folded: what `hawq-v3` makes. Raises `DoesNotFit` naming the
    operator and the layer that have no integer form, and where a sum could leave int32.
    """
    if not data.x.is_floating_point():
        raise DoesNotFit(f"{data.name}: its inputs are {data.x.dtype}; integer networks read real inputs")
    layers = layers_of(small)
    graph = capture(without_rounding(small), data.x[:1].float().cpu())
    draft = Draft(graph, layers, sizes(graph, layers, data))
    entrance = graph.inputs[0]
    one = torch.ones((1,) * len(entrance.shape), dtype=torch.float64)
    draft.values[entrance.name] = Value(
        INPUT, Reach(tuple(entrance.shape[1:]), None), one, 0 * one, draft.sizes[entrance.name]
    )
    for node in graph.nodes:
        draft.values[node.name] = lowered(draft, node)
    last = output(draft, graph)
    calls = needed(draft.calls, last.name)
    scales = {name: scale for name, scale in draft.scales.items() if name in {c.name for c in calls}}
    network = IntegerNetwork(calls, entrance.shape[1:], scales, last.name).eval()
    device = next((t.device for t in (*small.model.parameters(), *small.model.buffers())), data.x.device)
    return network.to(device)


def lowered(draft: Draft, node: Node) -> Value | list[Value]:
    """The value of one node, with its size on the data."""
    if node.shape[:1] != (1,):
        raise refuse(node, f"it mixes examples: one gives {tuple(node.shape)}; keep the first axis for them")
    found = RULES.get(node.op, no_rule)(draft, node)
    if isinstance(found, list):
        return found
    return replace(found, size=draft.sizes.get(node.name, found.size))


def output(draft: Draft, graph: Graph) -> Value:
    """The logits on one common scale: the finest of their rows, as far as int32 and `FINER` allow."""
    last = draft.values[graph.outputs[0]]
    if len(graph.outputs) != 1 or not isinstance(last, Value):
        raise DoesNotFit("the network has several outputs; integer networks have one")
    if last.real:
        raise DoesNotFit("no Linear or convolution lies between input and output; there is nothing to lower")
    if last.scale.numel() == 1:
        return replace(last, scale=last.scale.reshape(()))
    largest = max(abs(end) for end in last.reach.within) * float(last.scale.max())
    scale = max(float(last.scale.min()), largest / ROOM, float(last.scale.max()) * FINER)
    step = Rescale(Dyadic.of(last.scale / scale, "the output"), -(2**31), 2**31 - 1)
    one = torch.full((1,) * (len(last.reach.shape) + 1), scale, dtype=torch.float64)
    return draft.emit("output", step, [last], one)


def needed(calls: list[Call], output: str) -> list[Call]:
    """The calls that the output depends on."""
    wanted, kept = {output}, []
    for each in reversed(calls):
        if each.name in wanted:
            wanted |= set(each.inputs)
            kept.append(each)
    return kept[::-1]


# The compressed network ----------------------------------------------------------------------------------


def without_rounding(small: Compressed) -> nn.Module:
    """The float twin without the rounding of activations, which the grids of the layers stand for."""
    plain = small.plain().float().cpu().eval()
    for name in small.change.activations:
        put(plain, f"{name}.rounding", nn.Identity())
    return plain


def layers_of(small: Compressed) -> dict[str, Layer]:
    """The layers that can run on integers. Raises `DoesNotFit` naming the first packed one that cannot."""
    found = {}
    for name, form in small.packed.items():
        rounding = small.change.activations.get(name)
        if not isinstance(form, Affine) or form.group not in (PER_ROW, PER_TENSOR):
            how = f"in groups of {form.group}" if isinstance(form, Affine) else f"as {type(form).__name__}"
            raise DoesNotFit(f"{name}: its weight is stored {how}; integers need one scale per row or tensor")
        if not isinstance(rounding, StaticRounding):
            raise DoesNotFit(
                f"{name}: its input has no fixed grid; round its activations with StaticRounding"
            )
        found[name] = Layer(centred(form), row_scales(form), rounding)
    return found


def centred(form: Affine) -> Tensor:
    """The codes without their zero points, `out in *kernel`, int64 on the CPU."""
    zero = form.zeros().cpu().to(torch.int64).reshape(-1, *[1] * (len(form.shape) - 1))
    return form.integers().cpu().to(torch.int64) - zero


def row_scales(form: Affine) -> Tensor:
    """What 1 is worth in each row, float64."""
    return form.scale.cpu().double().reshape(-1).expand(form.shape[0]).clone()


@torch.no_grad()
def sizes(graph: Graph, layers: Mapping[str, Layer], data: Data) -> dict[str, float]:
    """The largest |value| of every node on the data, inputs of layers rounded as they are."""
    roundings = {
        node.name: layers[path].rounding.module().cpu()
        for node in graph.nodes
        if (path := node.layer.removesuffix(".layer")) in layers and "weight" in node.params
    }

    def one(x: Tensor) -> dict[str, Tensor]:
        found = {graph.inputs[0].name: x.abs().amax()}

        def step(node: Node, p: dict[str, Any]) -> Any:
            if node.name in roundings:
                p = {**p, "input": roundings[node.name](p["input"])}
            value = call(node, p)
            if isinstance(value, Tensor) and value.is_floating_point():
                found[node.name] = value.abs().amax()
            return value

        run(graph, [x.unsqueeze(0)], step)
        return found

    largest: dict[str, float] = {}
    for x, _ in progress.steps(data, "Finding scales", total=-(-len(data) // data.batch)):
        for name, each in torch.vmap(one)(x.float().cpu()).items():
            largest[name] = max(largest.get(name, 0.0), float(each.max()))
    return largest
