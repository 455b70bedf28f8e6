"""How far apart classes lie, and what it costs the frequent one to help the rare one.

Paper: Wang et al., "Imbalanced Adversarial Training with Reweighting", ICDM 2022, arXiv:2107.13639.

Two classes y = +-1 with x | y ~ N(y * eta * 1, sigma^2 I) in d dimensions, the rare one -1, the frequent one
K times as likely; errors of the rare one count rho times. By symmetry the best linear classifier looks at the
mean of x's entries alone. On the line along 1, in standard deviations, the classes lie at -a and a,

    a = sqrt(d) eta / sigma,

and the classifier says +1 above t. The weighted risk K Phi(t - a) + rho Phi(-t - a) is smallest where
K phi(t - a) = rho phi(t + a), which is

    t = log(rho / K) / (2 a),      error of the frequent class Phi(t - a),  of the rare one Phi(-t - a).

From rho = 1 to rho = K the threshold moves from -log K / (2 a) to 0. What the frequent class loses, over what
the rare one gains, falls from 1 at a = 0 to K^(-1/2) for large a: classes that are hard to separate pay most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor

from netweight.core.errors import BadInput


@dataclass(frozen=True)
class Errors:
    """Shares of each class that are classified as the other one."""

    rare: float
    frequent: float


@dataclass(frozen=True)
class Gaussians:
    """Two Gaussian classes. imbalance: K, how many times as likely the frequent one is."""

    eta: float
    sigma: float
    imbalance: float
    dimensions: int = 1

    def __post_init__(self) -> None:
        if not (min(self.eta, self.sigma) > 0 and self.imbalance >= 1 and self.dimensions >= 1):
            raise BadInput(f"{self}: eta and sigma are above 0, imbalance and dimensions 1 or more")

    @property
    def distance(self) -> float:
        """a: half the distance of the means, in standard deviations."""
        return math.sqrt(self.dimensions) * self.eta / self.sigma

    def threshold(self, rho: float = 1.0) -> float:
        """t of the best linear classifier, in standard deviations; rho: the weight of the rare class."""
        if not 0 < rho < math.inf:
            raise BadInput(f"rho={rho}: the weight of the rare class is above 0")
        return math.log(rho / self.imbalance) / (2 * self.distance)

    def errors(self, rho: float = 1.0) -> Errors:
        """Of the best linear classifier for that weight."""
        t, a = self.threshold(rho), self.distance
        return Errors(float(norm.cdf(-t - a)), float(norm.cdf(t - a)))

    def price(self) -> float:
        """What the frequent class loses over what the rare one gains from rho = 1 to rho = K.

        The limit 1 where nothing moves (K = 1)."""
        return price(self.errors(), self.errors(self.imbalance))


def price(before: Errors, after: Errors) -> float:
    """What the frequent class loses for each point that the rare one gains; 1 where neither moves."""
    gained = before.rare - after.rare
    return (after.frequent - before.frequent) / gained if gained else 1.0


def scatter_ratio(z: Float[Tensor, "b d"], y: Int[Tensor, " b"]) -> float:
    """Scatter of the class means around their mean, over the mean scatter of the classes around theirs.

    Classes count alike, however many examples they have. Infinite where no class has any scatter.
    """
    classes, z = y.unique(), z.double()
    means = [z[y == c].mean(0) for c in classes]
    centre = sum(means) / len(means)
    between = sum(float((mean - centre).square().sum()) for mean in means)
    within = sum(float((z[y == c] - m).square().sum(1).mean()) for c, m in zip(classes, means))
    return between / within if within else math.inf
