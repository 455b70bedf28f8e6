"""Flow through a porous plate: conductivity in, pressure out; simulated here, exact to the grid.

    -div( k grad u ) = 1 on the unit square,   u = 0 on its edge,   k = exp(CONTRAST (2 a - 1))

a is a smooth random field in [0, 1] (a Gaussian field with Fourier amplitudes exp(-|f|^2 / (2 BAND^2)),
pressed through a sigmoid). Finite volumes with the harmonic mean of k between neighbours, solved directly.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.task import Data

SIDE, BAND, CONTRAST, STEEP = 24, 4.0, 2.0, 1.5
TRAIN, TEST = 700, 100
UNIT = 14.0  # about the deviation of u in units of the grid; what is handed out is u / UNIT


def train(count: int = TRAIN) -> Data:
    """Pairs of a and u, `b 1 24 24` each."""
    x, y = (part[TEST : TEST + count] for part in _all())
    return Data(x, y, 100, "darcy (train)", low=0.0, high=1.0)


def test() -> Data:
    """100 pairs that `train()` does not hold."""
    x, y = (part[:TEST] for part in _all())
    return Data(x, y, 100, "darcy (test)", low=0.0, high=1.0)


@functools.cache
def _all() -> tuple[Tensor, Tensor]:
    a = fields(TEST + TRAIN, torch.Generator().manual_seed(0))
    return a, solved(a)


def fields(count: int, generator: torch.Generator) -> Float[Tensor, "count 1 24 24"]:
    """Smooth random fields in [0, 1]."""
    place = np.fft.fftfreq(SIDE) * SIDE
    square = place[:, None] ** 2 + place[None] ** 2
    strength = np.exp(-square / (2 * BAND**2)) * (square > 0)
    noise = torch.randn(count, SIDE, SIDE, generator=generator, dtype=torch.float64).numpy()
    smooth = np.fft.ifft2(np.fft.fft2(noise) * strength).real
    smooth /= smooth.std((1, 2), keepdims=True)
    return torch.from_numpy(1 / (1 + np.exp(-STEEP * smooth))).float()[:, None]


def solved(a: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b 1 s s"]:
    """The pressure of each plate, / `UNIT`."""
    return torch.from_numpy(np.stack([_pressure(one) for one in a[:, 0].double().numpy()])).float()[:, None]


def _pressure(a: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "s s"]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import spsolve

    side = len(a)
    k, number = np.exp(CONTRAST * (2 * a - 1)), np.arange(side * side).reshape(side, side)
    around, numbers = np.pad(k, 1, mode="edge"), np.pad(number, 1, constant_values=-1)
    diagonal, rows, columns, values = np.zeros_like(k), [number], [number], []
    for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        window = (slice(1 + down, 1 + down + side), slice(1 + right, 1 + right + side))
        between = 2 * k * around[window] / (k + around[window])
        diagonal += between
        inner = numbers[window] >= 0
        rows.append(number[inner])
        columns.append(numbers[window][inner])
        values.append(-between[inner])
    places = (np.concatenate([r.ravel() for r in rows]), np.concatenate([c.ravel() for c in columns]))
    matrix = coo_matrix((np.concatenate([diagonal.ravel(), *values]), places)).tocsc()
    return spsolve(matrix, np.ones(side * side)).reshape(side, side) / UNIT
