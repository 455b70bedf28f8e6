"""Graphs whose nodes are to be classified: Cora, Citeseer, and a stochastic block model that needs no file.

    graph = cora()                     # who cites whom, the words of each paper, the field of some of them
    task = judged(graph)               # an example is the number of a node: x `b` int64, y `b`

Papers: Sen et al., "Collective Classification in Network Data", AI Magazine 2008; the split is that of Yang,
Cohen and Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph Embeddings" (Planetoid), ICML
2016, arXiv:1603.08861: 20 nodes of each class to train on, 500 to validate. All nodes and edges are seen in
training and in use ("transductive"); what is hidden are classes.

Features are words of a paper, each row divided by its sum; they are kept as the stored values of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.core.task import Data, Task
from netweight.data.shared import shared_file
from netweight.data.split import Split

NAMES = ("cora", "citeseer", "sbm")
SBM = (4, 60, 96)  # classes, nodes of each, words
WORDS, OWN, WITHIN, BETWEEN = 12, 0.45, 0.10, 0.01  # of the block model: a node's words, odds of an edge


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph with sparse features.

    edges: `2 e` int64 (to, from), both directions, no loops, none twice, in ascending order. offsets: where
    the stored values of each row begin, `n + 1`. columns, values: of the stored values. width: features of a
    node. y: `n` class numbers, -1 where unknown. train, validation, test: node numbers.
    """

    name: str
    edges: Int64[Tensor, "2 e"]
    offsets: Int64[Tensor, " n1"]
    columns: Int64[Tensor, " stored"]
    values: Float[Tensor, " stored"]
    width: int
    classes: int
    y: Int64[Tensor, " n"]
    train: Int64[Tensor, " a"]
    validation: Int64[Tensor, " b"]
    test: Int64[Tensor, " c"]

    def __post_init__(self) -> None:
        n, stored = len(self.y), len(self.values)
        if self.offsets.shape != (n + 1,) or int(self.offsets[0]) or int(self.offsets[-1]) != stored:
            raise BadInput(f"{self.name}: {len(self.offsets)} row offsets do not fit {n} nodes")
        if (self.offsets.diff() < 0).any() or self.columns.shape != (stored,):
            raise BadInput(f"{self.name}: {len(self.columns)} columns for {stored} values, or rows overlap")
        if not self.values.isfinite().all():
            raise BadInput(f"{self.name}: the features hold NaN or Inf; remove or repair those nodes first")
        for what, index, limit in (("feature", self.columns, self.width), ("node", self.edges, n)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
                raise BadInput(f"{self.name}: {what} numbers go past {limit - 1}; give numbers from 0 on")

    @property
    def nodes(self) -> int:
        """How many there are."""
        return len(self.y)

    def dense(self) -> Float[Tensor, "n width"]:
        """The features with their zeros."""
        rows = torch.arange(self.nodes).repeat_interleave(self.offsets.diff())
        return torch.zeros(self.nodes, self.width).index_put((rows, self.columns), self.values, True)


def judged(graph: Graph) -> Task:
    """Nodes to train on; calibration is what validates; test."""
    parts = {
        name: examples(graph, nodes, name)
        for name, nodes in (("train", graph.train), ("validation", graph.validation), ("test", graph.test))
    }
    return Task(parts["validation"], parts["test"], train=parts["train"])


def examples(graph: Graph, nodes: Int64[Tensor, " b"], part: str = "nodes") -> Data:
    """These nodes by their numbers, with their classes."""
    return Data(nodes, graph.y[nodes], batch=max(len(nodes), 1), name=f"{graph.name} ({part})")


def whole(graph: Graph) -> Data:
    """One example: the features of all nodes, `1 n width` float32, in [0, 1], no labels."""
    return Data(graph.dense()[None], name=f"{graph.name} (features)", low=0.0, high=1.0)


def parts(name: str) -> Split:
    """What the command line takes a set of that name for."""
    task = judged(load(name))
    assert task.train is not None
    train = task.train
    return Split(task.calibration, task.test, lambda: train)


@cache
def load(name: str) -> Graph:
    """The graph of one of `NAMES`; raises `BadInput` where its file is not there."""
    return sbm() if name == "sbm" else planetoid(name)


def cora() -> Graph:
    """2,708 papers, 1,433 words, 7 fields; raises `BadInput` without the data folder."""
    return load("cora")


def citeseer() -> Graph:
    """3,327 papers (15 of them without words and links), 3,703 words, 6 fields."""
    return load("citeseer")


def planetoid(name: str) -> Graph:
    """Read `graphs/NAME.npz` of the data folder; its test nodes are every second of the usual 1,000."""
    with np.load(shared_file(f"graphs/{name}.npz")) as file:
        offsets, columns = (
            torch.from_numpy(file[f"x_{key}"].astype(np.int64)) for key in ("indptr", "indices")
        )
        values = torch.from_numpy(file["x_data"].astype(np.float32))
        y = torch.from_numpy(file["y"].astype(np.int64)).clamp(min=-1)
        pairs = torch.from_numpy(file["edges"].astype(np.int64))
        nodes = [torch.from_numpy(file[key].astype(np.int64)) for key in ("train", "val", "test")]
        width = int(file["x_shape"][1])
    values = normalized(offsets, values)
    edges = both_ways(pairs.T)
    return Graph(name, edges, offsets, columns, values, width, int(y.max()) + 1, y, *nodes)


def sbm(seed: int = 0, shape: tuple[int, int, int] = SBM, own: float = OWN) -> Graph:
    """240 nodes of 4 classes that link within their class ten times as often, with 12 of 96 words each.

    Every class has 24 words of its own, of which its nodes draw about half of theirs. shape: classes, nodes
    of each, words. own: weight of a word of the node's class in a draw, where a word of any
    other class has (1 - own) / (classes - 1). A quarter of the nodes train, a quarter validate.
    """
    classes, each, width = shape
    draw = torch.Generator().manual_seed(seed)
    n = classes * each
    y = torch.arange(n) % classes
    odds = torch.where(y[:, None] == y, WITHIN, BETWEEN)
    upper = (torch.rand(n, n, generator=draw) < odds).triu(1)
    weight = torch.where(
        torch.arange(width) // (width // classes) == y[:, None], own, (1 - own) / (classes - 1)
    )
    columns = torch.multinomial(weight, WORDS, generator=draw).sort(1).values
    offsets = torch.arange(n + 1) * WORDS
    values = normalized(offsets, torch.ones(n * WORDS))
    few = each // 4 * classes
    train, validation, test = torch.arange(n).split([few, few, n - 2 * few])
    edges = both_ways(upper.nonzero().T)
    return Graph("sbm", edges, offsets, columns.flatten(), values, width, classes, y, train, validation, test)


def both_ways(pairs: Int64[Tensor, "2 e"]) -> Int64[Tensor, "2 both"]:
    """Each link in both directions, once, without loops, ascending."""
    edges = torch.cat([pairs, pairs.flip(0)], 1)
    return edges[:, edges[0] != edges[1]].unique(dim=1)


def normalized(offsets: Int64[Tensor, " n1"], values: Float[Tensor, " stored"]) -> Float[Tensor, " stored"]:
    """Each row divided by its sum."""
    counts = offsets.diff()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    total = torch.zeros(len(counts)).index_add(0, rows, values)
    return values / total[rows]
