"""What a node gathers from its neighbours and itself: weights of the links, and sums over them.

Links are kept either as a list (`Edges`, for training: a link costs what it costs) or as a matrix (`Table`,
for exports and proofs: products, softmax and maximum of dense tensors). Both give the same numbers but for
the order of sums. Each node is its own neighbour. Values z are `n heads d` on a list, `b n heads d` on a
matrix; weights c of the links are `e heads` on a list, `b heads n n` (to, from) on a matrix, where heads
and b may be 1.

    const     c_ij = 1                            gcn       c_ij = 1 / sqrt(d_i d_j), d with the node itself
    gat       LeakyReLU(l.z_i + r.z_j)            sym-gat   the sum of gat's for ij and for ji
    cos       (l * z_i) . (r * z_j)               linear    tanh(r . z_j)
    gen-linear  r . tanh(z_i + z_j)

The last five become weights by a softmax over the neighbours j of i (Velickovic et al., "Graph Attention
Networks", ICLR 2018, arXiv:1710.10903; the list is that of Gao et al., "GraphNAS", 2019, arXiv:1904.09981).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from netweight.core.errors import unknown

NEVER = -1e9  # its exponential is 0
SLOPE = 0.2  # of the leaky ReLU of attention


@dataclass(frozen=True, eq=False)
class Edges:
    """to, source: node numbers of every link, loops included. count: nodes.

    given: weights of the links, `e 1`, in place of those of gcn; None for none.
    """

    to: Int64[Tensor, " e"]
    source: Int64[Tensor, " e"]
    count: int
    given: Float[Tensor, "e 1"] | None = None

    @property
    def degree(self) -> Tensor:
        """Neighbours of each node, `n 1 1`."""
        return torch.bincount(self.to, minlength=self.count).float().reshape(-1, 1, 1)

    def ones(self) -> Tensor:
        """1 for every link."""
        return torch.ones(len(self.to), 1, device=self.to.device)

    def balanced(self) -> Tensor:
        """1 / sqrt(d_i d_j), or the weights given."""
        if self.given is not None:
            return self.given
        root = self.degree[:, :, 0].rsqrt()
        return root[self.to] * root[self.source]

    def pair(self, left: Tensor, right: Tensor) -> Tensor:
        """left_i + right_j, from `n heads`."""
        return left[self.to] + right[self.source]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left_i . right_j, from `n heads d`."""
        return (left[self.to] * right[self.source]).sum(-1)

    def bent(self, z: Tensor, by: Tensor) -> Tensor:
        """by . tanh(z_i + z_j); by is `heads d`."""
        return ((z[self.to] + z[self.source]).tanh() * by).sum(-1)

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the links to the same node."""
        place = self.to[:, None].expand_as(scores)
        most = scores.new_full((self.count, scores.shape[1]), -torch.inf)
        most = most.scatter_reduce(0, place, scores.detach(), "amax")
        grown = (scores - most[self.to]).exp()
        total = grown.new_zeros(self.count, scores.shape[1]).index_add(0, self.to, grown)
        return grown / total[self.to]

    def sum(self, c: Tensor, z: Tensor) -> Tensor:
        """sum_j c_ij z_j."""
        return torch.zeros_like(z).index_add(0, self.to, c.unsqueeze(-1) * z[self.source])

    def largest(self, c: Tensor, z: Tensor) -> Tensor:
        """max_j c_ij z_j."""
        found = c.unsqueeze(-1) * z[self.source]
        place = self.to[:, None, None].expand_as(found)
        return torch.zeros_like(z).scatter_reduce(0, place, found, "amax", include_self=False)


@dataclass(frozen=True, eq=False)
class Table:
    """linked: `n n`, whether the row's node hears the column's; the diagonal is True.

    given: weights of the links, `n n`, 0 where there is none, in place of those of gcn; None for none.
    """

    linked: Bool[Tensor, "n n"]
    given: Float[Tensor, "n n"] | None = None

    @property
    def degree(self) -> Tensor:
        """Neighbours of each node, `n 1 1`."""
        return self.linked.sum(1).float().reshape(-1, 1, 1)

    def ones(self) -> Tensor:
        """1 for every link."""
        return self.linked.float()[None, None]

    def balanced(self) -> Tensor:
        """1 / sqrt(d_i d_j), or the weights given."""
        if self.given is not None:
            return self.given[None, None]
        root = self.degree[:, :, 0].rsqrt()
        return self.ones() * (root * root.T)

    def pair(self, left: Tensor, right: Tensor) -> Tensor:
        """left_i + right_j, from `b n heads`."""
        return left.transpose(-1, -2).unsqueeze(-1) + right.transpose(-1, -2).unsqueeze(-2)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left_i . right_j, from `b n heads d`."""
        return left.transpose(-2, -3) @ right.transpose(-2, -3).transpose(-1, -2)

    def bent(self, z: Tensor, by: Tensor) -> Tensor:
        """by . tanh(z_i + z_j); by is `heads d`."""
        both = (z.unsqueeze(-3) + z.unsqueeze(-4)).tanh()  # b n n heads d
        return (both * by).sum(-1).permute(0, 3, 1, 2)

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the links to the same node."""
        return torch.where(self.linked, scores, NEVER).softmax(-1)

    def sum(self, c: Tensor, z: Tensor) -> Tensor:
        """sum_j c_ij z_j."""
        return (c @ z.transpose(-2, -3)).transpose(-2, -3)

    def largest(self, c: Tensor, z: Tensor) -> Tensor:
        """max_j c_ij z_j."""
        found = c.unsqueeze(-1) * z.transpose(-2, -3).unsqueeze(-3)  # b heads n n d
        return torch.where(self.linked[..., None], found, NEVER).amax(-2).transpose(-2, -3)


Links = Edges | Table


def _gat(z: Tensor, left: Tensor, right: Tensor, near: Links) -> Tensor:
    return F.leaky_relu(near.pair((z * left).sum(-1), (z * right).sum(-1)), SLOPE)


def _symmetric(z: Tensor, left: Tensor, right: Tensor, near: Links) -> Tensor:
    return _gat(z, left, right, near) + _gat(z, right, left, near)


def _cosine(z: Tensor, left: Tensor, right: Tensor, near: Links) -> Tensor:
    return near.product(z * left, z * right)


def _linear(z: Tensor, left: Tensor, right: Tensor, near: Links) -> Tensor:
    score = (z * right).sum(-1)
    return near.pair(torch.zeros_like(score), score.tanh())


def _generalized(z: Tensor, left: Tensor, right: Tensor, near: Links) -> Tensor:
    return near.bent(z, right)


LEARNT: dict[str, Callable[[Tensor, Tensor, Tensor, Links], Tensor]] = {
    "gat": _gat,
    "sym-gat": _symmetric,
    "cos": _cosine,
    "linear": _linear,
    "gen-linear": _generalized,
}
ATTENTIONS = ("const", "gcn", *LEARNT)
AGGREGATES = ("sum", "mean", "max")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "relu": torch.relu,
    "leaky-relu": lambda x: F.leaky_relu(x, 0.01),
    "relu6": F.relu6,
    "elu": F.elu,
}


def vectors_of(attention: str) -> tuple[str, ...]:
    """Which of the vectors left and right an attention uses."""
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    if attention in ("linear", "gen-linear"):
        return ("right",)
    return ("left", "right") if attention in LEARNT else ()


def coefficients(attention: str, z: Tensor, left: Tensor | None, right: Tensor | None, near: Links) -> Tensor:
    """c_ij of every link. left, right: `heads d`, for those that use them (`vectors_of`)."""
    if attention == "const":
        return near.ones()
    if attention == "gcn":
        return near.balanced()
    return near.softmax(LEARNT[attention](z, left, right, near))


def aggregated(kind: str, c: Tensor, z: Tensor, near: Links) -> Tensor:
    """Sum, mean or maximum over the neighbours of c_ij z_j."""
    if kind == "max":
        return near.largest(c, z)
    total = near.sum(c, z)
    return total / near.degree if kind == "mean" else total
