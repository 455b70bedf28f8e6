"""How fast attacks are, and what they leave right: ours beside Foolbox and torchattacks, on ResNet-20.

Every attack gets the same test images, radius and steps and starts once, at a random point. They run in
turns, in this process, on one thread; figures are medians of CPU seconds, and of ratios of the same turn.

    PGD   20 steps   ours on the margin, steps that shrink; Foolbox and torchattacks on the cross-entropy
    APGD  50 steps   ours and torchattacks on the cross-entropy
    all              `ensemble` and torchattacks' AutoAttack, both as they come, once

Ours drop an example as soon as it is wrong. A peer that is not installed is named in `missing`; torchattacks
asks for torchvision but runs without it: pip install --no-deps torchattacks.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from netweight.attacks.apgd import apgd
from netweight.attacks.ensemble import ensemble
from netweight.attacks.pgd import pgd
from netweight.bench.run_turns import on_threads
from netweight.bench.train import in_turns, ratio
from netweight.core.perturbation import Linf
from netweight.core.result import Bar
from netweight.core.task import Task

IMAGES, TURNS = 32, 3
RADII = (1 / 255, 2 / 255)
PGD_STEPS, APGD_STEPS = 20, 50
STRIDE = 2.5  # of the peers' PGD: how often all steps together cross eps, as in Madry et al.
QUICKER, MORE = 1.3, 0.005  # of images per second; of robust accuracy above AutoAttack's
PEERS = {"foolbox": "pip install foolbox", "torchattacks": "pip install --no-deps torchattacks"}
Attack = Callable[[], Tensor]  # -> one point for each image


def bench(
    *,
    network: tuple[nn.Module, Task] | None = None,
    images: int = IMAGES,
    turns: int = TURNS,
    radii: tuple[float, ...] = RADII,
) -> dict[str, Any]:
    """A row for each radius and attack, and the bars.

    network: in place of the fine-tuned ResNet-20 with test images of CIFAR-10. Raises `BadInput` where these
    are not there.
    """
    if network is None:
        from netweight.bench.run import resnet20

        network = resnet20()
    model, test = network[0].eval(), network[1].test.take(images)
    assert test.y is not None
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with on_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers, about what they will leave out
        for eps in radii:
            quick, whole = attacks(model, test.x, test.y, eps)
            found = measured(model, test.y, quick, turns) | measured(model, test.y, whole, 0)
            rows += [{"eps": eps, "attack": name, **value} for name, value in found.items()]
            bars += compared(found, f"eps {255 * eps:g}/255")
    return {
        "images": len(test),
        "turns": turns,
        "missing": [f"{peer} is not installed: {how}" for peer, how in PEERS.items() if not find_spec(peer)],
        "rows": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        "bars": [{**asdict(bar), "reached": bar.passed} for bar in bars],
    }


def attacks(
    model: nn.Module, x: Tensor, y: Tensor, eps: float
) -> tuple[dict[str, Attack], dict[str, Attack]]:
    """Those that are timed in turns, and the whole sets."""
    within = Linf(eps, 0.0, 1.0)
    quick: dict[str, Attack] = {
        "PGD, ours": lambda: pgd(model, x, y, within, steps=PGD_STEPS).points,
        "APGD, ours": lambda: apgd(model, x, y, within, loss="ce", steps=APGD_STEPS).points,
    }
    whole: dict[str, Attack] = {"all, ours": lambda: ensemble(model, x, y, within).points}
    if find_spec("foolbox"):
        foolbox = import_module("foolbox")
        seen = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        theirs = foolbox.attacks.LinfPGD(steps=PGD_STEPS, rel_stepsize=STRIDE / PGD_STEPS)
        quick["PGD, Foolbox"] = lambda: theirs(seen, x, y, epsilons=eps)[1]
    if find_spec("torchattacks"):
        peer = import_module("torchattacks")
        step = STRIDE * eps / PGD_STEPS  # its default is for eps = 8/255
        quick["PGD, torchattacks"] = lambda: peer.PGD(model, eps=eps, alpha=step, steps=PGD_STEPS)(x, y)
        quick["APGD, torchattacks"] = lambda: peer.APGD(model, eps=eps, steps=APGD_STEPS)(x, y)
        whole["all, torchattacks"] = lambda: peer.AutoAttack(model, eps=eps, n_classes=10)(x, y)
    return quick, whole


def measured(model: nn.Module, y: Tensor, ways: dict[str, Attack], turns: int) -> dict[str, dict[str, Any]]:
    """CPU seconds of each turn, and the share of images that the points leave right; turns=0: one run."""
    points: dict[str, Tensor] = {}

    def keep(name: str, attack: Attack) -> Callable[[], None]:
        def run() -> None:
            torch.manual_seed(0)  # the peers draw from the global generator
            points[name] = attack()

        return run

    with torch.random.fork_rng():
        calls = {name: keep(name, attack) for name, attack in ways.items()}
        seconds = in_turns(calls, turns) if turns else {name: [once(call)] for name, call in calls.items()}
    with torch.no_grad():
        right = {name: float((model(s).argmax(1) == y).float().mean()) for name, s in points.items()}
    return {
        name: {
            "cpu_seconds": statistics.median(times),
            "images_per_second": len(y) / statistics.median(times),
            "robust_accuracy": right[name],
            "seconds": times,
        }
        for name, times in seconds.items()
    }


def once(call: Callable[[], None]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compared(found: dict[str, dict[str, Any]], where: str) -> list[Bar]:
    """Ours against each peer: as many images a second, and no more of them left right."""
    bars = []
    for name, theirs in found.items():
        kind, _, whose = name.partition(", ")
        if whose == "ours":
            continue
        ours = found[f"{kind}, ours"]
        more = ours["robust_accuracy"] - theirs["robust_accuracy"]
        if kind == "all":
            bars.append(Bar(f"robust accuracy, ours - {whose}, {where}", more, MORE, "at most"))
            continue
        times = ratio(theirs["seconds"], ours["seconds"])
        bars.append(Bar(f"{kind}, images a second, ours / {whose}, {where}", times, QUICKER, "at least"))
        bars.append(Bar(f"{kind}, robust accuracy, ours - {whose}, {where}", more, 0.0, "at most"))
    return bars
