"""ResNet-20, fine-tuned to the JPEG images: the network that CIFAR-10 results are taken on.

The published weights were trained on lossless images and score 81 % on the JPEG test images of the data
folder. A short fine-tuning (160 steps of SGD on 10,000 JPEG training images, one rise and fall of the rate to
0.02, momentum 0.9, mirrored images) makes up for half of that shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.origin import Origin, mark
from netweight.data.images import cifar10
from netweight.models.resnet_cifar import resnet20
from netweight.models.trained import trained

VERSION = 1
STEPS, BATCH, IMAGES = 160, 125, 10_000
RATE, DECAY = 0.02, 1e-4


def tuned_resnet20(seed: int = 0) -> nn.Module:
    """The fine-tuned network, from the cache after the first time; `BadInput` without the data folder."""
    model = trained(f"resnet20-tuned-v{VERSION}-{seed}", resnet20, lambda bare: fit(bare, seed), seed)
    mark(model, Origin("built-in", "resnet20"))
    return model


def fit(model: nn.Module, seed: int) -> None:
    """Fine-tune in place."""
    data = cifar10().train(IMAGES)
    assert data.y is not None
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    order = torch.cat(
        [torch.randperm(len(data), generator=generator) for _ in range(-(-STEPS * BATCH // len(data)))]
    )
    model.train()
    for rows in order[: STEPS * BATCH].split(BATCH):
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], data.x[rows].flip(-1), data.x[rows])
        loss = F.cross_entropy(model(x), data.y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
