# ruff: noqa: B023, E741 - the formulas are written as in the papers, and used where they stand
"""Graph blocks: the formulas written out, lists against matrices, renumbered nodes, packed forms, files."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.compressed import Compressed, assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.data.graphs import Graph, both_ways, normalized, sbm, whole
from netweight.models import graph_block as module
from netweight.models.graph_block import Choice, GraphNetwork, by_hand, skeleton
from netweight.models.graph_parts import Parts, buffer_bits, each_block, rounded, shipped, weight_bits
from netweight.models.graph_sums import (
    ACTIVATIONS,
    AGGREGATES,
    ATTENTIONS,
    LEARNT,
    Edges,
    Table,
    coefficients,
    vectors_of,
)

N = 7


def tiny_graph(seed: int = 0) -> Graph:
    """7 nodes, the last without links; 5 features, 3 classes."""
    draw = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([(a, b) for a, b in itertools.combinations(range(N - 1), 2) if (3 * a + b) % 3])
    dense = (torch.rand(N, 5, generator=draw) < 0.6) * torch.rand(N, 5, generator=draw)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    values = normalized(offsets, dense[dense != 0])
    parts = torch.arange(N).split([3, 2, 2])
    return Graph(
        "tiny", both_ways(pairs.T), offsets, dense.nonzero()[:, 1], values, 5, 3, torch.arange(N) % 3, *parts
    )


def network(graph: Graph, *choices: Choice, seed: int = 0) -> GraphNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GraphNetwork(graph, choices).eval()


def linked(graph: Graph) -> list[list[int]]:
    found = [[node] for node in range(graph.nodes)]
    for to, source in graph.edges.T.tolist():
        found[to].append(source)
    return found


@torch.no_grad()
def by_definition(block, h, graph, choice):
    """The block of the head of the file, node by node and head by head."""
    heads = choice.heads
    z = (h @ block.linear.weight.T).reshape(len(h), heads, -1)
    l, r = (None if (v := block.vector(name)) is None else v for name in ("left", "right"))
    near, out = linked(graph), []
    for i in range(len(h)):
        row = []
        for k in range(heads):

            def leaky(a, b, k=k):
                v = float(l[k] @ z[a, k] + r[k] @ z[b, k])
                return v if v > 0 else 0.2 * v

            scores = {
                "const": lambda j: 1.0,
                "gcn": lambda j: (len(near[i]) * len(near[j])) ** -0.5,
                "gat": lambda j: leaky(i, j),
                "sym-gat": lambda j: leaky(i, j) + leaky(j, i),
                "cos": lambda j: float((l[k] * z[i, k]) @ (r[k] * z[j, k])),
                "linear": lambda j: math.tanh(float(r[k] @ z[j, k])),
                "gen-linear": lambda j: float(r[k] @ (z[i, k] + z[j, k]).tanh()),
            }
            e = [scores[choice.attention](j) for j in near[i]]
            if choice.attention in LEARNT:
                total = sum(math.exp(v) for v in e)
                e = [math.exp(v) / total for v in e]
            each = torch.stack([v * z[j, k] for v, j in zip(e, near[i])])
            row.append({"sum": each.sum(0), "mean": each.mean(0), "max": each.amax(0)}[choice.aggregate])
        out.append(torch.stack(row).mean(0) if block.last else torch.cat(row))
    found = torch.stack(out) + block.bias
    if block.shortcut is not None:
        found = found + h @ block.shortcut.weight.T
    return ACTIVATIONS[choice.activation](found)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_block_is_its_definition_on_lists_and_on_matrices(attention, aggregate):
    graph = tiny_graph()
    choices = Choice(attention, aggregate, "tanh", 8, 4, True), Choice(attention, aggregate, "none", 2, 2)
    model = network(graph, *choices)
    h = graph.dense()
    for block, choice in zip(model.blocks, choices):
        torch.nn.init.normal_(block.bias)
        h = by_definition(block, h, graph, choice)
    assert torch.allclose(model(torch.arange(N)), h, atol=1e-5)
    assert torch.allclose(model(whole(graph).x)[0], h, atol=1e-5)
    assert torch.equal(model(torch.tensor([5, 1])), model(torch.arange(N))[[5, 1]])


@given(
    order=st.permutations(range(N)), attention=st.sampled_from(ATTENTIONS), kind=st.sampled_from(AGGREGATES)
)
@settings(max_examples=30, deadline=None)
def test_renumbered_nodes_get_the_same_scores(order, attention, kind):
    graph, order = tiny_graph(), torch.tensor(order)
    place = order.argsort()  # the new number of each node
    h = graph.dense()[order]
    counts = (h != 0).sum(1)
    moved = Graph(
        "moved", both_ways(place[graph.edges]), torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        h.nonzero()[:, 1], h[h != 0], 5, 3, graph.y[order], graph.train, graph.validation, graph.test,
    )  # fmt: skip
    choices = Choice(attention, kind, "elu", 4, 2), Choice("gcn", "sum", "none")
    first, second = network(graph, *choices), network(moved, *choices)
    assert torch.allclose(first(order), second(torch.arange(N)), atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_of_links(attention):
    graph = tiny_graph()
    loops = torch.arange(N).expand(2, -1)
    near = Edges(*torch.cat([graph.edges, loops], 1), N)
    z, l, r = torch.randn(N, 2, 3), torch.randn(2, 3), torch.randn(2, 3)
    c = coefficients(attention, 40 * z, l, r, near)  # large scores do not overflow
    full = torch.zeros(N, N, c.shape[1]).index_put((near.to, near.source), c)
    if attention in LEARNT:
        assert torch.allclose(full.sum(1), torch.ones(N, 2), atol=1e-5) and (full >= 0).all()
    if attention == "gcn":
        a = torch.eye(N).index_put(tuple(graph.edges), torch.ones(()))
        d = torch.diag(a.sum(1) ** -0.5)
        assert torch.allclose(full[..., 0], d @ a @ d, atol=1e-6)
    linked_ = torch.zeros(N, N, dtype=torch.bool).index_put((near.to, near.source), torch.tensor(True))
    dense = coefficients(attention, 40 * z[None], l, r, Table(linked_))[0]
    assert torch.allclose(dense, full.permute(2, 0, 1).expand_as(dense), atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [Parts("ternary", "4", "8", "4.4", "2.6", "1.7", "8.8"), Parts("binary", "2", "ternary"), Parts()],
    ids=["all", "weights", "none"],
)
def test_what_is_trained_is_what_is_packed_saved_and_loaded(parts, tmp_path):
    graph = tiny_graph()
    model = network(graph, Choice("gat", "sum", "relu", 8, 2, True), Choice("linear", "mean", "none", 2, 2))
    trained = rounded(model, (parts, parts)).eval()
    plain, change = shipped(trained)
    small = assemble(plain, change, Plan({}))
    nodes = torch.arange(N)
    assert torch.equal(small(nodes), trained(nodes)) and torch.equal(small.plain()(nodes), trained(nodes))
    if any(vars(parts).values()):
        assert not torch.allclose(small(nodes), model(nodes), atol=1e-4)
    assert torch.allclose(small(whole(graph).x)[0], trained(nodes), atol=1e-4)
    small.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small")  # the graph came along
    assert torch.equal(loaded(nodes), small(nodes))
    if parts.linear == "ternary":
        codes = weight_bits(graph, model.choices, (parts, parts))
        assert codes <= small.bits() <= codes + 18 * 40 + 8 * 10  # steps of every row, whole bytes


def test_sizes_by_hand():
    graph = tiny_graph()
    links = graph.edges.shape[1] + N
    choices = Choice("gat", "sum", "relu", 8, 2, True), Choice("linear", "mean", "none", 2, 2)
    first, second = each_block(graph, choices)
    assert first == {
        "linear": 40, "shortcut": 40, "vectors": 16, "input": 35, "message": 56,
        "links": 2 * links, "sums": 56,
    }  # fmt: skip
    assert second == {"linear": 48, "vectors": 6, "input": 56, "message": 42, "links": 2 * links, "sums": 42}
    model = network(graph, *choices)
    weights = [p.numel() for name, p in model.named_parameters() if not name.endswith("bias")]
    assert weight_bits(graph, choices, (Parts(), Parts())) == 32 * sum(weights)
    parts = Parts.same("4", "4.4"), Parts.same("binary", "2.2")
    assert weight_bits(graph, choices, parts) == 4 * 96 + 54
    assert buffer_bits(graph, choices, parts) == max(8 * 91, 4 * 98)


def test_mistakes_are_said():
    graph = tiny_graph()
    model = network(graph, Choice(width=4))
    for call, kind, words in [
        (lambda: Choice("gta"), BadInput, "unknown attention 'gta'; did you mean 'gat'"),
        (lambda: Choice(width=6, heads=4), BadInput, "width=6, heads=4: give a width that the heads divide"),
        (lambda: GraphNetwork(graph, ()), BadInput, "needs a block at least"),
        (lambda: GraphNetwork(graph, (Choice(),), dropout=1.0), BadInput, "dropout=1.0"),
        (lambda: model(torch.rand(1, N, 4)), DoesNotFit, "7 nodes of 5; give features of every node"),
        (lambda: rounded(model, ()), DoesNotFit, "0 roundings do not fit 1 blocks"),
        (lambda: by_hand("gnc", graph), BadInput, "did you mean 'gcn'"),
        (lambda: skeleton("", {"graph.json": b"{}", "graph.npz": b"PK"}), BadInput, "do not describe"),
        (lambda: skeleton("", {}), BadInput, "do not describe a graph network"),
    ]:
        with pytest.raises(kind, match=words):
            call()


def test_a_graph_too_large_for_a_matrix_says_so(monkeypatch):
    monkeypatch.setattr(module, "MOST", 6)
    model = network(tiny_graph(), Choice(width=4))
    assert model(torch.arange(N)).shape == (N, 3)
    with pytest.raises(DoesNotFit, match="fit into no matrix"):
        model(torch.rand(1, N, 5))


def test_networks_by_hand_have_the_vectors_they_use():
    assert vectors_of("gcn") == () and vectors_of("linear") == ("right",) and len(vectors_of("cos")) == 2
    shapes = {name: len(list(by_hand(name, sbm()).parameters())) for name in ("gcn", "gat", "sage")}
    assert shapes == {"gcn": 4, "gat": 8, "sage": 6}
