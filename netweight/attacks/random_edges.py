"""Random edges: the weakest attack on a graph, what every other one is held against.

Source: the "random attack" of Li et al., "Reliable Representations Make A Stronger Defender: Unsupervised
Structure Refinement for Robust GNN", KDD 2022, arXiv:2207.00012: k pairs of nodes without a link, drawn with
equal odds, are linked. Nothing about classes or features is used.
"""

from __future__ import annotations

import torch

from netweight.core.flips import EdgeFlips
from netweight.data.edges import Poisoned, adjacency, affordable
from netweight.data.graphs import Graph


def random_edges(graph: Graph, within: EdgeFlips, *, seed: int = 0) -> Poisoned:
    """The graph with `within.k` more edges, all different.

    Raises `BadInput` for a graph that is not undirected or has fewer pairs without an edge.
    """
    free = (~adjacency(graph)).triu(1).nonzero().cpu()
    affordable(graph, within.k, len(free), "pairs of nodes without an edge")
    draw = torch.Generator().manual_seed(seed)
    return Poisoned(graph, free[torch.randperm(len(free), generator=draw)[: within.k]])
