"""A layer on power codes with integers alone: sums of table entries, then thresholds.

Weights w = s_w q_w^(1-1/a) phi_1/a(n_w) and inputs x on grids of the same exponent a (see `nn.power`)
multiply as their codes do, up to one table look-up:

    w x = q_w s_w q_x s_x sign(n_w n_x) (|n_w n_x| / (q_w q_x))^(1/a),
    T[p] = round(2^f (p / (q_w q_x))^(1/a)),    p = 0 .. q_w q_x,
    sum_j w_j x_j = c sum_j sign(n_j) T[|n_j|],      n_j = n_w n_x of place j,     c = q_w s_w q_x s_x 2^-f.

The power stands on each product; roots of sums would be wrong. The sum and the bias round(b / c) are int32,
with f the largest number of bits up to 28 for which no input makes these weights overflow. The codes of the
next layer are those of the rounding of c sum: it rises with the sum, so q thresholds per output channel say
the code, found by binary search. They are made by bisection on the float rounding itself and hence equal it
for every sum.

With T as a table of q_w rows, row m holding T[m n_x] for all n_x, the sum is one product of integers per m
with the weights' signs where |n_w| = m: q_w products at any layer that torch runs on integers (on the CPU).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int, Int32
from torch import Tensor, nn

from netweight.core.compressed import RoundedInput, replace
from netweight.core.errors import DoesNotFit
from netweight.nn.layers import PackedLayer, run
from netweight.nn.power import Power, PowerRounding

FRACTION = 28  # the most bits behind the point of a table entry
LAST = 2**31 - 1  # the largest int32


def table(exponent: float, q_w: int, q_x: int, fraction: int) -> Int32[Tensor, " products"]:
    """T[p] for p = 0 .. q_w q_x."""
    share = torch.arange(q_w * q_x + 1, dtype=torch.float64) / (q_w * q_x)
    return (share.pow(1 / exponent) * 2**fraction).round().to(torch.int32)


def fraction_of(largest: float, products: int) -> int:
    """f: the largest up to `FRACTION` for which a sum stays below 2^31 in size.

    largest: what the exact sum and the bias can reach, in units of q_w s_w q_x s_x. products: how many
    entries are summed, each up to 1/2 off. Raises `DoesNotFit` where no f is small enough.
    """
    for fraction in range(FRACTION, 0, -1):
        if largest * 2**fraction + products / 2 + 1 < LAST:
            return fraction
    raise DoesNotFit(
        f"sums of {products} products up to {largest:.3g} do not fit 32 bits; keep the layer float"
    )


def accumulated(
    like: nn.Module,
    codes: Int[Tensor, "*in_"],
    weight: Int32[Tensor, "out in *k"],
    entries: Int32[Tensor, " p"],
) -> Int32[Tensor, "*out"]:
    """sum_j sign(n_j) T[|n_j|] at every output of the layer; its bias is left out."""
    shell = copy.copy(like)
    shell._parameters = {**like._parameters, "bias": None}
    if max(getattr(like, "dilation", (1,))) > 1:  # torch has no dilated convolution of integers
        weight, shell.dilation = undilated(weight, like.dilation), (1,) * len(like.dilation)
    sign, size, where = weight.sign(), weight.abs(), codes.long()
    total = None
    for m in range(1, int(size.max()) + 1):
        looked_up = entries[m * where.abs()] * where.sign().to(torch.int32)
        part = run(shell, looked_up, torch.where(size == m, sign, 0))
        total = part if total is None else total + part
    return run(shell, codes.to(torch.int32), torch.zeros_like(weight)) if total is None else total


def undilated(
    weight: Int32[Tensor, "out in *kernel"], dilation: tuple[int, ...]
) -> Int32[Tensor, "out in *wide"]:
    """The same kernel with its gaps as zeros."""
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
    wide = weight.new_zeros(*weight.shape[:2], *sizes)
    wide[(..., *(slice(None, None, d) for d in dilation))] = weight
    return wide


def thresholds(code: Callable[[Tensor], Tensor], codes: range, count: int) -> Int32[Tensor, "count codes"]:
    """For each of `count` channels the smallest int32 sum whose code is at least k, for all k but the first.

    code: the code of float64 sums, `count k` -> `count k`, rising. Where no sum reaches k it is `LAST`.
    """
    wanted = torch.tensor(codes[1:]).expand(count, -1)
    low = torch.full(wanted.shape, -LAST - 1, dtype=torch.int64)
    high = torch.full_like(low, LAST)
    while bool((low < high).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = code(middle.double()) >= wanted
        high, low = torch.where(reached, middle, high), torch.where(reached, low, (middle + 1).minimum(high))
    return low.to(torch.int32)


def requantized(sums: Int32[Tensor, "n channels"], steps: Int32[Tensor, "channels k"], first: int) -> Tensor:
    """The codes of the sums, int16: `first` plus the number of thresholds at or below each."""
    found = torch.searchsorted(steps, sums.T.contiguous(), right=True)
    return (found.T + first).to(torch.int16)


class PowerInteger(nn.Module):
    """A layer with power codes for weight and input, computed in integers.

    Takes float inputs (then rounds them to codes first) or codes. Gives floats, or, where `then` says how the
    next layer rounds its input, the codes of that layer. A ReLU between the two keeps codes as they should
    be; so do max pooling and changes of shape, but no sum and no mean.
    """

    def __init__(
        self, layer: PackedLayer, rounding: PowerRounding, then: PowerRounding | None = None
    ) -> None:
        super().__init__()
        form = layer.form
        if not isinstance(form, Power) or form.group not in (0, -1) or isinstance(layer.like, nn.Embedding):
            raise DoesNotFit("integer sums need a layer with a power weight, one scale per row or tensor")
        if float(form.exponent) != float(rounding.exponent):
            raise DoesNotFit("weight and input have different exponents: their codes do not multiply")
        self.like, self.rounding, self.then = layer.like, rounding, then
        self.axis = -1 if isinstance(layer.like, nn.Linear) else 1
        rows, scale = form.shape[0], form.scale.double().reshape(-1)
        unit = (scale * form.q * rounding.scale.double() * rounding.q).expand(rows)
        bias = torch.zeros_like(unit) if layer.bias is None else layer.bias.detach().double()
        sizes = (form.integers().double().abs().flatten(1) / form.q).pow(1 / float(form.exponent))
        largest = sizes.sum(1).to(unit.device) + bias.abs() / unit
        self.fraction = fraction_of(float(largest.max()), sizes.shape[1])
        self.register_buffer("c", unit * 2.0**-self.fraction, persistent=False)
        self.register_buffer("bias", (bias / self.c).round().to(torch.int32), persistent=False)
        self.register_buffer("weight", form.integers().to(torch.int32), persistent=False)
        entries = table(float(form.exponent), form.q, rounding.q, self.fraction)
        self.register_buffer("entries", entries, persistent=False)
        if then is not None:
            first = -then.q if then.signed else 0
            steps = thresholds(lambda s: then.integers(s * self.c[:, None]), range(first, then.q + 1), rows)
            self.register_buffer("steps", steps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for floats or codes."""
        sums = self.sums(self.rounding.integers(x) if x.is_floating_point() else x).movedim(self.axis, -1)
        if self.then is None:
            y = (sums * self.c).to(self.rounding.scale.dtype)
        else:
            flat = sums.reshape(-1, sums.shape[-1])
            y = requantized(flat, self.steps, -self.then.q if self.then.signed else 0).reshape(sums.shape)
        return y.movedim(-1, self.axis)

    def sums(self, codes: Int[Tensor, "*in_"]) -> Int32[Tensor, "*out"]:
        """The int32 sums with the bias, in the layout of the layer's output."""
        total = accumulated(self.like, codes, self.weight, self.entries).movedim(self.axis, -1)
        return (total + self.bias).movedim(-1, self.axis)


def in_integers(model: nn.Module, joined: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of a network in which every layer with power codes on both sides runs on integers.

    joined: layers that hand codes to the next one, name to name, with only ReLU, max pooling and changes of
    shape between the two, and no other reader. What lies between other layers stays in floating point.
    """
    twin, joined = copy.deepcopy(model).eval(), joined or {}
    layers = {
        name: module
        for name, module in twin.named_modules()
        if isinstance(module, RoundedInput)
        and isinstance(module.how, PowerRounding)
        and isinstance(module.layer, PackedLayer)
    }
    for name in {*joined, *joined.values()} - layers.keys():
        raise DoesNotFit(f"{name}: not a layer with power codes for weight and input")
    for name, module in layers.items():
        then = layers[joined[name]].how if name in joined else None
        replace(twin, name, PowerInteger(module.layer, module.how, then))
    return twin
