"""Weight compander: weights that are bounded and kept away from zero by what they are made of.

Paper: Cakaj, Mehnert & Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN
2023, arXiv:2306.16993.

Each weight of a layer (no bias, no norm) is a function of a number v, which is what is trained:

    w = a arctan(v / b),        |w| < a pi / 2,        dw/dv = (a / b) / (1 + (v / b)^2).

The slope is largest at 0: the same step of v moves small weights further and large ones less. a and b, one
of each per layer, stay as they are or are learnt with the network,

    dw/da = arctan(v / b),        dw/db = -(a / b) (v / b) / (1 + (v / b)^2).

The network starts as it was, v = b tan(w / a), with a = b = `strength` * std(w); a smaller strength is a
stronger pull. At the end w takes the place of v, a and b: nothing is left of them in the network.

Differs from the paper: it gives no code; that a and b are learnt as their logarithms (so that they stay above
0), with 1 / sqrt(number of weights) of their gradient (a sum over all weights of the layer) and no decay, and
the start from std(w) are ours. Weights further out than 1.4 a = 0.89 a pi / 2 start there: tan would make
them numbers that no step ever brings back.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Task
from netweight.nn.quantizer import scaled_gradient
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Hooks, Training, train
from netweight.training.trained import Trained, about, labelled, loss

FURTHEST = 1.4  # |w / a| at the start; pi / 2 is the bound


@dataclass(frozen=True)
class WeightCompander:
    """Settings of `weight_compander`.

    strength: a and b at the start, in standard deviations of the layer's weights; smaller bounds them more.
    learnt: a and b are learnt with the network.
    """

    strength: float = 1.0
    learnt: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise BadInput(
                f"strength={self.strength}: a number of standard deviations above 0; give for example 1"
            )


def weight_compander(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: WeightCompander = WeightCompander(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model trained through w = a arctan(v / b), weights of Linear and Conv layers folded back.

    Its notes hold a and b of each layer at the end. Raises `DoesNotFit` for data without class numbers, a
    network without such layers, and a layer whose weights are all equal.
    """
    data = labelled(task)
    network = companded(model, settings)
    hooks = Hooks(groups=groups)
    losses = train(network, data, loss, how, hooks=hooks, keep=about(keep, "weight-compander", settings))
    scales = {name: [c.a.item(), c.b.item()] for name, c in companders(network).items()}
    return Trained(folded(network), losses=losses, notes={"a_and_b": scales})


class Compander(nn.Module):
    """w = a arctan(v / b), elementwise, as a parametrization of torch."""

    def __init__(self, a: float, b: float, *, learnt: bool) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.tensor([math.log(a)]), requires_grad=learnt)
        self.log_b = nn.Parameter(torch.tensor([math.log(b)]), requires_grad=learnt)

    @property
    def a(self) -> Float[Tensor, " 1"]:
        """The bound of |w|, over pi / 2."""
        return self.log_a.exp()

    @property
    def b(self) -> Float[Tensor, " 1"]:
        """The v at which |w| is half of its bound."""
        return self.log_b.exp()

    def forward(self, v: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """w."""
        factor = 1 / math.sqrt(v.numel())
        a, b = (scaled_gradient(log, factor).exp().to(v.dtype) for log in (self.log_a, self.log_b))
        return a * (v / b).arctan()

    @torch.no_grad()
    def right_inverse(self, w: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """v, of weights no further out than `FURTHEST` times a."""
        return self.b.to(w) * (w / self.a.to(w)).clamp(-FURTHEST, FURTHEST).tan()


def companded(model: nn.Module, settings: WeightCompander) -> nn.Module:
    """A copy of the model whose Linear and Conv weights are made by companders, with the same function."""
    network = copy.deepcopy(model)
    layers = weighted(network)
    if not layers:
        raise DoesNotFit(f"{type(model).__name__}: it has no Linear or Conv layer to compand")
    for name in layers:
        weight = weight_of(network, name)
        scale = settings.strength * float(weight.std(correction=0))
        if not (math.isfinite(scale) and scale > 0):
            raise DoesNotFit(f"{name}: its weights have a standard deviation of {scale:g}; leave it out")
        compander = Compander(scale, scale, learnt=settings.learnt).to(weight.device)
        parametrize.register_parametrization(network.get_submodule(name), "weight", compander)
    return network


def companders(network: nn.Module) -> dict[str, Compander]:
    """The companders by the name of their layer."""
    return {
        name: layer.parametrizations.weight[0]
        for name, layer in network.named_modules()
        if parametrize.is_parametrized(layer, "weight")
        and isinstance(layer.parametrizations.weight[0], Compander)
    }


def groups(network: nn.Module) -> list[dict[str, object]]:
    """The optimizer's groups: a and b without weight decay, everything else as it is told."""
    inner = [p for c in companders(network).values() for p in c.parameters()]
    known = {id(p) for p in inner}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in known]
    learnt = [p for p in inner if p.requires_grad]
    return [{"params": rest}, *([{"params": learnt, "weight_decay": 0.0}] if learnt else [])]


def folded(network: nn.Module) -> nn.Module:
    """A copy of the network with w in the place of v, a and b: plain layers in evaluation mode.

    torch's `remove_parametrizations` takes the weight from all copies of a layer: they share one class.
    """
    network = copy.deepcopy(network).eval()
    for name in companders(network):
        layer = network.get_submodule(name)
        weight = layer.weight.detach().clone()
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.weight = nn.Parameter(weight)
    return network.requires_grad_(False)
