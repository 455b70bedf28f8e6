"""Networks that skip residual blocks, each example its own, by a gate before each block.

Paper: Wang et al., "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018,
arXiv:1711.09485.

With blocks F_i whose output has the shape of their input, and gates on the mean over all places,

    h_{i+1} = G_i F_i(h_i) + (1 - G_i) h_i,      p_i = sigmoid(a . mean(h_i) + b),      G_i = 1 iff p_i >= T.

T = 0 runs every block, T = 1 none. A batch is routed: a block sees only those who do not skip it. While gates
learn, G_i is 0 or 1 forwards and p_i backwards (`soft`).

Differs from the paper: one linear gate per block (its FFGate-II without the convolution); F_i includes the
block's shortcut, so that skipping is the identity; straight-through gradients in place of reinforcement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.dynamic import Decisions

WHOLE = "dynamic"  # the only part of a network with gates
WIDEST = 1 << 20  # channels: a description from outside cannot take all memory
OPEN = 2.0  # first score of every gate: most blocks are run


class Gate(nn.Module):
    """The score of each example, `b`: a linear function of the mean over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        nn.init.constant_(self.linear.bias, OPEN)

    def forward(self, h: Float[Tensor, "b c *places"]) -> Float[Tensor, " b"]:
        """Before the sigmoid."""
        return self.linear(h.flatten(2).mean(2) if h.ndim > 2 else h)[:, 0]


@dataclass(frozen=True)
class Skipped:
    """logits `b classes`, and which of the gated blocks each example ran, `b gates`."""

    logits: Float[Tensor, "b classes"]
    ran: Bool[Tensor, "b gates"]


class Skipping(nn.Module):
    """Parts one after the other, some of them behind a gate. The module itself runs all of them."""

    limit: Tensor

    def __init__(
        self, parts: Sequence[nn.Module], gates: Mapping[int, nn.Module], limit: float = 0.5
    ) -> None:
        """gates: by the number of the part (from 0); a gate gives one score for each example."""
        super().__init__()
        if not parts or not {*gates} <= {*range(len(parts))}:
            raise BadInput(f"{len(parts)} parts and gates at {sorted(gates)}: give gates of parts that exist")
        self.parts = nn.ModuleList(parts)
        self.gates = nn.ModuleDict({str(index): gates[index] for index in sorted(gates)})
        self.register_buffer("limit", torch.zeros((), dtype=torch.float64))
        self.skip_below(limit)

    def skip_below(self, limit: float) -> None:
        """Skip a block where p is below this from now on: 0 runs every block, 1 none."""
        if not 0 <= limit <= 1:
            raise BadInput(f"limit={limit}: blocks are skipped below a probability from 0 to 1")
        self.limit.fill_(limit)

    @property
    def beside(self) -> list[nn.Module]:
        """The gates, which `forward` does not run; see `core.compressed.weighted`."""
        return [*self.gates.values()]

    def gate(self, index: int) -> nn.Module | None:
        """The gate before that part, if it has one."""
        return dict(self.gates.items()).get(str(index))

    def runs(self, score: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Who runs the block."""
        return (score.sigmoid() >= self.limit) & (self.limit < 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits where every block is run."""
        for part in self.parts:
            x = part(x)
        return x

    def route(self, x: Tensor) -> Skipped:
        """Each example runs the blocks that its gates let through."""
        ran = []
        for index, part in enumerate(self.parts):
            gate = self.gate(index)
            go = None if gate is None else self.runs(gate(x))
            if go is not None:
                ran.append(go)
            if go is None or bool(go.all()):
                x = part(x)
            elif bool(go.any()):
                rows = go.nonzero()[:, 0]
                x = x.index_copy(0, rows, part(x[rows]))
        none = torch.zeros(len(x), 0, dtype=torch.bool, device=x.device)
        return Skipped(x, torch.stack(ran, 1) if ran else none)

    def decisions(self, x: Tensor) -> Decisions:
        """One for each gate, all blocks before it run; effort: how far its score lies below the limit's."""
        saves, effort = [torch.zeros(len(x), 0, dtype=torch.bool, device=x.device)], [x.new_zeros(len(x), 0)]
        least = min(max(float(self.limit), 1e-6), 1 - 1e-6)
        for index, part in enumerate(self.parts):
            if (gate := self.gate(index)) is not None:
                score = gate(x)
                saves.append(~self.runs(score.detach())[:, None])
                effort.append((score - math.log(least / (1 - least))).clamp(max=0)[:, None])
            x = part(x)
        return Decisions(torch.cat(saves, 1), torch.cat(effort, 1))

    def soft(self, x: Tensor) -> tuple[Float[Tensor, "b classes"], Float[Tensor, "b gates"]]:
        """(logits, G): 0 or 1 forwards, with the gradients of p; every block is run on all examples."""
        shares = []
        for index, part in enumerate(self.parts):
            gate = self.gate(index)
            if gate is None:
                x = part(x)
                continue
            score = gate(x)
            p = score.sigmoid()
            hard = self.runs(score.detach()).to(p) + p - p.detach()
            shares.append(hard)
            each = hard.reshape(-1, *[1] * (x.ndim - 1))
            x = each * part(x) + (1 - each) * x
        return x, torch.stack(shares, 1)


@dataclass(frozen=True)
class AddGates:
    """A Sequential network gets a gate before some of its parts, and is run as `Skipping` from then on.

    blocks: names of the parts, in order. channels: of the input of each. A network that has gates already
    stays as it is; the whole network computes what it did.
    """

    blocks: tuple[str, ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        fits = all(isinstance(count, int) and 1 <= count <= WIDEST for count in self.channels)
        if not self.blocks or len(self.blocks) != len(self.channels) or not fits:
            raise BadInput(f"{self}: give the channels of each block that may be skipped, 1 to {WIDEST}")

    def apply(self, model: nn.Module) -> None:
        """Add them in place, with random weights; raises `DoesNotFit` for a network of another kind."""
        if [name for name, _ in model.named_children()] == [WHOLE]:
            return
        names = [name for name, _ in model.named_children()]
        if not isinstance(model, nn.Sequential) or not {*self.blocks} <= {*names}:
            raise DoesNotFit(
                f"{type(model).__name__}: gates lie before {', '.join(self.blocks)}; give an nn.Sequential "
                "that has these parts"
            )
        like = next((p for p in model.parameters()), torch.empty(0))
        gates = {
            names.index(name): Gate(channels).to(like) for name, channels in zip(self.blocks, self.channels)
        }
        parts = [*model.children()]
        for name in names:
            delattr(model, name)
        model.add_module(WHOLE, Skipping(parts, gates).to(like.device))
        model.train(model.training)
