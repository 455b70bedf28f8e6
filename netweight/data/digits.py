"""Handwritten digits that scikit-learn brings along: 1797 images of 8 x 8 grey pixels, ten classes.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from netweight.core.task import Data

TEST = 540
CALIBRATION = 256
SEED = 0  # of the split, the same for everybody


def train() -> Data:
    """1257 images, `b 1 8 8` in [0, 1]."""
    return _part(slice(TEST, None), "digits (train)")


def calibration() -> Data:
    """The first 256 images of `train()`."""
    return _part(slice(TEST, TEST + CALIBRATION), "digits (calibration)")


def test() -> Data:
    """540 images that `train()` does not hold."""
    return _part(slice(0, TEST), "digits (test)")


def _part(which: slice, name: str) -> Data:
    x, y = _all()
    return Data(x[which], y[which], 100, name, tuple("0123456789"), low=0.0, high=1.0)


@functools.cache
def _all() -> tuple[Tensor, Tensor]:
    """Every image and class in the order of the split: test, then train."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return x[order], torch.from_numpy(classes).long()[order]
