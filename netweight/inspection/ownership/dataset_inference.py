"""Whether a network was trained on a data set: its own examples lie farther from the decision boundary.

Paper: Maini, Yaghini and Papernot, "Dataset Inference: Ownership Resolution in Machine Learning", ICLR 2021,
arXiv:2104.10706.

Blind walk, for which the suspect's classes are enough: from each example step by step along random signs,

    r = the number of steps, times their size, after which the class of x + r s is no longer its label's,

at most `most`, 0 where it is wrong from the start. Distances of one example differ by several times with the
direction s, so what is compared is the mean of log(r + size) over the directions. Whoever has the network
takes the distance to the nearest class t by gradients,

    r = min_t (z_y - z_t) / |grad_x (z_y - z_t)|.

A one-sided test of Welch says how likely own examples lie as much farther as public ones where training made
no difference. Own and public examples have to come from one distribution: any other difference between them
counts as well.

Differs from the paper: gradients are followed for one step, as if scores were linear; the mean is tested
itself, not the answer of a regressor that is trained on the distances of the owner's network; walks go along
signs alone, not along noise of other kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.progress import steps as progress
from netweight.core.task import Data
from netweight.core.victim import victim

TINY = 1e-12  # a gradient that is not divided by


@dataclass(frozen=True)
class Inference:
    """Mean distances of own and public examples, in units of the input, and the p-value of the test.

    Of walks the geometric means of r + size.
    """

    own: float
    public: float
    p: float


def dataset_inference(
    model: nn.Module,
    own: Data,
    public: Data,
    *,
    directions: int = 40,
    size: float = 0.05,
    most: int = 60,
    seed: int = 0,
) -> Inference:
    """The test of a suspect; both sets have class numbers and two examples or more.

    size: of a step, in every number of the input. most: steps. Raises as `walked` does.
    """
    apart = [
        (walked(model, data, directions=directions, size=size, most=most, seed=2 * seed + index) + size)
        for index, data in enumerate((own, public))
    ]
    found = inferred(*(each.log().mean(1) for each in apart))
    return Inference(math.exp(found.own), math.exp(found.public), found.p)


def by_gradients(model: nn.Module, own: Data, public: Data) -> Inference:
    """The same for whoever has the network itself, by `nearest`: it tells the two apart better."""
    return inferred(nearest(model, own), nearest(model, public))


def inferred(own: Float[Tensor, " b"], public: Float[Tensor, " k"]) -> Inference:
    """What distances say."""
    return Inference(float(own.mean()), float(public.mean()), farther(own.numpy(), public.numpy()))


@torch.no_grad()
def walked(
    model: nn.Module, data: Data, *, directions: int = 10, size: float = 0.02, most: int = 50, seed: int = 0
) -> Float[Tensor, "b directions"]:
    """r for each example and direction, on the CPU; raises `DoesNotFit` for data without class numbers."""
    if directions < 1 or most < 1 or not size > 0:
        raise BadInput(
            f"directions={directions}, size={size}, most={most}: a walk needs one direction and step, above 0"
        )
    labels(data)
    g = torch.Generator().manual_seed(seed)
    with victim(model, data.x, data.y, "dataset-inference") as v:
        rows = torch.arange(len(data)).to(v.of.device)
        found = []
        for _ in progress(range(directions), "Blind walks"):
            signs = (2 * torch.randint(0, 2, v.x.shape, generator=g) - 1).to(v.x)
            steps, inside = torch.zeros(len(data), device=v.x.device), rows
            for step in range(most + 1):
                inside = inside[~v.wrong(v.x[inside] + step * size * signs[inside], inside)]
                steps[inside] = step + 1
                if not len(inside):
                    break
            found.append(steps.clamp(max=most).cpu() * size)
        return torch.stack(found, 1)


def nearest(model: nn.Module, data: Data) -> Float[Tensor, " b"]:
    """r by gradients, Euclidean, 0 where the class is not y; on the CPU."""
    labels(data)
    with victim(model, data.x, data.y, "dataset-inference") as v:
        found = []
        for rows in progress(torch.arange(len(data)).split(data.batch), "Distances"):
            x = v.x[rows].detach().requires_grad_()
            z, y = v.scores(x), v.of[rows]
            own = z.gather(1, y[:, None])[:, 0]
            each = []
            for t in range(z.shape[1]):
                (slope,) = torch.autograd.grad((own - z[:, t]).sum(), x, retain_graph=True)
                apart = (own - z[:, t]) / slope.flatten(1).norm(dim=1).clamp(min=TINY)
                each.append(torch.where(y == t, torch.inf, apart))
            found.append(torch.stack(each).amin(0).clamp(min=0).detach().cpu())
        return torch.cat(found)


def labels(data: Data) -> None:
    """Raises `DoesNotFit` for data without class numbers."""
    if data.y is None or data.y.is_floating_point() or data.y.ndim != 1:
        raise DoesNotFit(f"{data.name}: a walk ends where the class is left; give data with class numbers")


def farther(own: np.ndarray, public: np.ndarray) -> float:
    """p of Welch's test that own distances are not larger; of two sets without variance 0 or 1."""
    if min(len(own), len(public)) < 2:
        raise BadInput(f"{len(own)} own and {len(public)} public examples: a test needs two of each")
    if own.std() == public.std() == 0:
        return float(own.mean() <= public.mean())
    return float(stats.ttest_ind(own, public, equal_var=False, alternative="greater").pvalue)
