"""The early attack: every early exit gets it wrong, while the network as a whole keeps its class.

Paper: Haque and Yang, "Dynamic Neural Network is All You Need: Understanding the Robustness of Dynamic
Mechanisms in Neural Networks", ICCV workshop 2023, arXiv:2308.08709; official code `Early_Attack`.

With p^(k) the probabilities at exit k of K and y the class of the last one for x, minimised over w is

    |x - s|_2^2 + c ( -alpha sum_{j != y} ReLU(p_y - p_j)^(K) + sum_{k < K} p_y^(k) ),
    s = lower + (upper - lower) (tanh(w) + 1) / 2,

by Adam. It is found where every exit k < K has another class than y, and the last one y. A test that
looks at the whole network alone sees nothing of it.

`sure` (ours) adds c max(0, q_k - max_{j != y} p_j^(k)) at the exit where that is least: one that is fooled
but unsure is passed, and the network as it is run is right after all. Then it has to be wrong there too.

Differs from the paper: w begins at x, atanh(2 x - 1), in place of a random image, and is much nearer in the
end; kept is the nearest point found, not the last; the search of an example ends when it has been found and
`rounds` steps are over, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from netweight.core.ascent import adam, around_inputs, per_example, slope
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import check_inputs, device_of, evaluated
from netweight.nn.dynamic import dynamic_of
from netweight.nn.early_exit import EarlyExit, at_exits, first_exits

EDGE = 1e-6  # how near to the ends of its range a coordinate begins


@dataclass(frozen=True)
class Early:
    """How `early` weighs.

    c: of the classes against the distance. alpha: of the last exit against the early ones. rate: Adam's.
    rounds: steps after which what was found is let be. sure: whether it has to be wrong as it is run.
    slack: by how much an exit is to be surer than its limit.
    """

    c: float = 50.0
    alpha: float = 1.0
    rate: float = 0.01
    rounds: int = 200
    sure: bool = False
    slack: float = 0.02

    def __post_init__(self) -> None:
        if not (self.c >= 0 and self.alpha >= 0 and self.rate > 0 and self.rounds >= 0 and self.slack >= 0):
            raise BadInput(f"{self}: give a rate above 0, and weights and rounds from 0 on")


def early(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 1000,
    restarts: int = 1,
    seed: int = 0,
    how: Early = Early(),
) -> Found:
    """The nearest point found that fools every early exit, not the last one, else the point where it ended.

    y: the class to be kept at the end; None stands for that of the last exit. within: s lies in it; the box
    around it is what tanh maps into, and only points of the set itself count. restarts: the first begins at
    x, the others at random points of the set. Raises `DoesNotFit` for networks without early exits, whole
    numbers as inputs, and sets that do not lie around inputs.
    """
    net, within = exits_of(model, how), around_inputs(within)
    check_inputs(x, "early")
    generator = torch.Generator().manual_seed(seed)
    with evaluated(model):
        x = x.to(device_of(model, x))
        with torch.no_grad():
            scores = net.scores(x)
        kept = scores[-1].argmax(1) if y is None else y.to(x.device)
        points = within.project(x, x)
        best = torch.where(fooled(net, scores, kept, how.sure), 0.0, torch.inf)
        for restart in range(restarts):
            start = x if restart == 0 else within.sample(x, generator)
            found, far = _search(net, x, kept, within, start, steps, how)
            better = (far < best) | ~best.isfinite()
            points = torch.where(per_example(better, x), found, points)
            best = torch.minimum(best, far)
        return Found(points, best.isfinite())


def exits_of(model: nn.Module, how: Early) -> EarlyExit:
    """The network with exits; raises `DoesNotFit` where there is none, or none that is early."""
    net = dynamic_of(model)
    if not isinstance(net, EarlyExit) or len(net.exits) < 2:
        raise DoesNotFit(f"{type(net).__name__}: the early attack is on early exits, and it has none")
    if how.sure and net.doubt != "unsure":
        raise DoesNotFit(f"exits that leave by {net.doubt}: `sure` is for those that leave by confidence")
    return net


def _search(
    net: EarlyExit,
    x: Float[Tensor, "b *in"],
    kept: Int[Tensor, " b"],
    within: Perturbation,
    start: Float[Tensor, "b *in"],
    steps: int,
    how: Early,
) -> tuple[Float[Tensor, "b *in"], Float[Tensor, " b"]]:
    """The nearest point found for each x and its distance; else the last point, infinitely far.

    Gradients are those at the point projected into the set, passed on to w as if it had not been projected.
    """
    lower, upper = within.corners(x)
    points, best = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    w = into(start, lower, upper)
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, steps + 1):
        low, high = lower[rows], upper[rows]
        s = within.project(out_of(w, low, high), x[rows]).requires_grad_()
        scores = net.scores(s)
        square = (s - x[rows]).flatten(1).square().sum(1)
        gradient = slope(square + how.c * penalty(net, scores, kept[rows], how), s)
        far = torch.where(fooled(net, scores, kept[rows], how.sure), square.detach().sqrt(), torch.inf)
        better = (far < best[rows]) | ~best[rows].isfinite()
        points[rows[better]], best[rows] = s.detach()[better], torch.minimum(best[rows], far)
        gradient = gradient * (0.5 * (high - low) * (1 - w.tanh().square()))
        way, first, second = adam(gradient, first, second, step)
        w = w - how.rate * way
        if step >= how.rounds:
            on = ~best[rows].isfinite()
            rows, w, first, second = rows[on], w[on], first[on], second[on]
            if len(rows) == 0:
                break
    return points, best


def into(s: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """w with `out_of(w)` = s, but for coordinates at the ends of their range, which begin just inside."""
    width = (upper - lower).clamp(min=torch.finfo(s.dtype).tiny)
    place = ((s - lower) / width).clamp(EDGE, 1 - EDGE)
    return torch.atanh(2 * place - 1)


def out_of(w: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """lower + (upper - lower) (tanh(w) + 1) / 2, in [lower, upper]."""
    return torch.clamp(lower + (upper - lower) * (0.5 * (w.tanh() + 1)), lower, upper)


def penalty(
    net: EarlyExit, scores: Sequence[Float[Tensor, "k classes"]], y: Int[Tensor, " k"], how: Early
) -> Float[Tensor, " k"]:
    """What stands behind c: of the last exit and of the early ones, and of being sure where that is asked."""
    p = torch.stack([z.float().softmax(-1) for z in scores])
    own = p.gather(2, y.expand(len(p), -1)[..., None])[..., 0]
    found = own[:-1].sum(0) - how.alpha * (own[-1, :, None] - p[-1]).clamp(min=0).sum(1)
    if how.sure:
        others = p[:-1].scatter(2, y.expand(len(p) - 1, -1)[..., None], 0).amax(2)
        q = (1 - net.limits + how.slack).clamp(max=1).to(others)
        found = found + (q[:, None] - others).clamp(min=0).amin(0)
    return found


@torch.no_grad()
def fooled(
    net: EarlyExit, scores: Sequence[Float[Tensor, "k classes"]], y: Int[Tensor, " k"], sure: bool = False
) -> Bool[Tensor, " k"]:
    """Whether every early exit has another class than y, the last one y; sure: is wrong where it leaves."""
    classes = torch.stack([*scores]).argmax(2)
    found = (classes[:-1] != y).all(0) & (classes[-1] == y)
    if sure:
        left = at_exits(scores, first_exits(scores, net.limits, net.doubt))
        found &= left.argmax(1) != y
    return found
