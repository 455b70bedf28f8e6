"""Links by degree against their formula, the network on lists and matrices, files, and mistakes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.compressed import Change, Compressed, assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.data.edges import adjacency
from netweight.data.graphs import sbm, whole
from netweight.models import gcn as module
from netweight.models.gcn import RefinedGCN, Tail, by_degree, skeleton
from netweight.models.graph_sums import Edges

GRAPH = sbm(0, (3, 8, 24))
N = GRAPH.nodes


def network(seed: int = 0) -> RefinedGCN:
    linked = adjacency(GRAPH)
    one_way = linked.clone()
    one_way[0, 1:6] = True
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = RefinedGCN(
            GRAPH, by_degree(linked, loop=2.0), by_degree(one_way, 0.3, even=True), width=8, hidden=(6,)
        )
        with torch.no_grad():
            for p in (made.encoder.bias, made.slope, *(block.bias for block in made.blocks)):
                p.copy_(torch.randn(p.shape))
    return made.eval()


@given(
    seed=st.integers(0, 999),
    alpha=st.floats(-1, 1),
    loop=st.sampled_from([1.0, 2.0, 3.0]),
    even=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_links_by_degree_are_their_formula(seed, alpha, loop, even):
    linked = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)) < 0.3  # one way too
    linked.fill_diagonal_(False)
    before = linked.clone()
    found = by_degree(linked, alpha, loop, even=even).matrix(9)
    a = linked.double() + loop * torch.eye(9, dtype=torch.float64)
    d = torch.diag(a.sum(1) ** alpha)
    wanted = d @ a @ d
    if even:
        wanted = wanted / wanted.sum(1, keepdim=True)
        assert torch.allclose(found.sum(1), torch.ones(9), atol=1e-6)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(linked, before)


def test_alpha_of_minus_a_half_is_the_gcn():
    linked = adjacency(GRAPH)
    found = by_degree(linked)
    near = Edges(found.to, found.source, N)
    assert torch.allclose(found.weight, near.balanced()[:, 0])


@torch.no_grad()
def test_the_network_is_its_formula_on_lists_and_on_matrices():
    made = network()
    c, r = made.cleaned.matrix(N), made.refined.matrix(N)
    z = c @ GRAPH.dense() @ made.encoder.linear.weight.T + made.encoder.bias
    h = torch.where(z > 0, z, made.slope * z)
    assert torch.allclose(made.encode(), h, atol=1e-5) and (z < 0).any()
    first, second = made.blocks
    scores = torch.relu(r @ h @ first.linear.weight.T + first.bias)
    scores = r @ scores @ second.linear.weight.T + second.bias
    nodes = torch.arange(N)
    assert torch.allclose(made(nodes), scores, atol=1e-5)
    assert torch.allclose(made(whole(GRAPH).x)[0], scores, atol=1e-5)
    assert torch.equal(made(torch.tensor([5, 1])), made(nodes)[[5, 1]])
    tail = Tail(made.blocks, made.encode(), made.links("refined", matrix=False)).eval()
    assert torch.allclose(tail(nodes), scores, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    made = network()
    assemble(made, Change({}), Plan({})).save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small")
    assert torch.equal(loaded(torch.arange(N)), made(torch.arange(N)))


def test_mistakes_are_said(monkeypatch):
    made = network()
    files = dict(made.netweight_origin.files)
    wide = json.dumps({**json.loads(files["graph.json"]), "width": 10**9}).encode()
    for call, kind, words in [
        (lambda: by_degree(adjacency(GRAPH), loop=0.0), BadInput, "loop=0.0"),
        (lambda: made(torch.rand(1, N, 4)), DoesNotFit, "24 nodes of 24; give features of every node"),
        (lambda: skeleton("", {**files, "graph.json": wide}), BadInput, "a layer has up to"),
        (lambda: skeleton("", {}), BadInput, "do not describe a refined GCN"),
        (lambda: skeleton("", {**files, "graph.npz": b"PK"}), BadInput, "do not describe a refined GCN"),
    ]:
        with pytest.raises(kind, match=words):
            call()
    monkeypatch.setattr(module, "MOST", 6)
    assert made(torch.arange(N)).shape == (N, 3)
    with pytest.raises(DoesNotFit, match="fit into no matrix"):
        made(torch.rand(1, N, 24))
