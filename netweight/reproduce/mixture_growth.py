"""Pham et al. 2024: grown from two networks of half the width, a network beats the same one from scratch.

The paper: WRN-28-5 to WRN-28-10 on CIFAR-100, 200 + 200 + 40 epochs, 2 to 2.5 points above earlier ways of
growing, close to the large network from scratch at fewer products. Here: `PICTURES` images of CIFAR-10 at 16
pixels a side, four convolutions whose widths grow from 8, 16, 16, 32 to twice that, 8 epochs for each member,
3 after growth. "From scratch" is the full network, as torch's layers begin, for the epochs after growth and,
to the step, for as many as cost the products of the whole growth (7.3 epochs; a member takes a quarter but
for its first and last layer). Schedule and seed are shared. "Random" draws the new coefficients, "zero" adds
the members up, "widened" is Net2Net's copy of member 0 (Chen et al. 2016, arXiv:1511.05641) with a little
noise. No gain over random or zero growth is left after training at this size: it is reported and, for random
growth, only not to be lost.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.graph import macs
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.digits_cnn import MEAN as GREY
from netweight.models.digits_cnn import STD as GREY_STD
from netweight.models.resnet_cifar import MEAN, STD
from netweight.models.trained import seeded
from netweight.nn.normalize import Normalize
from netweight.training.loop import Hooks, Training, train
from netweight.training.mixture_growth import (
    MEMBERS,
    MixtureGrowth,
    folded,
    grow,
    loss,
    mixed_layers,
    templates_of,
    train_grown,
    train_member,
)

PICTURES, WIDTH, NOISE = 4000, 16, 0.01
HOW = Training(8, batch=128, rate=0.1, optimizer="sgd", decay=5e-4, cosine=True, warmup=2)
AFTER = MixtureGrowth(epochs=3, share=0.45)
QUICK, NARROW = replace(HOW, epochs=7, batch=32), 8


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; quick: the digits, and whether the logits of the members are added."""
    if quick:
        return quick_claim(seed)
    data, test = halved(cifar10().train(PICTURES)), halved(cifar10().test())
    how = replace(HOW, seed=seed)
    full = network(WIDTH, Normalize(MEAN, STD), seed)
    net, halves = trained_members(full, data, how)
    equal = epochs_at_equal_macs(full, halves[0], data, how)
    score = {f"member {place}": accuracy(half, test) for place, half in enumerate(halves)}
    score |= {"ensemble": ensemble(halves, test), **growths(net, data, test, how)}
    score["scratch, equal products"] = accuracy(fitted(full, data, how, equal), test)
    score["scratch, epochs after growth"] = accuracy(fitted(full, data, how, AFTER.epochs), test)
    again = replace(how, rate=how.rate * AFTER.share, warmup=0.0)
    score["widened"] = accuracy(fitted(widened(halves[0], full, seed), data, again, AFTER.epochs), test)

    grown, random = score["orthogonal"], score["random"]
    better = max(score[f"member {place}"] for place in range(MEMBERS))
    return Claim(
        [
            at_least("grown - scratch at equal products", grown - score["scratch, equal products"], 0.01),
            at_least(
                "grown - scratch, epochs after growth", grown - score["scratch, epochs after growth"], 0.02
            ),
            at_least(
                "before training, orthogonal - random", score["orthogonal, raw"] - score["random, raw"], 0.01
            ),
            at_least("after training, orthogonal - random", grown - random, -0.01),
            at_least("grown - better member", grown - better, 0.015),
            at_least("grown - ensemble of the members", grown - score["ensemble"], -0.01),
            Bar(
                "parameters of an inner layer beyond the full one", extra_parameters(net, full), 8, "at most"
            ),
        ],
        {**score, "epochs at equal products": equal},
    )


def quick_claim(seed: int) -> Claim:
    """The digits: no worse than from scratch, and logits that are sums where nothing new is mixed in."""
    data, test, how = digits.train(), digits.test(), replace(QUICK, seed=seed)
    full = network(NARROW, Normalize([GREY], [GREY_STD]), seed)
    net, halves = trained_members(full, data, how)
    equal = epochs_at_equal_macs(full, halves[0], data, how)
    scratch = [accuracy(fitted(full, data, how, epochs), test) for epochs in (AFTER.epochs, equal)]
    plain = copy.deepcopy(net)
    grow(plain, replace(AFTER, growth="zero"), seed)
    apart = outputs(folded(plain), test) - sum(outputs(half, test) for half in halves)
    grow(net, AFTER, seed)
    train_grown(net, data, how, AFTER)
    grown = accuracy(folded(net), test)
    return Claim(
        [
            at_least("digits: grown - scratch at equal products", grown - scratch[1], 0.0),
            at_least("digits: grown - scratch, epochs after growth", grown - scratch[0], 0.0),
            Bar("zero growth: logits off the sum by", float(apart.abs().max()), 1e-4, "at most"),
        ],
        {"grown": grown, "scratch, epochs after growth": scratch[0], "scratch, equal products": scratch[1]},
    )


def at_least(name: str, measured: float, mark: float) -> Bar:
    """A bar that is to be reached from below."""
    return Bar(name, measured, mark, "at least")


def halved(data: Data) -> Data:
    """The images at half their size, the mean over 2 x 2 pixels."""
    return replace(data, x=F.avg_pool2d(data.x, 2), memo={})


def network(width: int, normalize: Normalize, seed: int) -> nn.Sequential:
    """Four 3 x 3 convolutions of 1, 2, 2 and 4 times that width, the mean over the image, a linear layer."""
    with seeded(seed):
        layers, before = [normalize], len(normalize.mean)
        for factor, stride in ((1, 1), (2, 2), (2, 1), (4, 2)):
            convolution = nn.Conv2d(before, factor * width, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(factor * width), nn.ReLU()]
            before = factor * width
        end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10, bias=False)]
        return nn.Sequential(*layers, *end).eval()


def trained_members(full: nn.Module, data: Data, how: Training) -> tuple[nn.Module, list[nn.Module]]:
    """The network of templates with both members trained, and the members as ordinary networks."""
    net = templates_of(full, data, AFTER, how.seed)
    for member in range(MEMBERS):
        train_member(net, data, how, member)
    return net, [folded(net, member) for member in range(MEMBERS)]


def growths(net: nn.Module, data: Data, test: Data, how: Training) -> dict[str, float]:
    """Test accuracy of every way of growing, before ("raw") and after training."""
    found = {}
    for name in ("orthogonal", "random", "zero"):
        settings, grown = replace(AFTER, growth=name), copy.deepcopy(net)
        grow(grown, settings, how.seed)
        found[f"{name}, raw"] = accuracy(grown, test)
        train_grown(grown, data, how, settings)
        found[name] = accuracy(folded(grown), test)
    return found


def fitted(model: nn.Module, data: Data, how: Training, epochs: float) -> nn.Module:
    """A copy of the network, trained on labels for so many epochs, to the step."""
    steps = round(epochs * -(-len(data) // how.batch))

    def order(generator: torch.Generator) -> list[Tensor]:
        rounds = [torch.randperm(len(data), generator=generator) for _ in range(math.ceil(epochs))]
        return [rows for one in rounds for rows in one.split(how.batch)][:steps]

    model = copy.deepcopy(model).requires_grad_(True)
    at_once = replace(how, epochs=1, warmup=how.warmup / epochs)  # the loop knows whole epochs alone
    train(model, data, loss, at_once, hooks=Hooks(order=order))
    return model


def epochs_at_equal_macs(full: nn.Module, half: nn.Module, data: Data, how: Training) -> float:
    """Epochs of the full network that take the products of both members and of what follows."""
    ratio = macs(half, data.x[:1]) / macs(full, data.x[:1])
    return MEMBERS * how.epochs * ratio + AFTER.epochs


@torch.no_grad()
def widened(half: nn.Module, full: nn.Module, seed: int) -> nn.Module:
    """Net2Net: every channel of the half network twice, its outgoing weights halved, and a little noise."""
    wide, generator = copy.deepcopy(full), torch.Generator().manual_seed(seed)
    small, weights = half.state_dict(), {name for name, p in wide.named_parameters() if p.ndim > 1}
    for name, tensor in wide.state_dict().items():
        times = [a // b for a, b in zip(tensor.shape, small[name].shape)]
        tensor.copy_(small[name].repeat(times) if times else small[name])
        if name in weights:
            tensor /= times[1]
            tensor += NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return wide


def ensemble(halves: list[nn.Module], test: Data) -> float:
    """Accuracy of the sum of the logits."""
    total = torch.stack([outputs(half, test) for half in halves]).sum(0)
    return float((total.argmax(-1) == test.y).double().mean())


def extra_parameters(net: nn.Module, full: nn.Module) -> float:
    """The most that an inner layer of templates stores beyond the weight it becomes."""
    convolutions = [layer for layer in full.modules() if isinstance(layer, nn.Conv2d)][1:]
    inner = [layer for layer in mixed_layers(net) if layer.halves.pieces == 4]
    return max(
        sum(p.numel() for p in layer.parameters()) - whole.weight.numel()
        for layer, whole in zip(inner, convolutions, strict=True)
    )


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers."""
    return float((outputs(model, data).argmax(-1) == data.y).double().mean())
