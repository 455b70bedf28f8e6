"""Lei et al. 2025: made consistent across noise levels, a network needs one pass per vote to be certified.

The paper: certified accuracy on ImageNet 5.3 points above denoising by diffusion, on average over the radii,
at 85 times less inference. Here: scikit-learn's digits, a residual MLP of 3 blocks and width 256, noise 0.5
of a pixel's range, 150 test images, 2,000 votes each. Beside it the same fine-tuning without pre-training,
and denoising: one pass of a denoiser of the same size (Karras et al., 2022, arXiv:2206.00364), or ten, then a
classifier of clean images (Carlini et al., 2023, arXiv:2206.10550).

Not reached: 1.5 times the radius of the same fine-tuning from scratch. Read linearly from frozen
representations, clean digits gain from 1,500 steps of pre-training (98 % right, 95 % with random weights),
digits in this noise do not (70 %, 72 %): so few steps do not seem to carry consistency up the levels. The
ratio stayed between 0.9 and 1.2 (one seed, 500 votes) at the paper's rate, with a sixth of the fine-tuning,
with the released head that does not learn, with noise levels up to 2 alone, and with 100 labels.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.graph import macs
from netweight.core.perturbation import L2
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, outputs
from netweight.data import digits
from netweight.data.augment import View, view
from netweight.models.noise_level import SIGMA_DATA, ResidualMLP
from netweight.training.chance import own_chance
from netweight.training.consistency import (
    LOWEST,
    RHO,
    Finetuning,
    Pretraining,
    finetune,
    pretrain,
    rise_and_fall,
    symmetric,
)
from netweight.verification.smoothing import ABSTAINED, Smoothed, average_radius, curve, smooth

SIGMA = 0.5
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
IMAGES, VOTES = 150, 2000
SHIFTED = View(crop=0.5, blur=0.0, flip=0.0)  # digits are neither mirrored nor blurred
PRETRAINING = Pretraining(
    steps=1500, batch=256, rate=1e-3, warmup=75, target=(0.99, 0.999), average=0.99, hidden=256, out=128
)
# an eighth of the paper's steps, hence a higher rate
FINETUNING = Finetuning(steps=600, batch=256, rate=1e-3, consistency=20.0)
CLEAN = Finetuning(steps=600, batch=256, rate=1e-3, consistency=0.0, entropy=0.0, layer_decay=1.0)
DENOISING = (1500, 256, 1e-3)  # steps, batch, rate
DENOISED = (0.02, 2.0)  # noise levels that the denoiser is trained on, in [-1, 1]
ATTACKED, RESTARTS = 50, 20


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Certified radii of four networks and the work per vote; quick: see `quick_claim`."""
    if quick:
        return quick_claim(seed)
    train, test = digits.train(), digits.test().take(IMAGES)
    bare = encoder(seed)
    found = pretrain(bare, train, views, PRETRAINING, seed=seed)
    networks = {
        "rRCM": finetune(found.encoder, train, SIGMA, FINETUNING, seed=seed),
        "from scratch": finetune(bare, train, SIGMA, FINETUNING, seed=seed),
    }
    clean = finetune(bare, train, LOWEST, CLEAN, seed=seed)
    denoiser = trained_denoiser(train, seed)
    networks["denoised once"] = Denoised(denoiser, clean, SIGMA, 1)
    ten = Denoised(denoiser, clean, SIGMA, 10)

    certified = {name: smooth(net, test, SIGMA, n=VOTES, seed=seed) for name, net in networks.items()}
    radius = {name: average_radius(each, test.y) for name, each in certified.items()}
    flops = {name: 2 * macs(net, test.x[:1]) for name, net in {**networks, "denoised in ten": ten}.items()}
    flipped = {
        f"{share} R": flips(networks["rRCM"], test, certified["rRCM"], share, restarts, seed)
        for share, restarts in ((0.95, RESTARTS), (2.0, 1))
    }
    bars = [
        Bar("ACR / from scratch", radius["rRCM"] / radius["from scratch"], 1.5, "at least"),
        Bar("ACR / denoised once", radius["rRCM"] / radius["denoised once"], 0.85, "at least"),
        Bar("work per vote / denoised once", flops["rRCM"] / flops["denoised once"], 0.55, "at most"),
        Bar("work per vote / denoised in ten", flops["rRCM"] / flops["denoised in ten"], 0.1, "at most"),
        Bar(f"votes of {ATTACKED} flipped within 0.95 R", flipped["0.95 R"], 0.0, "at most"),
    ]
    figures = {
        "ACR": radius,
        "certified accuracy": {name: curve(each, test.y, RADII).tolist() for name, each in certified.items()},
        "radii": RADII,
        "abstained": {name: int((each.classes == ABSTAINED).sum()) for name, each in certified.items()},
        "one noisy vote is right": {
            name: right(net, test, seed) for name, net in {**networks, "denoised in ten": ten}.items()
        },
        "operations per vote": flops,
        "votes flipped": flipped,
        "pre-training loss": [found.losses[0], sum(found.losses[-50:]) / 50],
    }
    return Claim(bars, figures)


def quick_claim(seed: int) -> Claim:
    """Radii of a linear network against the exact one, and a short pre-training."""
    alpha, distance = 0.05, 0.2
    plane = nn.Linear(4, 2)
    plane.weight.data = torch.tensor([[0.0] * 4, [2.0] * 4])
    plane.bias.data = torch.tensor([0.0, 4 * distance])
    found = smooth(plane, Data(torch.zeros(500, 4)), 0.25, n=200, alpha=alpha, seed=seed, batch=200)
    wrong = (found.classes == 0) | (found.radius > distance)
    settings = Pretraining(steps=200, batch=128, rate=1e-3, warmup=20, hidden=128, out=64)
    losses = pretrain(encoder(seed, 128), digits.train(), views, settings, seed=seed).losses
    return Claim(
        [
            Bar("certificates above the exact radius", float(wrong.double().mean()), 2 * alpha, "at most"),
            Bar("loss / loss at the start", sum(losses[-10:]) / (10 * losses[0]), 0.8, "at most"),
        ]
    )


def encoder(seed: int, width: int = 256) -> ResidualMLP:
    """A network for 64 pixels with random weights."""
    with own_chance(seed, torch.device("cpu")):
        return ResidualMLP(64, width, 3)


def views(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random views of each image."""
    return view(x, SHIFTED, generator), view(x, SHIFTED, generator)


class Denoiser(nn.Module):
    """D(x, t) = c_skip x + c_out F(x, t), the mean of the clean image given a noisy one, both in [-1, 1]."""

    def __init__(self, inner: ResidualMLP, data: Data) -> None:
        super().__init__()
        self.inner = inner
        self.out = nn.Linear(inner.width, data.x[0].numel())

    def forward(self, x: Float[Tensor, "b *in"], t: Float[Tensor, " b"]) -> Float[Tensor, "b *in"]:
        """D(x, t)."""
        level = t.reshape(-1, *[1] * (x.ndim - 1))
        total = level**2 + SIGMA_DATA**2
        inner = self.out(self.inner(x, t)).reshape(x.shape)
        return x * SIGMA_DATA**2 / total + inner * level * SIGMA_DATA * total.rsqrt()


class Denoised(nn.Module):
    """A classifier behind a denoiser: `count` Euler steps of the probability flow from 2 sigma down to 0."""

    levels: Tensor

    def __init__(self, denoiser: Denoiser, classifier: nn.Module, sigma: float, count: int) -> None:
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier
        ends = (2 * sigma) ** (1 / RHO), DENOISED[0] ** (1 / RHO)
        self.register_buffer("levels", torch.linspace(*ends, count + 1)[:-1] ** RHO)

    def forward(self, x: Float[Tensor, "b *in"]) -> Float[Tensor, "b classes"]:
        """Scores for images in [0, 1] with noise sigma."""
        x = 2 * x - 1
        for t, following in zip(self.levels, [*self.levels[1:], 0.0]):
            clean = self.denoiser(x, t.expand(len(x)))
            x = clean + (x - clean) * (following / t)
        return self.classifier((x + 1) / 2)


def trained_denoiser(data: Data, seed: int) -> Denoiser:
    """Trained on squared error at noise levels that are even in their logarithm, with the weights of EDM."""
    (count, batch, rate), (low, high) = DENOISING, DENOISED
    with own_chance(seed, torch.device("cpu")):
        denoiser = Denoiser(encoder(seed), data)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall(count // 20, count))
    for _ in steps(range(count), "Training the denoiser"):
        x = symmetric(data.x[torch.randint(len(data), (batch,), generator=generator)], data)
        t = low * (high / low) ** torch.rand(batch, generator=generator)
        level = t[:, None, None, None]
        found = denoiser(x + level * torch.randn(x.shape, generator=generator), t)
        weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2
        loss = (weight * (found - x) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser.eval()


def flips(network: nn.Module, data: Data, found: Smoothed, share: float, restarts: int, seed: int) -> float:
    """How many of the first 50 certified inputs an attack within `share` of their radius gives another vote.

    NaN where fewer are certified. The attack is that of Salman et al. (2019, arXiv:1906.04584): gradient
    ascent on the mean softmax over 32 noises, at points x + R u with |u| <= share; the point found gets
    10,000 votes of its own.
    """
    rows = (found.classes != ABSTAINED).nonzero()[:ATTACKED, 0]
    if len(rows) < ATTACKED:
        return math.nan
    x, reach = data.x[rows], found.radius[rows].float()[:, None, None, None]
    of = found.classes[rows]
    noise = SIGMA * torch.randn((32, *x.shape[1:]), generator=torch.Generator().manual_seed(seed))

    def score(u: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        s = x[which] + reach[which] * u
        shares = network((s[:, None] + noise).flatten(0, 1)).softmax(1).unflatten(0, (len(s), -1)).mean(1)
        own = shares.gather(1, of[which][:, None])[:, 0]
        return -own.clamp(min=1e-12).log(), torch.zeros(len(s), dtype=torch.bool)

    moves = ascend(score, torch.zeros_like(x), L2(share), steps=20, restarts=restarts, seed=seed).points
    votes = smooth(network, Data(x + reach * moves), SIGMA, seed=seed + 1).votes
    return float((votes.argmax(1) != of).sum())


def right(network: nn.Module, data: Data, seed: int) -> float:
    """The share of images that one noisy vote puts into the right class, over 10 votes each."""
    x = data.x.repeat(10, 1, 1, 1)
    noisy = x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return float((outputs(network, Data(noisy, batch=500)).argmax(1) == data.y.repeat(10)).float().mean())
