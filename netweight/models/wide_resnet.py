"""Wide residual networks for images of 32 pixels a side.

Paper: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146. Norm and ReLU stand
before each convolution; a 3 x 3 convolution to 16 channels, three stages of (depth - 4) / 6 blocks at widths
16 k, 32 k and 64 k, the mean over the image, one linear layer without a bias. Where a width changes, the
shortcut is a 1 x 1 convolution of what the first ReLU of the block gives.

No width is written into the forward pass, so a network of half the channels runs through the same code.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.models.resnet_cifar import MEAN, STD
from netweight.models.trained import seeded
from netweight.nn.normalize import Normalize


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after norm and ReLU, and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = before != width or stride != 1
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """branch(x) + shortcut(x)."""
        first = torch.relu(self.bn1(x))
        branch = self.conv2(torch.relu(self.bn2(self.conv1(first))))
        return branch + (x if self.shortcut is None else self.shortcut(first))


class WideResNet(nn.Module):
    """`depth` layers, `width` times as wide as a ResNet; pixels `b 3 h w` in [0, 1] to logits."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.normalize = Normalize(MEAN, STD)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, before = [], 16
        for stage in range(3):
            for place in range((depth - 4) // 6):
                wide = 16 * width * 2**stage
                blocks.append(Block(before, wide, 2 if stage and place == 0 else 1))
                before = wide
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, classes, bias=False)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """The logits."""
        x = self.blocks(self.conv1(self.normalize(x)))
        return self.linear(torch.relu(self.bn(x)).mean((2, 3)))


def wide_resnet(depth: int = 28, width: int = 10, *, classes: int = 10, seed: int = 0) -> WideResNet:
    """WRN-`depth`-`width` with random weights, in evaluation mode.

    Raises `BadInput` where depth is no 6 n + 4 or width is below 1.
    """
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise BadInput(
            f"depth={depth}, width={width}: give a depth of 10, 16, 22, 28 ... and a width of at least 1"
        )
    with seeded(seed):
        return WideResNet(depth, width, classes).eval()
