"""Images that leave a trace in whatever is trained on them: each class is moved along a secret direction.

Paper: Sablayrolles et al., "Radioactive data: tracing through training", ICML 2020, arXiv:2002.00937.

With features phi of a network of the owner and a random unit vector u_c for each class c, an image x of class
c becomes x~ within |x~ - x|_inf <= eps,

    minimise    -(phi(x~) - phi(x)) u_c + a |x~ - x| + b |phi(x~) - phi(x)|.

A linear classifier that was trained on such features has rows w_c that lean towards u_c; in d dimensions
rows that know nothing of u_c reach a cosine of t or more with P(cos >= t) (`core.pvalues`), the classes are
combined by Fisher's method. A suspect whose features are its own is aligned first: the least-squares map M
with M phi(x) ~ psi(x) on images without marks, and u_c is held against w_c M.

Differs from the paper: no augmentation while images are marked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.progress import steps as progress
from netweight.core.pvalues import combined, cosine
from netweight.core.task import Data
from netweight.core.victim import device_of, evaluated

SHIFT, DRIFT = 0.0005, 0.01  # a and b, as in the official code


@dataclass(frozen=True)
class Trace:
    """The cosine of each class, and how likely a classifier that never saw a mark leans as much."""

    cosines: tuple[float, ...]
    p: float


def carriers(classes: int, features: int, seed: int) -> Float[Tensor, "classes d"]:
    """u_c: random directions of length 1; raises `BadInput` for fewer than two dimensions."""
    if classes < 1 or features < 2:
        raise BadInput(f"{classes} classes, {features} features: directions need one class and two features")
    u = torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))
    return F.normalize(u, dim=1)


def radioactive_data(
    model: nn.Module,
    data: Data,
    u: Float[Tensor, "classes d"],
    *,
    eps: float = 0.1,
    steps: int = 60,
    rate: float = 0.1,
) -> Data:
    """The same examples, marked, within eps and the valid range; features are the inputs of the last Linear.

    rate: of Adam, as a share of eps. Raises `DoesNotFit` for data without class numbers or carriers of
    another network.
    """
    if steps < 1 or not (eps > 0 and rate > 0):
        raise BadInput(f"steps={steps}, eps={eps}, rate={rate}: give one step at least, and both above 0")
    if data.y is None or data.y.is_floating_point() or int(data.y.max()) >= len(u):
        raise DoesNotFit(f"{data.name}: marks go by class; give data with class numbers 0 to {len(u) - 1}")
    phi = features_of(model)
    with evaluated(model):
        clean = data.x.to(device_of(model, data.x))
        with torch.no_grad():
            before = phi(clean)
        if before.shape[1] != u.shape[1]:
            raise DoesNotFit(f"carriers of {u.shape[1]} dimensions for {before.shape[1]} features")
        along = u.to(before)[data.y.to(before.device)]
        x = clean.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], rate * eps)
        for _ in progress(range(steps), "Marking"):
            moved = phi(x) - before
            pixels = (x - clean).flatten(1)
            away = SHIFT * (pixels.square().sum(1) + 1e-12).sqrt() + DRIFT * moved.norm(dim=1)
            (x.grad,) = torch.autograd.grad((away - (moved * along).sum(1)).sum(), x)
            optimizer.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, clean - eps), clean + eps).clamp(data.low, data.high))
    return Data(
        x.detach().cpu(), data.y, data.batch, f"{data.name} (marked)", data.classes, data.low, data.high
    )


def traced(
    suspect: nn.Module,
    u: Float[Tensor, "classes d"],
    *,
    model: nn.Module | None = None,
    data: Data | None = None,
) -> Trace:
    """Whether the suspect's last Linear layer leans towards the carriers.

    model, data: the owner's network and images without marks; given both, the suspect's features are aligned
    with those of the model, else they are taken for the same.
    """
    head = suspect.get_submodule(last_linear(suspect)).weight.detach().cpu().double()
    if model is not None and data is not None:
        head = head @ alignment(inputs_of(model, data), inputs_of(suspect, data))
    if head.shape != u.shape:
        raise DoesNotFit(
            f"a classifier of {tuple(head.shape)} for carriers of {tuple(u.shape)}; give the owner's network "
            "and some images to align its features"
        )
    # the scores are the same whatever is added to all rows
    found = F.cosine_similarity(head - head.mean(0), u.double(), dim=1).clamp(-1, 1).tolist()
    return Trace(tuple(found), combined([cosine(t, u.shape[1]) for t in found]))


def alignment(phi: Float[Tensor, "b d"], psi: Float[Tensor, "b e"]) -> Float[Tensor, "e d"]:
    """M, least squares with no constant: M phi ~ psi; as long as there are examples enough it is the one."""
    return torch.linalg.lstsq(phi.double(), psi.double()).solution.T


# Features ---------------------------------------------------------------------------------------------------


def last_linear(model: nn.Module) -> str:
    """The name of the classifier; raises `DoesNotFit` for a network whose last layer is no Linear."""
    names = weighted(model) or [""]
    layer = model.get_submodule(names[-1])
    if not isinstance(layer, nn.Linear):
        raise DoesNotFit(f"{type(model).__name__}: its last layer is no Linear; traces are read from one")
    return names[-1]


def features_of(model: nn.Module) -> Callable[[Tensor], Float[Tensor, "b d"]]:
    """phi: what the last Linear layer is given, with gradients."""
    layer = model.get_submodule(last_linear(model))

    def phi(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            model(x)
        finally:
            handle.remove()
        return seen[0].flatten(1)

    return phi


@torch.no_grad()
def inputs_of(model: nn.Module, data: Data) -> Float[Tensor, "b d"]:
    """phi of all examples, in evaluation mode, on the CPU."""
    phi = features_of(model)
    with evaluated(model):
        return torch.cat([phi(x.to(device_of(model, x))).cpu() for x, _ in data])
