"""All networks of a search in one: every block holds every choice, and a draw says which of them runs.

For each decision with logits l, noise N of the Gumbel distribution (Jang et al., "Categorical
Reparameterization with Gumbel-Softmax", ICLR 2017, arXiv:1611.01144),

    p = softmax((l + eta N) / tau),        the option that runs is k = argmax p.

Backwards, what a decision gives counts as sum_m (1[m = k] + p_m - [p_m]) y_m, [.] without gradient, over all
options m: of attention, aggregation, activation, shortcut and rounding alike. (Were only y_k computed and
counted as y_k (1 + p_k - [p_k]), the gradient would say whether y_k should be larger, whatever the other
options are, and what is drawn first would grow.) The number of heads alone counts so, since it cuts the same
rows otherwise. With one weight for every width, the narrower networks use its first rows and columns. Where
no gradient is asked of the logits, one path is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.data.graphs import Graph
from netweight.models.graph_block import TAPS, Choice, Rows, dropped, edges, hold, rows, times
from netweight.models.graph_parts import FLOAT, KEPT, Parts, bits_of
from netweight.models.graph_sums import (
    ACTIVATIONS,
    AGGREGATES,
    ATTENTIONS,
    LEARNT,
    Links,
    aggregated,
    coefficients,
    vectors_of,
)
from netweight.nn.fixed_point import Fixed, weight_rounding

AHEAD = 1.5  # the weights of the supernet were first trained with the most bits
GROWN = (1, 2, 4, 8)  # widths in units of the base, and heads


@dataclass(frozen=True)
class Pick:
    """What one decision came to. p: of every option, with a gradient or without."""

    index: int
    p: Float[Tensor, " options"]

    def gate(self) -> Tensor | float:
        """1, with the gradient of p of the option that runs."""
        own = self.p[self.index]
        return 1 + (own - own.detach()) if self.p.requires_grad else 1.0

    def shares(self) -> Tensor:
        """1 for the option that runs, else 0, with the gradients of p."""
        hard = torch.eye(len(self.p), dtype=self.p.dtype, device=self.p.device)[self.index]
        return hard + (self.p - self.p.detach())  # the bracket is 0, and nothing is rounded otherwise


Picks = Mapping[str, Pick]


def most_bits(part: str, names: Sequence[str]) -> int:
    """Which of the roundings of a part keeps the most bits, the first of several."""
    return max(range(len(names)), key=lambda m: bits_of(part, names[m]))


def start(decision: str, options: Sequence[Any]) -> Tensor:
    """The first logits: 0, and `AHEAD` for the most bits."""
    logits = torch.zeros(len(options))
    if decision in (*KEPT, *TAPS):
        logits[most_bits(decision, options)] = AHEAD
    return logits


@dataclass(frozen=True)
class Options:
    """What a block is drawn from. base: the smallest width. last: the number of classes in the last block."""

    base: int
    weights: tuple[str, ...]
    formats: tuple[str, ...]
    last: int = 0

    def architecture(self) -> dict[str, Sequence[object]]:
        """Decisions about what is computed. A last block has no activation and its width is the classes."""
        found: dict[str, Sequence[object]] = {
            "attention": ATTENTIONS,
            "aggregate": AGGREGATES,
            "heads": GROWN,
            "skip": (False, True),
        }
        if not self.last:
            found |= {"activation": tuple(ACTIVATIONS), "width": [self.base * grown for grown in GROWN]}
        return found

    def roundings(self) -> dict[str, Sequence[str]]:
        """Decisions about bits."""
        return dict.fromkeys(KEPT, self.weights) | dict.fromkeys(TAPS, self.formats)


class MixedBlock(nn.Module):
    """A block with every choice; `architecture` and `roundings` hold the logits of its decisions."""

    def __init__(self, before: int, options: Options, dropout: float) -> None:
        super().__init__()
        self.options, self.dropout = options, dropout
        most = max(GROWN) * (options.last or options.base)
        self.linear = nn.Parameter(nn.init.xavier_uniform_(torch.empty(most, before)))
        self.shortcut = nn.Parameter(nn.init.xavier_uniform_(torch.empty(options.last or most, before)))
        self.left, self.right = (nn.Parameter(torch.randn(most) * most**-0.5) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(options.last or most))
        self.architecture, self.roundings = (
            nn.ParameterDict({name: nn.Parameter(start(name, each)) for name, each in kind.items()})
            for kind in (options.architecture(), options.roundings())
        )

    def choice(self, picks: Picks) -> Choice:
        """The block that runs."""
        named = {name: each[picks[name].index] for name, each in self.options.architecture().items()}
        named["shortcut"] = named.pop("skip")
        if self.options.last:
            named |= {"activation": "none", "width": int(named["heads"])}
        return Choice(**named)

    def parts(self, picks: Picks) -> Parts:
        """Its roundings."""
        return Parts(**{name: each[picks[name].index] for name, each in self.options.roundings().items()})

    def rounded(self, name: str, x: Tensor, picks: Picks) -> Tensor:
        """x under the roundings of that part."""
        pick, names = picks[name], self.options.roundings()[name]
        all_of = [Fixed.parse(each) if name in TAPS else weight_rounding(each) for each in names]
        if not pick.p.requires_grad:
            return all_of[pick.index](x)
        return torch.stack([share * rounding(x) for share, rounding in zip(pick.shares(), all_of)]).sum(0)

    def forward(self, h: Rows | Tensor, near: Links, picks: Picks) -> Tensor:
        """Features of all nodes, as wide as this draw says."""
        choice, rounded = self.choice(picks), partial(self.rounded, picks=picks)
        before = self.linear.shape[1] if isinstance(h, Rows) else h.shape[-1]
        each = self.options.last or choice.width // choice.heads
        out = choice.heads * each
        h = h.with_values(rounded("input", h.values)) if isinstance(h, Rows) else rounded("input", h)
        h = dropped(h, self.dropout if self.training else 0.0)
        z = times(h, rounded("linear", self.linear[:out, :before]))
        z = rounded("message", z * self.widths(picks, out)).unflatten(-1, (choice.heads, each))
        left, right = (
            rounded("vectors", v[:out].reshape(choice.heads, each)) for v in (self.left, self.right)
        )
        c = self.chosen("attention", picks, lambda name: coefficients(name, z, left, right, near))
        c = rounded("links", c)
        found = self.chosen("aggregate", picks, lambda name: aggregated(name, c, z, near))
        found = rounded("sums", found * picks["heads"].gate())
        found = found.mean(-2) if self.options.last else found.flatten(-2)
        found = found + self.bias[: found.shape[-1]]
        weight = self.shortcut[: found.shape[-1], :before]
        found = found + self.chosen(
            "skip", picks, lambda there: times(h, rounded("shortcut", weight)) if there else 0.0
        )
        if self.options.last:
            return found
        return self.chosen("activation", picks, lambda name: ACTIVATIONS[name](found))

    def chosen(self, name: str, picks: Picks, of: Callable[[Any], Any]) -> Any:
        """What the option that runs gives, with the gradients of all of them."""
        pick, options = picks[name], self.options.architecture()[name]
        if not pick.p.requires_grad:
            return of(options[pick.index])
        return sum(share * of(option) for share, option in zip(pick.shares(), options))

    def numbers(
        self, graph: Graph, before: Tensor | float, picks: Picks
    ) -> tuple[dict[str, Tensor | float], Tensor | float]:
        """`elements` of the block that runs and the width it gives, with the gradients of its decisions."""

        def value(decision: str, of: Callable[[Any], float]) -> Tensor:
            shares = picks[decision].shares()
            return shares @ shares.new_tensor([of(each) for each in self.options.architecture()[decision]])

        heads = value("heads", float)
        out = heads * self.options.last if self.options.last else value("width", float)
        after = float(self.options.last) if self.options.last else out
        links = graph.edges.shape[1] + graph.nodes
        learnt = value("attention", lambda name: float(name in LEARNT))
        return {
            "linear": out * before,
            "shortcut": value("skip", float) * after * before,
            "vectors": value("attention", lambda name: len(vectors_of(name))) * out,
            "input": graph.nodes * before,
            "message": graph.nodes * out,
            "links": links * (learnt * heads + 1 - learnt),
            "sums": graph.nodes * out,
        }, after

    def widths(self, picks: Picks, out: int) -> Tensor | float:
        """1 for each channel, with the gradients of every width that has it."""
        if self.options.last or not picks["width"].p.requires_grad:
            return 1.0
        widths = torch.tensor([self.options.base * grown for grown in GROWN], device=self.linear.device)
        shares = picks["width"].shares()
        return shares @ (torch.arange(out, device=widths.device) < widths[:, None]).to(shares)


class Supernet(nn.Module):
    """Mixed blocks on one graph."""

    def __init__(self, graph: Graph, options: Options, blocks: int, dropout: float) -> None:
        super().__init__()
        if blocks < 1:
            raise BadInput(f"blocks={blocks}: a graph network needs a block at least")
        self.graph = graph
        most = options.base * max(GROWN)
        befores = [graph.width] + [most] * (blocks - 1)
        lasts = [0] * (blocks - 1) + [graph.classes]
        self.blocks = nn.ModuleList(
            MixedBlock(before, Options(options.base, options.weights, options.formats, last), dropout)
            for before, last in zip(befores, lasts)
        )
        hold(self, graph)

    def forward(self, x: Tensor, picks: Sequence[Picks]) -> Tensor:
        """Scores of the nodes numbered x."""
        h, near = rows(self), edges(self)
        for block, each in zip(self.blocks, picks):
            h = block(h, near, each)
        return h[x]

    def logits(self, kind: str) -> list[nn.Parameter]:
        """Of all decisions of a kind, `architecture` or `roundings`."""
        return [p for block in self.blocks for p in getattr(block, kind).values()]

    def draw(
        self, generator: torch.Generator | None, noise: float, temperature: float, learnt: Sequence[str] = ()
    ) -> list[Picks]:
        """An option for each decision. learnt: the kinds that are to have a gradient.

        Without a generator, or with no noise, each is the most likely one.
        """
        found: list[Picks] = []
        for block in self.blocks:
            picks = {}
            for kind in ("architecture", "roundings"):
                for name, logits in getattr(block, kind).items():
                    if generator is not None:
                        drawn = torch.rand(len(logits), generator=generator).clamp(1e-6, 1 - 1e-6)
                        logits = logits + noise * -(-drawn.log()).log().to(logits.device)
                    p = (logits / temperature).softmax(0)
                    picks[name] = Pick(int(p.argmax()), p if kind in learnt else p.detach())
            found.append(picks)
        return found

    def widest(self, picks: Sequence[Picks]) -> list[Picks]:
        """The same architecture, every part with the most bits."""
        found = []
        for block, each in zip(self.blocks, picks):
            for name, names in block.options.roundings().items():
                k = most_bits(name, names)
                each = {**each, name: Pick(k, torch.eye(len(names))[k].to(each[name].p))}
            found.append(each)
        return found

    def choices(self, picks: Sequence[Picks]) -> tuple[Choice, ...]:
        """The blocks that run."""
        return tuple(block.choice(each) for block, each in zip(self.blocks, picks))

    def share(self, picks: Sequence[Picks]) -> Tensor:
        """L_q: expected bits of the weights over 32 for each of them, and the same of activations, added.

        Numbers counted are those of the architecture that runs; how many they are has a gradient too.
        """
        total: dict[bool, Tensor | float] = {True: 0.0, False: 0.0}
        counted = {True: 0.0, False: 0.0}
        before: Tensor | float = float(self.graph.width)
        for block, each in zip(self.blocks, picks):
            counts, before = block.numbers(self.graph, before, each)
            for name, count in counts.items():
                bits = [bits_of(name, option) for option in block.options.roundings()[name]]
                p, kind = each[name].p, name in KEPT
                total[kind] = total[kind] + count * (p * p.new_tensor(bits)).sum()
                counted[kind] += float(torch.as_tensor(count).detach())
        return sum(total[kind] / (FLOAT * counted[kind]) for kind in (True, False))
