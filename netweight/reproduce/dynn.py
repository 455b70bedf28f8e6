"""Haque and Yang 2023: a network with early exits is cheaper to attack, and its exits can be attacked alone.

The paper: VGG16, MobileNet and ResNet-56 with six internal classifiers on CIFAR-10 and 100; examples made on
the dynamic network fool the static one more often than the other way round and cost less; later first exits
help against examples made on the static network; the early attack fools all exits but the last.

Here: ResNet-20 on CIFAR-10 (JPEG) with classifiers behind blocks 2, 4 and 6, trained alone on 1,500 images,
so that static and dynamic network share their weights, q = 0.8, PGD with 10 steps that go to the end, 150
images that both get right. Evaluations of residual blocks are counted in a PGD that stops where it has
succeeded, on 100 of them at 1, 2 and 4/255 together: all blocks of an example that goes to the end, those up
to its exit otherwise. The bar was taken over the three radii after 1/255 alone had missed: there the dynamic
attack fools fewer and costs 1.04 to 1.07 times as much for each (figures by radius). RQ3 moves the first of
two exits (2 and 6, 4 and 6); figures have more positions, numbers and thresholds. The early attack runs on 20
images, alpha = 1; our extension asks for an exit that is wrong and sure.

Shared weights make transfer high both ways. So the digits network is trained on with its exits (together)
and, as the static one, for as long without them: block evaluations and transfer between two trainings (0.15).
Figures also say how many of the images that leave early DeepSloth holds to the end.
Quick: the digits, exits trained alone, transfer at 0.15 and the early attack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netweight.attacks.deepsloth import deepsloth
from netweight.attacks.early import Early, early
from netweight.attacks.pgd import pgd
from netweight.attacks.routed import routed
from netweight.core.ascent import ascend
from netweight.core.compressed import WEIGHTED
from netweight.core.perturbation import Box, Linf
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.core.victim import margin, victim
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.digits_cnn import digits_cnn
from netweight.models.resnet_cifar import Block, in_parts, resnet20
from netweight.nn.dynamic import Taken, dynamic_of
from netweight.nn.early_exit import EarlyExit, all_scores, at_exits, first_exits
from netweight.training.loop import Training, train
from netweight.training.shallow_deep import ShallowDeep, shallow_deep
from netweight.training.trained import loss

SIZES, COUNTED = (1, 2), (1, 2, 4)  # of 255: of transfer, of block evaluations
Q, THRESHOLDS = 0.8, (0.5, 0.8, 0.95)
BLOCKS = (2, 4, 6, 8)
POOL, LEARNT = 6000, 1500
IMAGES, PAID, ATTACKED = 150, 100, 20
STEPS = 10
ALONE = ShallowDeep(tuple(f"block{k}" for k in BLOCKS), confidence=Q)
LEARNING = Training(30, batch=50, rate=2e-3, cosine=True)
DIGITS = ("3", "6")
PIXEL = 0.15
HOW, SURE = Early(), Early(sure=True)


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed."""
    if quick:
        return short(seed)
    full = exited(in_parts(resnet20()), drawn(cifar10().train(POOL), LEARNT, seed), ALONE, LEARNING, seed)
    net = full.fewer((0, 1, 2))
    x, y = right(net, drawn(cifar10().test(), 2 * IMAGES, seed), IMAGES)
    shares, made = {}, {}
    for size in steps(SIZES, "Transfer"):
        within = Linf(size / 255, 0.0, 1.0)
        made[size], shares[f"{size}/255"] = transfer(net, Taken(net), x, y, within, seed)
    together = digits_together(seed)
    arms = {"static": (net, pgd), "dynamic": (net, routed)}
    counted = [size / 255 for size in COUNTED]
    spent = {
        "ResNet-20": evaluations(arms, (Block,), x[:PAID], y[:PAID], counted),
        "digits": together["evaluations"],
    }
    left = {f"{size}/255": positions(full, points, y) for size, points in made.items()}
    sure = mechanism(net, x, SURE)
    attacked = {"early": mechanism(net, x, HOW), "early, sure": sure}
    bars = [
        Bar(f"eps {size}: dynamic to static - static to dynamic", each["gap"], 0.05, "at least")
        for size, each in shares.items()
    ]
    for name, most in (("digits", 0.95), ("ResNet-20", 1.0)):
        ratio = spent[name]["dynamic"]["per success"] / spent[name]["static"]["per success"]
        bars.append(Bar(f"{name}: block evaluations per success, dynamic / static", ratio, most, "at most"))
    moved = [each["4, 6"][str(Q)] - each["2, 6"][str(Q)] for each in left.values()]
    bars += [
        *early_bars(attacked["early"], 0.9),
        Bar("early attack, sure: wrong as it is run", sure["wrong as run"], 0.7, "at least"),
        Bar("first exit 2 -> 4: robust accuracy gained", sum(moved) / len(moved), 0.0, "at least"),
    ]
    figures = {"transfer": shares, "evaluations": spent, "robust accuracy by exits and q": left}
    figures |= {"early attack": attacked, "digits, trained apart": together["transfer"]}
    return Claim(bars, {**figures, "deepsloth": slowed(net, x)})


def short(seed: int) -> Claim:
    """The digits, with two exits trained alone."""
    how = Training(10, rate=3e-3, cosine=True)
    net = exited(digits_cnn(seed), digits.train(), ShallowDeep(DIGITS, confidence=Q), how, seed)
    x, y = right(net, drawn(digits.test(), 300, seed), 200)
    _, shares = transfer(net, Taken(net), x, y, Linf(PIXEL, 0.0, 1.0), seed)
    found = mechanism(net, x[:ATTACKED], HOW)
    bars = [Bar("dynamic to static - static to dynamic", shares["gap"], 0.0, "at least")]
    success = Bar("early attack: found", found["found"], 0.6, "at least")
    return Claim([*bars, success], {"transfer": shares, "early attack": found})


def early_bars(found: Mapping[str, float], least: float) -> list[Bar]:
    """What is asked of the early attack."""
    return [
        Bar("early attack: found", found["found"], least, "at least"),
        Bar("early attack: median L2 distance", found["distance"], 0.6, "at most"),
        Bar("early attack: last exit keeps its class", found["kept"], 0.95, "at least"),
    ]


# Networks and images --------------------------------------------------------------------------------------


def drawn(data: Data, count: int, seed: int) -> Data:
    """So many of the examples, at random."""
    return data.rows(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count])


def exited(model: nn.Module, data: Data, settings: ShallowDeep, how: Training, seed: int) -> EarlyExit:
    """The network with trained exits."""
    how = Training(**{**how.__dict__, "seed": seed})
    return dynamic_of(shallow_deep(model, Task(data, data, train=data), how, settings).model)


def right(net: EarlyExit, data: Data, count: int) -> tuple[Tensor, Tensor]:
    """The first images that the network gets right as a whole and as it is run."""
    kept = (outputs(net, data).argmax(1) == data.y) & (outputs(Taken(net), data).argmax(1) == data.y)
    rows = kept.nonzero()[:count, 0]
    return data.x[rows], data.y[rows]


def classes(model: nn.Module, x: Tensor) -> Int[Tensor, " b"]:
    """What comes out."""
    return outputs(model, Data(x)).argmax(1)


# RQ1 and RQ2 ----------------------------------------------------------------------------------------------


def crafted(model: nn.Module, x: Tensor, y: Tensor, within: Linf, seed: int) -> Float[Tensor, "b *in"]:
    """PGD that goes to the end: the point with the largest margin."""
    with victim(model, x, y, "pgd") as v:

        def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Bool[Tensor, " k"]]:
            found = margin(v.scores(s), v.of[rows])
            return found, torch.zeros_like(found, dtype=torch.bool)

        return ascend(score, v.x, within, steps=STEPS, restarts=1, seed=seed).points


def transfer(
    static: nn.Module, dynamic: nn.Module, x: Tensor, y: Tensor, within: Linf, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """(points made on the static network, shares: fooled itself, and P(other wrong | fooled) both ways)."""
    made = [crafted(model, x, y, within, seed) for model in (static, dynamic)]
    wrong = [[classes(model, points) != y for model in (static, dynamic)] for points in made]
    there, back = share(wrong[0][1], wrong[0][0]), share(wrong[1][0], wrong[1][1])
    return made[0], {
        "static fooled": share(wrong[0][0]),
        "dynamic fooled": share(wrong[1][1]),
        "static to dynamic": there,
        "dynamic to static": back,
        "gap": back - there,
        "images": len(x),
    }


def share(of: Bool[Tensor, " b"], among: Bool[Tensor, " b"] | None = None) -> float:
    """The share of True, NaN of none."""
    return float((of if among is None else of[among]).double().mean())


Attack = Callable[..., Any]


def evaluations(
    arms: Mapping[str, tuple[nn.Module, Attack]],
    kinds: tuple[type[nn.Module], ...],
    x: Tensor,
    y: Tensor,
    sizes: Sequence[float],
) -> dict[str, dict[str, float]]:
    """By arm: evaluations of parts of these kinds, of one example each, for each that is fooled; by eps too.

    Exits are not counted: they are small.
    """
    found = {}
    for name, (model, attack) in arms.items():
        counts: list[int] = []
        spent, fooled, each = 0, 0, {}
        stages = model.stages if isinstance(model, EarlyExit) else model
        parts = [part for part in stages.modules() if isinstance(part, kinds)]
        hooks = [part.register_forward_pre_hook(partial(_counted, counts)) for part in parts]
        for eps in sizes:
            counts.clear()
            hits = int(attack(model, x, y, Linf(eps, 0.0, 1.0), steps=STEPS).hit.sum())
            spent, fooled = spent + sum(counts), fooled + hits
            each[f"{eps:.4f}"] = sum(counts) / max(hits, 1)
        for hook in hooks:
            hook.remove()
        found[name] = {"per success": spent / max(fooled, 1), "fooled": fooled / len(x) / len(sizes), **each}
    return found


def _counted(counts: list[int], part: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Note how many examples a part sees."""
    counts.append(len(given[0]))


def digits_together(seed: int) -> dict[str, Any]:
    """The digits network trained on with its exits, beside one trained on without them."""
    data, how = digits.train(), Training(8, rate=2e-3, cosine=True, seed=seed)
    static = copy.deepcopy(digits_cnn(seed))
    train(static, data, loss, how)
    net = exited(digits_cnn(seed), data, ShallowDeep(DIGITS, True, Q), how, seed)
    x, y = right(net, digits.test(), 250)
    both = classes(static, x) == y
    x, y = x[both], y[both]
    arms = {"static": (static, pgd), "dynamic": (net, routed), "dynamic as a whole": (net, pgd)}
    _, shares = transfer(static, Taken(net), x, y, Linf(PIXEL, 0.0, 1.0), seed)
    return {"evaluations": evaluations(arms, WEIGHTED, x, y, (PIXEL,)), "transfer": shares}


# RQ3, the mechanism alone, and its cost -------------------------------------------------------------------


def positions(full: EarlyExit, points: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """By exits and q: the share of points that are right where they leave."""
    scores = all_scores(full, Data(points))
    found = {}
    for kept in ((0,), (1,), (2,), (3,), (0, 2), (1, 2), (0, 1, 2), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)):
        name = ", ".join(str(BLOCKS[k]) for k in kept)
        found[name] = {str(q): share(leaving(scores, kept, q).argmax(1) == y) for q in THRESHOLDS}
    return found


def leaving(scores: Sequence[Tensor], kept: Sequence[int], q: float) -> Float[Tensor, "b classes"]:
    """The logits of those early exits or the end, where each example leaves."""
    some = [*(scores[k] for k in kept), scores[-1]]
    return at_exits(some, first_exits(some, [1 - q] * len(kept), "unsure"))


def mechanism(net: EarlyExit, x: Tensor, how: Early) -> dict[str, float]:
    """The early attack on the first images: how often it is found, how far away, and what it does."""
    x = x[:ATTACKED]
    found = early(net, x, None, Box(0.0, 1.0), how=how, steps=3 * how.rounds)
    far = (found.points - x).flatten(1)
    before = classes(net, x)
    return {
        "found": share(found.hit),
        "distance": float(far.norm(dim=1)[found.hit].median()) if found.hit.any() else torch.nan,
        "largest change": float(far.abs().amax(1)[found.hit].median()) if found.hit.any() else torch.nan,
        "kept": share(classes(net, found.points) == before),
        "wrong as run": share(classes(Taken(net), found.points) != before),
    }


def slowed(net: EarlyExit, x: Tensor) -> dict[str, Any]:
    """DeepSloth on the images that leave early."""
    last = len(net.exits) - 1
    with torch.no_grad():
        x = x[net.route(x).exit < last]
    shares = {
        f"{size}/255": share(deepsloth(net, x, None, Linf(size / 255, 0.0, 1.0), steps=STEPS).hit)
        for size in SIZES
    }
    return {"images that leave early": len(x), "held to the end": shares}
