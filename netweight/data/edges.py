"""Edges of a graph as a matrix, graphs with some of them flipped, and the largest part that hangs together.

    part = divided(component(cora()), seed=0)       # largest component; 10 % train, 10 % validate, 80 % test
    poisoned = Poisoned(part, flips)                # what an attack on edges gives
    poisoned.graph, poisoned.first(100).graph       # after all flips; after the first hundred

A graph is undirected and has no loops: its adjacency is symmetric, of 0 and 1, with zeros on the diagonal.
`core.flips.EdgeFlips(k)` is the set of all graphs that differ from one in at most k pairs of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64, Num
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.data.graphs import Graph

MOST = 5000  # nodes of a graph whose pairs fit into a matrix


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A graph of which pairs of nodes were flipped, an edge to none and none to an edge.

    clean: the graph as it was. flips: `k 2` node numbers, the lower first, in the order they were chosen.
    """

    clean: Graph
    flips: Int64[Tensor, "k 2"]

    @property
    def graph(self) -> Graph:
        """The graph after the flips."""
        return relinked(self.clean, flipped(adjacency(self.clean), self.flips))

    def first(self, count: int) -> Poisoned:
        """The first `count` flips alone; raises `BadInput` where there are fewer."""
        if not 0 <= count <= len(self.flips):
            raise BadInput(f"{self.clean.name}: {len(self.flips)} pairs were flipped, not {count}; flip more")
        return Poisoned(self.clean, self.flips[:count])


def adjacency(graph: Graph) -> Bool[Tensor, "n n"]:
    """True where two nodes are linked; raises `BadInput` for loops, one-way links or too large a graph."""
    n = graph.nodes
    if n > MOST:
        raise BadInput(f"{graph.name}: the pairs of {n} nodes fit into no matrix (up to {MOST}); take a part")
    found = torch.zeros(n, n, dtype=torch.bool, device=graph.edges.device)
    found[graph.edges[0], graph.edges[1]] = True
    checked(found, graph.name)
    return found


def checked(matrix: Num[Tensor, "n n"] | Bool[Tensor, "n n"], name: str) -> None:
    """Raise `BadInput` unless the matrix is symmetric, of 0 and 1, with zeros on its diagonal."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not ((matrix == 0) | (matrix == 1)).all():
        raise BadInput(f"{name}: the adjacency is no square matrix of 0 and 1; give one row for each node")
    if not torch.equal(matrix, matrix.T):
        raise BadInput(
            f"{name}: the adjacency is not symmetric; give an undirected graph, each link both ways"
        )
    if matrix.diagonal().any():
        node = int(matrix.diagonal().nonzero()[0])
        raise BadInput(f"{name}: node {node} is linked to itself; leave loops out")


def relinked(graph: Graph, matrix: Num[Tensor, "n n"] | Bool[Tensor, "n n"]) -> Graph:
    """The same nodes with these links; raises `BadInput` for what is no adjacency of them."""
    checked(matrix, graph.name)
    if len(matrix) != graph.nodes:
        raise BadInput(
            f"{graph.name}: an adjacency of {len(matrix)} nodes for {graph.nodes}; give one row each"
        )
    return replace(graph, edges=matrix.nonzero().T.contiguous())


def flipped(matrix: Bool[Tensor, "n n"], flips: Int64[Tensor, "k 2"]) -> Bool[Tensor, "n n"]:
    """A copy in which these pairs are the other way round; each pair once."""
    found, (a, b) = matrix.clone(), flips.to(matrix.device).T
    found[a, b] ^= True
    found[b, a] ^= True
    return found


def affordable(graph: Graph, budget: int, pairs: int, what: str) -> None:
    """Raise `BadInput` where the budget is larger than what there is to flip."""
    if budget > pairs:
        raise BadInput(
            f"edgeflips={budget}: {graph.name} has no more than {pairs} {what}; give a smaller budget"
        )


def words(graph: Graph) -> Float[Tensor, "n width"]:
    """1 where a node has a feature, else 0."""
    return (graph.dense() != 0).float()


# Parts of a graph -----------------------------------------------------------------------------------------


def component(graph: Graph) -> Graph:
    """The largest connected part, nodes renumbered in their order; ties go to the lowest node."""
    n, (to, source) = graph.nodes, graph.edges.cpu().numpy()
    matrix = csr_array(((to >= 0).astype("int8"), (to, source)), shape=(n, n))
    label = torch.from_numpy(connected_components(matrix, directed=False)[1]).long()
    return kept(graph, label == label.bincount().argmax())


def kept(graph: Graph, which: Bool[Tensor, " n"]) -> Graph:
    """The nodes that are True and the links between them, renumbered in their order."""
    if not which.any():
        raise BadInput(f"{graph.name}: no node is left; keep one at least")
    place = which.cumsum(0) - 1
    rows = torch.arange(graph.nodes).repeat_interleave(graph.offsets.diff())
    inside, counts = which[rows], graph.offsets.diff()[which]
    between = which[graph.edges].all(0)
    parts = {part: place[nodes[which[nodes]]] for part in PARTS for nodes in [getattr(graph, part)]}
    return replace(
        graph,
        edges=place[graph.edges[:, between]],
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        columns=graph.columns[inside],
        values=graph.values[inside],
        y=graph.y[which],
        **parts,
    )


PARTS = ("train", "validation", "test")


def divided(graph: Graph, seed: int, train: float = 0.1, validation: float = 0.1) -> Graph:
    """The nodes drawn anew into those that train, validate and test.

    train, validation: shares of all nodes, each class in proportion to its known nodes, at least one of each
    to train on. All other nodes whose class is known test. Raises `BadInput` for shares that leave none, or a
    class without nodes.
    """
    known = int((graph.y >= 0).sum())
    grown = graph.nodes / max(known, 1)
    if not (train > 0 and validation > 0 and (train + validation) * grown < 1):
        raise BadInput(
            f"train={train}, validation={validation}: of {graph.nodes} nodes {known} have a class; give "
            "shares above 0 that leave some of these to test on"
        )
    draw, parts = torch.Generator().manual_seed(seed), ([], [], [])
    for number in range(graph.classes):
        nodes = (graph.y == number).nonzero().flatten()
        if not len(nodes):
            raise BadInput(f"{graph.name}: class {number} has no nodes; leave it out of the classes")
        first, second = (int(share * grown * len(nodes)) for share in (train, validation))
        order = nodes[torch.randperm(len(nodes), generator=draw)]
        for part, taken in zip(parts, order.tensor_split([max(first, 1), max(first, 1) + second])):
            part.append(taken)
    return replace(graph, **{name: torch.cat(part).sort().values for name, part in zip(PARTS, parts)})
