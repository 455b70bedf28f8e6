"""Where a network of 8-bit layers is rounded in between, so that a runtime stays on integers throughout.

A runtime runs a layer on integers where its weight, its input and its OUTPUT lie on fixed grids. Methods say
how weights and inputs are rounded. Here rounding is added wherever a value leaves a layer and another
operator on integers reads it:

    product          convolution or linear layer with integer weights and a rounded input
    + activation     what follows it alone: ReLU and other clips, which rounding to a grid contains
    join, pool       sum, product or concatenation of rounded values; mean over places
    move             slice, zero padding, reshape, maximum: of a rounded value it is rounded already

A value takes the grid that the first product behind it asks for; where none does (the branch in front of a
residual sum), its own range on calibration data is measured. Nothing is rounded in front of the output of the
network, and where a layer asks for another grid than its source has, both roundings stay.

The result is a network of its own, `Edged.twin`: more is rounded in it than in the one that it was made of.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from netweight.core.compressed import Compressed, replace
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_ROW, PER_TENSOR, Grid, in_groups
from netweight.core.task import Data
from netweight.nn.fake import StaticRounding
from netweight.nn.packed import Affine
from netweight.nn.ranges import input_ranges
from netweight.nn.simulated import rounded_bias

BITS = 8
PRODUCTS = ("conv1d", "conv2d", "conv3d", "linear")
CLIPS = ("relu", "relu6", "hardtanh", "clamp")
JOINS = ("add", "mul", "cat")
POOLS = ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d")
MOVES = (
    "slice", "view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze",
    "expand", "select", "max_pool1d", "max_pool2d", "clone", "alias", "dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Int8:
    """A layer that integers compute: its weight as 8-bit codes around 128, and the rounding of its input."""

    form: Affine
    rounding: StaticRounding

    def bias_scale(self) -> Tensor:
        """S_w S_x, what 1 of its integer bias is worth: one number or one per row."""
        return self.form.scale.float().reshape(-1) * self.rounding.scale.float()


@dataclass(frozen=True)
class Edged:
    """twin: the network with rounding at its edges. layers: those on integers. grids: by node of the twin's
    graph, the name of the rounding whose grid its value lies on. measured: how many roundings have a grid
    from calibration data; shared: how many have that of a layer."""

    twin: fx.GraphModule
    layers: Mapping[str, Int8]
    grids: Mapping[fx.Node, str]
    measured: int
    shared: int


@dataclass
class _Plan:
    """What is known while a graph is walked: the grids of layers, of values, and of the new modules."""

    twin: fx.GraphModule
    layers: Mapping[str, Int8]
    grids: dict[fx.Node, str] = field(default_factory=dict)
    raw: set[fx.Node] = field(default_factory=set)  # values of products, joins and pools before rounding
    edges: dict[str, StaticRounding | None] = field(default_factory=dict)  # None: to be measured


def edged(small: Compressed, data: Data, how: str = "min-max") -> Edged:
    """The network with rounding at every edge between its integer layers; `how`: see `nn.ranges.HOW`.

    Raises `DoesNotFit` where no layer has integer weights with one scale per row or tensor behind a static
    rounding of at most 8 bits, and where the network cannot be captured.
    """
    layers = int8_layers(small)
    if not layers:
        raise DoesNotFit(
            "no layer has weights of at most 8 bits (one scale per row or tensor) and a static rounding of "
            "its input; compress with a method that rounds inputs (hawq-v3, smoothquant), or export to onnx"
        )
    twin = captured(bare(small, layers), data.x[:2])
    plan = _Plan(twin, layers)
    for node in list(twin.graph.nodes):
        _visit(plan, node)
    for name, rounding in plan.edges.items():
        if rounding is not None:
            replace(twin, name, rounding.module())
    twin.recompile()
    open_ = [name for name, rounding in plan.edges.items() if rounding is None]
    for name, (lo, hi) in input_ranges(twin, data, open_, how, bits=BITS).items() if open_ else ():
        replace(twin, name, StaticRounding.of(lo, hi, BITS).module())
    return Edged(twin, layers, plan.grids, len(open_), len(plan.edges) - len(open_))


def int8_layers(small: Compressed) -> dict[str, Int8]:
    """The packed layers whose weight is a code of 8 bits without zero point, or can be written as one."""
    found = {}
    for name, form in small.packed.items():
        rounding = small.change.activations.get(name)
        if not (isinstance(rounding, StaticRounding) and rounding.bits <= BITS and isinstance(form, Affine)):
            continue
        centred = as_int8(form)
        if centred is not None:
            cpu = StaticRounding(rounding.scale.cpu(), rounding.zero.cpu(), rounding.bits)
            found[name] = Int8(centred, cpu)
    return found


def as_int8(form: Affine) -> Affine | None:
    """The same weight, bit for bit, with 8-bit codes around 128; None where that does not hold it."""
    if form.group not in (PER_ROW, PER_TENSOR) or form.dtype != "float32":
        return None
    zero = form.zeros().cpu().to(torch.int16).reshape(-1, *[1] * (len(form.shape) - 1))
    codes = form.integers().cpu().to(torch.int16) - zero + 128
    if int(codes.min()) < 0 or int(codes.max()) > 255:
        return None
    scale = form.scale.cpu().reshape(-1)
    like = torch.empty(form.shape)
    flat = in_groups(codes.to(torch.uint8), form.group)
    return Affine.of(flat, scale, torch.zeros_like(scale), like, Grid(BITS, True, form.group))


def bare(small: Compressed, layers: Mapping[str, Int8]) -> nn.Module:
    """The float twin without the rounding of these layers' inputs, their biases on the grid of integers."""
    plain = small.plain().float().cpu().eval()
    for name, each in layers.items():
        layer = plain.get_submodule(name).layer
        if layer.bias is not None:
            scale = each.form.scale.float().reshape(-1).expand(each.form.shape[0])
            layer.bias = nn.Parameter(rounded_bias(layer.bias, scale, each.rounding.scale))
        replace(plain, name, layer)
    return plain


def captured(plain: nn.Module, x: Tensor) -> fx.GraphModule:
    """The network as a graph of operators for any number of examples."""
    x = x.cpu() if len(x) > 1 else torch.cat([x, x]).cpu()
    shapes = ({0: torch.export.Dim.AUTO},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own internals
            program = torch.export.export(plain, (x,), dynamic_shapes=shapes, strict=False)
            found = program.run_decompositions({}).module(check_guards=False)
            return fx.GraphModule(found, found.graph).eval()  # without the exporter's refusal of eval()
    except Exception as error:  # the exporter raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DoesNotFit(
            f"{type(plain).__name__}: it cannot be captured as one graph ({reason}); "
            "use no control flow on values"
        ) from error


def kind(node: fx.Node) -> str:
    """The operator by its plain name, "" for what is none."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")


def layer_of(layers: Mapping[str, Int8], node: fx.Node) -> str:
    """The integer layer that this product is, "" for any other node."""
    if kind(node) not in PRODUCTS:
        return ""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    name = str(weight.target).removesuffix(".weight")
    return name if weight.op == "get_attr" and name in layers else ""


def _visit(plan: _Plan, node: fx.Node) -> None:
    """Note what is on a grid after this node, and round its value where an integer operator reads it."""
    what, source = kind(node), node.args[0] if node.args else None
    if layer := layer_of(plan.layers, node):
        _read(plan, node, plan.layers[layer].rounding)
        plan.raw.add(node)
    elif (
        (what in CLIPS and source in plan.raw)
        or (what in JOINS and _joins(plan, node))
        or (what in POOLS and source in plan.grids)
    ):
        plan.raw.add(node)
    elif _moves(node) and source in plan.grids:
        plan.grids[node] = plan.grids[source]
    if node in plan.raw:
        readers = list(node.users)
        alone = len(readers) == 1 and kind(readers[0]) in CLIPS
        if not alone and any(_integer(plan, reader) for reader in readers):
            _round(plan, node, _asked(plan, readers), readers)


def _read(plan: _Plan, node: fx.Node, rounding: StaticRounding) -> None:
    """Let the input of a product lie on its grid."""
    source: Any = node.args[0]
    if not _same(plan.edges.get(plan.grids.get(source, "")), rounding):
        named = {reader: layer_of(plan.layers, reader) for reader in source.users}
        readers = [r for r, name in named.items() if name and _same(plan.layers[name].rounding, rounding)]
        _round(plan, source, rounding, readers)


def _round(plan: _Plan, node: fx.Node, rounding: StaticRounding | None, readers: Sequence[fx.Node]) -> None:
    """Put a rounding between a value and these readers."""
    name = f"rounding_{len(plan.edges)}"
    plan.twin.add_submodule(name, nn.Identity())
    with plan.twin.graph.inserting_after(node):
        edge = plan.twin.graph.call_module(name, (node,))
    plan.edges[name], plan.grids[edge] = rounding, name
    for reader in readers:
        reader.replace_input_with(node, edge)


def _asked(plan: _Plan, readers: Sequence[fx.Node]) -> StaticRounding | None:
    """The grid of the first product among them or behind moves."""
    for reader in readers:
        if layer := layer_of(plan.layers, reader):
            return plan.layers[layer].rounding
        if _moves(reader) and (found := _asked(plan, list(reader.users))):
            return found
    return None


def _integer(plan: _Plan, reader: fx.Node) -> bool:
    """Whether it may compute on integers, or moves the value to what may."""
    if _moves(reader):
        return any(_integer(plan, each) for each in reader.users)
    return bool(layer_of(plan.layers, reader)) or kind(reader) in (*JOINS, *POOLS)


def _joins(plan: _Plan, node: fx.Node) -> bool:
    """Whether a sum, product or concatenation has rounded values alone."""
    parts: Any = node.args[0] if kind(node) == "cat" else node.args[:2]
    return node.kwargs.get("alpha", 1) == 1 and all(
        isinstance(part, fx.Node) and part in plan.grids for part in parts
    )


def _moves(node: fx.Node) -> bool:
    """Whether the values of its result are values of its input, or zero."""
    if kind(node) == "pad":
        mode, value = (*node.args[2:], *["constant", None][len(node.args) - 2 :])
        return mode == "constant" and not value
    return kind(node) in MOVES


def _same(one: StaticRounding | None, other: StaticRounding) -> bool:
    """Whether two grids are one."""
    return one is not None and (
        one.bits == other.bits and torch.equal(one.scale, other.scale) and torch.equal(one.zero, other.zero)
    )
