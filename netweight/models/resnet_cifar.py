"""ResNet-20, 32 and 44 for CIFAR-10.

Paper: He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, section 4.2: a 3 x 3
convolution, three stages of n blocks at widths 16, 32, 64, the mean over the image, one linear layer, 6 n + 2
layers. Where the width doubles, the shortcut keeps every second pixel and fills the new channels with zeros
(option A), half of them before and half after.

Weights: those of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), trained on the lossless images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.core.io import existing_file
from netweight.core.origin import Origin, mark
from netweight.data.shared import shared_file
from netweight.nn.normalize import Normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 44: "resnet44-014dd654.th"}
LARGEST = 64 << 20  # bytes of a weight file


class Block(nn.Module):
    """Two convolutions and a shortcut; `stride` 2 halves the image."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - before

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """relu(branch(x) + shortcut(x))."""
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.more // 2, self.more - self.more // 2),
            )
        return torch.relu(branch + x)


class ResNet(nn.Module):
    """`blocks` blocks in each of three stages; pixels `b 3 32 32` in [0, 1] to ten logits."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.normalize = Normalize(MEAN, STD)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 10"]:
        """The logits."""
        x = torch.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Mean(nn.Module):
    """The mean over the image, `b c h w` to `b c`."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """Of each channel."""
        return x.mean((2, 3))


def in_parts(model: ResNet) -> nn.Sequential:
    """The same network as a Sequential that can be cut: stem, block1, block2, .., mean, linear.

    For `nn.early_exit` and `nn.skipping`. Modules are shared with the model.
    """
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    stem = nn.Sequential(model.normalize, model.conv1, model.bn1, nn.ReLU())
    named = {f"block{index}": block for index, block in enumerate(blocks, 1)}
    parts = {"stem": stem, **named, "mean": Mean(), "linear": model.linear}
    return nn.Sequential(OrderedDict(parts)).train(model.training)


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


def resnet20(weights_path: str | Path | None = None) -> ResNet:
    """Three blocks per stage, 269,722 weights: the published ones, unless a file is given."""
    return _resnet(20, weights_path)


def resnet32(weights_path: str | Path | None = None) -> ResNet:
    """Five blocks per stage, 464,154 weights: the published ones, unless a file is given."""
    return _resnet(32, weights_path)


def resnet44(weights_path: str | Path | None = None) -> ResNet:
    """Seven blocks per stage, 658,586 weights: the published ones, unless a file is given."""
    return _resnet(44, weights_path)


def resnet20_in_parts() -> nn.Sequential:
    """`resnet20`, cut into parts: `netweight.models.resnet_cifar:resnet20_in_parts` on the command line."""
    return in_parts(resnet20()).eval()


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The network that "resnet20" and the like name, marked, with random weights."""
    return mark(architecture(int(target.removeprefix("resnet"))), Origin("built-in", target))


def architecture(depth: int) -> ResNet:
    """ResNet-`depth` with random weights."""
    return ResNet((depth - 2) // 6)


def _resnet(depth: int, weights_path: str | Path | None) -> ResNet:
    path = shared_file(f"cifar10_resnets/{WEIGHTS[depth]}") if weights_path is None else Path(weights_path)
    model = architecture(depth)
    fill(model, path)
    return mark(model.eval(), Origin("built-in", f"resnet{depth}"))  # type: ignore[return-value]


def fill(model: ResNet, path: Path) -> None:
    """Load published weights; nothing but tensors is unpickled. Raises `BadInput` for any other file."""
    path = existing_file(path, "weights of a CIFAR-10 ResNet", at_most=LARGEST)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        model.load_state_dict(
            {**state, "normalize.mean": model.normalize.mean, "normalize.std": model.normalize.std}
        )
    except Exception as error:  # torch.load raises anything for a hostile file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"{path}: not the weights of this ResNet ({reason}); give the .th file of this depth"
        ) from error
    if not all(p.isfinite().all() for p in model.parameters()):
        raise BadInput(f"{path}: the weights hold NaN or Inf; fetch the file again")
