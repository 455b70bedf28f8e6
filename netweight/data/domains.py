"""The same kind of images seen in several ways, and batches with an equal share of each.

    data = dealt(digits.train(), DIGITS, seed=0)        a quarter of the images in each domain
    seen, unseen = data.rows(data.domain != 1), every(digits.test(), DIGITS, 1)

A domain is a function of images `b c h w` in [0, 1] and a source of chance. Which domain an example is of
stands in `Data.domain`. Training on some domains and testing on the one that was left out is how domain
generalization is judged (Gulrajani & Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021,
arXiv:2007.01434).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data
from netweight.data.augment import grey

Images = Float[Tensor, "b c h w"]
Domain = Callable[[Tensor, torch.Generator], Tensor]

TURN = 25.0  # degrees
NOISE = 0.15  # standard deviation, of pixels in [0, 1]
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def as_they_are(x: Images, generator: torch.Generator) -> Images:
    """The images."""
    return x


def rotated(x: Images, generator: torch.Generator) -> Images:
    """Turned by 25 degrees against the clock; what comes in from outside is black."""
    cos, sin = math.cos(math.radians(TURN)), math.sin(math.radians(TURN))
    turn = x.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).clamp(0, 1)


def inverted(x: Images, generator: torch.Generator) -> Images:
    """1 - x."""
    return 1 - x


def noisy(x: Images, generator: torch.Generator) -> Images:
    """Blurred (1 2 1 both ways), with Gaussian noise of 0.15, inside [0, 1]."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return (blurred(x, 1) + NOISE * noise).clamp(0, 1)


def greyed(x: Images, generator: torch.Generator) -> Images:
    """Brightness alone, in every channel."""
    return grey(x).expand_as(x).clone()


def edges(x: Images, generator: torch.Generator) -> Images:
    """The length of each channel's gradient (Sobel), at most 1."""
    kernel = x.new_tensor(SOBEL).expand(x.shape[1], 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = (F.conv2d(padded, k, groups=x.shape[1]) for k in (kernel, kernel.mT))
    return (across.square() + down.square()).sqrt().div(2).clamp(0, 1)


def smooth(x: Images, generator: torch.Generator) -> Images:
    """Low frequencies alone: blurred three times."""
    return blurred(x, 3)


def blurred(x: Images, times: int) -> Images:
    """1 2 1 along both axes, `times` times; borders repeat the outermost pixels."""
    line = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    for _ in range(times):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
    return x


DIGITS: Mapping[str, Domain] = {
    "clean": as_they_are,
    "rotated": rotated,
    "inverted": inverted,
    "noisy": noisy,
}
PHOTOS: Mapping[str, Domain] = {"original": as_they_are, "grey": greyed, "edges": edges, "smooth": smooth}


def dealt(data: Data, domains: Mapping[str, Domain], seed: int) -> Data:
    """Each example in one of the domains, dealt out at random in equal shares; `domain` is their number."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(len(data))[torch.randperm(len(data), generator=generator)] % len(domains)
    x = data.x.clone()
    for index, domain in enumerate(domains.values()):
        x[number == index] = domain(data.x[number == index], generator)
    return replace(data, x=x, domain=number, name=f"{data.name} in domains", memo={})


def every(data: Data, domains: Mapping[str, Domain], number: int, seed: int = 0) -> Data:
    """All examples in the domain of that number."""
    name, domain = list(domains.items())[number]
    x = domain(data.x, torch.Generator().manual_seed(seed))
    return replace(data, x=x, domain=torch.full((len(x),), number), name=f"{data.name} ({name})", memo={})


def domains_of(data: Data, method: str) -> Int64[Tensor, " b"]:
    """The domain of each example; raises `DoesNotFit` unless there are two at least."""
    if data.domain is None:
        raise DoesNotFit(
            f"{data.name}: {method} needs the domain of each example; give a .npz file with an array "
            "domain (one whole number or name per example) beside x and y"
        )
    if len(data.domain.unique()) < 2:
        raise DoesNotFit(f"{data.name}: all examples are of one domain; {method} needs two or more")
    return data.domain


def in_equal_shares(domain: Int64[Tensor, " b"], batch: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    """Rows of each step of an epoch (`Hooks.order`): batch // domains from each domain, in random order.

    The epoch ends when the largest domain is through; smaller ones begin anew. Raises `BadInput` for a batch
    with fewer examples than there are domains.
    """
    groups = [(domain == number).nonzero()[:, 0] for number in domain.unique()]
    share = batch // len(groups)
    if share < 1:
        raise BadInput(f"batch={batch}: it holds no example of each of {len(groups)} domains; give more")
    steps = math.ceil(max(len(rows) for rows in groups) / share)

    def order(generator: torch.Generator) -> Sequence[Tensor]:
        parts = [endless(rows, steps * share, generator).reshape(steps, share) for rows in groups]
        return list(torch.cat(parts, 1))

    return order


def endless(rows: Int64[Tensor, " n"], count: int, generator: torch.Generator) -> Int64[Tensor, " count"]:
    """`count` of the rows: all of them in random order, then all again in another."""
    times = math.ceil(count / len(rows))
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(times)])[:count]
