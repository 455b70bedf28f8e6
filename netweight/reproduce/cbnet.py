"""Mahmud et al. 2024: hard images are made easy, and then all of them take the short way of an early exit.

The paper: up to 4.8 times faster and 79 % less energy than LeNet, BranchyNet and others on MNIST, FMNIST and
KMNIST, with similar or higher accuracy. Here: the digits, 40 % of them made hard (turned by up to 25
degrees, moved by up to a pixel, noise of 0.15) in training and test. Every arm sees each training image in
`COPIES` corruptions, each of them once; only the autoencoder goes over them several times. T is chosen on
images that nothing was trained on. Arms: the whole network trained alone, BranchyNet, its exit alone, CBNet
with the exit's weights and tuned on converted images. Controls: a fully connected classifier of the
autoencoder's layers trained for as many steps, and the exit tuned as long as CBNet's on images as they are.
"Similar or higher accuracy" is reported, not demanded.

Time is CPU seconds of one thread for the whole test set at once, BranchyNet routed; figures give batches of
1 and 32 too. At batch 1 calls into torch cost more than products.
Energy is a counter of the processor where one can be read, else CPU time times a constant (`energy` says
which). Quick: a quarter of the corruptions, no whole network trained
alone and no controls.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.result import Bar, Claim
from netweight.core.task import Data
from netweight.data import digits
from netweight.inspection.energy import Reading, energy
from netweight.models.digits_cnn import MEAN, STD
from netweight.models.trained import seeded
from netweight.nn.early_exit import EarlyExit
from netweight.nn.normalize import Normalize
from netweight.training import cbnet as method
from netweight.training.cbnet import CBNet
from netweight.training.loop import Training, train
from netweight.training.trained import loss

TURN, SHIFT, NOISE, HARD = 25.0, 1.0, 0.15, 0.4  # degrees, pixels, standard deviation, share of the images
COPIES, HELD_COPIES = 80, 8
HOW = Training(1, batch=64, rate=3e-3, cosine=True)
CONVERTING = replace(HOW, batch=128)
SETTINGS = CBNet(width=8, widths=(256, 128, 32), epochs=6, rate=3e-3, tune=1)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; quick: those of time, and whether converting does not hurt."""
    learn, held = method.apart(digits.train(), SETTINGS.held, seed)
    learn = views(learn, COPIES // 4 if quick else COPIES, 4 * seed + 1)
    held = views(held, HELD_COPIES, 4 * seed + 2)
    test, hard = mixed(digits.test(), HARD, 4 * seed + 3)
    arms = trained(learn, held, seed)
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "BranchyNet": lambda x: arms.net.route(x).logits,
        "exit": arms.net.until(0),
        "CBNet": arms.converted,
        "CBNet, tuned": arms.tuned,
    }
    if not quick:
        models |= others(arms, learn, seed)
    score = {name: accuracies(model, test, hard) for name, model in models.items()}
    took, figures = times(arms, test, runs=5 if quick else 21)
    slopes, swept = sweep(arms, 4 * seed + 3, turns=30 if quick else 150)

    def gained(over: str, where: str = "all") -> float:
        return score["CBNet, tuned"][where] - score[over][where]

    marks = (0.0, 0.0) if quick else (0.03, 0.06)
    bars = [
        Bar("accuracy, CBNet - exit", gained("exit"), marks[0], "at least"),
        Bar("accuracy on hard images, CBNet - exit", gained("exit", "hard"), marks[1], "at least"),
    ]
    if not quick:
        bars += [
            Bar(f"accuracy, CBNet - {name}", gained(name), -0.03, "at least")
            for name in ("BranchyNet", "whole network")
        ]
    bars += [
        Bar("CPU time, CBNet / BranchyNet", took["CBNet"] / took["BranchyNet"], 1 / 3, "at most"),
        Bar("CPU time, CBNet / whole network", took["CBNet"] / took["whole network"], 1 / 5, "at most"),
        *slopes,
    ]
    macs = method.paths(arms.net, arms.tuned, test)
    about = {"threshold": float(arms.net.limits[0]), "easy training images": arms.easy, "macs": macs}
    return Claim(bars, {"accuracy": score, **about, **figures, **swept})


# Images ---------------------------------------------------------------------------------------------------


def made_hard(x: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Turned and moved, what comes in from outside black, then with noise, inside [0, 1]."""

    def drawn(most: float) -> Tensor:
        return most * (2 * torch.rand(len(x), generator=generator) - 1)

    angle, right, down = drawn(math.radians(TURN)), drawn(SHIFT), drawn(SHIFT)
    cos, sin = angle.cos(), angle.sin()
    right, down = 2 * right / x.shape[-1], 2 * down / x.shape[-2]  # the image is 2 wide and high
    places = torch.stack([cos, -sin, right, sin, cos, down], 1).reshape(-1, 2, 3)
    turned = F.grid_sample(x, F.affine_grid(places, list(x.shape), align_corners=False), align_corners=False)
    return (turned + NOISE * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def mixed(data: Data, share: float, seed: int) -> tuple[Data, Bool[Tensor, " b"]]:
    """The images, a random share of them made hard, and which these are; a larger share only adds some."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(len(data), generator=generator) < share
    x = torch.where(hard[:, None, None, None], made_hard(data.x, generator), data.x)
    return replace(data, x=x, memo={}), hard


def views(data: Data, copies: int, seed: int) -> Data:
    """The images so many times, each time others of them made hard, and in another way."""
    assert data.y is not None
    again = replace(data, x=data.x.repeat(copies, 1, 1, 1), y=data.y.repeat(copies), memo={})
    return mixed(again, HARD, seed)[0]


# Arms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arms:
    """The network as it began, with its exit, CBNet before and after tuning; the share of easy images."""

    start: nn.Module
    net: EarlyExit
    converted: nn.Module
    tuned: nn.Module
    easy: float


def network(seed: int) -> nn.Sequential:
    """Like LeNet: a convolution | two more, a pool and two Linear layers; 8 x 8 pixels, random weights."""
    with seeded(seed):
        return nn.Sequential(
            Normalize([MEAN], [STD]),
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 2 * 2, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        ).eval()


def trained(learn: Data, held: Data, seed: int) -> Arms:
    """The steps of `cbnet` one by one, as T is chosen on other images than corruptions of those learnt."""
    how, converting = replace(HOW, seed=seed), replace(CONVERTING, seed=seed)
    start = network(seed)
    convert = method.conversion(start, learn, SETTINGS)
    net = method.with_exit(start, convert, seed)
    method.train_exits(net, learn, how, SETTINGS)
    method.choose_limit(net, held, SETTINGS)
    easy = method.easy_rows(net, learn, SETTINGS.fewest)
    converted = method.converted(start, net, convert, seed)
    method.train_autoencoder(converted.autoencoder, learn, easy, converting, SETTINGS)
    tuned = copy.deepcopy(converted)
    method.tune(tuned, learn, how, SETTINGS.tune)
    return Arms(start, net, converted, tuned, len(easy) / len(learn))


def others(arms: Arms, learn: Data, seed: int) -> dict[str, nn.Module]:
    """The whole network trained alone; the exit tuned; a classifier of the autoencoder's layers."""
    how = replace(HOW, seed=seed)
    whole, exit = copy.deepcopy(arms.start), copy.deepcopy(arms.net.until(0))
    train(whole, learn, loss, how)
    train(exit, learn, loss, replace(how, epochs=SETTINGS.tune))
    with seeded(seed):
        encoder = copy.deepcopy(arms.tuned.autoencoder.encoder)
        for layer in encoder:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        connected = nn.Sequential(encoder, nn.Linear(SETTINGS.widths[-1], 64), nn.ReLU(), nn.Linear(64, 10))
    train(connected, learn, loss, replace(CONVERTING, seed=seed, epochs=SETTINGS.epochs, rate=SETTINGS.rate))
    return {"whole network": whole, "exit, tuned": exit, "fully connected": connected}


@torch.no_grad()
def accuracies(model: Callable[[Tensor], Tensor], test: Data, hard: Bool[Tensor, " b"]) -> dict[str, float]:
    """Share of right answers on all images, on the hard ones and on the rest."""
    right = (model(test.x).argmax(-1) == test.y).double()
    return {n: float(right[w].mean()) for n, w in (("all", hard | True), ("hard", hard), ("rest", ~hard))}


# Time and energy ------------------------------------------------------------------------------------------


def ways(arms: Arms, x: Tensor) -> dict[str, Callable[[], object]]:
    """One call of each way to classify x. How the whole network was trained does not matter here."""
    routes = {"whole network": arms.start, "BranchyNet": arms.net.route, "exit": arms.net.until(0)}
    return {name: partial(way, x) for name, way in (routes | {"CBNet": arms.tuned}).items()}


@torch.no_grad()
def times(arms: Arms, test: Data, runs: int) -> tuple[Mapping[str, float], dict[str, Any]]:
    """CPU seconds of the whole test set at once; figures for 1000 images in batches of several sizes."""
    with seeded(0):  # one thread
        found = {size: energy(ways(arms, test.x[:size]), runs=runs) for size in (len(test), 32, 1)}
        stay = float(arms.net.route(test.x).exit.double().mean())

    def of_1000(of: Callable[[Reading], float]) -> dict[str, dict[str, float]]:
        return {
            f"batches of {size}": {name: of(reading) * 1000 / size for name, reading in each.items()}
            for size, each in found.items()
        }

    first = found[len(test)]
    figures = {
        "CPU seconds of 1000 images": of_1000(lambda r: r.seconds),
        "joules of 1000 images": of_1000(lambda r: r.joules),
        "energy": ("measured: " if first["CBNet"].measured else "modelled: ") + first["CBNet"].how,
        "images that stay past the exit": stay,
    }
    return {name: reading.seconds for name, reading in first.items()}, figures


@torch.no_grad()
def sweep(arms: Arms, seed: int, turns: int) -> tuple[list[Bar], dict[str, Any]]:
    """CPU time of BranchyNet and CBNet by the share of hard images: a line through each turn."""
    calls: dict[str, list[Callable[[], object]]] = {"BranchyNet": [], "CBNet": []}
    for share in SHARES:
        x = mixed(digits.test(), share, seed)[0].x
        calls["BranchyNet"].append(partial(arms.net.route, x))
        calls["CBNet"].append(partial(arms.tuned, x))
    took = {name: in_turns(each, turns) for name, each in calls.items()}
    growth = {name: growths(seconds) for name, seconds in took.items()}
    medians = {name: np.median(seconds, axis=0) for name, seconds in took.items()}
    straight = float(np.corrcoef(SHARES, medians["BranchyNet"])[0, 1] ** 2)
    bars = [
        Bar("BranchyNet: growth of time from 0 to 100 % hard", growth["BranchyNet"], 0.0, "at least"),
        Bar("BranchyNet: r^2 of time by share of hard images", straight, 0.9, "at least"),
        Bar("CBNet: change of time from 0 to 100 % hard", abs(growth["CBNet"]), 0.05, "at most"),
    ]
    shares = ", ".join(f"{share:.0%}" for share in SHARES)
    return bars, {f"CPU seconds at {shares} hard": {name: each.tolist() for name, each in medians.items()}}


def in_turns(calls: list[Callable[[], object]], turns: int) -> Float[np.ndarray, "turns calls"]:
    """CPU seconds of each call in each turn, on one thread."""
    seconds = np.empty((turns, len(calls)))
    with seeded(0):
        for turn in range(turns):
            for at, call in enumerate(calls):
                start = time.process_time()
                call()
                seconds[turn, at] = time.process_time() - start
    return seconds


def growths(seconds: Float[np.ndarray, "turns shares"]) -> float:
    """Growth from the first share to the last over the line's begin, a line through each turn; the median.

    What slows the machine for a while slows all calls of a turn, and drops out.
    """
    slope, begin = np.polyfit(SHARES, seconds.T, 1)
    return float(np.median(slope / begin))
