"""Mopuri, Ganeshan and Babu 2018: a change made without any data fools a network on most of its inputs.

The paper: ImageNet, xi = 10/255, 60 to 85 % of predictions of VGG-F to ResNet-152 changed without data; 10 to
20 points more with a prior on the range of pixels; what is made on one network fools others; segmentation and
depth suffer too. Here: ResNet-20 on CIFAR-10 (JPEG), 500 test images, ResNet-32 and 44 as unseen networks,
300 steps without data, 150 with range images; beside them noise of the same largest change: random signs, and
uniform. A compressed victim: the change that was made on the float ResNet-20 against its 8- and 4-bit copies
(weights rounded to nearest).

The other task: pressure of a porous plate from its conductivity (`data.darcy`), a small U-Net, mean squared
error against the pressure of the plate as it is (its input is taken for a measurement), xi = 0.1 of the
input's range. Had the plate itself changed, its pressure would have moved as much: the network follows it.
Figures say how far, and how far the network is from the pressure of such a plate.
Quick: the digits CNN, xi = 0.2, 60 steps with range images (without them it is not above random signs there).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netweight.attacks.gd_uap import universal
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.perturbation import Linf
from netweight.core.plan import Plan
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import darcy, digits
from netweight.data.images import cifar10
from netweight.models.darcy_unet import darcy_unet
from netweight.models.digits_cnn import digits_cnn
from netweight.models.resnet_cifar import resnet20, resnet32, resnet44

IMAGES = 500
NONE_STEPS, RANGE_STEPS = 300, 150
WITHIN = Linf(10 / 255, 0.0, 1.0)
PLATES = Linf(0.1, 0.0, 1.0)
SIGNS, UNIFORM, NONE, RANGE = "random signs", "uniform noise", "no data", "range prior"


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Shares of predictions that change, and errors of the other task, of one seed."""
    if quick:
        return short(seed)
    model, data = resnet20(), cifar10().test(IMAGES)
    made = changes(model, data, WITHIN, seed)
    nets = {"ResNet-20": model, "ResNet-32": resnet32(), "ResNet-44": resnet44()}
    nets |= {f"ResNet-20, {bits} bit": rounded(model, bits) for bits in (8, 4)}
    fooled = {name: fooling(net, data, made) for name, net in steps([*nets.items()], "Fooling networks")}
    own = fooled["ResNet-20"]
    bars = [
        Bar("fooled without data", own[NONE], 0.60, "at least"),
        Bar("fooled, no data / random signs", own[NONE] / own[SIGNS], 1.4, "at least"),
    ]
    unseen = ("ResNet-32", "ResNet-44")
    for name in unseen:
        ratio = fooled[name][NONE] / fooled[name][SIGNS]
        bars.append(Bar(f"{name}, unseen: no data / random signs", ratio, 1.2, "at least"))
    carried = sum(fooled[name][RANGE] - fooled[name][NONE] for name in unseen) / len(unseen)
    apart = abs(fooled["ResNet-20, 8 bit"][NONE] - own[NONE])
    bars += [
        Bar("fooled, range prior - no data", own[RANGE] - own[NONE], -0.02, "at least"),
        Bar("fooled on unseen networks, range prior - no data", carried, 0.0, "at least"),
        Bar("8-bit copy: distance to the float network's share", apart, 0.10, "at most"),
    ]
    errors, figures = plates(seed)
    for name in (NONE, RANGE):
        ratio = errors[name] / errors[SIGNS]
        bars.append(Bar(f"pressure: squared error, {name} / random signs", ratio, 2.0, "at least"))
    return Claim(bars, {"fooled": fooled, "pressure": figures})


def short(seed: int) -> Claim:
    """The digits."""
    within, data, model = Linf(0.2, 0.0, 1.0), digits.test(), digits_cnn(seed)
    made = {SIGNS: noises(data.x[:1], within, seed)[SIGNS]}
    for name, prior in ((NONE, "none"), (RANGE, "range")):
        made[name] = universal(model, data.x[:1], within, prior=prior, steps=60, seed=seed).d
    fooled = fooling(model, data, made)
    reached = max(fooled[RANGE] / (1.5 * fooled[SIGNS]), fooled[RANGE] / 0.3)
    return Claim([Bar("range prior: of 1.5 times random signs, or of 0.3", reached, 1.0, "at least")], fooled)


def changes(model: nn.Module, data: Data, within: Linf, seed: int) -> dict[str, Tensor]:
    """Noise, and what is made on the network with and without the range prior; `1 *in` each."""
    like = data.x[:1]
    none = universal(model, like, within, prior="none", steps=NONE_STEPS, seed=seed)
    range_ = universal(model, like, within, prior="range", steps=RANGE_STEPS, seed=seed)
    return noises(like, within, seed) | {NONE: none.d, RANGE: range_.d}


def noises(like: Tensor, within: Linf, seed: int) -> dict[str, Tensor]:
    """+-xi at random, and uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, like.shape, generator=generator) - 1
    return {
        SIGNS: within.eps * signs,
        UNIFORM: within.eps * (2 * torch.rand(like.shape, generator=generator) - 1),
    }


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """The network with weights rounded to nearest."""
    data = digits.test()  # not looked at
    return assemble(model, rtn(model, Task(data, data), weighted(model), RTN(bits)), Plan({})).model


def fooling(model: nn.Module, data: Data, made: dict[str, Tensor]) -> dict[str, float]:
    """The share of predictions that each changes."""
    clean = outputs(model, data).argmax(1)
    return {
        name: float((outputs(model, moved(data, d)).argmax(1) != clean).float().mean())
        for name, d in made.items()
    }


def moved(data: Data, d: Tensor) -> Data:
    """The data with d on each example, cut to the valid range."""
    assert data.low is not None and data.high is not None
    return Data((data.x + d).clamp(data.low, data.high), data.y, data.batch, low=data.low, high=data.high)


# The other task ---------------------------------------------------------------------------------------------


def plates(seed: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(the mean squared error under each change, figures)."""
    model, data = darcy_unet(seed), darcy.test()
    assert data.y is not None
    made = changes(model, data, PLATES, seed) | {"clean": torch.zeros_like(data.x[:1])}
    found = {name: outputs(model, moved(data, d)) for name, d in made.items()}
    errors = {name: float((u - data.y).square().mean()) for name, u in found.items()}
    true = {name: darcy.solved(moved(data, d).x) for name, d in made.items()}
    return errors, {
        "squared error": errors,
        "relative error": {name: relative(u, data.y) for name, u in found.items()},
        "the equation's own change": {name: relative(u, data.y) for name, u in true.items()},
        "relative error for the changed plate": {n: relative(u, true[n]) for n, u in found.items()},
    }


def relative(u: Tensor, y: Tensor) -> float:
    """|u - y| / |y|, the mean over examples."""
    return float(((u - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean())
