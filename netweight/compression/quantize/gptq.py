"""GPTQ: weights are rounded one input at a time, and each rounding error is passed on to the inputs not yet
rounded.

Paper: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv:2210.17323.

For a weight W (a row per output) and H = E[x x^T] of its inputs, the error of W + dW is tr(dW H dW^T). With U
the upper Cholesky factor of the inverse, H^-1 = U^T U, and Q the rounding to the grid, for each input j in
turn

    e = (W_:j - Q(W_:j)) / U_jj,        W_:k <- W_:k - e U_jk   for all k > j,

which is the best correction of the later columns for the error of this one. Columns are taken by falling H_jj
(`act_order`), with the scales of the original weight; without `act_order` the scale of a group is set from
the corrected weights as its first column is reached. The columns after a block are corrected once per block.

H is damped by `damping` times its mean diagonal, ten times more for as long as it is not positive definite. A
convolution is the product with its patches, one H per group of channels. With a diagonal H, and so for a
layer whose inputs are all zero, nothing is passed on and the result is that of `compression/quantize/rtn.py`.

Differs from the paper: inputs are those of the float network, not of the layers rounded before; an input that
is never active keeps its rounded weight (the authors' code sets it to zero); H is factored once and never
inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from netweight.core.compressed import Change, Packed
from netweight.core.grid import Grid, extent, in_groups, scale_and_zero, storable
from netweight.core.moments import moments
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine

RUN = 32  # columns whose corrections are gathered before the rest of a block gets them


@dataclass(frozen=True)
class GPTQ:
    """Settings of `gptq`.

    bits, symmetric, group: as in `RTN`. damping: added to the diagonal of H, as a share of its mean.
    act_order: inputs with the largest H_jj first. block: inputs rounded before the others are corrected.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = 0
    damping: float = 0.01
    act_order: bool = True
    block: int = 128

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
    seen = moments(model, task.calibration, list(weights))
    packed: dict[str, Packed] = {}
    for layer, weight in weights.items():
        if seen[layer].gram.isfinite().all():
            packed[layer] = encode(weight, seen[layer].gram, settings, layer)
        else:
            left[layer] = "its inputs on the calibration data hold NaN or Inf"
    return Change(packed, left=left)


def encode(
    weight: Float[Tensor, "*shape"], gram: Float[Tensor, "n d d"], settings: GPTQ, layer: str = "weight"
) -> Affine:
    """The rounded weight as it is stored. gram: H of each of the n groups of a convolution, else one."""
    grid = Grid(settings.bits, settings.symmetric, settings.group)
    groups = in_groups(weight, grid.group, layer)
    scale, zero = scale_and_zero(*extent(groups, grid.symmetric), grid)

    W = weight.reshape(len(gram), -1, gram.shape[-1]).double()
    s, z = (values[:, None].expand_as(groups).reshape(W.shape) for values in (scale.float(), zero))
    order = order_of(gram, settings.act_order)
    H = by_column(by_column(gram.double(), order).mT, order)
    s, z = by_column(s, order).contiguous(), by_column(z, order).contiguous()
    codes = pass_on(by_column(W, order), inverse_factor(H, settings.damping), s, z, grid, settings)

    back = order.argsort(dim=-1)
    codes, s, z = (in_groups(by_column(t, back).reshape(weight.shape), grid.group) for t in (codes, s, z))
    return Affine.of(codes, storable(s[:, 0]), z[:, 0], weight, grid)


def order_of(H: Float[Tensor, "n d d"], act_order: bool) -> Int64[Tensor, "n d"]:
    """The columns in the order in which they are rounded."""
    importance = H.diagonal(dim1=-2, dim2=-1) if act_order else H.new_zeros(H.shape[:2])
    return importance.argsort(dim=-1, descending=True, stable=True)


def by_column(t: Tensor, order: Int64[Tensor, "n d"]) -> Tensor:
    """The columns of every matrix in that order."""
    return t.gather(2, order[:, None].expand_as(t))


def inverse_factor(H: Float[Tensor, "n d d"], damping: float) -> Float[Tensor, "n d d"]:
    """U, upper triangular, with H^-1 = U^T U for the damped H.

    Factored from the last row and column on, H = R R^T with R upper triangular; then U = R^-1.
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    extra = damping * mean
    while True:
        R, failed = torch.linalg.cholesky_ex((H + torch.diag_embed(extra.expand_as(diagonal))).flip(-1, -2))
        if not failed.any():
            break
        extra = torch.where(failed[:, None] > 0, torch.maximum(10 * extra, 1e-8 * mean), extra)
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(R.flip(-1, -2), identity.expand_as(H), upper=True)


def pass_on(
    W: Float[Tensor, "n rows d"],
    U: Float[Tensor, "n d d"],
    s: Float[Tensor, "n rows d"],
    z: UInt8[Tensor, "n rows d"],
    grid: Grid,
    settings: GPTQ,
) -> UInt8[Tensor, "n rows d"]:
    """The codes of all columns, in float32. Without `act_order` the scales s and zeros z of groups are set
    anew, in place.

    Inside a block, columns are corrected in runs of `RUN` first: single columns are bound by memory. They lie
    as rows here, so that each is one piece of memory.
    """
    d = W.shape[-1]
    low, high = map(float, grid.levels)
    refresh = grid.group if grid.group > 0 and not settings.act_order else 0
    block, run = settings.block + -settings.block % max(refresh, 1), RUN + -RUN % max(refresh, 1)
    W, U, codes = W.mT.float().contiguous(), U.float(), torch.empty_like(z.mT.contiguous())
    scale, zero = s.mT.float().contiguous(), z.mT.float().contiguous()
    errors = torch.empty_like(W)
    for start in range(0, d, block):  # no group reaches past its block, nor past its run
        stop = min(start + block, d)
        for first in range(start, stop, run):
            last = min(first + run, stop)
            for j in range(first, last):
                if refresh and j % refresh == 0:
                    group = slice(j, j + refresh)
                    scale[:, group], zero[:, group] = scales_of(W[:, group], grid)
                w = W[:, j]
                code = (w / scale[:, j]).round_().add_(zero[:, j]).clamp_(low, high)
                errors[:, j] = (w - (code - zero[:, j]) * scale[:, j]) / U[:, j, j, None]
                codes[:, j] = code.to(torch.uint8)
                W[:, j + 1 : last].baddbmm_(U[:, j, j + 1 : last, None], errors[:, None, j], alpha=-1)
            W[:, last:stop] -= U[:, first:last, last:stop].mT @ errors[:, first:last]
        W[:, stop:] -= U[:, start:stop, stop:].mT @ errors[:, start:stop]
    s.copy_(scale.mT)
    z.copy_(zero.mT)
    return codes.mT.contiguous()


def scales_of(
    columns: Float[Tensor, "n of rows"], grid: Grid
) -> tuple[Float[Tensor, "n 1 rows"], Float[Tensor, "n 1 rows"]]:
    """Scales and zeros of one group of columns from the weights as they stand."""
    groups = columns.mT.reshape(-1, columns.shape[1])
    scale, zero = scale_and_zero(*extent(groups, grid.symmetric), grid)
    shape = (len(columns), 1, -1)
    return scale.float().reshape(shape), zero.float().reshape(shape)
