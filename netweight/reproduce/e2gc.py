"""Jha et al. 2020: at the same MACs, one group size for all layers costs less energy than one group count.

The paper: energy efficiency +10.8 % (MobileNet-V1) and +4.73 % (ResNeXt-50) at comparable MACs on a P100.
Here: stacks of five 3 x 3 group convolutions, 32 to 512 channels on maps of 32 to 2 pixels a side, batches
of 8, one thread, channels last. Energy is a counter of the processor where one can be read, else CPU time
times a constant (figures say which): the ratios of the bars are the same then as those of CPU times. A
constant group count is compared with two neighbouring group sizes, mixed to the same MACs. Accuracy: a
MobileNet-like net trained on 10,000 images of CIFAR-10, groups of 8 against 8 groups, with one recipe for
both: of seven (images shifted or not, batch, rate, epochs, warm-up) the one that gave the two the highest
mean accuracy on 5,000 further training images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.graph import macs
from netweight.core.result import Bar, Claim
from netweight.core.task import outputs
from netweight.data.images import cifar10
from netweight.inspection.e2gc import (
    Constants,
    Conv,
    balance,
    best_size,
    choose,
    equal,
    on_this_machine,
    readings,
)
from netweight.models.trained import seeded
from netweight.nn.group_conv import mobile
from netweight.training.loop import Moment, Training, train

STACK = ((32, 32), (64, 16), (128, 8), (256, 4), (512, 2))  # channels, side of the map
SIZES, COUNTS = (2, 4, 8, 16, 32), (4, 8, 16)
WIDTHS, SIZE = (32, 64, 128, 256), 8
EXAMPLES, EPOCHS, BATCH, RATE = 10_000, 8, 32, 3e-3
SHIFT = 2  # pixels that a training image is moved by at most


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; quick: the interior optimum, and the closed forms on costs that are given."""
    found = readings(stacks(), runs=5 if quick else 21, seed=seed)
    joules = {name: reading.joules for name, reading in found.items()}
    figures: dict[str, Any] = {"joules": joules, "how": found["G 2"].how}
    interior = Bar("energy at G = 2 / at G = 8", joules["G 2"] / joules["G 8"], 1.3, "at least")
    if quick:
        return Claim([interior, *closed_forms()], figures)

    ratios = {count: matched(joules, count) for count in COUNTS}
    constants, rows = on_this_machine(runs=11, seed=seed)
    accuracy = accuracies(seed)
    figures |= {
        "at equal MACs, one size / one count": ratios,
        "constants": {"compute": constants.compute, "data": constants.data, "move": constants.move},
        "best group size": best_size(constants),
        "points": len(rows),
        **accuracy,
    }
    return Claim(
        [
            interior,
            Bar(
                "at equal MACs, one size / one count: of 3, at most 0.95",
                sum(r <= 0.95 for r in ratios.values()),
                2,
                "at least",
            ),
            Bar(
                "at equal MACs, energy of one size / one count, mean",
                float(np.mean([*ratios.values()])),
                0.93,
                "at most",
            ),
            Bar("R^2 of the energy model, logarithms", constants.fit, 0.8, "at least"),
            Bar("points of the fit", len(rows), 40, "at least"),
            Bar("accuracy, one size - one count", accuracy["size"] - accuracy["count"], -0.01, "at least"),
            Bar(
                "MACs of the trained nets, one size / one count, off 1 by",
                abs(accuracy["MACs"] - 1),
                0.05,
                "at most",
            ),
        ],
        figures,
    )


def stacks() -> dict[str, list[Conv]]:
    """The five convolutions at each constant group size ("G 8") and each constant count ("g 8")."""
    by_size = {f"G {size}": [layer(m, side, size) for m, side in STACK] for size in SIZES}
    return by_size | {f"g {count}": [layer(m, side, m // count) for m, side in STACK] for count in COUNTS}


def layer(channels: int, side: int, size: int) -> Conv:
    """A 3 x 3 convolution that keeps channels and map."""
    return Conv(channels, channels, 9, side * side, side * side, size)


def matched(joules: dict[str, float], count: int) -> float:
    """Energy of two neighbouring sizes, mixed to the MACs of a constant count, over the energy of that."""
    made = stacks()
    total = {name: sum(one.macs for one in stack) for name, stack in made.items()}
    wanted = total[f"g {count}"]
    low = max(size for size in SIZES if total[f"G {size}"] <= wanted)
    high = min(size for size in SIZES if total[f"G {size}"] > wanted)
    share = (wanted - total[f"G {low}"]) / (total[f"G {high}"] - total[f"G {low}"])
    mixed = (1 - share) * joules[f"G {low}"] + share * joules[f"G {high}"]
    return mixed / joules[f"g {count}"]


def closed_forms() -> list[Bar]:
    """On given costs: G* against the least J of a fine grid, and equal sizes against the knapsack."""
    constants = Constants(compute=1.0, data=2000.0)
    grid = np.linspace(0.5, 40, 20001)
    values = balance(grid, constants.compute, constants.data, 9, 1.0, 64)  # type: ignore[arg-type]
    off = abs(grid[int(np.argmin(values))] / best_size(constants) - 1)
    layers = stacks()["G 8"]

    def cost(one: Conv) -> float:
        return one.outputs * one.places * balance(one.size, 1.0, 2000.0, 9, 1.0, 64)

    ceiling = float(sum(one.macs for one in layers))
    chosen = choose(layers, (1, 2, 4, 8, 16, 32), ceiling, cost)
    unlike = sum(size != equal(layers, ceiling) for size in chosen)
    return [
        Bar("closed form, off the least of the model by", float(off), 0.001, "at most"),
        Bar("layers where the knapsack leaves the equal size", unlike, 0, "at most"),
    ]


def accuracies(seed: int) -> dict[str, float]:
    """Test accuracy with one group size and with one group count, and MACs of the first over the second."""
    nets = {
        "size": lambda: mobile(WIDTHS, lambda m: SIZE),
        "count": lambda: mobile(WIDTHS, lambda m: m // SIZE),
    }
    data, test = cifar10().train(EXAMPLES), cifar10().test()
    how = Training(EPOCHS, batch=BATCH, rate=RATE, warmup=1, cosine=True, seed=seed)
    found: dict[str, float] = {}
    work: dict[str, int] = {}
    for name, make in nets.items():
        with seeded(seed):
            net = make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            train(net, data, loss, how)
        right = outputs(net, test).argmax(-1) == test.y
        found[name] = float(right.double().mean())
        work[name] = macs(net, test.x[:1])
    return {**found, "MACs": work["size"] / work["count"]}


def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
    """Cross-entropy on images turned left to right at random, half of them, and shifted."""
    flip = torch.rand(len(x), generator=at.generator) < 0.5
    x = shifted(torch.where(flip.to(x.device)[:, None, None, None], x.flip(-1), x), at.generator)
    return F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)


def shifted(x: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Each image moved by -`SHIFT` to `SHIFT` pixels along both axes at random, mirrored at its edges."""
    height, width = x.shape[-2:]
    wide = F.pad(x, (SHIFT,) * 4, mode="reflect")
    by = torch.randint(0, 2 * SHIFT + 1, (len(x), 2, 1), generator=generator).to(x.device)
    rows = by[:, 0] + torch.arange(height, device=x.device)
    columns = by[:, 1] + torch.arange(width, device=x.device)
    image, colour = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return wide[
        image[:, None, None, None], colour[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]
