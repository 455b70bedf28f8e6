"""GPTQ: weights are rounded one input at a time, and each rounding error is passed on to the inputs not yet
rounded.

Paper: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv:2210.17323.

For a weight W (a row per output) and H = E[x x^T] of its inputs, the error of W + dW is tr(dW H dW^T). With U
the upper Cholesky factor of the inverse, H^-1 = U^T U, and Q the rounding to the grid, for each input j in
turn

    e = (W_:j - Q(W_:j)) / U_jj,        W_:k <- W_:k - e U_jk   for all k > j,

which is the best correction of the later columns for the error of this one. The same numbers come without an
inverse (Chee et al., "QuIP", NeurIPS 2023, arXiv:2307.13304, theorem 6): with H = R D R^T, R unit upper
triangular, and E the whole error of a column against the weight that was given,

    E_:j = W0_:j - Q(W_:j),             W_:k <- W_:k + E_:j R_jk   for all k > j.

Columns are taken by falling H_jj (`act_order`), with the scales of the original weight; without `act_order`
the scale of a group is set from the corrected weights as its first column is reached. The columns after a
block are corrected once per block. Layers that read one tensor (query, key and value) are one problem.

H is damped by `damping` times its mean diagonal, ten times more for as long as it is not positive definite. A
convolution is the product with its patches, one H per group of channels. With a diagonal H, and so for a
layer whose inputs are all zero, nothing is passed on and the result is that of `compression/quantize/rtn.py`.

`sequential` takes H from the inputs in the network as it is rounded so far, as the paper does, in the order
in which the network calls its layers (`core.walk`: any network, one forward pass); otherwise H is that of the
float network. A single layer has no layer before it that is rounded: then both are one, and so it is for a
plan, which chooses and rounds layer by layer.

Differs from the paper: the order is by layers (those of one input together), not by decoder blocks; an input
that is never active keeps its rounded weight (the authors' code sets it to zero); H is never inverted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from netweight.core.compressed import Change, Packed
from netweight.core.grid import Grid, extent, in_groups, scale_and_zero, storable
from netweight.core.moments import are_known, moments
from netweight.core.task import Task
from netweight.core.walk import walk
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine

RUN = 32  # columns whose corrections are gathered before the rest of a block gets them
ROWS = 256  # of a large matrix that are copied at a time
RECENT = 4  # decoded weights that are kept while the parts of the data pass their layers


@dataclass(frozen=True)
class GPTQ:
    """Settings of `gptq`.

    bits, symmetric, group: as in `RTN`. damping: added to the diagonal of H, as a share of its mean.
    act_order: inputs with the largest H_jj first. block: inputs rounded before the others are corrected.
    sequential: H of the network as it is rounded so far, where several layers are asked for.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = 0
    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    sequential: bool = False

    def __post_init__(self) -> None:
        Grid(self.bits, self.symmetric, self.group)
        if not 0 <= self.damping < torch.inf:
            raise ValueError(f"need damping >= 0, got damping={self.damping}")
        if self.block < 1:
            raise ValueError(f"need block >= 1, got block={self.block}")


def gptq(model: nn.Module, task: Task, layers: Sequence[str], settings: GPTQ) -> Change:
    """Round Linear and Conv weights with the calibration inputs in view.

    Raises `DoesNotFit` for a layer without a matrix of inputs (an embedding, a transposed convolution), one
    that is never called, and where `group` does not divide a row.
    """
    weights, left = weights_to_pack(model, layers)
    for layer, weight in weights.items():
        in_groups(weight, settings.group, layer)
    packed: dict[str, Packed] = {}

    def see(some: tuple[str, ...], gram: Float[Tensor, "n d d"]) -> None:
        if gram.isfinite().all():
            packed.update(encoded({layer: weights[layer] for layer in some}, gram, settings))
        else:
            left.update(dict.fromkeys(some, "its inputs on the calibration data hold NaN or Inf"))

    @lru_cache(maxsize=RECENT)
    def rounded(layer: str) -> Tensor | None:
        return packed[layer].decode() if layer in packed else None

    asked, data = list(weights), task.calibration
    if len(asked) == 1 or (not settings.sequential and are_known(model, data, asked)):
        for layer, seen in moments(model, data, asked).items():  # kept with the data, for other settings
            see((layer,), seen.gram)
    elif asked:
        walk(model, data, asked, see, rounded if settings.sequential else None)
    return Change({layer: packed[layer] for layer in asked if layer in packed}, left=left)


def encode(
    weight: Float[Tensor, "*shape"], gram: Float[Tensor, "n d d"], settings: GPTQ, layer: str = "weight"
) -> Affine:
    """The rounded weight as it is stored. gram: H of each of the n groups of a convolution, else one."""
    return encoded({layer: weight}, gram, settings)[layer]


def encoded(
    weights: Mapping[str, Float[Tensor, "out ..."]], gram: Float[Tensor, "n d d"], settings: GPTQ
) -> dict[str, Affine]:
    """The rounded weights of layers with the same inputs: rows do not see each other, so they are rounded as
    one weight."""
    grid, n, d = Grid(settings.bits, settings.symmetric, settings.group), len(gram), gram.shape[-1]
    grids = {
        layer: scale_and_zero(*extent(in_groups(weight, grid.group, layer), grid.symmetric), grid)
        for layer, weight in weights.items()
    }
    rows = [weight.numel() // (n * d) for weight in weights.values()]
    order = order_of(gram, settings.act_order)

    def by_row(values: Sequence[Tensor]) -> Float[Tensor, "n d rows"]:
        lie = [as_rows(t.float(), n, many, grid.group) for t, many in zip(values, rows)]
        return per_column(torch.cat(lie, -1), order, grid.group)

    scale, zero = (by_row(values) for values in zip(*grids.values()))
    W = torch.cat([weight.reshape(n, -1, d).mT.float() for weight in weights.values()], -1)
    W = W.gather(1, order[..., None].expand_as(W))
    scale, zero = pass_on(W, factor(gram, order, settings.damping), scale, zero, grid, settings)
    W = W.gather(1, order.argsort(dim=-1)[..., None].expand_as(W))

    found, refreshed = {}, grid.group > 0 and not settings.act_order
    parts = (t.split(rows, -1) for t in (W, scale, zero))
    for (layer, weight), codes, s, z in zip(weights.items(), *parts):
        if refreshed:
            s, z = (t[:, :: grid.group].mT.reshape(-1) for t in (s, z))
        else:
            s, z = grids[layer]
        groups = in_groups(codes.mT.reshape(weight.shape), grid.group)
        found[layer] = Affine.of(groups.to(torch.uint8), storable(s.float()), z.to(torch.uint8), weight, grid)
    return found


def order_of(H: Float[Tensor, "n d d"], act_order: bool) -> Int64[Tensor, "n d"]:
    """The columns in the order in which they are rounded."""
    importance = H.diagonal(dim1=-2, dim2=-1) if act_order else H.new_zeros(H.shape[:2])
    return importance.argsort(dim=-1, descending=True, stable=True)


def as_rows(t: Shaped[Tensor, " groups"], n: int, rows: int, group: int) -> Shaped[Tensor, "n of rows"]:
    """One value per group of a weight (see `core.grid`), a row for all groups of inputs at one place."""
    return t.reshape(n, rows, -1).mT if group >= 0 else t.expand(n, 1, rows)


def per_column(
    t: Float[Tensor, "n of rows"], order: Int64[Tensor, "n d"], group: int
) -> Float[Tensor, "n d rows"]:
    """The value of each column, in their order; where all columns share one it lies in memory once."""
    n, d = order.shape
    if t.shape[1] == 1 and group <= 0:
        return t.expand(n, d, t.shape[-1])
    return t.gather(1, (order // group)[..., None].expand(n, d, t.shape[-1]))


def factor(H: Float[Tensor, "n d d"], order: Int64[Tensor, "n d"], damping: float) -> Float[Tensor, "n d d"]:
    """R, float32: unit upper triangular, R D R^T = the damped H with rows and columns in that order, D > 0.

    Factored from the last row and column on.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).double()
    mean = torch.where(mean > 0, mean, 1.0)
    back, extra = order.flip(-1), damping * mean
    damped = torch.empty_like(H, dtype=torch.float64).mT  # as LAPACK has it: factored where it lies
    failed = torch.empty(len(H), dtype=torch.int32, device=H.device)
    while True:
        for one, given, i in zip(damped.mT, H, back):
            for to, rows in zip(one.split(ROWS), i.split(ROWS)):
                to.copy_(given[rows][:, i])
        damped.diagonal(dim1=-2, dim2=-1).add_(extra)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))
        if not failed.any():
            break
        extra = torch.where(failed[:, None] > 0, torch.maximum(10 * extra, 1e-8 * mean), extra)
    R = torch.empty_like(H, dtype=torch.float32)
    last = damped.diagonal(dim1=-2, dim2=-1)[:, None].clone()
    for to, rows in zip(R.split(ROWS, 1), back.new_tensor(range(H.shape[1])).flip(0).split(ROWS)):
        to.copy_((damped[:, rows] / last).flip(-1))
    return R


def pass_on(
    W: Float[Tensor, "n d rows"],
    R: Float[Tensor, "n d d"],
    scale: Float[Tensor, "n d rows"],
    zero: Float[Tensor, "n d rows"],
    grid: Grid,
    settings: GPTQ,
) -> tuple[Float[Tensor, "n d rows"], Float[Tensor, "n d rows"]]:
    """W becomes its codes, in place; gives the scales and zeros, which without `act_order` are set anew.

    A column lies as a row here: one piece of memory. Inside a block, columns are corrected in runs of `RUN`
    first: single columns are bound by memory.
    """
    d, E = W.shape[1], W.clone()
    refresh = grid.group if grid.group > 0 and not settings.act_order else 0
    block, run = settings.block + -settings.block % max(refresh, 1), RUN + -RUN % max(refresh, 1)
    low, high = (bound.expand_as(W) for bound in ends(zero, grid))
    for start in range(0, d, block):  # no group reaches past its block, nor past its run
        stop = min(start + block, d)
        for first in range(start, stop, run):
            last = min(first + run, stop)
            for j in range(first, last):
                if refresh and j % refresh == 0:
                    group = slice(j, j + refresh)
                    moved = corrected(W[:, group], E[:, group], R[:, group, group])
                    scale[:, group], zero[:, group] = scales_of(moved, grid)
                    low[:, group], high[:, group] = ends(zero[:, group], grid)
                w, s = W[:, j], scale[:, j]
                torch.clamp(w.div_(s).round_(), low[:, j], high[:, j], out=w)
                E[:, j].addcmul_(w, s, value=-1)
                W[:, j + 1 : last].baddbmm_(R[:, j, j + 1 : last, None], E[:, j, None])
            W[:, last:stop].baddbmm_(R[:, first:last, last:stop].mT, E[:, first:last])
        W[:, stop:].baddbmm_(R[:, start:stop, stop:].mT, E[:, start:stop])
    W += zero
    return scale, zero


def corrected(
    W: Float[Tensor, "n of rows"], given: Float[Tensor, "n of rows"], R: Float[Tensor, "n of of"]
) -> Float[Tensor, "n of rows"]:
    """The columns of a group that is reached, at their best for the columns before it: W counts the errors of
    those alone, and on top each column makes up for what the one before it moved."""
    return given + torch.linalg.solve_triangular(R.mT, W - given, upper=False, unitriangular=True)


def ends(zero: Float[Tensor, "n of rows"], grid: Grid) -> tuple[Tensor, Tensor]:
    """The least and the largest code - zero."""
    zero = zero[:, :1] if zero.stride(1) == 0 else zero
    low, high = grid.levels
    return low - zero, high - zero


def scales_of(
    columns: Float[Tensor, "n of rows"], grid: Grid
) -> tuple[Float[Tensor, "n 1 rows"], Float[Tensor, "n 1 rows"]]:
    """Scales and zeros of one group of columns from the weights as they stand."""
    groups = columns.mT.reshape(-1, columns.shape[1])
    scale, zero = scale_and_zero(*extent(groups, grid.symmetric), grid)
    shape = (len(columns), 1, -1)
    return scale.float().reshape(shape), zero.float().reshape(shape)
