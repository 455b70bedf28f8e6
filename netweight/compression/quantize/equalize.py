"""Cross-layer equalization: channels get the same range on both sides of a ReLU, so that one scale fits all.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv:1906.04721, sections 4.1 and 5.1.

A ReLU6 behind a layer becomes a ReLU, batch norms are folded. Then, for each layer and the layers that read
it through ReLU or pooling,

    r1_i = max |row i of W1|,    r2_i = max |column i of W2|,    s_i = sqrt(r1_i / r2_i),
    row i of W1 and b1_i divided by s_i, column i of W2 times s_i: both ranges become sqrt(r1_i r2_i),

around all pairs until no s moves; along a chain such as a depthwise convolution between two others all
ranges end at the root of their product. Where inputs are rounded too, high biases are absorbed first:

    c = max(0, beta - 3 gamma) / s,    b1 - c,    b2 + W2 c,

as relu(y - c) = relu(y) - c but where y < c, 0.1 % of a N(beta, gamma^2). Weights are rounded to nearest.

Differs from the paper: a bias is absorbed only where no reader pads with zeros, as the zeros stand for c
then; ranges of inputs are measured on calibration data, not beta +- 6 gamma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Rewrite, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.graph import FIRST_OF, capture
from netweight.core.grid import PER_TENSOR, Grid
from netweight.core.rewrite import FoldBatchNorm, Scale, Unclip, rewritten
from netweight.core.sites import Site, column_ranges, foldable, sites
from netweight.core.task import Data, Task
from netweight.nn.fake import StaticRounding
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine
from netweight.nn.ranges import check, input_ranges

STILL = 1e-4  # |ln s| below which a pair counts as equal


@dataclass(frozen=True)
class Equalize:
    """Settings of `equalize`.

    bits, symmetric, group: of the grid. rounds: most passes over all pairs. relu6: whether a ReLU6 between
    two layers becomes a ReLU (it ends a chain if not). activation_bits: 2 to 16 for the inputs of layers,
    None leaves them. range: of these, one of `nn.ranges.HOW`. absorb: high biases go on, if inputs are
    rounded.
    """

    bits: int = 8
    symmetric: bool = True
    group: int = PER_TENSOR
    rounds: int = 100
    relu6: bool = True
    activation_bits: int | None = None
    range: str = "min-max"
    absorb: bool = True

    def __post_init__(self) -> None:
        check(self.range)
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 16:
            raise ValueError(f"need 2 <= activation_bits <= 16, got activation_bits={self.activation_bits}")
        if self.rounds < 1:
            raise ValueError(f"need rounds >= 1, got rounds={self.rounds}")
        Grid(self.bits, self.symmetric, self.group)


def equalize(model: nn.Module, task: Task, layers: Sequence[str], settings: Equalize) -> Change:
    """Fold, equalize the pairs of which both sides are in `layers`, round.

    Of the data only the shape counts, unless inputs are rounded. Raises `DoesNotFit` for a model that cannot
    be captured as one graph.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    clips = unclipped(model, task.calibration, list(weights)) if settings.relu6 else {}
    free = rewritten(model, [*clips.values()]) if clips else model
    exact = equalized(free, task, list(weights), settings)
    scaled = {rewrite.producer for rewrite in exact if isinstance(rewrite, Scale)}
    rewrites = [*(clip for layer, clip in clips.items() if layer in scaled), *exact]
    net, grid = rewritten(model, rewrites), Grid(settings.bits, settings.symmetric, settings.group)
    packed = {}
    for layer in weights:
        weight = weight_of(net, layer)
        packed[layer] = Affine.nearest(weight, grid, layer)
    bits = settings.activation_bits
    if bits is None:
        return Change(packed, rewrites, left=left)
    biases = absorbed(free, net, exact) if settings.absorb else {}
    for layer, bias in biases.items():
        net.get_submodule(layer).bias = nn.Parameter(bias)
    ranges = input_ranges(net, task.calibration, list(weights), settings.range, bits=bits)
    activations = {layer: StaticRounding.of(*ends, bits) for layer, ends in ranges.items()}
    return Change(packed, rewrites, activations, left, biases)


def unclipped(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Unclip]:
    """Layer -> the rewrite of the ReLU6 that reads it, or the batch norm behind it."""
    if not any(isinstance(module, nn.ReLU6) for module in model.modules()):
        return {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    graph, found = capture(model, data.x[:2].to(device)), {}
    by_name = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if not node.layer or not isinstance(model.get_submodule(node.layer), nn.ReLU6):
            continue
        source = by_name.get(node.inputs[0])
        if source is not None and source.op in FIRST_OF:
            source = by_name.get(source.inputs[0])
        if source is not None and source.layer in layers:
            found[source.layer] = Unclip(node.layer)
    return found


def equalized(model: nn.Module, task: Task, layers: Sequence[str], settings: Equalize) -> list[Rewrite]:
    """The exact rewrites alone: the folds of all norms behind `layers`, then one scale per pair."""
    data = task.calibration
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    folds = [FoldBatchNorm(*pair) for pair in foldable(model, data) if pair[0] in layers] if norms else []
    net = rewritten(model, folds)
    pairs = [
        site
        for site in sites(net, data)
        if not site.norm(net) and {site.producer, *site.consumers} <= set(layers)
    ]
    return [*folds, *balanced(net, pairs, settings.rounds)]


def balanced(net: nn.Module, pairs: Sequence[Site], rounds: int) -> list[Scale]:
    """One scale per pair, after which both sides of each have equal ranges; `net` is changed in place."""
    total = [torch.ones(len(weight_of(net, pair.producer)), dtype=torch.float64) for pair in pairs]
    for _ in range(rounds):
        moved = 0.0
        for pair, product in zip(pairs, total):
            scale = balance(net, pair)
            Scale(pair.producer, pair.consumers, scale).apply(net)
            product *= scale
            moved = max(moved, float(scale.log().abs().max()))
        if moved < STILL:
            break
    return [Scale(pair.producer, pair.consumers, s.float()) for pair, s in zip(pairs, total)]


def balance(net: nn.Module, site: Site) -> Float[Tensor, " channels"]:
    """s of one pair; 1 for a channel that is zero on one side."""
    rows = weight_of(net, site.producer).flatten(1).abs().amax(1).double()
    columns = torch.stack([column_ranges(net, reader) for reader in site.consumers]).amax(0).double()
    if len(rows) != len(columns):
        raise DoesNotFit(f"{site.producer}: {len(rows)} outputs, but {len(columns)} are read")
    alive = (rows > 0) & (columns > 0)
    return torch.where(alive, (rows / columns).sqrt(), 1.0)


def absorbed(model: nn.Module, net: nn.Module, rewrites: Sequence[Rewrite]) -> dict[str, Tensor]:
    """What the biases become when high ones go on to the next layer.

    model: with the norms, before `rewrites`. net: after them.
    """
    norms = {r.layer: model.get_submodule(r.norm) for r in rewrites if isinstance(r, FoldBatchNorm)}
    biases: dict[str, Tensor] = {}
    for rewrite in rewrites:
        if not isinstance(rewrite, Scale) or rewrite.producer not in norms:
            continue
        readers = {name: net.get_submodule(name) for name in rewrite.consumers}
        norm = norms[rewrite.producer]
        if norm.weight is None or any(map(pads, readers.values())):
            continue
        c = (norm.bias - 3 * norm.weight.abs()).detach().double().clamp(min=0) / rewrite.scale.to(norm.bias)
        for name, layer in {rewrite.producer: net.get_submodule(rewrite.producer), **readers}.items():
            if name not in biases:
                zeros = layer.weight.new_zeros(len(layer.weight))
                biases[name] = (zeros if layer.bias is None else layer.bias.detach()).double()
            biases[name] = biases[name] + (-c if name == rewrite.producer else through(layer, c))
    return {name: bias.to(weight_of(net, name).dtype) for name, bias in biases.items()}


def pads(layer: nn.Module) -> bool:
    """Whether zeros stand at the edge of what the layer reads."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    return any(layer._reversed_padding_repeated_twice)


def through(layer: nn.Module, constant: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    """W c, for an input that is c at every position; any groups."""
    weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
    sums = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).sum(3)
    return (sums * constant.reshape(groups, 1, -1)).sum(2).reshape(-1)
