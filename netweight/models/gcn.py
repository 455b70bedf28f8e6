"""A GCN on representations of nodes: an encoder on one set of links, then blocks on another, with weights.

    network = RefinedGCN(graph, cleaned, refined, hidden=(16,))
    network(torch.tensor([3, 7]))              # scores of nodes 3 and 7, `b classes`
    network(features)                          # `b n width` float -> `b n classes`: all nodes, other features

    H = PReLU(C X W + b),        h_0 = H,        h_k = act(R h_{k-1} W_k + b_k)

X are the features of the graph, C and R weighted links (`Weighted`), act is the ReLU, in the last block
nothing. Encoder and blocks are those of `graph_block` (its roundings stand at the same places), with weights
of links that are given. GCN: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional
Networks", ICLR 2017, arXiv:1609.02907. What the links are is up to the method (`training.stable`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.origin import Origin, mark
from netweight.data.edges import MOST
from netweight.data.graphs import Graph
from netweight.models.graph_block import Choice, GraphBlock, Rows
from netweight.models.graph_sums import Edges, Table

LARGEST = 1 << 28  # weights of a layer: a description from outside cannot take all memory


@dataclass(frozen=True, eq=False)
class Weighted:
    """Links with weights: a sparse matrix `n n`. to, source: rows and columns; weight: float32."""

    to: Int64[Tensor, " e"]
    source: Int64[Tensor, " e"]
    weight: Float[Tensor, " e"]

    def matrix(self, n: int) -> Float[Tensor, "n n"]:
        """With its zeros."""
        return self.weight.new_zeros(n, n).index_put((self.to, self.source), self.weight)


def by_degree(
    linked: Bool[Tensor, "n n"], alpha: float = -0.5, loop: float = 1.0, *, even: bool = False
) -> Weighted:
    """(d_i d_j)^alpha a_ij, a the links with `loop` on the diagonal, d_i the sum of row i of a.

    Row i hears column j; the links need not be symmetric. alpha = -0.5 is the GCN; above it neighbours with
    many links count for more. even: each row divided by its sum. Raises `BadInput` for a loop that is not
    above 0.
    """
    if not loop > 0:
        raise BadInput(f"loop={loop}: a node hears itself with a weight above 0; give for example 1")
    a = linked.double()
    a.fill_diagonal_(loop)
    to, source = a.nonzero().T
    d = a.sum(1)
    weight = a[to, source] * (d[to] * d[source]) ** alpha
    if even:
        weight = weight / torch.zeros_like(d).index_add(0, to, weight)[to]
    return Weighted(to, source, weight.float())


class RefinedGCN(nn.Module):
    """See the module's head."""

    def __init__(
        self,
        graph: Graph,
        cleaned: Weighted,
        refined: Weighted,
        *,
        width: int = 512,
        hidden: Sequence[int] = (16,),
        dropout: float = 0.5,
    ) -> None:
        """width: of H. hidden: widths of the blocks but the last. dropout: of the blocks, in training."""
        super().__init__()
        self.graph, self.cleaned, self.refined = graph, cleaned, refined
        self.encoder = GraphBlock(graph.width, Choice(activation="none", width=width), dropout=0.0)
        self.slope = nn.Parameter(torch.tensor(0.25))
        self.blocks = blocks(width, hidden, graph.classes, dropout)
        for name, links in (("cleaned", cleaned), ("refined", refined)):
            for field in fields(links):
                self.register_buffer(f"{name}_{field.name}", getattr(links, field.name), persistent=False)
        for name in ("offsets", "columns", "values"):
            self.register_buffer(f"features_{name}", getattr(graph, name), persistent=False)
        said = {"width": width, "hidden": list(hidden), "dropout": dropout}
        mark(self, Origin("refined graph", "", files_of(self, said)))

    def links(self, name: str, *, matrix: bool) -> Edges | Table:
        """cleaned or refined, as a list or as a matrix."""
        to, source, weight = (getattr(self, f"{name}_{field}") for field in ("to", "source", "weight"))
        n = self.graph.nodes
        if not matrix:
            return Edges(to, source, n, weight[:, None])
        if n > MOST:
            raise DoesNotFit(
                f"{self.graph.name}: the links of {n} nodes fit into no matrix (up to {MOST}); give node "
                "numbers, or a smaller graph"
            )
        given = Weighted(to, source, weight).matrix(n)
        return Table(given != 0, given)

    def encode(self, x: Tensor | None = None) -> Tensor:
        """H of all nodes, `n width`; of features x `b n in`, `b n width`."""
        if x is None:
            h: Rows | Tensor = Rows(self.features_offsets, self.features_columns, self.features_values)
        elif x.shape[1:] == (self.graph.nodes, self.graph.width):
            h = x
        else:
            raise DoesNotFit(
                f"features of {tuple(x.shape[1:])} do not fit {self.graph.name}, which has "
                f"{self.graph.nodes} nodes of {self.graph.width}; give features of every node"
            )
        z = self.encoder(h, self.links("cleaned", matrix=x is not None))
        return torch.relu(z) - self.slope * torch.relu(-z)  # PReLU in operators that every bound knows

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the nodes numbered x, or of all nodes with the features x; see the module's head."""
        given = x.is_floating_point()
        h, near = self.encode(x if given else None), self.links("refined", matrix=given)
        for block in self.blocks:
            h = block(h, near)
        return h if given else h[x]


def blocks(width: int, hidden: Sequence[int], classes: int, dropout: float) -> nn.ModuleList:
    """Blocks of a GCN: ReLU after each but the last."""
    widths = [width, *hidden]
    made = [GraphBlock(before, Choice(width=after), dropout=dropout) for before, after in zip(widths, hidden)]
    last = GraphBlock(widths[-1], Choice(activation="none"), last=classes, dropout=dropout)
    return nn.ModuleList([*made, last])


class Tail(nn.Module):
    """The blocks alone, on representations that stay as they are: what is trained last."""

    def __init__(self, blocks: nn.ModuleList, h: Float[Tensor, "n width"], near: Edges) -> None:
        super().__init__()
        self.blocks, self.count = blocks, near.count
        for name, tensor in (
            ("h", h),
            ("heard", torch.stack([near.to, near.source])),
            ("weight", near.given),
        ):
            self.register_buffer(name, tensor)

    def forward(self, x: Int64[Tensor, " b"]) -> Float[Tensor, "b classes"]:
        """Scores of the nodes numbered x."""
        h, near = self.h, Edges(*self.heard, self.count, self.weight)
        for block in self.blocks:
            h = block(h, near)
        return h[x]


# Files ----------------------------------------------------------------------------------------------------


def files_of(network: RefinedGCN, said: Mapping[str, object]) -> dict[str, bytes]:
    """Graph and links as the files that travel with the weights."""
    graph = {f.name: getattr(network.graph, f.name) for f in fields(network.graph)}
    arrays = {name: each for name, each in graph.items() if isinstance(each, Tensor)}
    for name in ("cleaned", "refined"):
        links = getattr(network, name)
        arrays |= {f"{name}_{f.name}": getattr(links, f.name) for f in fields(links)}
    content = io.BytesIO()
    np.savez_compressed(content, **{name: each.cpu().numpy() for name, each in arrays.items()})
    plain = {name: each for name, each in graph.items() if name not in arrays}
    return {"graph.npz": content.getvalue(), "graph.json": json.dumps({**plain, "network": said}).encode()}


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The network that `files_of` described, with random weights; raises `BadInput` for damaged files."""
    try:
        said = json.loads(files["graph.json"])
        with np.load(io.BytesIO(files["graph.npz"]), allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        links = [
            Weighted(**{f.name: tensors.pop(f"{name}_{f.name}") for f in fields(Weighted)})
            for name in ("cleaned", "refined")
        ]
        sizes = said.pop("network")
        graph = Graph(**said, **tensors)
        if max(graph.width, *sizes["hidden"]) * sizes["width"] > LARGEST:
            raise BadInput(f"graph.json: {sizes}: a layer has up to {LARGEST} weights; save it again")
        for each in links:
            ends = torch.cat([each.to, each.source])
            if not 0 <= int(ends.min()) <= int(ends.max()) < graph.nodes:
                raise BadInput(f"graph.npz: links go past node {graph.nodes - 1}; save the network again")
        return RefinedGCN(graph, *links, **sizes).eval()
    except BadInput:
        raise
    except Exception as error:  # a damaged archive makes numpy raise anything
        raise BadInput(f"graph.npz, graph.json: they do not describe a refined GCN ({error})") from error
