"""What ONNX Runtime computes for a network with rounding at every edge, code by code.

A value is x = S (q - z), a row of a weight S_w q_w, all S in float32. With f(.) for rounding to float32,

    product   acc = sum (q_x - z_x) q_w + round(b / (S_x S_w))        exact, 32-bit integers
              q_y = clip(round(f(f(acc) m)) + z_y),                   m = f(f(S_x S_w) / S_y)
    sum       q_y = clip(round(f(r_a q_a + f(r_b q_b + c)))),         r = f(S / S_y),
                                                                      c = f(z_y - f(r_a z_a + f(r_b z_b)))
    mean      as a product, acc = sum (q_x - z_x),                    m = f(S_x / f(S_y n)), n places

and round half to even: QLinearConv, QGemm, QLinearAdd and QLinearGlobalAveragePool on x86 (mlas:
quantize.cpp, qladd_avx2.cpp; on ARM the r of a sum have 21 bits). Rounding float32 values instead gives
another code where a value lies within some 1e-5 of the middle between two: once in an image or so of a
ResNet-20, and a code that differs changes others behind it. All other operators are computed in float32 as
they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from netweight.deployment.onnx_edges import BITS, CLIPS, Edged, Int8, kind, layer_of
from netweight.nn.fake import Static


class Exact(fx.Interpreter):
    """The simulation `Edged.twin`, its codes behind products and sums as ONNX Runtime rounds them."""

    def __init__(self, made: Edged) -> None:
        super().__init__(made.twin, garbage_collect_values=False)
        self.made = made

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        edge = self.rounding(str(n.target)) if n.op == "call_module" else None
        if edge is None or edge.bits != BITS:
            return super().run_node(n)
        source, contained = self.unclipped(n.args[0], edge)
        if not contained:  # computed in float32 by ONNX Runtime as well
            return super().run_node(n)
        layer = layer_of(self.made.layers, source)
        if layer and (kind(source) != "linear" or self.env[source.args[0]].ndim == 2):
            return self.product(source, self.made.layers[layer], edge)
        if kind(source) == "add" and all(part in self.made.grids for part in source.args):
            return self.sum(source, edge)
        if (
            source.args
            and source.args[0] in self.made.grids
            and over_places(source, self.env[source.args[0]])
        ):
            return self.mean(source, edge)
        return super().run_node(n)

    def unclipped(self, node: Any, edge: Static) -> tuple[fx.Node, bool]:
        """The node in front of clips, and whether they clip no more than the grid of the edge does."""
        ends = torch.stack([(0 - edge.zero) * edge.scale, (2**BITS - 1 - edge.zero) * edge.scale])
        clipped, contained = ends, True
        while kind(node) in CLIPS:
            clipped = node.target(clipped, *node.args[1:], **node.kwargs)
            contained = torch.equal(clipped, ends)
            node = node.args[0]
        return node, contained

    def rounding(self, name: str) -> Static | None:
        """The rounding module of that name."""
        module = self.made.twin.get_submodule(name)
        return module if isinstance(module, Static) else None

    def product(self, node: fx.Node, layer: Int8, edge: Static) -> Tensor:
        """The value behind a convolution or a linear layer."""
        x, weight, bias, *rest = (*(self.env.get(a, a) for a in node.args), None)[: max(3, len(node.args))]
        rows = (1, -1, *[1] * (weight.ndim - 2))
        unit = layer.bias_scale()
        wide = layer.form.scale.double().reshape(-1, *[1] * (weight.ndim - 1))
        codes = (x.double() / layer.rounding.scale.double()).round()
        whole = (weight.double() / wide).round()
        acc = node.target(codes, whole, None, *rest)
        if bias is not None:
            steps = layer.form.scale.double().reshape(-1) * layer.rounding.scale.double()
            acc = acc + (bias.double() / steps).round().reshape(rows)
        multiplier = (unit / edge.scale).reshape(rows)
        return self.value((acc.float() * multiplier).round() + edge.zero, edge)

    def sum(self, node: fx.Node, edge: Static) -> Tensor:
        """The value behind a sum."""
        (a, r_a, z_a), (b, r_b, z_b) = (self.part(each, edge) for each in node.args[:2])
        fixed = (edge.zero - (r_a * z_a + (r_b * z_b).float()).float()).float()
        first = (r_b * b + fixed).float()
        return self.value((r_a * a + first).float().round(), edge)

    def mean(self, node: fx.Node, edge: Static) -> Tensor:
        """The value behind a mean over all places."""
        source = self.env[node.args[0]]
        places = list(range(2, source.ndim))
        codes, grid = self.codes(node.args[0])
        acc = (codes - grid.zero).sum(places, keepdim=True)
        multiplier = grid.scale / (edge.scale * float(source[0, 0].numel()))
        return self.value((acc.float() * multiplier).round() + edge.zero, edge).reshape(self.env[node].shape)

    def part(self, node: Any, edge: Static) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, ratio of scales and zero point of a summand, in float64, where a product of two is exact."""
        codes, grid = self.codes(node)
        return codes, (grid.scale / edge.scale).double(), grid.zero.double()

    def codes(self, node: Any) -> tuple[Tensor, Static]:
        """The codes of a value in float64, and its grid."""
        grid = self.rounding(self.made.grids[node])
        assert grid is not None
        return (self.env[node].double() / grid.scale.double()).round() + grid.zero, grid

    def value(self, codes: Tensor, edge: Static) -> Tensor:
        """S_y (q_y - z_y)."""
        return (codes.clamp(0, 2**BITS - 1) - edge.zero) * edge.scale


def over_places(node: fx.Node, x: Tensor) -> bool:
    """Whether it is a mean over all axes of x but examples and channels."""
    if x.ndim < 3:
        return False
    if kind(node).startswith("adaptive_avg_pool"):
        return all(size == 1 for size in node.args[1])
    return kind(node) == "mean" and {axis % x.ndim for axis in node.args[1]} == set(range(2, x.ndim))
