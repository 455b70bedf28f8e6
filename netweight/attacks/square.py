"""Square attack: random search over squares of the input, from class scores alone.

Paper: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search", ECCV 2020, arXiv:1912.00049 (Algorithm 1; squares: Algorithm 2 for Linf, Algorithm 3 for L2).
Repeat: draw a square of side sqrt(p h w), change the point inside it, keep the change where the margin

    max_(j != y) z_j - z_y        rises.

Linf: every channel of the square moves to +eps or -eps. L2, L1: the square takes the whole budget of a second
square and what is not spent, as a pattern that decays from its centre. p starts at 0.8 and is halved after
10, 50, 200, 1000, 2000, 4000, 6000 and 8000 of every 10000 steps. Start: vertical stripes of +-eps (Linf), a
grid of patterns (L2, L1).

Differs from the paper: inputs that are no images are one row of pixels; L1 as in arXiv:2103.01208, whose
budget is shared out in the same way; p starts at 0.8 for all sets (0.05 and 0.1 there); boxes as Linf.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from netweight.core.ascent import around_inputs, per_example
from netweight.core.perturbation import L1, L2, Box, Found, Linf, Perturbation
from netweight.core.victim import margin, victim

START = 0.8
HALVED_AT = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # of 10000
Images = Float[Tensor, "k c h w"]


def square(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 1000,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point in the set around each x where one is found, else the one with the largest margin seen.

    steps: queries of the network for each input and restart; it needs no gradient. y: class numbers; None
    stands for the network's own predictions. Raises `DoesNotFit` as `attacks.pgd` does.
    """
    within = around_inputs(within)
    generator = torch.Generator().manual_seed(seed)
    with victim(model, x, y, "square") as v, torch.no_grad():
        points = within.project(v.x, v.x)
        best, hit = margin(v.clean, v.of), v.clean.argmax(1) != v.of
        for _ in range(restarts):
            draw = _Patches(within, v.x, generator)
            rows = (~hit).nonzero()[:, 0]
            s = draw.start(v.x[rows])
            value = torch.full_like(best[rows], -torch.inf)
            for step in range(steps):
                if len(rows) == 0:
                    break
                tried = s if step == 0 else draw.change(s, v.x[rows], side_share(step, steps))
                scores = v.scores(tried)
                reached, found = scores.argmax(1) != v.of[rows], margin(scores, v.of[rows])
                better = reached | (found > value)
                s = torch.where(per_example(better, s), tried, s)
                value = torch.where(better, found, value)
                gained = reached | (value > best[rows])
                points[rows[gained]], best[rows[gained]], hit[rows] = s[gained], value[gained], reached
                rows, s, value = rows[~reached], s[~reached], value[~reached]
        return Found(points, hit)


def side_share(step: int, steps: int) -> float:
    """p: the share of the image that a square covers at this step."""
    return START / 2 ** sum(step * 10000 / steps > at for at in HALVED_AT)


class _Patches:
    """Draws the changes: images `k c h w` inside, `k *in` outside."""

    def __init__(
        self, within: Linf | L2 | L1 | Box, x: Float[Tensor, "b *in"], generator: torch.Generator
    ) -> None:
        self.within, self.generator = within, generator
        self.image = tuple(x.shape[1:]) if x.ndim == 4 else (1, 1, x[0].numel())

    def start(self, x: Float[Tensor, "k *in"]) -> Float[Tensor, "k *in"]:
        """Stripes, or a grid of patterns over the whole image."""
        c, h, w = self.image
        if isinstance(self.within, Linf | Box):
            return self._moved(x, x, self._signs(len(x), c, 1, w).expand(-1, -1, h, -1))
        d = torch.zeros(len(x), c, h, w, device=x.device)
        side = min(max(1, max(h, w) // 5), h, w) if h > 1 else max(1, w // 5)
        for top in range(0, h, side):
            for left in range(0, w, side):
                patch = _pattern(min(side, h - top), min(side, w - left)).to(x)
                d[:, :, top : top + side, left : left + side] = patch * self._signs(len(x), c, 1, 1).to(x)
        return self._scaled(x, d)

    def change(self, s: Float[Tensor, "k *in"], x: Float[Tensor, "k *in"], share: float) -> Tensor:
        """Each point with one square of it changed."""
        c, h, w = self.image
        height = min(max(1, round((share * h * w) ** 0.5)), h)
        width = min(max(1, round(share * h * w / height)), w)
        inside, patch = self._window(len(x), height, width)
        signs = self._signs(len(x), c, 1, 1).to(x)
        if isinstance(self.within, Linf | Box):
            moved = self._moved(x, x, signs.expand(-1, -1, h, w)).reshape(-1, c, h, w)
            return torch.where(inside.to(x.device), moved, s.reshape(-1, c, h, w)).reshape(s.shape)
        emptied, _ = self._window(len(x), height, width)
        d = (s - x).reshape(-1, c, h, w)
        inside, emptied, patch = inside.to(x.device), emptied.to(x.device), patch.to(x)
        p = int(self.within.norm)
        spent = (d.abs() ** p).flatten(1).sum(1)
        free = (self.within.eps**p - spent).clamp(min=0) / c
        own = d.where(inside, 0)
        there = (d.abs() ** p).where(inside | emptied, 0).flatten(2).sum(2) + free[:, None]
        old = own / (own.abs() ** p).flatten(2).sum(2).pow(1 / p).clamp(min=1e-12)[:, :, None, None]
        new = signs * patch + old
        new = new / (new.abs() ** p).flatten(2).sum(2).pow(1 / p).clamp(min=1e-12)[:, :, None, None]
        new = new * there.pow(1 / p)[:, :, None, None]
        d = torch.where(inside, new, d.where(~emptied, 0))
        return self._scaled(x, d)

    def _window(self, count: int, height: int, width: int) -> tuple[Bool[Tensor, "k 1 h w"], Images]:
        """A square at a random place of each image, and a pattern in it of p-th powers that add up to 1."""
        _, h, w = self.image
        top = torch.randint(0, h - height + 1, (count, 1, 1, 1), generator=self.generator)
        left = torch.randint(0, w - width + 1, (count, 1, 1, 1), generator=self.generator)
        row, column = torch.arange(h)[:, None] - top, torch.arange(w)[None] - left
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pattern = _pattern(height, width)[row.clamp(0, height - 1), column.clamp(0, width - 1)]
        return inside, pattern.where(inside, 0)

    def _signs(self, *shape: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=self.generator) - 1

    def _moved(self, s: Tensor, x: Tensor, signs: Images) -> Tensor:
        """s moved to the edges of the set, by the signs."""
        signs = signs.to(x).reshape(len(x), *x.shape[1:])
        if isinstance(self.within, Box):
            lower, upper = self.within.corners(x)
            return self.within.project(torch.where(signs > 0, upper, lower), x)
        return self.within.project(s + self.within.eps * signs, x)

    def _scaled(self, x: Tensor, d: Images) -> Tensor:
        """x and a change of length eps in the direction of d."""
        assert isinstance(self.within, L2 | L1)
        p = int(self.within.norm)
        length = (d.abs() ** p).flatten(1).sum(1).pow(1 / p).clamp(min=1e-12)
        d = d * (self.within.eps / length)[:, None, None, None]
        return self.within.project(x + d.reshape(x.shape), x)


def _pattern(height: int, width: int) -> Float[Tensor, "height width"]:
    """Two halves of opposite sign, each a pyramid that decays from its centre; of Euclidean length 1."""
    if height * width == 1:
        return torch.ones(1, 1)
    turned = height < width
    tall, wide = (width, height) if turned else (height, width)
    half = tall // 2
    pattern = torch.cat([_pyramid(half, wide), -_pyramid(tall - half, wide)])
    return (pattern.T if turned else pattern) / pattern.norm()


def _pyramid(height: int, width: int) -> Float[Tensor, "height width"]:
    """Rings around the centre: the k-th from outside holds the sum of 1 / i^2 over the inner ones."""
    row, column = torch.arange(height), torch.arange(width)
    edge = torch.minimum(row, height - 1 - row)[:, None].minimum(torch.minimum(column, width - 1 - column))
    inner = int(edge.max())
    steps = 1 / (torch.arange(inner + 1) + 1.0) ** 2
    rings = torch.tensor([steps[inner - k :].sum() for k in range(inner + 1)])
    return rings[edge]
