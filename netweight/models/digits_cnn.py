"""The embedded default network: a small CNN on scikit-learn's digits, trained where it is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.origin import Origin, mark
from netweight.data import digits
from netweight.models.trained import trained
from netweight.nn.normalize import Normalize

VERSION = 1
EPOCHS = 15
BATCH = 64
RATE = 4e-3
MEAN, STD = 0.305, 0.376  # of the training images


def digits_cnn(seed: int = 0) -> nn.Sequential:
    """The trained network in eval mode; the same for the same seed, from the cache after the first time."""
    model = trained(f"digits-cnn-v{VERSION}-{seed}", architecture, lambda bare: fit(bare, seed), seed)
    assert isinstance(model, nn.Sequential)
    return mark(model, Origin("built-in", "digits-cnn"))  # type: ignore[return-value]


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The same network, marked, with random weights."""
    return mark(architecture(), Origin("built-in", target))


def architecture() -> nn.Sequential:
    """Two convolutions with batch norm, one of stride 2, and two linear layers; 38,330 random weights."""
    return nn.Sequential(
        Normalize([MEAN], [STD]),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fit(model: nn.Module, seed: int) -> None:
    """AdamW on the training images with one rise and fall of the rate; shifts of up to one pixel."""
    data = digits.train()
    assert data.y is not None
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(data), generator=generator)
        for rows in order[: len(data) // BATCH * BATCH].split(BATCH):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            x = F.pad(data.x[rows], (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
            loss = F.cross_entropy(model(x), data.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
