"""Metattack: the edges whose flips change a training most, by the gradient through that training.

Paper: Zuegner and Guennemann, "Adversarial Attacks on Graph Neural Networks via Meta Learning", ICLR 2019,
arXiv:1902.08412 (Meta-Self). The graph is poisoned before anyone trains on it. A surrogate, a GCN of two
layers without activations whose weights are merged, is trained by T steps on the classes Y of the training
nodes V, with p = softmax(Z W), Z = A^2 X, A = D^-1/2 (adjacency + I) D^-1/2:

    v <- m v + Z_V^T (p_V - Y) / |V| + c W,      W <- W - r v        (decay c, momentum m, rate r)

Then its loss on all other nodes, whose classes are guessed by the surrogate of the clean graph, is
differentiated with respect to the adjacency, through all T steps. The pairs with the largest
(d loss / d a_ij + d loss / d a_ji) (1 - 2 a_ij) are flipped, no pair twice, and all begins anew.

Differs from the paper: weights merged, X the rows of unit length in their leading principal directions (128),
so that the training is a few small products and one backward pass gives the exact meta-gradient; several
pairs are flipped in a round, at most two at each node; no test that degrees stay a power law. As in the
paper no flip takes a node's last edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.core.flips import EdgeFlips
from netweight.core.progress import doing
from netweight.data.edges import Poisoned, adjacency, affordable, flipped, words
from netweight.data.graphs import Graph

EACH = 2  # flips at a node in one round
CANDIDATES = 8  # rows whose best pair is looked at in a round, times the pairs it may flip


@dataclass(frozen=True)
class Surrogate:
    """What is trained inside: principal directions of the features, steps, rate, momentum, weight decay."""

    directions: int = 128
    steps: int = 60
    rate: float = 5.0
    momentum: float = 0.9
    decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.directions < 1 or self.steps < 1:
            raise BadInput(f"directions={self.directions}, steps={self.steps}: give at least one of each")
        if not self.rate > 0:
            raise BadInput(f"rate={self.rate}: the surrogate learns at a rate above 0; give for example 5")


@dataclass(frozen=True, eq=False)
class Known:
    """What the attacker has: features `n d`, training nodes and their classes as rows of 0 and 1, weights to
    start from `d classes`."""

    x: Float[Tensor, "n d"]
    train: Int64[Tensor, " m"]
    y: Float[Tensor, "m classes"]
    start: Float[Tensor, "d classes"]


def metattack(
    graph: Graph,
    within: EdgeFlips,
    *,
    seed: int = 0,
    round: int = 10,
    surrogate: Surrogate = Surrogate(),
) -> Poisoned:
    """The graph with exactly `within.k` pairs flipped, those found first being first.

    round: flips for each training of the surrogate. seed: of its first weights. Classes of nodes that do not
    train are not looked at. Raises `BadInput` for a graph that is not undirected, a class without training
    nodes, or a budget that is larger than what can be flipped.
    """
    if round < 1:
        raise BadInput(f"round={round}: a round flips at least one pair; give for example 10")
    matrix, n = adjacency(graph), graph.nodes
    affordable(graph, within.k, n * (n - 1) // 2, "pairs of nodes")
    known = attacker(graph, surrogate, seed)
    with torch.no_grad():
        z, _ = twice(matrix.to(known.x).to_sparse(), matrix.sum(1).to(known.x), known.x)
        guess = scores(z, known, surrogate).argmax(1)
    others = torch.ones(n, dtype=torch.bool, device=matrix.device)
    others[known.train] = False
    if not others.any():
        raise BadInput(f"{graph.name}: every node trains, so that none is left to attack; train on fewer")
    done, found = torch.zeros_like(matrix), []
    with doing("Metattack", within.k) as advance:
        while len(found) < within.k:
            gain = gains(matrix, known, guess, others, surrogate)
            picked = best(gain, matrix, done, min(round, within.k - len(found)))
            affordable(graph, within.k, len(found) + (within.k if picked else 0), "pairs that may be flipped")
            flips = torch.tensor(picked, device=matrix.device)
            matrix, done = flipped(matrix, flips), flipped(done, flips)
            found += picked
            advance(len(picked))
    return Poisoned(graph, torch.tensor(found, dtype=torch.int64).reshape(-1, 2))


def attacker(graph: Graph, surrogate: Surrogate, seed: int) -> Known:
    """Features, classes and first weights; raises `BadInput` for a class without training nodes."""
    y = F.one_hot(graph.y[graph.train].clamp(min=0), graph.classes).float()
    if (graph.y[graph.train] < 0).any() or not y.sum(0).all():
        raise BadInput(f"{graph.name}: a class has no training node, or one has no class; give some of each")
    x = principal(F.normalize(words(graph)), surrogate.directions)
    draw = torch.Generator().manual_seed(seed)
    spread = (6 / (x.shape[1] + graph.classes)) ** 0.5  # Glorot and Bengio 2010
    start = (torch.rand(x.shape[1], graph.classes, generator=draw) * 2 - 1) * spread
    return Known(x, graph.train, y.to(x), start.to(x))


def principal(x: Float[Tensor, "n width"], directions: int) -> Float[Tensor, "n d"]:
    """Rows of x in the directions of its largest singular values, at most as many as it has."""
    n, width = x.shape
    if width <= n:
        vectors = torch.linalg.eigh(x.T @ x).eigenvectors
        return x @ vectors[:, -directions:]
    values, vectors = torch.linalg.eigh(x @ x.T)
    return vectors[:, -directions:] * values[-directions:].clamp(min=0).sqrt()


# The meta-gradient ----------------------------------------------------------------------------------------


def twice(
    a: Tensor, degree: Float[Tensor, " n"], x: Float[Tensor, "n d"], *probes: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n d"], list[Float[Tensor, "n d"]]]:
    """Z of features x, and what the adjacency was multiplied by, twice. a: dense or sparse, without loops.

    probes: zeros that are added to the two products, to differentiate by.
    """
    root, seen = (degree + 1).rsqrt()[:, None], []
    for probe in probes or (0.0, 0.0):
        seen.append(root * x)
        x = root * (a @ seen[-1] + seen[-1] + probe)
    return x, seen


def scores(z: Float[Tensor, "n d"], known: Known, surrogate: Surrogate) -> Float[Tensor, "n classes"]:
    """Logits of all nodes after the surrogate's training on Z; differentiable in it."""
    seen, w, v = z[known.train], known.start, torch.zeros_like(known.start)
    for _ in range(surrogate.steps):
        wrong = (seen @ w).softmax(1) - known.y
        v = surrogate.momentum * v + seen.T @ wrong / len(seen) + surrogate.decay * w
        w = w - surrogate.rate * v
    return z @ w


def gains(
    matrix: Bool[Tensor, "n n"],
    known: Known,
    guess: Int64[Tensor, " n"],
    others: Bool[Tensor, " n"],
    surrogate: Surrogate,
) -> Float[Tensor, "n n"]:
    """How much the loss on `others` grows, to first order, when each pair is flipped; symmetric.

    The adjacency has its say in two products a u, and in the degrees. With g the gradient by what a product
    gives, and e that by the degrees, d loss / d a_ij = sum over products of g_i . u_j, plus e_i: the matrix
    itself is only multiplied as a sparse one.
    """
    a, degree = matrix.to(known.x).to_sparse(), matrix.sum(1).to(known.x).requires_grad_()
    probes = [torch.zeros_like(known.x, requires_grad=True) for _ in range(2)]
    z, seen = twice(a, degree, known.x, *probes)
    loss = F.cross_entropy(scores(z, known, surrogate)[others], guess[others])
    *by_product, by_degree = torch.autograd.grad(loss, [*probes, degree])
    slope = torch.cat(by_product, 1) @ torch.cat([u.detach() for u in seen], 1).T + by_degree[:, None]
    slope = slope + slope.T
    return torch.where(matrix, -slope, slope)


def best(
    gain: Float[Tensor, "n n"], matrix: Bool[Tensor, "n n"], done: Bool[Tensor, "n n"], count: int
) -> list[tuple[int, int]]:
    """Up to `count` pairs with the largest gains, at most `EACH` at a node, none `done`, no last edge taken.

    Looked at are the pairs that gain as much as the best of row number `CANDIDATES * count`: there may be
    fewer than `count` among them; none where nothing may be flipped.
    """
    n, degree = len(gain), matrix.sum(1).tolist()
    leaf = matrix.sum(1) <= 1
    never = done | (matrix & (leaf[:, None] | leaf)) | torch.ones_like(done).tril()
    upper = gain.masked_fill(never, -torch.inf)
    rows = upper.amax(1).topk(min(CANDIDATES * count, n)).values  # far cheaper than the largest of all pairs
    if rows[0] == -torch.inf:
        return []
    pairs = (upper >= rows[rows > -torch.inf][-1]).nonzero()
    order = upper[tuple(pairs.T)].argsort(descending=True, stable=True)
    used, found = [0] * n, []
    for a, b in pairs[order].tolist():
        way = -1 if matrix[a, b] else 1
        if len(found) == count:
            break
        if max(used[a], used[b]) >= EACH or (way < 0 and min(degree[a], degree[b]) <= 1):
            continue
        for node in (a, b):
            used[node] += 1
            degree[node] += way
        found.append((a, b))
    return found
