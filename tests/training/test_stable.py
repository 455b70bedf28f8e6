"""STABLE: its steps against their definitions, the GCN as a special case, stops, files, mistakes."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight import pipeline
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.data.edges import adjacency, words
from netweight.data.graphs import Graph, judged, sbm, whole
from netweight.deployment import exports
from netweight.models.gcn import by_degree
from netweight.models.graph_block import by_hand
from netweight.models.graph_sums import Edges
from netweight.models.trained import seeded
from netweight.testing import tiny_model
from netweight.training import stable as module
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment
from netweight.training.settings import Training
from netweight.training.stable import (
    PAPER,
    Contrast,
    Stable,
    against_shuffled,
    as_words,
    jaccard,
    recovering,
    refined,
    stable,
    unlike,
)
from netweight.verification.bounds import bounds

GRAPH = sbm(0, (3, 20, 48))
HOW = Training(12, rate=0.02, decay=5e-4, seed=2)
SHORT = Stable(0.05, 0.1, 3, 0.3, width=8, epochs=15, rate=0.01)

FLOWS = Stable(0.05, 0.0, 3, -0.5, width=32, epochs=80, rate=0.003)


def contrast(seed: int = 0, share: float = 0.5, how: Stable = SHORT) -> Contrast:
    linked = adjacency(GRAPH)
    clean = linked & ~unlike(GRAPH, linked, 0.1)
    with seeded(seed):
        return Contrast(GRAPH, clean, linked & ~clean, replace(how, recovered=share), seed)


def moment(seed: int = 0) -> Moment:
    return Moment(0, 0, 1, torch.Generator().manual_seed(seed))


@given(threshold=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_rough_cleaning_is_jaccard_similarity(threshold):
    left = jaccard(GRAPH, threshold)
    said = [set(row.nonzero().flatten().tolist()) for row in GRAPH.dense()]
    wanted = [
        [a, b]
        for a, b in GRAPH.edges.T.tolist()
        if len(said[a] & said[b]) / len(said[a] | said[b]) >= threshold
    ]
    assert left.edges.T.tolist() == wanted


def test_a_threshold_of_nothing_drops_nothing_and_empty_nodes_are_like_no_other():
    assert torch.equal(jaccard(GRAPH, 0.0).edges, GRAPH.edges)
    rows = torch.arange(GRAPH.nodes).repeat_interleave(GRAPH.offsets.diff())
    some = rows >= 2  # nodes 0 and 1 have no words
    counts = torch.where(torch.arange(GRAPH.nodes) < 2, 0, GRAPH.offsets.diff())
    bare = replace(
        GRAPH,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        columns=GRAPH.columns[some],
        values=GRAPH.values[some],
        edges=torch.cat([GRAPH.edges, torch.tensor([[0, 1], [1, 0]])], 1).unique(dim=1),
    )
    assert torch.equal(jaccard(bare, 0.0).edges, bare.edges)
    assert not (jaccard(bare, 1e-6).edges < 2).any()
    assert as_words(bare).isfinite().all()


@given(seed=st.integers(0, 99), threshold=st.floats(-0.9, 0.9), k=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_refinement_is_its_definition(seed, threshold, k):
    draw = torch.Generator().manual_seed(seed)
    linked = (torch.rand(14, 14, generator=draw) < 0.5).triu(1)
    linked = linked | linked.T
    h = torch.randn(14, 3, generator=draw, dtype=torch.float64)
    cosine = F.cosine_similarity(h[:, None], h[None], dim=-1)
    kept = linked & (cosine > threshold)
    trusted = [node for node in range(14) if kept[node].sum() > 1]
    if len(trusted) < k:
        with pytest.raises(DoesNotFit, match=f"neighbours={k}"):
            refined(linked, h, threshold, k)
        return
    wanted = kept.clone()
    for node in range(14):
        for other in sorted(trusted, key=lambda j: -cosine[node, j])[:k]:
            wanted[node, other] = node != other
    assert torch.equal(refined(linked, h, threshold, k), wanted)


def test_without_refinement_the_links_are_those_of_the_gcn():
    linked = adjacency(GRAPH)
    heard = refined(linked, torch.randn(60, 4), -1.0, 0)
    links = by_degree(heard, -0.5)
    loops = torch.arange(60).expand(2, -1)
    near = Edges(*torch.cat([GRAPH.edges, loops], 1), 60)
    wanted = torch.zeros(60, 60).index_put((near.to, near.source), near.balanced()[:, 0])
    assert torch.allclose(links.matrix(60), wanted)


def test_the_contrast_is_its_formula_with_its_gradient():
    net, at = contrast().double(), moment(4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    w, b, m = net.weight, net.bias, net.match
    x = words(GRAPH).double()
    a, *more = (links.matrix(60).double() for links in (net.links, *net.augmented))

    def encoded(graph: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        z = graph @ x @ w.T + b
        return torch.where(z > 0, z, net.slope * z)

    s = [encoded(each, x).mean(0).sigmoid() for each in more]
    right, wrong = (
        h @ m @ s[0] + h @ m @ s[1] + 2 * net.offset for h in (encoded(a, x), encoded(a, x[order]))
    )
    wanted = -(right.sigmoid().log().sum() + (1 - wrong.sigmoid()).log().sum()) / 120
    slopes = torch.autograd.grad(wanted, [*net.parameters()])
    found = against_shuffled(net, torch.zeros(1), torch.zeros(1), at)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(found, [*net.parameters()]), slopes):
        assert torch.allclose(one.double(), other.double(), atol=1e-6)
    assert torch.allclose(net.representations(), encoded(a, x), atol=1e-6)


def test_the_loss_starts_near_ln_2_and_falls():
    values = [
        against_shuffled(contrast(s), torch.zeros(1), torch.zeros(1), moment(s)).item() for s in range(5)
    ]
    assert all(abs(value - math.log(2)) < 0.05 for value in values)
    losses = module.learnt(contrast(), judged(GRAPH), HOW, replace(SHORT, epochs=60))
    assert min(losses) < 0.6


def test_augmented_graphs_get_their_share_of_what_was_dropped_back():
    linked = adjacency(GRAPH)
    clean = linked & ~unlike(GRAPH, linked, 0.1)
    dropped = linked & ~clean
    for share in (0.0, 0.3, 1.0):
        found = recovering(clean, dropped, share, torch.Generator().manual_seed(1))
        more = found & ~clean
        assert torch.equal(found, found.T) and not (clean & ~found).any() and not (more & ~dropped).any()
        assert int(more.triu().sum()) == int(share * int(dropped.triu().sum()))
    first, second = contrast().augmented
    assert not torch.equal(first.matrix(60), second.matrix(60))
    loops = contrast(share=0.0).augmented[0].matrix(60)
    assert torch.allclose(loops, by_degree(clean, loop=SHORT.beta + 1).matrix(60))


def test_the_lowest_loss_ends_the_contrast():
    stop = Stable(patience=3)
    net = contrast()
    before = net.weight.detach().clone()
    losses = module.learnt(net, judged(GRAPH), HOW, replace(SHORT, epochs=400, rate=0.05, patience=3))
    assert len(losses) < 400 and losses.index(min(losses)) == len(losses) - 1 - stop.patience
    assert not torch.equal(net.weight, before)
    again = contrast()
    short = module.learnt(
        again, judged(GRAPH), HOW, replace(SHORT, epochs=losses.index(min(losses)) + 1, rate=0.05)
    )
    assert list(short) == list(losses[: len(short)])
    assert torch.equal(again.weight, net.weight)  # weights of that loss, not of the last step


def test_the_same_comes_twice_and_stops_change_nothing(tmp_path, monkeypatch):
    model, task = by_hand("gcn", GRAPH), judged(GRAPH)
    before = copy.deepcopy(model.state_dict())
    wholly = stable(model, task.blind(), HOW, SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    place = tmp_path / "run.pt"
    for what, stop in (("binary_cross_entropy_with_logits", 8), ("cross_entropy", 10)):
        real, calls = getattr(F, what), itertools.count()

        def stops(*args, real=real, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(F, what, stops)
        with pytest.raises(KeyboardInterrupt):
            stable(model, task, HOW, SHORT, keep=Checkpoint(place, resume=True))
        monkeypatch.setattr(F, what, real)
    again = stable(model, task, HOW, SHORT, keep=Checkpoint(place, resume=True))
    assert again.losses == wholly.losses and again.notes == wholly.notes
    assert torch.equal(again.network()(task.test.x), wholly.network()(task.test.x))
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        other = replace(SHORT, alpha=0.0)
        stable(model, task, HOW, other, keep=Checkpoint(place, resume=True))


def test_the_network_flows_on(tmp_path):
    graph = sbm()
    task = judged(graph)
    trained = stable(by_hand("gcn", graph), task, replace(HOW, epochs=60), FLOWS)
    small, nodes = trained.network(), task.test.x
    assert (small(nodes).argmax(1) == task.test.y).float().mean() > 0.7
    x, y = task.calibration.x, task.calibration.y
    assert trained.notes["validation_accuracy"] == pytest.approx(
        float((small(x).argmax(1) == y).double().mean())
    )
    small.save(tmp_path / "small")
    assert torch.equal(pipeline.load(tmp_path / "small")(nodes), small(nodes))
    assert any(row.question == "average" for row in pipeline.compare(by_hand("gcn", graph), small, task).rows)
    features = whole(graph)
    assert torch.allclose(small(features.x)[0, nodes], small(nodes), atol=1e-4)
    proven = bounds(small.plain(), features.x, Linf(0.001), method="ibp")
    for shift in (0.0, 0.001):
        there = small((features.x + shift).clamp(0, 1))
        assert (proven.lower <= there).all() and (there <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(small, Task(features, features), "onnx", tmp_path / "model.onnx")["same"]


def test_links_of_the_network_come_from_the_poisoned_graph_and_rows_sum_to_1():
    """Edges that the rough cleaning dropped may stay: refinement looks at the graph as it was given."""
    how = replace(SHORT, jaccard=0.15, cosine=-1.0, neighbours=0, epochs=2)
    found = stable(by_hand("gcn", GRAPH), judged(GRAPH), replace(HOW, epochs=1), how).model
    links, cleaned = found.refined.matrix(60), found.cleaned.matrix(60)
    loops = torch.eye(60, dtype=torch.bool)
    assert torch.equal(links != 0, adjacency(GRAPH) | loops)
    assert torch.equal(cleaned != 0, adjacency(jaccard(GRAPH, 0.15)) | loops)
    assert ((links != 0) & (cleaned == 0)).any()
    assert torch.allclose(links.sum(1), torch.ones(60), atol=1e-6)
    plain = stable(
        by_hand("gcn", GRAPH), judged(GRAPH), replace(HOW, epochs=1), replace(how, alpha=-0.5)
    ).model
    assert torch.allclose(plain.refined.matrix(60), by_degree(adjacency(GRAPH)).matrix(60))


def test_another_seed_gives_another_network():
    found = [
        stable(by_hand("gcn", GRAPH), judged(GRAPH), replace(HOW, epochs=1, seed=s), replace(SHORT, epochs=2))
        for s in (0, 1)
    ]
    one, other = (each.model.state_dict() for each in found)
    assert all(not torch.equal(one[name], other[name]) for name in one if name.endswith("linear.weight"))
    assert found[0].notes["contrast_losses"][1] != found[1].notes["contrast_losses"][1]


def without(graph: Graph, node: int) -> Graph:
    return replace(graph, edges=graph.edges[:, (graph.edges != node).all(0)])


def test_isolated_nodes_get_neighbours():
    graph = without(GRAPH, 59)
    trained = stable(by_hand("gcn", graph), judged(graph), HOW, SHORT)
    links = trained.model.refined
    assert (links.to == 59).sum() > 1
    assert trained.model(torch.arange(60)).isfinite().all()


def test_mistakes_are_said():
    task, model = judged(GRAPH), by_hand("gcn", GRAPH)
    few = Task(task.calibration, task.test, train=Data(torch.tensor([0, 3]), torch.tensor([0, 0])))
    one_way = replace(GRAPH, edges=GRAPH.edges[:, GRAPH.edges[0] < GRAPH.edges[1]])
    loop = replace(GRAPH, edges=torch.cat([GRAPH.edges, torch.tensor([[4], [4]])], 1))
    for call, kind, said in [
        (lambda: Stable(jaccard=1.5), BadInput, "jaccard=1.5"),
        (lambda: Stable(cosine=-2.0), BadInput, "cosine=-2.0"),
        (lambda: Stable(neighbours=-1), BadInput, "neighbours=-1"),
        (lambda: Stable(beta=0.0), BadInput, "beta=0.0"),
        (lambda: stable(tiny_model(), task, HOW, SHORT), DoesNotFit, "it holds no graph"),
        (lambda: stable(by_hand("gat", GRAPH), task, HOW, SHORT), DoesNotFit, "blocks.0: gat, sum, elu"),
        (lambda: stable(model, Task(task.test, task.test), HOW, SHORT), DoesNotFit, "nodes to train on"),
        (lambda: stable(model, few, HOW, SHORT), DoesNotFit, "no training node is of class 1"),
        (lambda: stable(by_hand("gcn", one_way), task, HOW, SHORT), BadInput, "is not symmetric"),
        (lambda: stable(by_hand("gcn", loop), task, HOW, SHORT), BadInput, "node 4 is linked to itself"),
        (lambda: stable(model, task, HOW, replace(SHORT, neighbours=61)), DoesNotFit, "neighbours=61"),
    ]:
        with pytest.raises(kind, match=said):
            call()


def test_the_settings_of_the_paper():
    assert PAPER["cora"][0.2] == Stable() == Stable(0.03, 0.25, 7, 0.6)
    assert [each.neighbours for each in PAPER["citeseer"].values()] == [3, 3, 5, 5, 5]
