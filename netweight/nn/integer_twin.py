"""The simulation of an integer-only network in float64: equal to it bit for bit, and open to proofs.

    twin(network)(x)         whole numbers kept in float64, then times the scale of the output
    simulation(network)(x)   real values: q S at every place, as quantization is simulated in training
    simulation(network, join_as_real=True)(x)   residuals added as real values, then rounded: not what runs

All three give network(x) * network.scale, but the last. Whole numbers below 2^53 are exact in float64, their
products with dyadic numbers too (`nn.dyadic`). In real values each rescaling first recovers the whole number,
round(v / S): sums of n products are off by at most n 2^-53 of their size, below 2^31, so by far less than the
half that would matter (Yao et al., HAWQ-V3, 2021, arXiv:2011.10680, simulate so). Shifts round half up.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.nn.dyadic import WholeDyadic, rescale_whole
from netweight.nn.integer_network import Call, IntegerNetwork, Reach, reaches, read, run
from netweight.nn.integer_steps import Clip, Entrance, Join, Pool, Product, Rescale


def twin(network: IntegerNetwork) -> nn.Module:
    """The network for proofs: real inputs to real logits in float64, one graph of ATen operators."""
    return Twin(network).eval()


def load(folder: str | Path) -> nn.Module:
    """The twin of the integer network that was written to a folder; raises `BadInput` for any other."""
    return twin(read(folder))


def simulation(network: IntegerNetwork, *, join_as_real: bool = False) -> nn.Module:
    """The network in simulated quantization.

    join_as_real: branches are added before they are rounded, which integers cannot do: to see the difference.
    """
    return Simulation(network, join_as_real).eval()


class Twin(nn.Module):
    """Whole numbers in float64; every step is a module of its own, so that a proof names it."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        self.calls, self.output, self.scale = network.calls, network.output, network.scale
        found = reaches(network.calls, network.shape)
        self.steps = nn.ModuleList(Whole(call, found[call.inputs[0]]) for call in self.calls)

    def forward(self, x: Tensor) -> Tensor:
        """The logits in float64."""
        values = {self.calls[0].inputs[0]: x}
        steps = dict(zip((call.name for call in self.calls), self.steps))
        run(self.calls, values, self.output, lambda call, *q: steps[call.name](*q))
        return values[self.output] * self.scale


class Whole(nn.Module):
    """One step on whole numbers in float64. Its tensors are buffers, they follow to another device."""

    def __init__(self, call: Call, before: Reach) -> None:
        super().__init__()
        self.step, tensors = call.step, {}
        match call.step:
            case Entrance(gain, offset):
                tensors = {"gain": gain, "offset": offset}
            case Product(weight, bias):
                tensors = {"weight": weight.double(), "bias": bias.double()}
            case Rescale(factor):
                low, high = before.within or (0, 0)
                tensors = vars(WholeDyadic.of(factor, max(abs(low), abs(high))))
                image = call.step.image(low, high)
                self.clipped = image[0] < call.step.low or image[1] > call.step.high
            case Clip(low, high):
                relu = low is None or not bool(low.any())
                tensors = {
                    "low": None if relu else low.double(),
                    "high": None if high is None else high.double(),
                }
        for name, tensor in tensors.items():
            self.register_buffer(f"its_{name}", tensor)

    def forward(self, *q: Tensor) -> Tensor:
        """The step."""
        match self.step:
            case Entrance(low=low, high=high):
                return torch.round(q[0].double() * self.its_gain + self.its_offset).clamp(low, high)
            case Product():
                return product(self.step, q[0], self.its_weight, self.its_bias)
            case Rescale(low=low, high=high):
                by = WholeDyadic(self.its_ratio, self.its_carried, self.its_half, self.its_unit)
                found = rescale_whole(q[0], by)
                return found.clamp(low, high) if self.clipped else found
            case Clip(low, high):
                found = q[0]
                if low is not None:
                    found = torch.relu(found) if self.its_low is None else torch.maximum(found, self.its_low)
                return found if high is None else torch.minimum(found, self.its_high)
            case Pool():
                return pooled(self.step, q[0])
        return self.step.run(*q)


def product(step: Product, q: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear or convolution in float64."""
    if weight.ndim == 2:
        return F.linear(q, weight, bias)
    axes = [0] * (weight.ndim - 2)
    return torch.convolution(
        q, weight, bias, step.stride, step.padding, step.dilation, False, axes, step.groups
    )


def pooled(step: Pool, q: Tensor) -> Tensor:
    """A pool of whole numbers in float64, by the operators that bounds know."""
    if step.axes:
        return step.run(q)
    flat = len(step.kernel) == 1  # as a plane of one row: there is no sum over windows of a line
    kernel, stride, padding, dilation = (
        [start, *by] if flat else list(by)
        for start, by in ((1, step.kernel), (1, step.stride), (0, step.padding), (1, step.dilation))
    )
    q, axes = (q.unsqueeze(-2) if flat else q), len(kernel)
    if step.of == "max":
        made = (F.max_pool2d if axes == 2 else F.max_pool3d)(q, kernel, stride, padding, dilation)
    elif max(dilation) == 1:
        average = F.avg_pool2d if axes == 2 else F.avg_pool3d
        made = average(q, kernel, stride, padding, divisor_override=1)
    else:
        return step.run(q.squeeze(-2) if flat else q)
    return made.squeeze(-2) if flat else made


class Simulation(nn.Module):
    """Real values in float64: v = q S at every place."""

    def __init__(self, network: IntegerNetwork, join_as_real: bool) -> None:
        super().__init__()
        self.network, self.join_as_real = network, join_as_real
        joins = {name for call in network.calls if isinstance(call.step, Join) for name in call.inputs}
        self.skipped = frozenset(
            call.name for call in network.calls if isinstance(call.step, Rescale) and call.name in joins
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits in float64."""
        entered = self.network.entered(x)
        values = {name: q.double() * self._scale(name, q) for name, q in entered.items()}
        run(self.network.calls, values, self.network.output, self._step)
        last, scale = values[self.network.output], self.network.scale
        return torch.round(last / scale) * scale

    def _scale(self, name: str, like: Tensor) -> Tensor:
        return self.network.scales[name].to(like.device)

    def _step(self, call: Call, *v: Tensor) -> Tensor:
        """One step on real values."""
        before, after = self._scale(call.inputs[0], v[0]), self._scale(call.name, v[0])
        match call.step:
            case Rescale(factor, low, high):
                if self.join_as_real and call.name in self.skipped:
                    return v[0]
                q = torch.round(v[0] / before)
                by = WholeDyadic.of(factor, 2**31 - 1)
                return rescale_whole(q, by).clamp(low, high) * after
            case Product(weight, bias) as step:
                each = after.reshape(-1).expand(len(bias))
                rows = weight.double() * (each / before.reshape(-1)[0]).reshape(-1, *[1] * (weight.ndim - 1))
                return product(step, v[0], rows, bias.double() * each)
            case Clip(low, high):
                v0 = v[0] if low is None else torch.maximum(v[0], low * before)
                v0 = v0 if high is None else torch.minimum(v0, high * before)
                return v0 * (after / before)
            case Pool(of="sum") as step:
                return pooled(step, v[0]) * (after / before.reshape(after.shape))
            case Pool() as step:
                return pooled(step, v[0])
            case Join() as step if self.join_as_real:
                return torch.floor(step.run(*v) / after + 0.5) * after
        return call.step.run(*v)
