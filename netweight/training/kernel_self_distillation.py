"""Self-distillation of kernel ridge regression with the true labels mixed in: every step in closed form.

Paper: Borup and Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization
Imposed by Self-Distillation", NeurIPS 2021, arXiv:2102.13088.

Step t fits targets that mix the labels with what the step before gave, y^0 = y:

    y_mix^t = alpha^t y + (1 - alpha^t) y^{t-1},
    f^t(x) = k(x, X) (K + lambda I)^-1 y_mix^t,        y^t = f^t(X).

With K = V diag(d) V^T and a = d / (d + lambda) all of it is diagonal: y^t = V diag(b^t) V^T y,

    b^0 = 1,        b^t = a ((1 - alpha^t) b^{t-1} + alpha^t)                               (`shrinkages`)
    b^t = ((1 - alpha) a)^t + alpha a (1 - ((1 - alpha) a)^t) / (1 - (1 - alpha) a)         (`closed_form`)
    b^inf = alpha a / (1 - (1 - alpha) a) = d / (d + lambda / alpha)                        (`limit`)

The last is the same ridge regression with the penalty lambda / alpha, so that it can be had without a single
step; at alpha = 0 it is 0. The way there is linear: |y^t - y^inf| <= ((1 - alpha) max a)^t |y - y^inf|.

Predictions are linear in the weight: alpha u + (1 - alpha) v, u of the labels alone (the first fit), v of
y^{t-1} alone. Least squares on labels that were held out give the best one (`best_weight`),

    alpha* = <y_v - v, u - v> / |u - v|^2.

Everything is in float64. alpha weighs the TRUTH here; elsewhere it often weighs the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit

INDEFINITE = 1e-8  # an eigenvalue below minus that share of the largest one is no rounding error


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A kernel regression in the basis of its kernel: K = V diag(d) V^T.

    values: d, ascending, at least 0. vectors: V, columns. targets: V^T y. ridge: lambda. All float64.
    """

    values: Float[Tensor, " n"]
    vectors: Float[Tensor, "n n"]
    targets: Float[Tensor, "n ..."]
    ridge: float

    @property
    def shrinkage(self) -> Float[Tensor, " n"]:
        """a: how much of each component of the labels the first fit keeps, from 0 to 1."""
        return self.values / (self.values + self.ridge)


def spectrum(kernel: Float[Tensor, "n n"], y: Float[Tensor, "n ..."], ridge: float) -> Spectrum:
    """The one eigendecomposition from which every step follows.

    Raises `DoesNotFit` for a kernel that is not symmetric positive semidefinite or has not one row a label,
    `BadInput` for a ridge that is not above 0 (K alone may have no inverse).
    """
    if not (math.isfinite(ridge) and ridge > 0):
        raise BadInput(f"ridge={ridge}: the penalty is a number above 0; give for example 0.1")
    K, labels = kernel.double(), y.double()
    if K.shape != (len(labels), len(labels)):
        raise DoesNotFit(f"a kernel of {tuple(K.shape)} does not fit {len(labels)} labels; give one row each")
    if not torch.allclose(K, K.T, rtol=1e-6, atol=1e-9):
        raise DoesNotFit("the kernel is not symmetric; give k(x, x') of every pair of examples")
    d, V = torch.linalg.eigh((K + K.T) / 2)
    if d[0] < -INDEFINITE * d[-1].abs():
        raise DoesNotFit(
            f"the kernel has an eigenvalue of {d[0].item():.3g}; give a positive semidefinite one"
        )
    return Spectrum(d.clamp(min=0), V, torch.tensordot(V.T, labels, 1), ridge)


def shrinkages(a: Float[Tensor, " n"], weights: Sequence[float]) -> list[Float[Tensor, " n"]]:
    """b^0, b^1, ... b^T for the weights of steps 1 to T; raises `BadInput` for one outside [0, 1]."""
    found = [torch.ones_like(a)]
    for weight in weights:
        checked(weight)
        found.append(a * ((1 - weight) * found[-1] + weight))
    return found


def closed_form(a: Float[Tensor, " n"], weight: float, step: int) -> Float[Tensor, " n"]:
    """b^t at one weight for all steps."""
    kept = (1 - checked(weight)) * a
    power = kept**step
    return power + weight * a * (1 - power) / (1 - kept)  # a < 1, since the penalty is above 0


def limit(a: Float[Tensor, " n"], weight: float) -> Float[Tensor, " n"]:
    """b of infinitely many steps: ridge regression with the penalty lambda / alpha, and 0 at alpha = 0."""
    return checked(weight) * a / (1 - (1 - weight) * a)


def fitted(spec: Spectrum, b: Float[Tensor, " n"]) -> Float[Tensor, "n ..."]:
    """y^t = V diag(b) V^T y, the fit at the examples themselves."""
    return torch.tensordot(spec.vectors, along(b, spec.targets), 1)


def mixed(b: Float[Tensor, " n"], weight: float) -> Float[Tensor, " n"]:
    """The targets of the next step in the basis of the kernel, as a multiple of the labels there."""
    return weight + (1 - weight) * b


def predicted(
    spec: Spectrum, cross: Float[Tensor, "m n"], targets: Float[Tensor, " n"]
) -> Float[Tensor, "m ..."]:
    """f(x) at new points, `cross` = k(x, X), of the fit to V diag(targets) V^T y (see `mixed`)."""
    dual = along(targets / (spec.values + spec.ridge), spec.targets)
    return torch.tensordot(cross.double(), torch.tensordot(spec.vectors, dual, 1), 1)


def along(factor: Float[Tensor, " n"], values: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """One factor for each row."""
    return factor.reshape(-1, *[1] * (values.ndim - 1)) * values


def best_weight(truth: Tensor, first: Tensor, again: Tensor) -> float:
    """alpha* of predictions alpha `first` + (1 - alpha) `again` by least squares; it may leave [0, 1].

    Where the two predictions agree every weight gives the same, and 1 is returned: the labels alone.
    """
    y, u, v = truth.double(), first.double(), again.double()
    apart = u - v
    size = float(apart.square().sum())
    return float(((y - v) * apart).sum()) / size if size > 0 else 1.0


def clipped(weight: float) -> float:
    """The nearest weight that can be trained with."""
    return min(1.0, max(0.0, weight))


@dataclass(frozen=True)
class Chain:
    """Steps with the best weight of each. weights: as used, within [0, 1]; raw: as estimated.

    shrinkages: b^0 to b^T. The weight of step 1 is 1: its targets are the labels whatever it is.
    """

    weights: tuple[float, ...]
    raw: tuple[float, ...]
    shrinkages: tuple[Float[Tensor, " n"], ...]


def guided(spec: Spectrum, cross: Float[Tensor, "m n"], truth: Float[Tensor, "m ..."], steps: int) -> Chain:
    """`steps` fits, each with the weight that is best for the labels `truth` at the points of `cross`.

    Those points must be neither trained nor tested on. Raises `BadInput` for fewer than one step.
    """
    if steps < 1:
        raise BadInput(f"steps={steps}: give at least 1, the fit to the labels alone")
    a = spec.shrinkage
    first = predicted(spec, cross, torch.ones_like(a))
    b, weights, raw = [torch.ones_like(a), a], [1.0], [1.0]
    for _ in range(steps - 1):
        raw.append(best_weight(truth, first, predicted(spec, cross, b[-1])))
        weights.append(clipped(raw[-1]))
        b.append(a * mixed(b[-1], weights[-1]))
    return Chain(tuple(weights), tuple(raw), tuple(b))


def gaussian(x: Float[Tensor, "n f"], z: Float[Tensor, "m f"], gamma: float) -> Float[Tensor, "n m"]:
    """exp(-gamma |x - z|^2) of every pair, float64."""
    return torch.exp(-gamma * torch.cdist(x.double(), z.double(), compute_mode=EXACT).square())


EXACT = "donot_use_mm_for_euclid_dist"  # the product form loses half the digits of near pairs


def checked(weight: float) -> float:
    """The weight of the labels, if it is a share."""
    if not 0 <= weight <= 1:
        raise BadInput(f"weight={weight}: the labels weigh between 0 and 1")
    return weight
