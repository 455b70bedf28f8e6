"""Networks that classify the nodes of one graph: blocks of a product, attention, aggregation, activation.

    network = GraphNetwork(graph, (Choice(width=16), Choice()))       # a GCN of two blocks
    network(torch.tensor([3, 7]))              # scores of nodes 3 and 7, `b classes`
    network(features)                          # `b n width` float -> `b n classes`: all nodes, other features

Block k, with h the features of the nodes, N(i) the neighbours of node i and i itself, one sum per head:

    z = W h,    e_ij = coefficients (see `graph_sums`),    h'_i = act( agg_{j in N(i)} e_ij z_j + b + V h_i )

Heads are concatenated, in the last block averaged; V h is the shortcut, where there is one. GCN (Kipf and
Welling, ICLR 2017, arXiv:1609.02907), GAT (arXiv:1710.10903) and SAGE (arXiv:1706.02216) are choices.

Learning on one graph is transductive: the graph and its features are part of the network (not of its weights;
a folder keeps them in graph.npz), an example is the number of a node. Given features as floating point, the
same network runs on these instead, with the links as a matrix: that form is attacked, proven and exported.
Roundings stand at five places of a block: `input` (h), `message` (z), `links` (e), `sums` (what comes out of
agg), all of them `nn.Identity`, and the weights of `linear`, `shortcut`, `left` and `right`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.origin import Origin, mark
from netweight.data.graphs import Graph
from netweight.models.graph_sums import (
    ACTIVATIONS,
    AGGREGATES,
    ATTENTIONS,
    Edges,
    Links,
    Table,
    aggregated,
    coefficients,
    vectors_of,
)
from netweight.models.trained import seeded

TAPS = ("input", "message", "links", "sums")
MOST = 5000  # nodes of a graph whose links fit into a matrix


@dataclass(frozen=True)
class Choice:
    """What a block is made of. width: of its outputs, in a last block the classes; heads divide it."""

    attention: str = "gcn"
    aggregate: str = "sum"
    activation: str = "relu"
    width: int = 16
    heads: int = 1
    shortcut: bool = False

    def __post_init__(self) -> None:
        for what, known in (
            ("attention", ATTENTIONS),
            ("aggregate", AGGREGATES),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, what) not in known:
                raise unknown(what, getattr(self, what), known)
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise BadInput(f"width={self.width}, heads={self.heads}: give a width that the heads divide")


@dataclass(frozen=True, eq=False)
class Rows:
    """Sparse features `n width`: stored values of each row."""

    offsets: Int64[Tensor, " n1"]
    columns: Int64[Tensor, " stored"]
    values: Float[Tensor, " stored"]

    def times(self, weight: Float[Tensor, "out width"]) -> Float[Tensor, "n out"]:
        """The product with the transposed weight; gradients reach values and weight."""
        return F.embedding_bag(
            self.columns,
            weight.T.contiguous(),
            self.offsets,
            mode="sum",
            per_sample_weights=self.values,
            include_last_offset=True,
        )

    def with_values(self, values: Tensor) -> Rows:
        """The same places."""
        return Rows(self.offsets, self.columns, values)


def times(h: Rows | Tensor, weight: Tensor) -> Tensor:
    """h W^T of sparse or dense features."""
    return h.times(weight) if isinstance(h, Rows) else F.linear(h, weight)


class GraphBlock(nn.Module):
    """One block; see the module's head."""

    def __init__(self, before: int, choice: Choice, *, last: int = 0, dropout: float = 0.5) -> None:
        """before: features of a node. last: the number of classes in a last block, else 0."""
        super().__init__()
        self.choice, self.last, self.dropout = choice, bool(last), dropout
        each = last or choice.width // choice.heads
        for tap in TAPS:
            self.add_module(tap, nn.Identity())
        self.linear = nn.Linear(before, choice.heads * each, bias=False)
        for name in vectors_of(choice.attention):  # the product of each head with a vector of its own
            self.add_module(
                name, nn.Conv1d(choice.heads * each, choice.heads, 1, groups=choice.heads, bias=False)
            )
        self.shortcut = nn.Linear(before, last or choice.width, bias=False) if choice.shortcut else None
        self.bias = nn.Parameter(torch.zeros(last or choice.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights by Glorot and Bengio 2010, no bias."""
        nn.init.zeros_(self.bias)
        for layer in (self.linear, self.shortcut):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, h: Rows | Tensor, near: Links) -> Tensor:
        """Features of all nodes, `n out` or `b n out`."""
        h = h.with_values(self.input(h.values)) if isinstance(h, Rows) else self.input(h)
        h = dropped(h, self.dropout if self.training else 0.0)
        z = self.message(times(h, self.linear.weight)).unflatten(-1, (self.choice.heads, -1))
        left, right = (self.vector(name) for name in ("left", "right"))
        c = self.links(coefficients(self.choice.attention, z, left, right, near))
        out = self.sums(aggregated(self.choice.aggregate, c, z, near))
        out = (out.mean(-2) if self.last else out.flatten(-2)) + self.bias
        if self.shortcut is not None:
            out = out + times(h, self.shortcut.weight)
        return ACTIVATIONS[self.choice.activation](out)

    def vector(self, name: str) -> Tensor | None:
        """left or right, `heads d`; None where the attention has no use for it."""
        layer = getattr(self, name, None)
        return None if layer is None else layer.weight[..., 0]


def dropped(h: Rows | Tensor, share: float) -> Rows | Tensor:
    """That share of the features set to 0, the others scaled."""
    if not share:
        return h
    if isinstance(h, Rows):
        return h.with_values(F.dropout(h.values, share))
    return F.dropout(h, share)


class GraphNetwork(nn.Module):
    """Blocks on one graph; see the module's head."""

    def __init__(self, graph: Graph, choices: Sequence[Choice], *, dropout: float = 0.5) -> None:
        super().__init__()
        if not choices:
            raise BadInput("a graph network needs a block at least")
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout={dropout}: a share from 0 to below 1")
        self.graph, self.choices, self.dropout = graph, tuple(choices), dropout
        widths = [graph.width, *(choice.width for choice in choices[:-1])]
        last = [0] * (len(choices) - 1) + [graph.classes]
        self.blocks = nn.ModuleList(
            GraphBlock(before, choice, last=classes, dropout=dropout)
            for before, choice, classes in zip(widths, choices, last)
        )
        hold(self, graph)
        mark(self, Origin("graph", "", files_of(graph, self.choices, dropout)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the nodes numbered x, or of all nodes with the features x; see the module's head."""
        if x.is_floating_point():
            h, near = x, table(self)
            if x.shape[1:] != (self.graph.nodes, self.graph.width):
                raise DoesNotFit(
                    f"features of {tuple(x.shape[1:])} do not fit {self.graph.name}, which has "
                    f"{self.graph.nodes} nodes of {self.graph.width}; give features of every node"
                )
        else:
            h, near = rows(self), edges(self)
        for block in self.blocks:
            h = block(h, near)
        return h if x.is_floating_point() else h[x]


# The graph inside a network -------------------------------------------------------------------------------


def hold(network: nn.Module, graph: Graph) -> None:
    """Keep the graph in buffers that follow the device and are no part of the weights."""
    loops = torch.arange(graph.nodes, device=graph.edges.device).expand(2, -1)
    linked = torch.cat([graph.edges, loops], 1)
    parts = {"edges": linked, "offsets": graph.offsets, "columns": graph.columns, "values": graph.values}
    for name, tensor in parts.items():
        network.register_buffer(name, tensor, persistent=False)


def edges(network: nn.Module) -> Edges:
    """The links as a list."""
    return Edges(*network.edges, network.graph.nodes)


def rows(network: nn.Module) -> Rows:
    """The features as they are stored."""
    return Rows(network.offsets, network.columns, network.values)


def table(network: nn.Module) -> Table:
    """The links as a matrix; raises `DoesNotFit` for a graph that is too large for one."""
    n = network.graph.nodes
    if n > MOST:
        raise DoesNotFit(
            f"{network.graph.name}: the links of {n} nodes fit into no matrix (up to {MOST}); give node "
            "numbers, or a smaller graph"
        )
    to, source = network.edges
    linked = torch.zeros(n, n, dtype=torch.bool, device=to.device)
    return Table(linked.index_put((to, source), torch.ones((), dtype=torch.bool, device=to.device)))


def files_of(graph: Graph, choices: Sequence[Choice], dropout: float) -> dict[str, bytes]:
    """Graph and blocks as the files that travel with the weights."""
    arrays = {f.name: getattr(graph, f.name) for f in fields(graph)}
    content = io.BytesIO()
    np.savez_compressed(content, **{k: v.cpu().numpy() for k, v in arrays.items() if isinstance(v, Tensor)})
    said = {k: v for k, v in arrays.items() if not isinstance(v, Tensor)}
    said |= {"dropout": dropout, "blocks": [asdict(choice) for choice in choices]}
    return {"graph.npz": content.getvalue(), "graph.json": json.dumps(said).encode()}


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The network that `files_of` described, with random weights; raises `BadInput` for damaged files."""
    try:
        said = json.loads(files["graph.json"])
        with np.load(io.BytesIO(files["graph.npz"]), allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        choices = [Choice(**each) for each in said.pop("blocks")]
        dropout = float(said.pop("dropout"))
        return GraphNetwork(Graph(**said, **tensors), choices, dropout=dropout).eval()
    except BadInput:
        raise
    except Exception as error:  # a damaged archive makes numpy raise anything
        raise BadInput(f"graph.npz, graph.json: they do not describe a graph network ({error})") from error


# Networks by hand -----------------------------------------------------------------------------------------


def by_hand(name: str, graph: Graph, *, seed: int = 0) -> GraphNetwork:
    """gcn (16 wide), gat (8 heads of 8, then one) or sage (mean, shortcut, 16 wide); random weights."""
    known = {
        "gcn": (Choice(), Choice(activation="none")),
        "gat": (
            Choice("gat", "sum", "elu", 64, 8),
            Choice("gat", "sum", "none"),
        ),
        "sage": (Choice("const", "mean", shortcut=True), Choice("const", "mean", "none", shortcut=True)),
    }
    if name not in known:
        raise unknown("graph network", name, known)
    with seeded(seed):
        return GraphNetwork(graph, known[name]).eval()
