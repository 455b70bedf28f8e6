"""CIFAR-10 and MNIST from the data folder, as float32 images in [0, 1], channels first.

CIFAR-10 (Krizhevsky, 2009) is kept as JPEG: networks trained on the lossless images lose about ten points of
accuracy on it, so a compressed network is compared with its original on the same images, not with a published
number.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from netweight.core.task import Data
from netweight.data.arrays import read_arrays
from netweight.data.shared import shared_file

CALIBRATION = 1024


@dataclass(frozen=True)
class Images:
    """A set of images in the data folder; decoded on demand, and once.

    folder: the subfolder and the name. prefix: what its files begin with.
    Every part raises `BadInput` if the data folder is not there.
    """

    folder: str
    prefix: str

    def train(self, count: int | None = None) -> Data:
        """The first `count` training images (all: 50,000 or 60,000); in random order, so balanced."""
        return self._part("train", count, "train")

    def calibration(self, count: int = CALIBRATION) -> Data:
        """The first `count` training images."""
        return self._part("train", count, "calibration")

    def test(self, count: int | None = None) -> Data:
        """The first `count` test images (all: 5,000)."""
        return self._part("test_a", count, "test")

    def _part(self, part: str, count: int | None, name: str) -> Data:
        path = shared_file(f"{self.folder}/{self.prefix}_{part}.npz")
        pixels, y, classes = _decoded(str(path), count)
        return Data(pixels.float() / 255, y, 100, f"{self.folder} ({name})", classes, low=0.0, high=1.0)


def cifar10() -> Images:
    """50,000 and 5,000 colour images, `b 3 32 32`, of ten kinds of things."""
    return Images("cifar10", "cifar10")


def mnist() -> Images:
    """60,000 and 5,000 handwritten digits, `b 1 28 28`."""
    return Images("mnist", "mnist")


@functools.lru_cache(maxsize=4)
def _decoded(path: str, count: int | None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The first images of a file as uint8 `b c h w`, their classes, and the names of these."""
    arrays = read_arrays(path, ("x", "jpeg", "offsets", "y", "names"))
    y = torch.from_numpy(arrays["y"][:count].astype(np.int64))
    if "jpeg" in arrays:
        ends = arrays["offsets"][: len(y) + 1]
        images = np.stack(
            [_jpeg(arrays["jpeg"][a:b].tobytes()) for a, b in zip(ends, ends[1:], strict=False)]
        )
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    else:
        pixels = torch.from_numpy(arrays["x"][:count]).unsqueeze(1)
    return pixels, y, tuple(str(name) for name in arrays["names"])


def _jpeg(content: bytes) -> np.ndarray:
    """The pixels of one JPEG image, `h w 3` uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content), formats=["JPEG"]).convert("RGB"))
