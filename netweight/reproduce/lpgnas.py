"""Zhao et al. 2020: a search finds layers and bits of a graph network, smaller and as accurate.

The paper: eight data sets; on Pubmed 2.3 times smaller and 0.4 points better than the best searched
network; on Cora and Citeseer as accurate as networks made by hand, several times smaller; below 4-bit
weights and 8-bit activations plain rounding fails. Here: Cora, its usual 140 training and 500 validation
nodes, and 500 of its 1,000 test nodes. By hand: GCN, GAT and SAGE in float and with weights and inputs of
the blocks rounded ("W4A8": 4-bit weights, 8-bit inputs; W2 is ternary), 100 epochs, weights of the epoch
that is best on the validation nodes; "the best" of them is the best on the test nodes. A search of 400
epochs, as in the paper, for each of three betas; of six designs it offers, trained as those by hand, the
best on the validation nodes. Random: eight draws from the same space, 60 epochs each. Sizes are bits of
weight codes. Citeseer can be loaded but is left out for time. Quick (Cora, or a stochastic block model
without the data folder): one beta, 60 + 60 epochs, two designs, looser bars.

Chosen after seeing what: widths from 16 on, weights of 1, 2, 4 and 8 bits, 200 epochs and betas of 0.1, 0.3
and 0.6, with seeds 0 to 2, gave no network smaller than those by hand at 4 bits, and with seed 2 poor ones
(test 0.72 to 0.76), because an option's gradient was that of its own scale alone (`search.supernet`). With
gradients of all options, widths from 8 on and 3 and 6 bits on offer, seed 2 alone was looked at, at betas
0.3 and 0.6, with 200 and with 400 epochs; the betas below were set by the sizes found there.
Seed 2, the hardest: found networks have test 0.796, 0.774 and 0.788 at 142, 72 and 36 kbit, against 0.824
(GCN, float) and 0.834 (GCN, W4A8, 92 kbit), so that the bars of accuracy at a size are missed there, bar 2
by 4 points instead of by everything. The search prefers sums without weights (`const`) to the GCN's. Tried
without gain: beta 1.2 (features fall to 4 bits), L_q by the size of the largest network.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import outputs
from netweight.data import graphs
from netweight.data.graphs import Graph
from netweight.data.shared import shared_data
from netweight.models.graph_block import by_hand
from netweight.models.graph_parts import Parts, bits_of
from netweight.models.trained import seeded
from netweight.search.lpgnas import LPGNAS, Design, best_of, designs, fitted, searched
from netweight.search.supernet import Options, Supernet
from netweight.training.settings import Training
from netweight.training.trained import Trained

HOW = Training(100, rate=0.01, decay=5e-4)
BITS = ("binary", "ternary", "3", "4", "6", "8")
SEARCH = LPGNAS(epochs=400, rate=0.01, base=8, weights=BITS, designs=6)
BETAS = (0.3, 0.5, 0.8)
HAND = ("gcn", "gat", "sage")
PLAIN = {  # weights, inputs of the blocks
    "FP": Parts(),
    "W8A8": Parts("8", "8", "8", "4.4"),
    "W4A8": Parts("4", "4", "4", "4.4"),
    "W4A4": Parts("4", "4", "4", "2.2"),
    "W2A4": Parts("ternary", "ternary", "ternary", "2.2"),
}
RANDOM, RANDOM_EPOCHS = 8, 60
NOTHING = -1.0  # what a bar measures where there is no such network


@dataclass(frozen=True)
class Point:
    """A trained network: accuracies (shares), bits of its weights, bits of its input features."""

    name: str
    test: float
    validation: float
    size: int
    input: int
    told: Mapping[str, Any]


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed."""
    graph = graphs.cora() if shared_data() is not None else graphs.sbm()
    how = replace(HOW, seed=seed, epochs=60 if quick else HOW.epochs)
    if quick:
        hand = {"gcn FP": by_rule(graph, "gcn", "FP", how), "gat FP": by_rule(graph, "gat", "FP", how)}
        found = [search(graph, how, replace(SEARCH, beta=0.3, epochs=60, rate=0.03, designs=2))]
        return Claim(small_enough(hand, found, ((4, 0.04),)), figures(hand, found, []))
    names = [*itertools.product(HAND, PLAIN)]
    hand = {" ".join(pair): by_rule(graph, *pair, how) for pair in steps(names, "By hand")}
    found = [search(graph, how, replace(SEARCH, beta=beta)) for beta in BETAS]
    drawn = [at_random(graph, how, number) for number in steps(range(RANDOM), "Random networks")]
    bars = [
        *small_enough(hand, found, ((8, 0.01), (12, 0.03))),
        *cliff(hand, found),
        dominated(hand, found),
        *falls(found),
        better(found, drawn),
    ]
    return Claim(bars, figures(hand, found, drawn))


def trained(name: str, graph: Graph, design: Design, how: Training) -> Point:
    """Train a design and measure it."""
    return measured(name, graph, design, fitted(graph, design, graphs.judged(graph), how))


def measured(name: str, graph: Graph, design: Design, trained: Trained) -> Point:
    """What would be shipped, on the test nodes."""
    test = graphs.judged(graph).test
    assert test.y is not None
    right = outputs(trained.network().model, test).argmax(1) == test.y
    told = design.told(graph)
    kept = bits_of("input", design.parts[0].input)
    validation = float(trained.notes["validation_accuracy"])
    return Point(name, float(right.double().mean()), validation, told["weight_bits"], kept, told)


def by_rule(graph: Graph, name: str, rule: str, how: Training) -> Point:
    """A network made by hand, all blocks rounded the same way."""
    choices = by_hand(name, graph).choices
    return trained(f"{name} {rule}", graph, Design(choices, (PLAIN[rule],) * len(choices)), how)


def search(graph: Graph, how: Training, settings: LPGNAS) -> Point:
    """What a search finds: of the designs it offers, trained from scratch, the best on validation nodes."""
    task = graphs.judged(graph)
    supernet, _ = searched(by_hand("gcn", graph), task, how, settings)
    on_offer = designs(supernet, settings.designs, how.seed)
    design, best = best_of(on_offer, lambda design, number: fitted(graph, design, task, how))
    return measured(f"beta {settings.beta}", graph, design, best)


def at_random(graph: Graph, how: Training, number: int) -> Point:
    """A network drawn from the space of the search, every option equally likely."""
    with seeded(how.seed):
        options = Options(SEARCH.base, SEARCH.weights, SEARCH.formats)
        supernet = Supernet(graph, options, 2, 0.5)
    with torch.no_grad():
        for logits in (*supernet.logits("architecture"), *supernet.logits("roundings")):
            logits.zero_()
    picks = supernet.draw(torch.Generator().manual_seed(100 * how.seed + number), 1.0, 1.0)
    parts = tuple(block.parts(each) for block, each in zip(supernet.blocks, picks))
    design = Design(supernet.choices(picks), parts)
    return trained(f"random {number}", graph, design, replace(how, epochs=RANDOM_EPOCHS))


# Bars -----------------------------------------------------------------------------------------------------

Hand = Mapping[str, Point]


def small_enough(hand: Hand, found: Sequence[Point], wanted: Sequence[tuple[int, float]]) -> list[Bar]:
    """Bar 1: against the best float network by hand, another found network for each (times smaller, loss)."""
    best = max((p for name, p in hand.items() if name.endswith("FP")), key=lambda p: p.test)

    def gains(points: Sequence[Point]) -> list[float]:
        return [
            p.test - best.test if p.size * times <= best.size else NOTHING
            for p, (times, _) in zip(points, wanted)
        ]

    def least(points: Sequence[Point]) -> float:
        return min(gain + loss for gain, (_, loss) in zip(gains(points), wanted))

    chosen = max(itertools.permutations(found, len(wanted)), key=least)
    return [
        Bar(f"accuracy over the best float network by hand, {times} times smaller", gain, -loss, "at least")
        for gain, (times, loss) in zip(gains(chosen), wanted)
    ]


def cliff(hand: Hand, found: Sequence[Point]) -> list[Bar]:
    """Bar 1b: where plain rounding of a GCN fails, and that the search does not go there."""
    float_ = hand["gcn FP"].test
    return [
        Bar("GCN: accuracy lost at W4A8", float_ - hand["gcn W4A8"].test, 0.01, "at most"),
        Bar("GCN: accuracy lost at W4A4", float_ - hand["gcn W4A4"].test, 0.10, "at least"),
        Bar(
            "bits that the found networks keep of the features, fewest",
            min(p.input for p in found),
            8,
            "at least",
        ),
    ]


def dominated(hand: Hand, found: Sequence[Point]) -> Bar:
    """Bar 2: how far a rounded network by hand is above every found one that is no larger."""
    gaps = [
        p.test - max((f.test for f in found if f.size <= p.size), default=0.0)
        for name, p in hand.items()
        if not name.endswith("FP")
    ]
    return Bar("a rounded network by hand over the found ones no larger, most", max(gaps), 0.005, "at most")


def falls(found: Sequence[Point]) -> list[Bar]:
    """Bar 3: more beta, fewer bits."""
    sizes = torch.tensor([p.size for p in found], dtype=torch.float64).log2()
    return [
        Bar(f"beta {a} to {b}: halvings of the weights", float(one - other), 0.0, "at least")
        for (a, b), one, other in zip(itertools.pairwise(BETAS), sizes, sizes[1:])
    ]


def better(found: Sequence[Point], drawn: Sequence[Point]) -> Bar:
    """Bar 4: found networks over the mean of the random ones that are no smaller than the smallest found."""
    beaten = [p.test for p in drawn if p.size >= min(f.size for f in found)]
    gain = max(f.test for f in found) - statistics.fmean(beaten) if beaten else NOTHING
    return Bar("best found network over the mean of random ones", gain, 0.005, "at least")


def figures(hand: Hand, found: Sequence[Point], drawn: Sequence[Point]) -> dict[str, Any]:
    """Every network that was trained."""
    said = {p.name: [p.test, p.validation, p.size] for p in (*hand.values(), *found, *drawn)}
    return {"test, validation, bits of weights": said, "found": {p.name: dict(p.told) for p in found}}
