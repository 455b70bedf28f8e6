"""STABLE: representations learnt without classes say which edges of a poisoned graph to trust.

Paper: Li, Liu, Ao, Chi, Feng, Yang and He, "Reliable Representations Make A Stronger Defender: Unsupervised
Structure Refinement for Robust GNN", KDD 2022, arXiv:2207.00012.

1. Rough cleaning: an edge between nodes with words s, t is dropped if |s and t| / |s or t| < `jaccard`. Let
   C be the links kept, O those dropped.
2. Representations H = PReLU(A X W + b), X of words as 0 and 1, A the normalised C + beta I, are learnt by
   contrast (`Contrast`): two augmented graphs are C plus a random fifth of O each; s_i = sigmoid of the mean
   over nodes of the encoder on augmented graph i (normalised with one more self loop); positives h are rows
   of H, negatives h' the same with rows of X shuffled. With scores h^T M (s_1 + s_2) + 2 b the loss is the
   binary cross-entropy of h against 1 and h' against 0. It ends after `patience` epochs without a new lowest
   loss.
3. Refinement of the POISONED graph: an edge stays if cosine(H_u, H_v) > `cosine`; then each node hears the
   k most similar nodes among those with more than one edge left (one way, no self edge).
4. A GCN on H with the links (d_i d_j)^alpha (R + I)_ij, rows of sum 1 unless alpha = -0.5 (`by_degree`),
   weights of the epoch that is best on the validation nodes.

A node counts among its own k most similar ones, and the loop is dropped then, as in the official code: with
more than one edge left it hears k - 1 others. `PAPER` holds the paper's settings for rates of Metattack.

Differs from the paper: dropout stands before each product (`graph_block`), as in the GCN that it is held
against, not between the two alone. Nodes without words or without edges are like no other: similarity 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.data.edges import adjacency, relinked, words
from netweight.data.graphs import Graph
from netweight.models.gcn import RefinedGCN, Tail, Weighted, blocks, by_degree
from netweight.models.graph_block import Choice, GraphNetwork
from netweight.models.graph_sums import Edges
from netweight.models.trained import seeded
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.nodes import Best, at_once, digest, fit, graph_of
from netweight.training.trained import Trained, about


@dataclass(frozen=True)
class Stable:
    """Settings of `stable`.

    jaccard, cosine: thresholds of steps 1 and 3. neighbours: k. alpha: of step 4. beta: weight of self loops
    for the encoder, width: of H. recovered: share of the dropped edges in an augmented graph. epochs, rate,
    patience: of the contrast, by Adam.
    """

    jaccard: float = 0.03
    cosine: float = 0.25
    neighbours: int = 7
    alpha: float = 0.6
    beta: float = 2.0
    width: int = 512
    recovered: float = 0.2
    epochs: int = 1000
    rate: float = 1e-3
    patience: int = 20

    def __post_init__(self) -> None:
        for name in ("jaccard", "recovered"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name}={getattr(self, name)}: give a share from 0 to 1")
        if not -1 <= self.cosine <= 1:
            raise BadInput(f"cosine={self.cosine}: a cosine lies between -1 and 1")
        if self.neighbours < 0 or self.width < 1 or self.epochs < 1 or self.patience < 1:
            raise BadInput(
                f"neighbours={self.neighbours}, width={self.width}, epochs={self.epochs}, "
                f"patience={self.patience}: neighbours from 0 on, the others from 1 on"
            )
        if not (self.beta > 0 and self.rate > 0):
            raise BadInput(f"beta={self.beta}, rate={self.rate}: give numbers above 0")


PAPER = {  # data set: share of edges that Metattack flipped: settings
    "cora": {
        0.0: Stable(0.0, 0.1, 1, -0.5),
        0.05: Stable(0.03, 0.1, 5, -0.3),
        0.1: Stable(0.03, 0.1, 7, 0.3),
        0.15: Stable(0.03, 0.2, 7, 0.6),
        0.2: Stable(0.03, 0.25, 7, 0.6),
    },
    "citeseer": {
        0.0: Stable(0.0, 0.1, 3, -0.5),
        0.05: Stable(0.02, 0.1, 3, -0.3),
        0.1: Stable(0.02, 0.1, 5, -0.1),
        0.15: Stable(0.04, 0.1, 5, -0.1),
        0.2: Stable(0.03, 0.1, 5, 0.1),
    },
}


def stable(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: Stable = Stable(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A GCN on a refined form of the model's graph, trained on `task.train`; its features stay inputs.

    model: a `GraphNetwork` of GCN blocks on the poisoned graph; its graph, widths and dropout are taken, not
    its weights. how: of the GCN. Notes: edges, those dropped by step 1, one-way links of step 3 and links of
    the graph that are not among them, losses of the contrast, validation accuracy. Raises `DoesNotFit` for
    another network, for a class without training nodes and for data without nodes to train on and others to
    validate, `BadInput` for links that are not undirected.
    """
    graph = graph_of(model, task, "stable")
    hidden = widths(model)
    if missing := sorted({*range(graph.classes)} - {*task.train.y.tolist()}):
        raise DoesNotFit(
            f"{graph.name}: no training node is of class {missing[0]}; give one of each at least"
        )
    keep, device = about(keep, "stable", (settings, digest(graph))), next(model.parameters()).device
    linked = adjacency(graph)
    clean = linked & ~unlike(graph, linked, settings.jaccard)
    with seeded(how.seed):
        contrast = Contrast(graph, clean, linked & ~clean, settings, how.seed).to(device)
    found = learnt(contrast, task, how, settings, keep=keep and keep.part("contrast"))
    h = contrast.representations()
    heard = refined(linked.to(device), h, settings.cosine, settings.neighbours)
    links = by_degree(heard, settings.alpha, even=settings.alpha != -0.5)
    near = Edges(links.to, links.source, graph.nodes, links.weight[:, None])
    with seeded(how.seed):
        tail = Tail(blocks(settings.width, hidden, graph.classes, model.dropout), h, near).to(device)
    losses, score = fit(tail, task, how, keep=keep and keep.part("gcn"))
    network = joined(contrast, tail, graph, links, hidden, model.dropout)
    notes = {
        "edges": int(linked.sum()) // 2,
        "dropped_by_words": int((linked & ~clean).sum()) // 2,
        "links_heard": int(heard.sum()),
        "links_unheard": int((linked.to(device) & ~heard).sum()),
        "contrast_losses": list(found),
        "validation_accuracy": score,
    }
    return Trained(network, losses=losses, notes=notes)


def widths(model: GraphNetwork) -> tuple[int, ...]:
    """Widths of all blocks but the last; raises `DoesNotFit` where one is no block of a GCN."""
    last = len(model.choices) - 1
    for index, choice in enumerate(model.choices):
        wanted = (
            Choice(activation="none", width=choice.width) if index == last else Choice(width=choice.width)
        )
        if choice != wanted:
            raise DoesNotFit(
                f"blocks.{index}: {choice.attention}, {choice.aggregate}, {choice.activation} is no block "
                "of a GCN, in which stable ends; give by_hand('gcn', graph)"
            )
    return tuple(choice.width for choice in model.choices[:-1])


def joined(
    contrast: Contrast,
    tail: Tail,
    graph: Graph,
    links: Weighted,
    hidden: Sequence[int],
    dropout: float,
) -> RefinedGCN:
    """Encoder and blocks as one network, in evaluation mode."""
    encoder = contrast.weight.shape[0]
    c = contrast.links
    cleaned = replace(c, weight=c.weight * contrast.scale[c.source])  # the network takes features as they are
    network = RefinedGCN(graph, cleaned, links, width=encoder, hidden=hidden, dropout=dropout)
    network.to(contrast.weight.device)
    with torch.no_grad():
        network.encoder.linear.weight.copy_(contrast.weight)
        network.encoder.bias.copy_(contrast.bias)
        network.slope.copy_(contrast.slope)
    network.blocks.load_state_dict(tail.blocks.state_dict())
    return network.eval()


# 1. Rough cleaning ----------------------------------------------------------------------------------------


def unlike(graph: Graph, linked: Bool[Tensor, "n n"], threshold: float) -> Bool[Tensor, "n n"]:
    """True at the links whose words have a Jaccard similarity below the threshold; two empty nodes have 0."""
    to, source = linked.nonzero().T
    x = words(graph)
    both, count = (x[to] * x[source]).sum(1).double(), x.sum(1)
    either = count[to] + count[source] - both
    found = torch.zeros_like(linked)
    found[to, source] = both / either.clamp(min=1) < threshold
    return found


def jaccard(graph: Graph, threshold: float = 0.01) -> Graph:
    """The graph without the links whose words have less in common: the defence GCN-Jaccard, before its GCN.

    Source: Wu et al., "Adversarial Examples for Graph Data: Deep Insights into Attack and Defense", IJCAI
    2019, arXiv:1903.01610. Raises `BadInput` for links that are not undirected.
    """
    linked = adjacency(graph)
    return relinked(graph, linked & ~unlike(graph, linked, threshold))


# 2. Representations ---------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """A constant sparse matrix times a dense one; the transposed matrix is given, not made at each step."""

    @staticmethod
    def forward(ctx, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        """matrix @ dense."""
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[None, None, Tensor]:
        """transposed @ slope."""
        return None, None, ctx.transposed @ slope.contiguous()


class Contrast(nn.Module):
    """The encoder with its discriminator, on the cleaned graph and two augmented ones."""

    def __init__(
        self,
        graph: Graph,
        clean: Bool[Tensor, "n n"],
        dropped: Bool[Tensor, "n n"],
        settings: Stable,
        seed: int,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.width, graph.width))
        self.bias = nn.Parameter(torch.zeros(settings.width))
        self.slope = nn.Parameter(torch.tensor(0.25))
        self.match = nn.Parameter(torch.empty(settings.width, settings.width))
        self.offset = nn.Parameter(torch.zeros(()))
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.match.data[None])  # as a map to one number: the loss starts near ln 2
        self.links, self.scale = by_degree(clean, loop=settings.beta), as_words(graph)
        draw = torch.Generator().manual_seed(seed)
        self.augmented = [
            by_degree(recovering(clean, dropped, settings.recovered, draw), loop=settings.beta + 1)
            for _ in range(2)
        ]
        rows = torch.arange(graph.nodes).repeat_interleave(graph.offsets.diff())
        self.x = both_forms(
            Weighted(rows, graph.columns, graph.values * self.scale[rows]), (graph.nodes, graph.width)
        )
        shape = (graph.nodes, graph.nodes)
        self.spread = [both_forms(each, shape) for each in (self.links, *self.augmented)]

    def encoded(self, z: Float[Tensor, "n width"], on: int) -> Float[Tensor, "n width"]:
        """The encoder's output for z = X W on a graph: 0 cleaned, 1 and 2 augmented."""
        return F.prelu(Product.apply(*self.spread[on], z) + self.bias, self.slope)

    def forward(self, order: Int64[Tensor, " n"]) -> Float[Tensor, " 2n"]:
        """Scores of the positives, then of the negatives. order: of the rows of X for the negatives."""
        z = Product.apply(*self.x, self.weight.T)
        summary = sum(self.encoded(z, which).mean(0).sigmoid() for which in (1, 2))
        v = self.match @ summary
        return torch.cat([self.encoded(z, 0) @ v, self.encoded(z[order], 0) @ v]) + 2 * self.offset

    @torch.no_grad()
    def representations(self) -> Float[Tensor, "n width"]:
        """H."""
        return self.encoded(Product.apply(*self.x, self.weight.T), 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Contrast:
        """Move the matrices too: they are no buffers, since a checkpoint need not hold them."""
        super()._apply(fn, recurse)
        self.x, self.scale = tuple(map(fn, self.x)), fn(self.scale)
        self.links = moved(self.links, fn)
        self.spread = [tuple(map(fn, pair)) for pair in self.spread]
        return self


def as_words(graph: Graph) -> Float[Tensor, " n"]:
    """What each row of features is to be multiplied by for its values to be 1 in the mean."""
    rows = torch.arange(graph.nodes).repeat_interleave(graph.offsets.diff())
    total = torch.zeros(graph.nodes).index_add(0, rows, graph.values.abs())
    return torch.where(total > 0, graph.offsets.diff() / total.clamp(min=1e-30), 1.0)


def moved(links: Weighted, fn: Callable[[Tensor], Tensor]) -> Weighted:
    """The same links on the device that fn moves tensors to."""
    weight = fn(links.weight)
    return Weighted(links.to.to(weight.device), links.source.to(weight.device), weight)


def both_forms(links: Weighted, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The matrix and its transpose, sparse."""
    found = torch.sparse_coo_tensor(
        torch.stack([links.to, links.source]), links.weight, shape, check_invariants=True
    )
    return found.coalesce(), found.t().coalesce()


def recovering(
    clean: Bool[Tensor, "n n"], dropped: Bool[Tensor, "n n"], share: float, draw: torch.Generator
) -> Bool[Tensor, "n n"]:
    """The cleaned links and that share of the dropped ones, rounded down, drawn with equal odds."""
    pairs = dropped.triu(1).nonzero()
    taken = pairs[torch.randperm(len(pairs), generator=draw)[: int(share * len(pairs))]]
    found, (a, b) = clean.clone(), taken.T
    found[a, b] = found[b, a] = True
    return found


def learnt(
    contrast: Contrast, task: Task, how: Training, settings: Stable, *, keep: Checkpoint | None = None
) -> tuple[float, ...]:
    """Train the contrast in place; the loss of each epoch. The weights of the lowest loss are kept."""
    best = Best(contrast)

    def passes(run: Running, once: Callable[[], Tensor], at: Moment) -> Tensor:
        value = once()
        best.offer(run.model, -value, value)  # weights and loss are of the same moment
        return value

    def stop(losses: Sequence[float]) -> bool:
        return len(losses) - 1 - losses.index(min(losses)) >= settings.patience if losses else False

    hooks = Hooks(order=at_once(len(task.train)), passes=passes, state=best, stop=stop)
    plan = Training(settings.epochs, rate=settings.rate, clip=how.clip, seed=how.seed)
    losses = train(contrast, task.train, against_shuffled, plan, hooks=hooks, keep=keep)
    best.put_back(contrast)
    return losses


def against_shuffled(contrast: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
    """The loss of step 2, over all nodes; classes are not looked at."""
    n = contrast.spread[0][0].shape[0]
    order = torch.randperm(n, generator=at.generator).to(x.device)
    truth = torch.arange(2 * n, device=x.device) < n
    return F.binary_cross_entropy_with_logits(contrast(order).float(), truth.float())


# 3. Refinement --------------------------------------------------------------------------------------------


def refined(
    linked: Bool[Tensor, "n n"], h: Float[Tensor, "n width"], threshold: float, neighbours: int
) -> Bool[Tensor, "n n"]:
    """Links whose ends are more alike than the threshold, and the `neighbours` most similar of each row.

    Row i hears column j. A threshold of -1 drops nothing.
    """
    unit = F.normalize(h)
    alike = unit @ unit.T
    kept = linked & ((alike > threshold) | (threshold <= -1))
    trusted = kept.sum(1) > 1
    if neighbours and int(trusted.sum()) < neighbours:
        raise DoesNotFit(
            f"neighbours={neighbours}: {int(trusted.sum())} nodes have more than one edge left; give "
            "fewer, or a lower cosine"
        )
    if not neighbours:
        return kept
    nearest = torch.where(trusted, alike, -torch.inf).topk(neighbours, dim=1).indices
    found = kept.scatter(1, nearest, True)
    return found.fill_diagonal_(False)
