"""Fang et al. 2023: N:M weights in both passes halve the products of training at little loss of accuracy.

The paper: 2:8 trains ResNets, VGG and ViT 1.75 times as fast on its accelerator, on average, with 0.56 points
of accuracy less. Here: (1) accuracy of the shipped W_F: four convolutions on 5,000 images of CIFAR-10 at 16 x
16, and an MLP on the digits, by every arm, 2:4 and block-shared beside them on the digits. (2) MACs of
training, counted for both networks. (3) the accelerator, modelled at batch 64 for ResNet-20, and ResNet-18,
VGG-19 and ViT at 64 px: no FPGA was run. (4) CPU seconds of a forward and backward pass of one Linear layer
by block-shared products, medians of 20 steps each with the look-up and the repacking inside, against torch's
dense layer in turns, on one thread. Quick: the digits alone (bar at 3 points), without (4).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.inspection.accelerator import Accelerator, Estimate, bound, estimate, layers_of
from netweight.models.resnet_cifar import Block, architecture
from netweight.models.trained import seeded
from netweight.nn.nm_cpu import ways
from netweight.nn.nm_sparse import NEITHER, Pattern
from netweight.training.bdwp import BDWP, bdwp
from netweight.training.loop import Training
from netweight.training.trained import Trained

IMAGES, TESTED = 5_000, 5_000
DENSE = BDWP(arm="dense")
ARMS = {"dense": DENSE, "sr-ste": BDWP(arm="sr-ste"), "sdgp": BDWP(arm="sdgp"), "bdwp": BDWP()}
MORE = {
    "sdwp": BDWP(arm="sdwp"),
    "bdwp 2:4": BDWP(2, 4),
    "sr-ste 2:4": BDWP(2, 4, arm="sr-ste"),
    "sdgp 2:4": BDWP(2, 4, arm="sdgp"),
    "bdwp, blocks of 32": BDWP(block=32),
}
LAYERS = ((512, 1024), (1024, 256), (2048, 256))  # width, batch
BOUND = {512: True, 1024: True, 2048: False}  # which have a bar
TURNS = 5


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; accuracies are shares of the test data."""
    parts = [small(seed, quick), modelled()]
    if not quick:
        parts += [images(seed), speed()]
    return Claim(
        [bar for part in parts for bar in part.bars],
        {name: figure for part in parts for name, figure in part.figures.items()},
    )


# Accuracy -------------------------------------------------------------------------------------------------


def hits(trained: Trained, data: Data) -> int:
    """How many of the test examples the network as it is shipped gets right."""
    return int((outputs(trained.network().model, data).argmax(1) == data.y).sum())


def small(seed: int, quick: bool) -> Claim:
    """Digits, MLP 64-256-256-10."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
    task = Task(digits.calibration(), digits.test(), train=digits.train())
    how = Training(10 if quick else 30, 32, 0.1, optimizer="sgd", cosine=True, decay=5e-4, seed=seed)
    arms = ARMS if quick else ARMS | MORE
    return judged("digits", model, task, how, arms, 0.03 if quick else 0.015)


def images(seed: int) -> Claim:
    """CIFAR-10 at 16 x 16, four convolutions."""
    source = cifar10()
    data, test = (halved(part) for part in (source.train(IMAGES), source.test(TESTED)))
    with seeded(seed):
        model = nn.Sequential(
            *conv(3, 32, 1), *conv(32, 64, 2), *conv(64, 64, 1), *conv(64, 128, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
    how = Training(12, 128, 0.1, optimizer="sgd", cosine=True, decay=5e-4, seed=seed)
    return judged("CIFAR-10", model, Task(data.take(64), test, train=data), how, ARMS, 0.015)


def halved(data: Data) -> Data:
    """Images of half the side: means of 2 x 2 pixels."""
    return Data(F.avg_pool2d(data.x, 2), data.y, 250, data.name, low=0.0, high=1.0)


def conv(before: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    """3 x 3, batch norm, ReLU."""
    return nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def judged(
    name: str, model: nn.Module, task: Task, how: Training, arms: Mapping[str, BDWP], within: float
) -> Claim:
    """Bars 1 and 2 of one network: every arm from the same weights and the same order of examples."""
    found = {arm: bdwp(model, task.blind(), how, settings) for arm, settings in arms.items()}
    right, count = {arm: hits(trained, task.test) for arm, trained in found.items()}, len(task.test)
    best, counted = found["bdwp"], found["bdwp"].notes["macs"]["ratio"]
    bars = [
        Bar(
            f"{name}: accuracy, BDWP 2:8 - dense",
            (right["bdwp"] - right["dense"]) / count,
            -within,
            "at least",
        ),
        Bar(
            f"{name}: accuracy, BDWP 2:8 - SDGP 2:8", (right["bdwp"] - right["sdgp"]) / count, 0.0, "at least"
        ),
        Bar(f"{name}: most nonzero weights in a group of 8", float(most_kept(best)), 2, "at most"),
        Bar(f"{name}: MACs of training, BDWP 2:8 / dense", counted, 0.56, "at most"),
    ]
    macs = {arm: trained.notes["macs"]["ratio"] for arm, trained in found.items()}
    shares = {arm: number / count for arm, number in right.items()}
    return Claim(bars, {f"{name}: accuracy": shares, f"{name}: MACs of training / dense": macs})


def most_kept(trained: Trained) -> int:
    """The most weights other than 0 in any group of 8 inputs of the sparse layers, as they are decoded."""
    weights = (form.decode().movedim(1, -1).reshape(-1, 8) for form in trained.change.packed.values())
    return max(int((weight != 0).sum(1).max()) for weight in weights)


# The accelerator ------------------------------------------------------------------------------------------


def modelled() -> Claim:
    """Bar 3: speedups of 2:8 on the model of SAT, each measure switched off in turn, and other bandwidths."""
    chips = {
        "as it is": Accelerator(),
        "without interleaving": Accelerator(interleave=1),
        "without interleaving, without schedule": Accelerator(interleave=1, scheduled=False),
        "without pre-generation": Accelerator(pregenerated=False),
        "without schedule": Accelerator(scheduled=False),
        "192 bytes a cycle": Accelerator(bandwidth=192.0),
        "products alone": Accelerator(bandwidth=1e12, lanes=2**40),
    }
    shapes = {name: layers_of(net, torch.zeros(1, 3, side, side)) for name, (net, side) in networks().items()}
    runs: dict[str, dict[str, tuple[Estimate, Estimate]]] = {
        name: {
            what: (estimate(found, 64, chip, NEITHER), estimate(found, 64, chip))
            for what, chip in chips.items()
        }
        for name, found in shapes.items()
    }
    speeds = {
        what: {name: run[what][0].cycles / run[what][1].cycles for name, run in runs.items()}
        for what in chips
    }
    mean = {what: statistics.fmean(values.values()) for what, values in speeds.items()}
    bars = [
        Bar("modelled: mean speedup of 2:8 on SAT", mean["as it is"], 1.5, "at least"),
        Bar("modelled: mean speedup of 2:8 on SAT, most", mean["as it is"], 2.0, "at most"),
    ]
    slower = {
        what: statistics.fmean(run[what][1].cycles / run["as it is"][1].cycles for run in runs.values())
        for what in chips
    }
    energy = {name: run["as it is"][0].joules / run["as it is"][1].joules for name, run in runs.items()}
    return Claim(
        bars,
        {
            "modelled: speedup of 2:8, and its bound": speeds["as it is"] | {"bound": bound(Pattern())},
            "modelled: mean speedup": mean,
            "modelled: cycles of 2:8, of as it is": slower,
            "modelled: energy, dense / 2:8": energy,
            "modelled: how": runs["ResNet-20"]["as it is"][0].how,
        },
    )


def networks() -> dict[str, tuple[nn.Module, int]]:
    """The four networks of the model and the side of their images."""
    with seeded(0):
        return {
            "ResNet-20": (architecture(20), 32),
            "ResNet-18": (resnet18(), 64),
            "VGG-19": (vgg19(), 64),
            "ViT": (ViT(), 64),
        }


def resnet18() -> nn.Module:
    """Widths 64 to 512, two blocks each, for small images (shortcuts without weights)."""
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    blocks = [Block(*each) for a, b, s in widths for each in ((a, b, s), (b, b, 1))]
    return nn.Sequential(*conv(3, 64, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 200))


def vgg19() -> nn.Module:
    """Sixteen convolutions in five stages, one Linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += conv(before, width, 1)
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 200))


class Attention(nn.Module):
    """A transformer block of width d and 6 heads."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.together, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """x + attention, + MLP."""
        b, t, d = x.shape
        q, k, v = self.together(self.norm(x)).reshape(b, t, 3, 6, d // 6).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Seven blocks of width 384 on patches of 8 x 8."""

    def __init__(self, d: int = 384) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 8, 8)
        self.blocks = nn.Sequential(*(Attention(d) for _ in range(7)))
        self.head = nn.Linear(d, 200)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean over the patches."""
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


# CPU ------------------------------------------------------------------------------------------------------


def speed() -> Claim:
    """Bar 4: dense seconds over those of the block-shared path, 2:8."""
    patterns = [Pattern(block=block) for block in (32, 64)]
    bars, figures = [], {}
    for width, batch in steps(LAYERS, "CPU seconds"):
        seconds = in_turns(width, batch, patterns)
        over = {
            block: statistics.median(a / b for a, b in zip(seconds[0], times))
            for block, times in seconds.items()
        }
        figures[f"{width} x {width}, batch {batch}"] = {f"blocks of {b}": over[b] for b in over if b}
        if BOUND[width]:
            name = f"CPU: dense seconds / block-shared 2:8, {width} x {width}, batch {batch}"
            bars.append(Bar(name, over[64], 1.2, "at least"))
    return Claim(bars, {"CPU: times as fast as dense, forward and backward": figures})


def in_turns(width: int, batch: int, patterns: list[Pattern]) -> dict[int, list[float]]:
    """CPU seconds of 20 steps by block (0: dense), in turns, on one thread; the first turn is not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = ways(width, width, batch, patterns)
        seconds: dict[int, list[float]] = {block: [] for block in taken}
        for turn in range(TURNS + 1):
            for block, some in taken.items():
                start = time.process_time()
                some()
                if turn:
                    seconds[block].append(time.process_time() - start)
        return seconds
    finally:
        torch.set_num_threads(threads)
