"""Edges as a matrix, flips of them, the largest connected part, new divisions, and mistakes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.core.flips import EdgeFlips
from netweight.data.edges import (
    PARTS,
    Poisoned,
    adjacency,
    component,
    divided,
    flipped,
    kept,
    relinked,
    words,
)
from netweight.data.graphs import Graph, both_ways, normalized, sbm


def linked_by(pairs: list[tuple[int, int]], n: int, y: list[int] | None = None) -> Graph:
    """A graph with one feature more than nodes: its own and a common one."""
    offsets = torch.arange(n + 1) * 2
    columns = torch.stack([torch.arange(n), torch.full((n,), n)], 1).flatten()
    classes = torch.tensor(y or [node % 2 for node in range(n)])
    edges = both_ways(torch.tensor(pairs).reshape(-1, 2).T)
    values = normalized(offsets, torch.ones(2 * n))
    parts = torch.arange(n).tensor_split(3)
    return Graph("hand", edges, offsets, columns, values, n + 1, int(classes.max()) + 1, classes, *parts)


@given(seed=st.integers(0, 99), k=st.integers(0, 40))
@settings(max_examples=15, deadline=None)
def test_flips_and_links_are_each_other(seed, k):
    graph = linked_by([(0, 1), (1, 2), (5, 6), (2, 7), (3, 9)], 10)
    matrix = adjacency(graph)
    assert torch.equal(relinked(graph, matrix).edges, graph.edges)
    pairs = torch.triu_indices(10, 10, 1).T
    flips = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:k]]
    other = flipped(matrix, flips)
    assert torch.equal(adjacency(graph), matrix)  # a copy was changed
    assert torch.equal(flipped(other, flips), matrix)
    within = EdgeFlips(k)
    assert within.contains(other[None].int(), matrix[None].int()).all()
    if k:
        assert not EdgeFlips(k - 1).contains(other[None].int(), matrix[None].int()).any()
    poisoned = Poisoned(graph, flips)
    assert torch.equal(adjacency(poisoned.graph), other)
    assert torch.equal(adjacency(poisoned.first(k // 2).graph), flipped(matrix, flips[: k // 2]))
    with pytest.raises(BadInput, match=f"{k} pairs were flipped, not {k + 1}"):
        poisoned.first(k + 1)


def test_the_largest_part_by_hand():
    graph = linked_by([(1, 3), (3, 5), (0, 2)], 7, [0, 1, 0, 1, 0, 1, 1])
    part = component(graph)
    assert part.edges.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert part.y.tolist() == [1, 1, 1]
    assert torch.equal(part.dense(), graph.dense()[[1, 3, 5]])
    # of 0..6 nodes 0 to 2 train, 3 and 4 validate, 5 and 6 test
    assert [getattr(part, name).tolist() for name in PARTS] == [[0], [1], [2]]
    whole = kept(graph, torch.ones(7, dtype=torch.bool))
    assert torch.equal(whole.edges, graph.edges) and torch.equal(whole.dense(), graph.dense())
    with pytest.raises(BadInput, match="no node is left"):
        kept(graph, torch.zeros(7, dtype=torch.bool))


def test_a_division_takes_each_node_once_and_each_class_in_proportion():
    graph = sbm()
    y = graph.y.clone()
    y[:40] = -1  # not known
    graph = replace(graph, y=y)
    parts = divided(graph, 3)
    nodes = torch.cat([getattr(parts, name) for name in PARTS])
    assert nodes.sort().values.tolist() == list(range(40, 240))
    assert [len(getattr(parts, name)) for name in PARTS] == [24, 24, 152]  # a tenth of 240, twice
    assert graph.y[parts.train].bincount().tolist() == [6] * 4
    assert torch.equal(divided(graph, 3).train, parts.train)
    assert not torch.equal(divided(graph, 4).train, parts.train)


def test_words_are_where_features_are():
    assert torch.equal(words(sbm()), (sbm().dense() > 0).float())


def test_mistakes_are_said():
    graph = linked_by([(0, 1), (1, 2)], 4)
    one_way = replace(graph, edges=torch.tensor([[0], [1]]))
    loop = replace(graph, edges=torch.tensor([[2], [2]]))
    for call, message in [
        (lambda: adjacency(one_way), "the adjacency is not symmetric"),
        (lambda: adjacency(loop), "node 2 is linked to itself"),
        (lambda: relinked(graph, torch.full((4, 4), 0.5)), "no square matrix of 0 and 1"),
        (lambda: relinked(graph, torch.zeros(3, 4)), "no square matrix of 0 and 1"),
        (lambda: relinked(graph, torch.zeros(3, 3)), "an adjacency of 3 nodes for 4"),
        (lambda: divided(graph, 0, 0.5, 0.5), "train=0.5, validation=0.5"),
        (lambda: divided(graph, 0, 0.0), "train=0.0"),
        (lambda: divided(replace(graph, classes=3), 0), "class 2 has no nodes"),
    ]:
        with pytest.raises(BadInput, match=message):
            call()
