"""Graphs: links once and both ways, rows that add up, splits that share no node, and damaged files."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.data import files, graphs
from netweight.data.shared import shared_data

HERE = shared_data() is not None
KNOWN = ["sbm", *(["cora", "citeseer"] if HERE else [])]


@pytest.mark.parametrize("name", KNOWN)
def test_links_go_both_ways_once_and_rows_add_up(name):
    graph = graphs.load(name)
    links = {tuple(edge) for edge in graph.edges.T.tolist()}
    assert len(links) == graph.edges.shape[1]
    assert all(a != b and (b, a) in links for a, b in links)
    total = graph.dense().sum(1)
    full = graph.offsets.diff() > 0
    assert torch.allclose(total[full], torch.ones(int(full.sum())), atol=1e-5) and not total[~full].any()


@pytest.mark.parametrize("name", KNOWN)
def test_splits_share_no_node_and_every_node_of_them_has_a_class(name):
    graph = graphs.load(name)
    nodes = torch.cat([graph.train, graph.validation, graph.test])
    assert len(nodes.unique()) == len(nodes) and (graph.y[nodes] >= 0).all()
    task = graphs.judged(graph)
    assert torch.equal(task.train.y, graph.y[graph.train]) and torch.equal(task.test.x, graph.test)
    split = files.load(name)
    assert torch.equal(split.train.x, graph.train) and torch.equal(split.calibration.x, graph.validation)


@pytest.mark.skipif(not HERE, reason="the data folder is not here")
def test_the_papers_are_all_there():
    cora, citeseer = graphs.cora(), graphs.citeseer()
    assert (cora.nodes, cora.width, cora.classes, cora.edges.shape[1]) == (2708, 1433, 7, 2 * 5278)
    assert (citeseer.nodes, citeseer.width, citeseer.classes, citeseer.edges.shape[1]) == (
        3327,
        3703,
        6,
        9104,
    )
    assert int((citeseer.offsets.diff() == 0).sum()) == 15  # isolated papers without words
    assert [len(part) for part in (cora.train, cora.validation, cora.test)] == [140, 500, 500]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_doubled_links_and_loops_are_dropped(pairs):
    edges = graphs.both_ways(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)
    wanted = {(a, b) for a, b in pairs if a != b} | {(b, a) for a, b in pairs if a != b}
    assert sorted(wanted) == [tuple(edge) for edge in edges.T.tolist()]


def test_the_block_model_is_the_same_twice_and_links_within_classes():
    first, second = graphs.sbm(), graphs.sbm()
    assert torch.equal(first.edges, second.edges) and torch.equal(first.columns, second.columns)
    assert not torch.equal(first.edges.shape and first.columns, graphs.sbm(1).columns)
    to, source = first.edges
    assert (first.y[to] == first.y[source]).float().mean() > 0.6


def test_mistakes_are_said():
    graph = graphs.sbm()
    for change, words in [
        ({"offsets": graph.offsets[:-1]}, "row offsets do not fit 240 nodes"),
        ({"columns": graph.columns[:-1]}, "columns for 2880 values"),
        ({"columns": graph.columns + 96}, "feature numbers go past 95"),
        ({"edges": graph.edges - 1}, "node numbers go past 239"),
        ({"values": graph.values * torch.nan}, "the features hold NaN or Inf"),
    ]:
        with pytest.raises(BadInput, match=words):
            replace(graph, **change)
