"""AffineQuant: the exact affine rewrite of each block under which rounding hurts least is learnt.

Paper: Ma et al., "AffineQuant: Affine Transformation Quantization for Large Language Models", ICLR 2024,
arXiv:2403.12544. With diagonal matrices it is Shao et al., "OmniQuant: Omnidirectionally Calibrated
Quantization for Large Language Models", ICLR 2024, arXiv:2308.13137 (`matrix=False`).

Block by block, with X_f its inputs in the float network and X_q those that the rounded blocks before it give,

    minimise  mean (Q(block; A, d, u, v)(X_q) - block(X_f))^2,
    norm -> linears    x' = (x - d) / s,   W' = W diag(s)     s folded into the norm: free at run time
                       x' = (x - d) A^-1,  W' = W A^T         `norm_matrix`: a product behind the norm
    value -> output    W_v' = A^-T W_v,    W_o' = W_o A^T     by head, with a shift d of the values; free
    query, key         W_q' = A^-T W_q,    W_k' = A W_k       by head; free

(`core.affine`). A and s start where s_j = max |x_j|^alpha / max |W_:j|^(1 - alpha), d at the middle of x_j's
range, query and key at the identity. In epoch e of E, A counts through the mask that is 1 on the diagonal, sf
("stability factor") where 0 < |i - j| < floor((n - 1) e / (E - 1)) + 1, and 0 elsewhere: diagonals first,
full matrices in the end, and a large diagonal keeps A invertible. The range of each (row, group) is learnt:

    lo = sigmoid(v) min W',   hi = sigmoid(u) max W',   u = v = 4 at first,

and, with `activation_bits`, the input of each layer is rounded per token. A network without decoder blocks
that are known by name is one block, with diagonal rewrites where `core.sites` finds them on its graph.

Differs from the paper: query, key and value themselves stay in floating point; query and key get matrices
also where weights alone are rounded; with rotary positions these commute with every rotation, without which
the rewrite is not exact; max |W| and not max W; only diagonals are kept away from 0, not all small entries of
A; no shift where a bias is missing. Layers outside of the blocks are rounded to nearest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from netweight.core.affine import Band, with_product
from netweight.core.attention import decoder_blocks
from netweight.core.calls import Call, first, recorded
from netweight.core.compressed import WEIGHTED, Change, Packed, Rewrite, RoundedInput, replace, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, extent, in_groups, scale_and_zero, to_codes
from netweight.core.progress import doing
from netweight.core.task import Data, Task
from netweight.nn.fake import DynamicRounding, round_between
from netweight.nn.layers import weights_to_pack
from netweight.nn.learnt import (
    AtSite,
    Channels,
    Made,
    Place,
    Where,
    channels,
    detached,
    keep_away_from_zero,
    places,
)
from netweight.nn.packed import Affine

START = 4.0  # u and v: sigmoid(4) = 0.982 of the range


@dataclass(frozen=True)
class AffineQuant:
    """Settings of `affinequant`.

    bits, group: of the asymmetric grid of weights. activation_bits: of layer inputs, per token; None leaves
    them. matrix: whole matrices by head, False for diagonals (OmniQuant). norm_matrix: whole matrices also
    behind norms, at the cost of a float product and its matrix. stability: sf. alpha: of the start. epochs,
    batch (examples per step), rate, clip_rate (of u and v): of AdamW. gradual: bands open epoch by epoch,
    False for the full mask at once. augmented: mean (Q(block)(X_q) - block(X_q))^2 added to the loss.
    """

    bits: int = 4
    group: int = 0
    activation_bits: int | None = None
    matrix: bool = True
    norm_matrix: bool = False
    stability: float = 0.1
    alpha: float = 0.5
    epochs: int = 10
    batch: int = 4
    rate: float = 5e-3
    clip_rate: float = 1e-2
    gradual: bool = True
    augmented: bool = False

    def __post_init__(self) -> None:
        Grid(self.bits, group=self.group)
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 16:
            raise ValueError(f"need 2 <= activation_bits <= 16, got activation_bits={self.activation_bits}")
        if not (0 <= self.stability <= 1 and 0 <= self.alpha <= 1):
            raise ValueError(f"need stability and alpha in [0, 1], got {self.stability} and {self.alpha}")
        if self.epochs < 1 or self.batch < 1 or not (self.rate > 0 and self.clip_rate > 0):
            raise ValueError(f"need positive epochs, batch, rate and clip_rate, got {self}")

    @property
    def grid(self) -> Grid:
        """The grid of every weight."""
        return Grid(self.bits, symmetric=False, group=self.group)

    def band(self, epoch: int) -> Band:
        """The mask of that epoch."""
        along = epoch / (self.epochs - 1) if self.gradual and self.epochs > 1 else 1.0
        return Band(along if self.matrix else 0.0, self.stability)


def affinequant(model: nn.Module, task: Task, layers: Sequence[str], settings: AffineQuant) -> Change:
    """Learn the rewrites of every block, round and pack.

    Raises `DoesNotFit` for a layer that is no Linear or Conv, for a Conv with `activation_bits` (its inputs
    are no tokens), where `group` does not divide a row, and where the loss of a block becomes NaN or Inf.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    for layer, weight in weights.items():
        in_groups(weight, settings.group, layer)
        if settings.activation_bits and not isinstance(model.get_submodule(layer), nn.Linear):
            raise DoesNotFit(f"{layer}: its inputs are no tokens; leave activation_bits out")
    walk = Walk.start(model, task.calibration.batched(settings.batch), list(weights))
    packed: dict[str, Packed] = {}
    rewrites: list[Rewrite] = []
    names = decoder_blocks(model)
    with doing("Learning rewrites", settings.epochs * len(names)) as advance:
        for name in names:
            block = walk.block(name)
            if not block.finite:
                left.update(dict.fromkeys(block.layers, "its block gives NaN or Inf on the calibration data"))
            elif block.layers:
                learnt = learn(block, walk.places(block, settings), settings, advance)
                rewrites += learnt.rewrites
                packed.update(walk.settle(learnt, weights, settings))
    for layer in weights.keys() - packed.keys() - left.keys():
        packed[layer] = Affine.nearest(weights[layer], settings.grid)
    bits = settings.activation_bits
    activations = {layer: DynamicRounding(bits) for layer in packed} if bits else {}
    return Change({layer: packed[layer] for layer in weights if layer in packed}, rewrites, activations, left)


@dataclass(frozen=True)
class Block:
    """One block: the layers to round in it, and its calls in the float network and in the rounded one."""

    name: str
    module: nn.Module
    layers: Sequence[str]
    float_calls: Sequence[Call]
    calls: Sequence[Call]

    @property
    def finite(self) -> bool:
        """Whether what it has to learn is finite."""
        return all(bool(y.isfinite().all()) for _, _, y in (*self.float_calls, *self.calls))

    def local(self, name: str) -> str:
        """A full name as it is inside of the block."""
        return name.removeprefix(f"{self.name}.") if self.name else name


@dataclass(frozen=True)
class Walk:
    """The float network, and beside it the one whose first blocks are rounded already."""

    net: nn.Module
    small: nn.Module
    data: Data
    layers: Sequence[str]
    seen: Mapping[str, Channels]

    @classmethod
    def start(cls, model: nn.Module, data: Data, layers: Sequence[str]) -> Walk:
        """Two copies of the model, in float32 where it has less: half precision is too coarse to learn in."""
        net = copy.deepcopy(model).eval().requires_grad_(False)
        if any(weight_of(net, layer).element_size() < 4 for layer in layers):
            net = net.float()
        return cls(net, copy.deepcopy(net), data, layers, channels(net, layers, data))

    def block(self, name: str) -> Block:
        """The block of that name, its calls recorded now."""
        inside = [layer for layer in self.layers if not name or layer.startswith(f"{name}.")]
        both = [recorded(net, name, self.data) if inside else [] for net in (self.net, self.small)]
        return Block(name, self.net.get_submodule(name), inside, *both)

    def places(self, block: Block, settings: AffineQuant) -> list[Place]:
        """Where the block is rewritten."""
        where = Where(self.net, block.name, block.layers, self.seen)
        whole = settings.matrix and settings.norm_matrix
        return places(where, self.data, alpha=settings.alpha, whole=whole)

    def settle(
        self, learnt: Learnt, weights: Mapping[str, Tensor], settings: AffineQuant
    ) -> dict[str, Packed]:
        """The packed weights of a block; `small` computes with them from now on."""
        packed: dict[str, Packed] = {}
        for rewrite in learnt.rewrites:
            rewrite.apply(self.small)
        for layer, (u, v) in learnt.clips.items():
            weight = weight_of(self.small, layer).to(weights[layer].dtype)
            packed[layer] = encode(weight, u, v, settings.grid)
            module = self.small.get_submodule(layer)
            module.weight = nn.Parameter(packed[layer].decode().to(module.weight), requires_grad=False)
            if settings.activation_bits:
                replace(self.small, layer, RoundedInput(DynamicRounding(settings.activation_bits), module))
        return packed


@dataclass(frozen=True)
class Learnt:
    """Of one block: its rewrites, u and v of each layer (`groups 1`), and the mean loss of each epoch."""

    rewrites: Sequence[Made]
    clips: Mapping[str, tuple[Tensor, Tensor]]
    losses: Sequence[float]


def learn(block: Block, at: Sequence[Place], settings: AffineQuant, advance: Callable[..., None]) -> Learnt:
    """The rewrites and ranges of one block."""
    ready = Ready.of(block, at, settings.activation_bits)
    clips = {layer: ranges(weight, settings.group) for layer, weight in ready.weights(block.layers).items()}
    learnable = [tensor.requires_grad_() for place in at for tensor in place.tensors]
    bounds = [tensor for pair in clips.values() for tensor in pair]
    groups = [{"params": learnable, "lr": settings.rate}, {"params": bounds, "lr": settings.clip_rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, fused=True)
    losses = []
    for epoch in range(settings.epochs):
        total = 0.0
        try:
            for index, (_, _, target) in enumerate(block.float_calls):
                values = ready.values(settings.band(epoch), clips, settings.grid)
                loss = loss_of(block, block.calls[index], target, (ready.module, values), settings.augmented)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                keep_away_from_zero(at)
                total += float(loss.detach())
        except (ValueError, torch.linalg.LinAlgError):  # scales that are not finite, a matrix without inverse
            total = math.nan
        losses.append(total / len(block.calls))
        if not math.isfinite(total) or not all(t.isfinite().all() for t in (*learnable, *bounds)):
            raise DoesNotFit(
                f"{block.name or 'the network'}: what affinequant learns became NaN or Inf in epoch "
                f"{epoch + 1}; use a smaller rate or stability"
            )
        advance()
    made = [rewrite for place in at for rewrite in place.rewrites(settings.band(settings.epochs - 1))]
    return Learnt([detached(rewrite) for rewrite in made], clips, losses)


def loss_of(
    block: Block, call: Call, target: Tensor, rounded: tuple[nn.Module, Mapping[str, Tensor]], augmented: bool
) -> Float[Tensor, ""]:
    """Mean squared error of one call of the rounded block (a module and its tensors)."""
    (args, extra, _), (module, values) = call, rounded
    output = first(functional_call(module, dict(values), args, dict(extra)))
    loss = (output - target).square().mean()
    if not augmented:
        return loss
    with torch.no_grad():
        own = first(block.module(*args, **extra))
    return loss + (output - own).square().mean()


@dataclass(frozen=True)
class Ready:
    """A copy of a block in which rewritten and rounded tensors take the place of its own."""

    module: nn.Module
    base: Mapping[str, Tensor]
    names: Mapping[str, str]
    places: Sequence[Place]

    @classmethod
    def of(cls, block: Block, at: Sequence[Place], activation_bits: int | None) -> Ready:
        """The copy, with products behind norms and rounded inputs where there will be some."""
        module = copy.deepcopy(block.module)
        base = {
            (f"{block.name}.{name}" if block.name else name): p.detach()
            for name, p in module.named_parameters()
        }
        names = {full: block.local(full) for full in base}

        def moved(layer: str, by: str) -> None:
            names.update(
                (full, f"{block.local(layer)}.{by}.{full.rpartition('.')[2]}")
                for full in base
                if full.rpartition(".")[0] == layer
            )

        for place in at:
            if isinstance(place, AtSite) and place.size.ndim == 2:
                norm = place.site.producer
                with_product(module, block.local(norm), place.size)
                moved(norm, "0")
                names[f"{norm}.1.weight"] = f"{block.local(norm)}.1.weight"
        for layer in block.layers if activation_bits else ():
            own = module.get_submodule(block.local(layer))
            replace(module, block.local(layer), nn.Sequential(Tokens(activation_bits), own))
            moved(layer, "1")
        return cls(module, base, names, at)

    def weights(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """The weights of those layers as they were."""
        return {layer: self.base[f"{layer}.weight"] for layer in layers}

    def values(self, band: Band, clips: Mapping[str, tuple[Tensor, Tensor]], grid: Grid) -> dict[str, Tensor]:
        """The rewritten tensors, with weights on their grids, under their names in the copy."""
        now: dict[str, Tensor] = dict(self.base)
        for place in self.places:
            for rewrite in place.rewrites(band):
                now.update(rewrite.changed(now))
        for layer, (u, v) in clips.items():
            now[f"{layer}.weight"] = clipped(now[f"{layer}.weight"], u, v, grid)
        return {self.names[full]: value for full, value in now.items()}


class Tokens(nn.Module):
    """`DynamicRounding` with gradients that reach each token's range."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        return round_between(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), self.bits)


def ranges(weight: Float[Tensor, "out ..."], group: int) -> tuple[Tensor, Tensor]:
    """u and v of a weight at the start."""
    groups = len(in_groups(weight, group))
    u, v = (weight.new_full((groups, 1), START).requires_grad_() for _ in range(2))
    return u, v


def ends(groups: Float[Tensor, "groups of"], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """lo and hi, `groups 1`; 0 is always between them."""
    lo, hi = extent(groups, symmetric=False)
    return v.sigmoid() * lo[:, None], u.sigmoid() * hi[:, None]


def clipped(weight: Float[Tensor, "out ..."], u: Tensor, v: Tensor, grid: Grid) -> Float[Tensor, "out ..."]:
    """The weight on the grid of its learnt range; gradients reach all three."""
    groups = in_groups(weight, grid.group)
    return round_between(groups, *ends(groups, u, v), grid.bits).reshape(weight.shape)


def encode(weight: Float[Tensor, "out ..."], u: Tensor, v: Tensor, grid: Grid) -> Affine:
    """The same as it is stored."""
    groups = in_groups(weight.float(), grid.group)
    lo, hi = ends(groups, u.detach(), v.detach())
    scale, zero = scale_and_zero(lo[:, 0], hi[:, 0], grid)
    return Affine.of(to_codes(groups, scale, zero, grid), scale, zero, weight, grid)
