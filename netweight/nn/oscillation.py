"""Weights that go back and forth between two levels while they are trained: counted as they do.

With k_t the code of a weight after step t and d_t = sign(k_t - k_{t-1}), a weight oscillates at t where
d_t != 0 and d_t = -(its last d that was not 0). Its frequency is the moving mean

    f_t = m [oscillates at t] + (1 - m) f_{t-1},        m = 0.01,

and it is oscillating where f_t > 0.005. A code that another step size alone changes, codes(w_t, s_t) against
codes(w_t, s_{t-1}), is counted by itself: those changes are no decision of the weight.

Papers: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv:2203.11086
(the counting); Liu et al., ICML 2023, arXiv:2302.02210 (what a learnt step size has to do with it).
Frequencies of different grids are not comparable: a grid with a threshold at 0, where most weights lie,
oscillates more than one with a level there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netweight.nn.quantized import quantized
from netweight.nn.quantizer import FromMean, Learnt, codes

MOMENTUM, OFTEN = 0.01, 0.005
COUNTED = ("oscillations", "changes", "changes by the step size")

Rounded = Mapping[str, tuple[Tensor, Learnt | FromMean]]  # by name: a weight and what rounds it


def rounded_weights(network: nn.Module) -> dict[str, tuple[Tensor, Learnt | FromMean]]:
    """The weights of the `Quantized` layers that are rounded to levels."""
    return {
        name: (layer.like.weight, layer.weight_rounding)
        for name, layer in quantized(network).items()
        if isinstance(layer.weight_rounding, Learnt | FromMean)
    }


class Oscillations(nn.Module):
    """What is known of the codes of some weights; buffers, so that checkpoints hold them.

    phases: how many parts of a training are counted apart.
    """

    counts: Tensor
    steps: Tensor

    def __init__(self, weights: Rounded, phases: int = 1) -> None:
        super().__init__()
        self.names = tuple(weights)
        self.register_buffer("counts", torch.zeros(phases, len(COUNTED), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(phases, dtype=torch.int64))
        for index, (weight, rounding) in enumerate(weights.values()):
            size = rounding.size(weight).detach().clone()
            self.register_buffer(f"code{index}", codes(weight, size, rounding.levels).to(torch.int16))
            self.register_buffer(f"last{index}", torch.zeros_like(weight, dtype=torch.int8))
            self.register_buffer(f"often{index}", torch.zeros_like(weight, dtype=torch.float32))
            self.register_buffer(f"size{index}", size)

    @torch.no_grad()
    def see(self, weights: Rounded, phase: int = 0) -> None:
        """The same weights after one more step."""
        found = torch.zeros(len(COUNTED), dtype=torch.float64, device=self.counts.device)
        for index, name in enumerate(self.names):
            weight, rounding = weights[name]
            code, last = self.get_buffer(f"code{index}"), self.get_buffer(f"last{index}")
            often, old = self.get_buffer(f"often{index}"), self.get_buffer(f"size{index}")
            size = rounding.size(weight).detach()
            now = codes(weight, size, rounding.levels).to(torch.int16)
            way = (now - code).sign().to(torch.int8)
            oscillates = way * last == -1
            found[0] += oscillates.sum()
            found[1] += (way != 0).sum()
            found[2] += (now != codes(weight, old, rounding.levels)).sum()
            often.lerp_(oscillates.float(), MOMENTUM)
            last.copy_(torch.where(way != 0, way, last))
            code.copy_(now)
            old.copy_(size)
        self.counts[phase] += found
        self.steps[phase] += 1

    def rates(self, phase: int = 0) -> dict[str, float]:
        """How many of each kind per weight and step of that phase; NaN where it has no step."""
        each = max(self.weights, 1) * self.steps[phase].item()
        return {
            name: self.counts[phase, i].item() / each if each else float("nan")
            for i, name in enumerate(COUNTED)
        }

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(self.get_buffer(f"code{index}").numel() for index in range(len(self.names)))

    def oscillating(self) -> dict[str, float]:
        """The share of the weights that oscillate now, by name."""
        return {
            name: (self.get_buffer(f"often{index}") > OFTEN).double().mean().item()
            for index, name in enumerate(self.names)
        }

    def notes(self) -> dict[str, Any]:
        """Rates of each phase that has steps, and the shares; ready for JSON."""
        rates = [self.rates(phase) for phase in range(len(self.steps)) if self.steps[phase]]
        return {"per weight and step": rates, "oscillating": self.oscillating()}
