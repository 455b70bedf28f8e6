"""Nguyen, Yosinski and Clune 2015: networks are sure of images that show nothing.

The paper: MNIST, median confidence 99.99 % within 200 generations, noise (direct) or patterns (CPPN);
ImageNet 88.11 % (CPPN); other networks see the same; a class for such images does not help on MNIST, where
after 15 rounds of retraining it is still 99.99 %. Here: the digits CNN (8 x 8) with MAP-Elites to 0.9999 in
both encodings, gradient ascent, `ROUNDS` rounds of retraining from scratch with an eleventh class that holds
what `RUNS` evolutions found against each network before. ResNet-20 on CIFAR-10, with `SMALL` in place of 200
children, is reported alone.

Whether an image shows a digit is measured by its distance to the nearest training image, beside that of test
images. Regularity is the size of the ten images side by side as one PNG: of a PNG of 8 x 8 pixels 57 bytes
are its frame (figures hold the ratio of single files too).
Quick: direct, 30 generations.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from netweight.attacks.fooling import Ascended, Evolution, Fooled, ascent, fooling
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models import digits_cnn as built_in
from netweight.models.digits_cnn import digits_cnn
from netweight.models.resnet_cifar import MEAN, resnet20
from netweight.models.trained import seeded
from netweight.report.inputs import png
from netweight.training.loop import train
from netweight.training.settings import Training
from netweight.training.trained import loss

DIRECT, PAINTED = Evolution("direct", 200, enough=0.9999), Evolution("cppn", 1000, enough=0.9999)
ROUNDS, RUNS = 5, 3
JUDGED = 3  # the round that the bar is about
SMALL = 40
CLASSES = 10


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Confidences, distances, sizes and rounds of one seed."""
    model, test = digits_cnn(seed), digits.test()
    if quick:
        found = fooling(model, test.x[:1], Evolution("direct", 30), seed=seed)
        return Claim([Bar("direct, 30 generations: median confidence", found.median[-1], 0.99, "at least")])
    direct = fooling(model, test.x[:1], DIRECT, seed=seed)
    painted = fooling(model, test.x[:1], PAINTED, seed=seed)
    near, real = float(nearest(direct.images).min()), nearest(test.x)
    shared = seen_alike(digits_cnn(seed + 1), direct.images)
    rounds = {how.encoding: retrained(model, how, seed) for how in (PAINTED, DIRECT)}
    held = [rounds[encoding][JUDGED] >= 0.95 for encoding in rounds]
    bars = [
        Bar("direct: median confidence in 200 generations", direct.median[-1], 0.9999, "at least"),
        Bar("CPPN: median confidence in 1,000 generations", painted.median[-1], 0.99, "at least"),
        Bar("direct: distance / largest of test images", near / float(real.max()), 1.5, "at least"),
        Bar("PNG bytes, CPPN / direct", sheet(painted) / sheet(direct), 0.7, "at most"),
        *(
            Bar(f"{encoding}: 0.95 held after {JUDGED} rounds, of all seeds", float(one), 2 / 3, "at least")
            for encoding, one in zip(rounds, held)
        ),
        Bar("direct: same class on a network of another seed", shared, 0.5, "at least"),
    ]
    climbed = ascent(model, torch.full_like(test.x[:1], built_in.MEAN), seed=seed)
    figures = {
        "direct": described(direct) | {"largest distance of a test image": float(real.max())},
        "CPPN": described(painted)
        | {"same class on another": seen_alike(digits_cnn(seed + 1), painted.images)},
        "single PNG, CPPN / direct": single(painted) / single(direct),
        "uniform noise: median top confidence": noise(model, seed),
        "ascent": summed(climbed),
        "median confidence after each round": rounds,
        "ResNet-20": colour(seed),
    }
    return Claim(bars, figures)


def described(found: Fooled) -> dict[str, Any]:
    """Its figures."""
    return {
        "median": found.median[-1],
        "least": float(found.confidence.min()),
        "generations to 0.99 and 0.9999": [found.reached(level) for level in (0.99, 0.9999)],
        "least distance to a training image": (
            float(nearest(found.images).min()) if found.images.shape[1] == 1 else None
        ),
    }


def summed(found: Ascended) -> dict[str, Any]:
    """Its figures; how many classes ever reached each level."""
    return {
        "median": float(found.confidence.median()),
        "reached": {name: sum(step >= 0 for step in at) for name, at in found.when.items()},
    }


def nearest(images: Tensor) -> Tensor:
    """The Euclidean distance of each image to the nearest training image."""
    return torch.cdist(images.flatten(1), digits.train().x.flatten(1)).min(1).values


def seen_alike(other: nn.Module, images: Tensor) -> float:
    """The share of images to which another network gives the class they were made for."""
    return float((outputs(other, Data(images)).argmax(1) == torch.arange(len(images))).float().mean())


def sheet(found: Fooled) -> int:
    """Bytes of all images side by side as one PNG."""
    return len(png(torch.cat([*found.images], 2)))


def single(found: Fooled) -> float:
    """Bytes of one image as a PNG, the mean."""
    return statistics.mean(len(png(image)) for image in found.images)


def noise(model: nn.Module, seed: int) -> float:
    """The confidence in uniform noise, the median of 1,000 images."""
    x = torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return float(outputs(model, Data(x)).softmax(1).max(1).values.median())


def retrained(model: nn.Module, how: Evolution, seed: int) -> list[float]:
    """The median confidence over classes and runs before any round and after each."""
    like, data = digits.test().x[:1], digits.train()
    assert data.y is not None
    x, y, medians = data.x, data.y, []
    for number in steps(range(ROUNDS + 1), f"Rounds of retraining, {how.encoding}"):
        found = [
            fooling(model, like, limited(how), classes=range(CLASSES), seed=1000 * seed + 10 * number + run)
            for run in range(RUNS)
        ]
        medians.append(float(torch.cat([one.confidence for one in found]).median()))
        if number == ROUNDS:
            break
        images = torch.cat([one.images for one in found])
        x, y = torch.cat([x, images]), torch.cat([y, torch.full((len(images),), CLASSES)])
        model = with_one_more(Data(x, y), seed + 100 * (number + 1))
    return medians


def limited(how: Evolution) -> Evolution:
    """200 generations at most in a round."""
    return Evolution(how.encoding, 200, enough=how.enough)


def with_one_more(data: Data, seed: int) -> nn.Module:
    """The digits CNN with eleven classes, trained from random weights."""
    with seeded(seed):
        model = built_in.architecture()
        model[-1] = nn.Linear(64, CLASSES + 1)
    how = Training(15, batch=64, rate=4e-3, optimizer="adamw", decay=1e-2, warmup=3, cosine=True, seed=seed)
    train(model, data, loss, how)
    return model


def colour(seed: int) -> dict[str, Any]:
    """ResNet-20: both encodings for 25 generations, and ascent for 60 steps."""
    model, like = resnet20(), cifar10().test(1).x
    found = {
        encoding: described(fooling(model, like, Evolution(encoding, 25, SMALL), seed=seed))
        for encoding in ("direct", "cppn")
    }
    mean = torch.tensor(MEAN).reshape(1, 3, 1, 1).expand_as(like)
    return found | {"ascent": summed(ascent(model, mean, steps=60, seed=seed))}
