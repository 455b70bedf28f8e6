"""Attacks on edges: exactly the budget, the meta-gradient by finite differences, harm, mistakes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.attacks import metattack as module
from netweight.attacks.dice import dice
from netweight.attacks.metattack import Surrogate, attacker, best, gains, metattack, principal, scores
from netweight.attacks.random_edges import random_edges
from netweight.cli.attack import asked
from netweight.core.errors import BadInput
from netweight.core.flips import EdgeFlips
from netweight.data.edges import adjacency, divided, words
from netweight.data.graphs import Graph, sbm

SMALL = (2, 6, 8)  # 12 nodes
QUICK = Surrogate(8, 20)


def small(seed: int = 0) -> Graph:
    """12 nodes of 2 classes, two of each to train on."""
    graph = sbm(seed, (2, 15, 30))
    part = torch.zeros(30, dtype=torch.bool)
    part[:12] = True
    edges = graph.edges[:, part[graph.edges].all(0)]
    ring = torch.stack([torch.arange(12), (torch.arange(12) + 1) % 12])  # nobody is alone
    edges = torch.cat([edges, ring, ring.flip(0)], 1).unique(dim=1)
    stored = int(graph.offsets[12])
    return Graph(
        "small", edges, graph.offsets[:13], graph.columns[:stored], graph.values[:stored], 30, 2,
        graph.y[:12], torch.arange(4), torch.arange(4, 6), torch.arange(6, 12),
    )  # fmt: skip


ATTACKS = {
    "random": random_edges,
    "dice": dice,
    "metattack": lambda g, within, seed=0: metattack(g, within, seed=seed, round=3, surrogate=QUICK),
}


@pytest.mark.parametrize("name", ATTACKS)
@given(k=st.integers(0, 15), seed=st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_exactly_the_budget_of_pairs_differs_and_nobody_is_left_alone(name, k, seed):
    graph = small(seed)
    before, poisoned = adjacency(graph), ATTACKS[name](graph, EdgeFlips(k), seed=seed)
    after = adjacency(poisoned.graph)  # symmetric, 0 and 1, no loops, or it raises
    assert int((before ^ after).triu().sum()) == k == len(poisoned.flips)
    assert EdgeFlips(k).contains(after[None].int(), before[None].int()).all()
    assert after.any(1).all()
    assert (poisoned.flips[:, 0] < poisoned.flips[:, 1]).all()
    assert torch.equal(poisoned.flips, ATTACKS[name](graph, EdgeFlips(k), seed=seed).flips)
    assert torch.equal(poisoned.graph.dense(), graph.dense())
    first = poisoned.first(k // 2).graph
    assert int((before ^ adjacency(first)).triu().sum()) == k // 2


def test_random_edges_are_new_and_drawn_with_equal_odds():
    graph = small()
    before = adjacency(graph)
    free = int((~before).triu(1).sum())
    counts = torch.zeros(12, 12)
    for seed in range(300):
        a, b = random_edges(graph, EdgeFlips(5), seed=seed).flips.T
        assert not before[a, b].any()
        counts[a, b] += 1
    odds = counts[(~before).triu(1)] / 300
    assert (odds - 5 / free).abs().max() < 4 * (5 / free / 300) ** 0.5


def test_dice_takes_away_within_and_adds_between():
    graph = sbm()
    before, found = adjacency(graph), dice(graph, EdgeFlips(101), seed=1)
    a, b = found.flips.T
    gone, same = before[a, b], graph.y[a] == graph.y[b]
    assert torch.equal(gone, same)
    assert int(gone.sum()) == 50
    assert not torch.equal(found.flips, dice(graph, EdgeFlips(101), seed=2).flips)
    hidden = replace(graph, y=torch.where(torch.arange(240) < 200, -1, graph.y))
    assert dice(hidden, EdgeFlips(30)).flips.min() >= 200


def test_dice_takes_nobodys_last_edge():
    graph = small()
    chain = torch.tensor([[0, 2, 4, 1, 3], [2, 4, 6, 3, 5]])  # within a class; 0, 6, 1 and 5 have one edge
    ends = torch.tensor([[7, 9, 11, 8, 10], [9, 11, 7, 10, 8]])
    pairs = torch.cat([chain, ends], 1)
    graph = replace(graph, edges=torch.cat([pairs, pairs.flip(0)], 1).unique(dim=1))
    for seed in range(5):
        found = dice(graph, EdgeFlips(20), seed=seed)
        before, after = adjacency(graph), adjacency(found.graph)
        assert int((before ^ after).sum()) == 40 and int((before & ~after).sum()) > 0
        taken = before & ~after
        assert ((before & ~taken).sum(1) > 0).all()


def by_definition(a: torch.Tensor, known, surrogate: Surrogate) -> torch.Tensor:
    """Logits after the training, by autograd's own gradient of the training loss."""
    a = a + torch.eye(len(a), dtype=a.dtype)
    root = torch.diag(a.sum(1) ** -0.5)
    spread = root @ a @ root
    z = spread @ spread @ known.x
    w, v = known.start.clone().requires_grad_(), torch.zeros_like(known.start)
    for _ in range(surrogate.steps):
        loss = F.cross_entropy(z[known.train] @ w, known.y) + surrogate.decay / 2 * w.square().sum()
        (slope,) = torch.autograd.grad(loss, w)
        v = surrogate.momentum * v + slope
        w = (w - surrogate.rate * v).detach().requires_grad_()
    return (z @ w).detach()


@pytest.mark.parametrize("seed", range(3))
def test_the_meta_gradient_is_that_of_finite_differences(seed):
    graph, surrogate = small(seed), Surrogate(8, 15, rate=2.0, decay=1e-2)
    known = attacker(graph, surrogate, seed)
    known = type(known)(known.x.double(), known.train, known.y.double(), known.start.double())
    matrix, others = adjacency(graph), torch.arange(12) >= 4
    guess = by_definition(matrix.double(), known, surrogate).argmax(1)
    found = gains(matrix, known, guess, others, surrogate)

    def loss(a: torch.Tensor) -> float:
        return F.cross_entropy(by_definition(a, known, surrogate)[others], guess[others]).item()

    assert torch.equal(found, found.T)
    step = 1e-5
    for i, j in [(0, 1), (2, 9), (3, 4), (7, 11), (5, 6), (0, 10)]:
        move = torch.zeros(12, 12, dtype=torch.float64)
        move[i, j] = move[j, i] = step * (1 - 2 * float(matrix[i, j]))
        measured = (loss(matrix.double() + move) - loss(matrix.double() - move)) / (2 * step)
        assert found[i, j].item() == pytest.approx(measured, rel=1e-4, abs=1e-8)


def test_principal_directions_keep_the_products_that_matter():
    x = F.normalize(words(sbm(1)))
    values = torch.linalg.svdvals(x)
    for directions, flat in ((8, x), (8, x[:40]), (200, x), (200, x[:40])):  # wide and tall
        found = principal(flat, directions)
        values = torch.linalg.svdvals(flat)
        rest = values[directions:].square().max().item() if directions < len(values) else 0.0
        assert found.shape == (len(flat), min(directions, *flat.shape))
        off = torch.linalg.matrix_norm(found @ found.T - flat @ flat.T, 2)
        assert off.item() == pytest.approx(rest, abs=1e-4)


@given(seed=st.integers(0, 99), count=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_a_round_takes_the_best_pairs_but_two_at_a_node(seed, count):
    graph = small(seed % 3)
    matrix, n = adjacency(graph), 12
    gain = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    gain = gain + gain.T
    done = torch.zeros(n, n, dtype=torch.bool)
    done[0, 1] = done[1, 0] = True
    ranked = sorted((-gain[a, b].item(), a, b) for a in range(n) for b in range(a + 1, n))
    used, degree, wanted = [0] * n, matrix.sum(1).tolist(), []
    for _, a, b in ranked:
        alone = bool(matrix[a, b]) and min(degree[a], degree[b]) <= 1
        if (a, b) == (0, 1) or max(used[a], used[b]) >= 2 or alone or len(wanted) == count:
            continue
        for node in (a, b):
            used[node] += 1
            degree[node] += -1 if matrix[a, b] else 1
        wanted.append((a, b))
    found = best(gain, matrix, done, count)
    assert found == wanted[: len(found)] and found
    assert best(gain, matrix, torch.ones_like(done), count) == []


def test_metattack_harms_far_more_than_as_many_random_edges():
    graph = divided(sbm(0, (3, 40, 96)), 0)
    k = graph.edges.shape[1] // 2 // 4
    surrogate = Surrogate(32)

    def right(poisoned: Graph) -> float:
        known = attacker(poisoned, surrogate, 5)
        matrix = adjacency(poisoned).float()
        z, _ = module.twice(matrix, matrix.sum(1), known.x)
        logits = scores(z, known, surrogate)
        return float((logits.argmax(1) == poisoned.y)[poisoned.test].float().mean())

    attacked = metattack(graph, EdgeFlips(k), round=6, surrogate=surrogate).graph
    drawn = random_edges(graph, EdgeFlips(k)).graph
    assert right(attacked) < right(drawn) - 0.1
    blind = replace(graph, y=torch.full_like(graph.y, 0).index_put((graph.train,), graph.y[graph.train]))
    again = metattack(blind, EdgeFlips(k), round=6, surrogate=surrogate).graph
    assert torch.equal(again.edges, attacked.edges)  # no class of another node was looked at


def test_isolated_nodes_are_no_obstacle():
    graph = small()
    alone = replace(graph, edges=graph.edges[:, (graph.edges != 11).all(0)])
    for attack in ATTACKS.values():
        found = attack(alone, EdgeFlips(6)).graph
        assert int((adjacency(found) ^ adjacency(alone)).sum()) == 12


def test_mistakes_are_said():
    graph = small()
    one_way = replace(graph, edges=graph.edges[:, graph.edges[0] < graph.edges[1]])
    full = torch.triu_indices(12, 12, 1)
    complete = replace(graph, edges=torch.cat([full, full.flip(0)], 1))
    one_class = replace(graph, train=torch.arange(0, 12, 2))
    unknown = replace(graph, y=torch.where(torch.arange(12) == 1, -1, graph.y))
    for attack in ATTACKS.values():
        with pytest.raises(BadInput, match="not symmetric"):
            attack(one_way, EdgeFlips(1))
        with pytest.raises(BadInput, match="edgeflips=1000: small has no more than"):
            attack(graph, EdgeFlips(1000))
    for call, words_ in [
        (lambda: random_edges(complete, EdgeFlips(1)), "no more than 0 pairs of nodes without an edge"),
        (lambda: metattack(one_class, EdgeFlips(1)), "a class has no training node"),
        (lambda: metattack(unknown, EdgeFlips(1)), "or one has no class"),
        (lambda: metattack(replace(graph, train=torch.arange(12)), EdgeFlips(1)), "every node trains"),
        (lambda: metattack(graph, EdgeFlips(1), round=0), "round=0"),
        (lambda: Surrogate(steps=0), "steps=0"),
        (lambda: Surrogate(rate=0.0), "rate=0.0"),
        (lambda: metattack(complete, EdgeFlips(66)), "pairs that may be flipped"),
    ]:
        with pytest.raises(BadInput, match=words_):
            call()


def test_the_command_line_says_that_these_flip_edges():
    with pytest.raises(BadInput, match="dice flips edges of a graph, not inputs"):
        asked("dice", None, None)
