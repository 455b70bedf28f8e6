"""rRCM: a network learns, without labels, to give one image the same representation at every noise level.

Paper: Lei et al., "Robust Representation Consistency Model via Contrastive Denoising", ICLR 2025,
arXiv:2501.13094. A network tuned on it classifies noisy images in one pass, with no denoiser before it, and
is certified by `verification.smoothing`.

Pre-training: images x in [-1, 1], one noise n per image, one index i for the whole batch, r the
representation, p = head(r), ^- the target network (a moving average, no gradient), x', x'' random views:

    L = I(p(x' + t_N n), p^-(x'' + t_N n)) + I(p(x'' + t_N n), p^-(x' + t_N n))
        + I(r(x + t_i n), stop r(x + t_{i+1} n)),
    I(f, h) = mean over a of -log( exp(cos(f_a, h_a)/tau) / sum_b exp(cos(f_a, h_b)/tau) ),

with noise levels t_1 = 80 > ... > t_N = 0.002 (Karras et al., 2022, arXiv:2206.00364) whose number N grows.

Fine-tuning at noise sigma (Jeong and Shin, 2020, arXiv:2006.04062): with p_1, p_2 the softmax for two
noises and q their mean,

    L = (CE(p_1, y) + CE(p_2, y))/2 + lambda (KL(q || p_1) + KL(q || p_2))/2 + eta H(q).

Settings are those of the released code for CIFAR-10. Its fine-tuning leaves the linear head as it was drawn
and drops the last norm; here the head learns and the norm stays.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core import progress
from netweight.core.errors import BadInput
from netweight.core.task import Data
from netweight.training.chance import own_chance
from netweight.training.loop import Diverged

HIGHEST, LOWEST, RHO = 80.0, 0.002, 7.0  # noise levels and how they are spaced
HEAD_STD = 2e-5
Views = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pretraining:
    """Settings of `pretrain`.

    batch: different images per step (all, where there are fewer). rate: Adam's, after `warmup` steps; then
    half a cosine to 0. clip: of the gradient's norm, after the warm-up. temperature: tau. levels: of the
    noise, N - 1 at the start and at the end. target: decay of the target network at the start and at the end.
    average: decay of the weights that are handed out. hidden, out: widths of the projection head.
    """

    steps: int = 300_000
    batch: int = 2048
    rate: float = 1e-4
    warmup: int = 10_000
    clip: float = 2.0
    temperature: float = 0.2
    levels: tuple[int, int] = (20, 80)
    target: tuple[float, float] = (0.99, 0.9999)
    average: float = 0.9999
    hidden: int = 2048
    out: int = 256


@dataclass(frozen=True)
class Finetuning:
    """Settings of `finetune`.

    rate: AdamW's for 256 images; it grows with the batch, rises over the first tenth of the steps and falls
    as half a cosine. consistency, entropy: lambda and eta. layer_decay: factor of the rate per block, from
    the last to the first. levels: N - 1 of the pre-training's end.
    """

    steps: int = 4800  # 100 epochs of CIFAR-10
    batch: int = 1024
    rate: float = 2e-4
    consistency: float = 10.0
    entropy: float = 0.5
    layer_decay: float = 0.75
    levels: int = 80


@dataclass(frozen=True)
class Pretrained:
    """encoder: (x in [-1, 1] `b *in`, t `b`) -> r `b width`, with averaged weights. losses: of every step."""

    encoder: nn.Module
    losses: list[float]


class NoisyClassifier(nn.Module):
    """Inputs of the data, with noise of one known level, to class scores `b classes`.

    center, scale: the data lies between center - scale and center + scale. level: the noise that the encoder
    is told, in units of [-1, 1].
    """

    center: Tensor
    scale: Tensor
    level: Tensor

    def __init__(self, encoder: nn.Module, classes: int, level: float, low: float, high: float) -> None:
        super().__init__()
        for name, value in (("center", (low + high) / 2), ("scale", (high - low) / 2), ("level", level)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "b *in"]) -> Float[Tensor, "b classes"]:
        """Class scores."""
        return self.head(self.encoder((x - self.center) / self.scale, self.level.expand(len(x))))


def pretrain(
    encoder: nn.Module, data: Data, views: Views, settings: Pretraining = Pretraining(), *, seed: int = 0
) -> Pretrained:
    """Pre-train a copy of the encoder (see `models.noise_level`) on the images of `data`, without labels.

    views: (images in the data's units, generator) -> two random views. Runs where the encoder is. Raises
    `BadInput` for data without a range or with a single image.
    """
    _check(data)
    device = next(encoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with own_chance(seed, device):
        head = projection(encoder.width, settings).to(device)
    online = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head}).train()
    target, average = (copy.deepcopy(online).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.Adam(online.parameters(), lr=settings.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall(settings.warmup, settings.steps))
    losses = []
    for step in progress.steps(range(settings.steps), "Pre-training"):
        x = data.x[_rows(data, settings.batch, generator)].to(device)
        images = [symmetric(part, data) for part in (x, *views(x, generator))]
        noise = torch.randn(x.shape, generator=generator, device=device)
        near = noise_levels(level_count(step, settings)).to(device)
        i = int(torch.randint(len(near) - 1, (), generator=generator, device=device))
        loss = pretraining_loss(online, target, images, noise, near[i : i + 2], settings.temperature)
        _finite(loss, step, settings.rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step >= settings.warmup:
            nn.utils.clip_grad_norm_(online.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        follow(target, online, target_decay(step, settings))
        follow(average, online, settings.average)
        losses.append(loss.item())
    return Pretrained(average["encoder"].requires_grad_(True).eval(), losses)


def pretraining_loss(
    online: nn.ModuleDict,
    target: nn.ModuleDict,
    images: Sequence[Float[Tensor, "b *in"]],
    noise: Float[Tensor, "b *in"],
    near: Float[Tensor, " 2"],
    temperature: float,
) -> Float[Tensor, ""]:
    """L. images: x, x' and x'' in [-1, 1]. near: t_i and t_{i+1}, the same for the whole batch."""

    def seen(network: nn.ModuleDict, x: Tensor, t: Tensor) -> Tensor:
        return network["encoder"](x + t * noise, t.expand(len(x)))

    x, *pair = images
    lowest = near.new_tensor(LOWEST)
    first, second = (online["head"](seen(online, part, lowest)) for part in pair)
    with torch.no_grad():
        first_target, second_target = (target["head"](seen(target, part, lowest)) for part in pair)
        cleaner = seen(online, x, near[1])
    return (
        info_nce(first, second_target, temperature)
        + info_nce(second, first_target, temperature)
        + info_nce(seen(online, x, near[0]), cleaner, temperature)
    )


def info_nce(f: Float[Tensor, "b n"], h: Float[Tensor, "b n"], temperature: float) -> Float[Tensor, ""]:
    """I: each f_a should be nearer to its own h_a, by angle, than to the h of the rest of the batch."""
    near = F.normalize(f, dim=1) @ F.normalize(h, dim=1).T / temperature
    return F.cross_entropy(near, torch.arange(len(f), device=f.device))


def noise_levels(count: int) -> Float[Tensor, " count"]:
    """t_1 = 80 down to t_count = 0.002, spaced evenly in t^(1/7)."""
    ends = HIGHEST ** (1 / RHO), LOWEST ** (1 / RHO)
    return torch.linspace(*ends, count, dtype=torch.float64).pow(RHO).float()


def level_count(step: int, settings: Pretraining) -> int:
    """N(k) = min(s 2^ceil(k / K'), e) + 1 with K' = ceil(K / log2(ceil(e / s) + 1)), levels = (s, e)."""
    start, end = settings.levels
    each = math.ceil(settings.steps / math.log2(math.ceil(end / start) + 1))
    return min(start * 2 ** math.ceil(step / each), end) + 1


def target_decay(step: int, settings: Pretraining) -> float:
    """Decay of the target network: from the first to the last value, most of the way early on.

    With e^2 linear in the step from a^2 to b^2 and u = (e - a)/(b - a): a + (b - a)(2/(1 + exp(-15 u)) - 1).
    """
    a, b = settings.target
    e = math.sqrt(a**2 + min(1.0, step / settings.steps) * (b**2 - a**2))
    u = (e - a) / (b - a) if b > a else 1.0
    return a + (b - a) * (2 / (1 + math.exp(-15 * u)) - 1)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, for every parameter; buffers stay."""
    for mean, value in zip(average.parameters(), model.parameters()):
        mean.lerp_(value, 1 - decay)


def projection(width: int, settings: Pretraining) -> nn.Sequential:
    """The head p: three Linear layers without biases, batch norm and ReLU between them."""
    hidden, out = settings.hidden, settings.out
    layers: list[nn.Module] = []
    for inputs in (width, hidden):
        layers += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out, bias=False))


def finetune(
    encoder: nn.Module, data: Data, sigma: float, settings: Finetuning = Finetuning(), *, seed: int = 0
) -> NoisyClassifier:
    """A classifier for inputs with noise sigma (in units of the data), from a copy of the encoder.

    Runs where the encoder is. Raises `BadInput` for data without a range or without class numbers, and for
    noise that is none.
    """
    _check(data, labels=True)
    if not (math.isfinite(sigma) and sigma > 0):
        raise BadInput(f"sigma={sigma}: noise needs a finite standard deviation above 0, in data units")
    device = next(encoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    half = (data.high - data.low) / 2
    levels = noise_levels(settings.levels + 1)
    level = float(levels[(levels - sigma / half).abs().argmin()])
    with own_chance(seed, device):
        classes = max(len(data.classes), int(data.y.max()) + 1)
        model = (
            NoisyClassifier(copy.deepcopy(encoder), classes, level, data.low, data.high).to(device).train()
        )
    size = min(settings.batch, len(data))
    optimizer = torch.optim.AdamW(
        [
            {"params": part, "lr": settings.rate * size / 256 * settings.layer_decay**above}
            for above, part in enumerate(reversed(stages(model)))
        ],
        weight_decay=0.0,
    )
    warmup = settings.steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall(warmup, settings.steps))
    for step in progress.steps(range(settings.steps), "Fine-tuning"):
        rows = _rows(data, settings.batch, generator)
        x, y = data.x[rows].to(device), data.y[rows].to(device)
        noise = torch.randn((2, *x.shape), generator=generator, device=device)
        scores = model((x + sigma * noise).flatten(0, 1)).unflatten(0, (2, -1))
        loss = finetuning_loss(scores, y, settings.consistency, settings.entropy)
        _finite(loss, step, settings.rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def finetuning_loss(
    scores: Float[Tensor, "m b classes"], y: Int64[Tensor, " b"], consistency: float, entropy: float
) -> Float[Tensor, ""]:
    """L for m noises per image; 0 where all are sure of y."""
    log_p = scores.log_softmax(2)
    mean = log_p.exp().mean(0)
    log_mean = log_p.logsumexp(0) - math.log(len(scores))
    apart = (mean * (log_mean - log_p)).sum(2).mean()
    unsure = -(mean * log_mean).sum(1).mean()
    return (
        F.cross_entropy(scores.flatten(0, 1), y.repeat(len(scores))) + consistency * apart + entropy * unsure
    )


def stages(model: NoisyClassifier) -> list[list[nn.Parameter]]:
    """All parameters, from the input on: what comes before the blocks, each block, the norm and the head."""
    blocks = [[*block.parameters()] for block in model.encoder.blocks]
    return [
        [*model.encoder.embed.parameters()],
        *blocks,
        [*model.encoder.norm.parameters(), *model.head.parameters()],
    ]


def rise_and_fall(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor of the rate by step: linear up to 1 over the warm-up, then half a cosine down to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor


def symmetric(x: Tensor, data: Data) -> Tensor:
    """Inputs in [-1, 1]."""
    return (2 * x - (data.low + data.high)) / (data.high - data.low)


def _rows(data: Data, batch: int, generator: torch.Generator) -> Tensor:
    """Which examples are in the next batch: all different, `batch` of them if there are so many."""
    return torch.randperm(len(data), generator=generator, device=generator.device)[:batch].cpu()


def _finite(loss: Tensor, step: int, rate: float) -> None:
    """Raises `Diverged` where the loss is not finite."""
    if not loss.isfinite():
        raise Diverged(f"step {step + 1}: the loss is {loss.item():g}; lower the rate ({rate:g})")


def _check(data: Data, labels: bool = False) -> None:
    """Raises `BadInput` for data that cannot be trained on."""
    if not data.x.is_floating_point() or data.low is None or data.high is None:
        raise BadInput(
            f"{data.name}: noise levels are those of inputs in [-1, 1]; give floats and their range"
        )
    if len(data) < 2:
        raise BadInput(f"{data.name}: one example cannot be contrasted with others; give more")
    if labels and (data.y is None or data.y.is_floating_point() or data.y.ndim != 1):
        raise BadInput(f"{data.name}: fine-tuning needs one class number per example as labels")
