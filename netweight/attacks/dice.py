"""DICE: delete internally, connect externally.

Source: Waniek, Michalak, Wooldridge and Rahwan, "Hiding individuals and communities in a social network",
Nature Human Behaviour 2018, arXiv:1608.00375; as an attack on graph networks in Zuegner and Guennemann,
"Adversarial Attacks on Graph Neural Networks via Meta Learning", ICLR 2019, arXiv:1902.08412. Half of the k
flips take away an edge between nodes of the same class, the others link nodes of different classes. The
attacker knows every class, also those of test nodes.

Differs from the source: flips are k // 2 deletions and the rest additions, not a coin for each; an edge whose
loss would leave a node without any is kept, and another pair is linked in its place.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from netweight.core.flips import EdgeFlips
from netweight.data.edges import Poisoned, adjacency, affordable
from netweight.data.graphs import Graph


def dice(graph: Graph, within: EdgeFlips, *, seed: int = 0) -> Poisoned:
    """The graph with exactly `within.k` pairs flipped, in an order drawn with equal odds.

    Nodes whose class is not known (-1) are left alone. Raises `BadInput` for a graph that is not undirected
    or has fewer such pairs.
    """
    matrix = adjacency(graph)
    known = graph.y >= 0
    both = known[:, None] & known
    same = graph.y[:, None] == graph.y
    draw = torch.Generator().manual_seed(seed)
    gone = deletions(matrix, (matrix & same & both).triu(1), within.k // 2, draw)
    free = (~matrix & ~same & both).triu(1).nonzero()
    affordable(graph, within.k, len(gone) + len(free), "edges within and pairs between classes")
    added = free[torch.randperm(len(free), generator=draw)[: within.k - len(gone)]]
    flips = torch.cat([gone, added])
    return Poisoned(graph, flips[torch.randperm(len(flips), generator=draw)])


def deletions(
    matrix: Bool[Tensor, "n n"], among: Bool[Tensor, "n n"], count: int, draw: torch.Generator
) -> Int64[Tensor, "k 2"]:
    """Up to `count` of the edges `among`, drawn with equal odds, that leave no node without an edge."""
    degree, found = matrix.sum(1).tolist(), []
    edges = among.nonzero()
    for a, b in edges[torch.randperm(len(edges), generator=draw)].tolist():
        if len(found) == count:
            break
        if degree[a] > 1 and degree[b] > 1:
            degree[a], degree[b] = degree[a] - 1, degree[b] - 1
            found.append((a, b))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)
