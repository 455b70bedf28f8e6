"""Random views of images: crops, colours, blur, on whole batches and on any device.

The recipes of SimCLR (Chen et al., 2020, arXiv:2002.05709) and BYOL (Grill et al., 2020, arXiv:2006.07733):
each image of the batch draws its own crop, colours and blur. Hue is turned in the YIQ plane, and the colour
changes come in one order, where torchvision goes through HSV and shuffles them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # Rec. 601
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
ASPECT = 4 / 3
REACH = 3  # standard deviations that a blur's kernel covers


@dataclass(frozen=True)
class View:
    """How strongly images are changed, and with which chance.

    crop: the smallest share of the area that is kept. brightness, contrast, saturation: factors are drawn
    from 1 - s to 1 + s. hue: largest turn, in circles. jitter, grey, blur, solarize, flip: chances.
    blur_width: range of the blur's standard deviation, in sides of the image.
    """

    crop: float = 0.08
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 1.0
    blur_width: tuple[float, float] = (0.1 / 32, 2 / 32)
    solarize: float = 0.0
    flip: float = 0.5


BYOL = (View(), View(blur=0.1, solarize=0.2))
"""The two views of BYOL, as rRCM's code has them for CIFAR-10."""


def view(x: Float[Tensor, "b c h w"], how: View, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """A random view of each image in [0, 1], of the same size. generator: on the device of x."""
    x = cropped(x, how, generator)
    x = _chosen(x, coloured(x, how, generator), how.jitter, generator)
    if x.shape[1] == 3:
        x = _chosen(x, grey(x).expand_as(x), how.grey, generator)
    if how.blur > 0:
        x = _chosen(x, blurred(x, how, generator), how.blur, generator)
    return _chosen(x, torch.where(x < 0.5, x, 1 - x), how.solarize, generator)


def cropped(x: Float[Tensor, "b c h w"], how: View, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Rectangles of random area, shape (sides 3:4 to 4:3) and place, resampled; some are mirrored."""
    area = how.crop + (1 - how.crop) * _uniform(x, generator)
    aspect = (math.log(ASPECT) * (2 * _uniform(x, generator) - 1)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    right, down = ((1 - side) * (2 * _uniform(x, generator) - 1) for side in (width, height))
    mirrored = 1 - 2 * (_uniform(x, generator) < how.flip).to(x.dtype)
    zero = torch.zeros_like(area)
    places = torch.stack([width * mirrored, zero, right, zero, height, down], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(places, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def coloured(x: Float[Tensor, "b c h w"], how: View, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Brightness, contrast, then for three channels saturation and hue; clipped to [0, 1]."""

    def factor(strength: float) -> Tensor:
        return (1 + strength * (2 * _uniform(x, generator) - 1))[:, None, None, None]

    x = (x * factor(how.brightness)).clamp(0, 1)
    x = torch.lerp(grey(x).mean((2, 3), keepdim=True), x, factor(how.contrast)).clamp(0, 1)
    if x.shape[1] != 3:
        return x
    x = torch.lerp(grey(x), x, factor(how.saturation)).clamp(0, 1)
    return turned(x, how.hue * (2 * _uniform(x, generator) - 1)).clamp(0, 1)


def grey(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Brightness of each pixel; of other than three channels the mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)


def turned(x: Float[Tensor, "b 3 h w"], circles: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Hues turned by that share of a circle in the YIQ plane; greys stay as they are."""
    angle = 2 * math.pi * circles
    one, zero, cos, sin = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).reshape(-1, 3, 3)
    to = x.new_tensor(YIQ)
    return torch.einsum("bij,bjhw->bihw", to.inverse() @ turn @ to, x)


def blurred(x: Float[Tensor, "b c h w"], how: View, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Each image under a Gaussian of its own width; borders repeat the outermost pixels."""
    b, c, height, width = x.shape
    low, high = (side * min(height, width) for side in how.blur_width)
    sigma = (low + (high - low) * _uniform(x, generator))[:, None]
    reach = max(1, math.ceil(REACH * high))
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate").reshape(1, b * c, *_grown(x, reach))
    rows = F.conv2d(padded, kernel[:, None, None, :], groups=b * c)
    return F.conv2d(rows, kernel[:, None, :, None], groups=b * c).reshape(x.shape)


def _grown(x: Tensor, reach: int) -> tuple[int, int]:
    return x.shape[2] + 2 * reach, x.shape[3] + 2 * reach


def _chosen(x: Tensor, other: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """`other` for a random share of the images, x for the rest."""
    return torch.where((_uniform(x, generator) < chance)[:, None, None, None], other, x)


def _uniform(x: Tensor, generator: torch.Generator) -> Float[Tensor, " b"]:
    """One number in [0, 1) for each image."""
    return torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
