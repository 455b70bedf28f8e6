"""A small U-Net that gives the pressure for a plate's conductivity (`data.darcy`), trained where it is used.

Paper of the architecture: Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015, arXiv:1505.04597; three levels, widths 8, 16, 32, batch norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.data import darcy
from netweight.models.trained import trained
from netweight.nn.normalize import Normalize

VERSION = 1
EPOCHS, BATCH, RATE, WIDTH = 15, 20, 8e-3, 8


class UNet(nn.Module):
    """Images `b 1 h w` to images of that shape; h and w are multiples of 8."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.normalize = Normalize([0.5], [0.27])
        self.first, self.second = pair(1, width), pair(width, 2 * width)
        self.third, self.deepest = pair(2 * width, 4 * width), pair(4 * width, 4 * width)
        self.up3, self.up2 = pair(8 * width, 2 * width), pair(4 * width, width)
        self.up1, self.out = pair(2 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, x: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        """The pressure in units of `data.darcy`."""
        first = self.first(self.normalize(x))
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        deep = self.deepest(F.max_pool2d(third, 2))
        deep = self.up3(torch.cat([F.interpolate(deep, scale_factor=2.0), third], 1))
        deep = self.up2(torch.cat([F.interpolate(deep, scale_factor=2.0), second], 1))
        return self.out(self.up1(torch.cat([F.interpolate(deep, scale_factor=2.0), first], 1)))


def pair(before: int, width: int) -> nn.Sequential:
    """Two convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs in (before, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def darcy_unet(seed: int = 0) -> nn.Module:
    """The trained network, from the cache after the first time."""
    return trained(f"darcy-unet-v{VERSION}-{seed}", UNet, lambda bare: fit(bare, seed), seed)


def fit(model: nn.Module, seed: int) -> None:
    """AdamW on the squared error, one rise and fall of the rate, in place."""
    data = darcy.train()
    assert data.y is not None
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = EPOCHS * (len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data), generator=generator).split(BATCH):
            loss = F.mse_loss(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
