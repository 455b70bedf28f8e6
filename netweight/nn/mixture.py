"""Layers whose weights are mixtures of templates, at half width first and at full width after growth.

Pham et al., "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters", WACV 2024,
arXiv:2311.04251. A weight `out in *kernel` is made of pieces of half as many outputs and inputs,

    P_m = sum_j c_mj T_(m mod 2)j,        T_0, T_1: two sets of n templates of the shape of a piece;

member m (0 or 1) computes with P_m alone, the grown layer with

    W = [[P_0, P_2],    the first layer:  [P_0; P_1], its input is not split;
         [P_3, P_1]]    the last:         [P_0, P_1], its output is not split, the sum of both members'.

A convolution in an even number of groups has no weights between the halves: its pieces are [P_0; P_1] too,
and a member has half of the groups. With n = 2 all templates together are as large as W: nothing is saved.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED
from netweight.core.errors import BadInput, DoesNotFit, unknown

GROWTHS = ("orthogonal", "random", "zero", "copy")
Bank = dict[tuple[int, ...], nn.ParameterList]


@dataclass(frozen=True)
class Halves:
    """Which sides of a layer are split in two."""

    inputs: bool
    outputs: bool

    @property
    def pieces(self) -> int:
        """How many pieces the grown weight has."""
        return 4 if self.inputs and self.outputs else 2


class Mixed(nn.Module):
    """`like` with its weight made of templates. `member` says which one computes, None the grown layer."""

    def __init__(
        self,
        like: nn.Module,
        halves: Halves,
        generator: torch.Generator,
        *,
        templates: int = 2,
        small: bool = True,
        name: str = "layer",
        bank: Bank | None = None,
    ) -> None:
        """Draws new templates (or shares those of that shape in the bank) and orthogonal coefficients.

        small: see `kaiming`; name: of the layer, for what is raised.

        Raises `DoesNotFit` where channels or groups are not even.
        """
        super().__init__()
        groups = getattr(like, "groups", 1)
        halves = Halves(halves.inputs and groups == 1, halves.outputs)
        self.halves, self.member = halves, 0
        shape = piece_shape(like, halves, name)
        bare = copy.copy(like)
        bare._parameters = dict.fromkeys(like._parameters)
        self.like, self.groups = bare, groups
        bank = {} if bank is None else bank
        if shape not in bank:
            bank[shape] = nn.ParameterList(
                kaiming(templates, shape, generator, small=small) for _ in range(2)
            )
        self.templates = bank[shape]
        rows = torch.empty(halves.pieces, templates)
        nn.init.orthogonal_(rows, generator=generator)
        self.coefficients = nn.ParameterList(rows.clone().unbind())
        zeros = [torch.zeros(shape[0]) for _ in range(2)] if like.bias is not None else []
        self.biases = nn.ParameterList(zeros)
        self.to(like.weight)

    def piece(self, place: int) -> Tensor:
        """P of that place."""
        return torch.tensordot(self.coefficients[place], self.templates[place % 2], 1)

    @property
    def weight(self) -> Tensor:
        """The weight of the member that computes, or of the grown layer."""
        if self.member is not None:
            return self.piece(self.member)
        pieces = [self.piece(place) for place in range(self.halves.pieces)]
        if len(pieces) == 2:
            return torch.cat(pieces, 0 if self.halves.outputs else 1)
        return torch.cat([torch.cat([pieces[0], pieces[2]], 1), torch.cat([pieces[3], pieces[1]], 1)])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the member, or of the grown layer: side by side, or their sum at the last layer."""
        if not len(self.biases):
            return None
        if self.member is not None:
            return self.biases[self.member]
        return torch.cat([*self.biases]) if self.halves.outputs else self.biases[0] + self.biases[1]

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives with that weight."""
        shell = self._shell()
        vars(shell).update(weight=self.weight, bias=self.bias)  # found before parameters are looked up
        return shell.forward(x)

    def use(self, member: int) -> None:
        """Compute as that member; raises `BadInput` once it is grown."""
        if self.member is None:
            raise BadInput("a layer that is grown has no members any more; build the templates again")
        self.member = member

    @torch.no_grad()
    def grow(self, how: str, noise: float, generator: torch.Generator) -> None:
        """Compute at full width from now on, new pieces mixed as `new_coefficients` says.

        Raises `BadInput` for a layer that is grown already.
        """
        if self.member is None:
            raise BadInput("a layer grows once; build the templates again to grow from the beginning")
        self.member = None
        if self.halves.pieces == 4:
            found = new_coefficients(torch.stack([*self.coefficients]).cpu(), how, noise, generator)
            for place in (2, 3):
                self.coefficients[place].copy_(found[place - 2])

    def plain(self) -> nn.Module:
        """The ordinary layer with this weight, at the width it computes with."""
        weight, bias = self.weight.detach(), self.bias
        layer = copy.deepcopy(self._shell())
        layer.weight = nn.Parameter(weight.clone())
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        else:
            layer.out_channels, layer.in_channels = len(weight), weight.shape[1] * layer.groups
        return layer

    def _shell(self) -> nn.Module:
        """The layer without a weight, with the groups that it computes in."""
        shell = copy.copy(self.like)
        if self.member is not None and self.groups > 1:
            shell.groups = self.groups // 2
        return shell


def piece_shape(like: nn.Module, halves: Halves, name: str) -> tuple[int, ...]:
    """The shape of a piece; raises `DoesNotFit` where a side that is to be split is odd."""
    if not isinstance(like, WEIGHTED):
        raise DoesNotFit(f"{name}: a {type(like).__name__} is not made of templates; grow without it")
    out, inputs, *kernel = like.weight.shape
    groups = getattr(like, "groups", 1)
    for what, count, split in (
        ("outputs", out, halves.outputs),
        ("inputs", inputs, halves.inputs),
        ("groups", groups, groups > 1),
    ):
        if split and count % 2:
            raise DoesNotFit(f"{name}: {count} {what} do not split in two; give the layer an even number")
    return (out // 2 if halves.outputs else out, inputs // 2 if halves.inputs else inputs, *kernel)


def kaiming(count: int, shape: tuple[int, ...], generator: torch.Generator, *, small: bool) -> Tensor:
    """Templates for layers before a ReLU (He et al. 2015, arXiv:1502.01852), the fan-in that of a piece.

    small: the fan-in of all templates as one tensor, as the official code has it: numbers smaller by the root
    of a piece's outputs, which a batch norm makes good and which lets the rate act faster.
    """
    fan = math.prod(shape if small else shape[1:])
    return torch.randn(count, *shape, generator=generator) * math.sqrt(2 / fan)


def new_coefficients(
    rows: Tensor, how: str, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(c_2, c_3) of a layer that grows; rows: all four, `4 templates`, as they are before.

    orthogonal: c_2 stays as it began, c_3 is noise times the right singular vector of c_0, c_1, c_2 with the
    smallest singular value, at right angles to all three from four templates on. random: noise times uniform
    numbers. copy: c_0 and c_1 plus a random vector of length noise. zero: the members side by side.
    """
    draw = torch.rand(2, rows.shape[1], generator=generator).to(rows)
    if how == "orthogonal":
        return rows[2], noise * torch.linalg.svd(rows[:3]).Vh[-1]
    if how == "random":
        return noise * draw[0], noise * draw[1]
    if how == "copy":
        away = noise * draw / draw.norm(dim=1, keepdim=True)
        return rows[0] + away[0], rows[1] + away[1]
    if how == "zero":
        return torch.zeros_like(rows[2]), torch.zeros_like(rows[3])
    raise unknown("growth", how, GROWTHS)
