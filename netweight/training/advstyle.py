"""AdvStyle: training against the worst shift of feature styles, for domains that were never seen.

Paper: Zhang, Li, Li, Jia and Zhang, "Adversarial Style Augmentation for Domain Generalization", technical
report 2023, arXiv:2301.12643.

Behind some parts of the network stands a layer of `nn.style` while it trains: AdvStyle, whose learnt spreads
S of mean and deviation have the gradient -k dL/dS, so that every step is one of

    min over weights, max over S,   E L(network(x; weights, S), y);

or DSU or MixStyle, which learn nothing, for comparison. Spreads begin as mean and deviation vary over the
first batch, move at the rate of the weights and have no weight decay. Afterwards the layers are taken out:
they do nothing in evaluation, so what is shipped is the network as it was, with other weights. No domains are
told apart: one is enough.

Where: behind each stage (`stages`), but the last if the mean over all places follows, which leaves nothing of
the deviation. The paper has them after the stem's convolution, its pooling and the four stages of a ResNet.

Differs from the paper: all spreads begin with the first batch as the network sees it before any step, not
each with the first batch it moves. A last batch of one example goes with the one before. With Adam the size
of k hardly matters, as each parameter's gradient is normed: the paper trains with SGD.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.task import Task
from netweight.nn import style
from netweight.training import distributed, gradients
from netweight.training.chance import own_chance
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, shuffled, train
from netweight.training.trained import Trained, about, labelled, loss

KINDS = ("advstyle", "dsu", "mixstyle", "none")


@dataclass(frozen=True)
class AdvStyle:
    """Settings of `advstyle`.

    kind: of the layers: advstyle, dsu, mixstyle, or none for plain training. k: how many times the gradient
    of the spreads is taken against the loss; below 0 with it. where: names of the parts of the network that
    they stand behind, () for all stages. p: the chance that dsu or mixstyle change a batch. alpha: of
    mixstyle's Beta distribution.
    """

    kind: str = "advstyle"
    k: float = 1.0
    where: tuple[str, ...] = ()
    p: float = style.CHANCE
    alpha: float = style.ALPHA

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of style layer", self.kind, KINDS)
        if not math.isfinite(self.k):
            raise BadInput(f"k={self.k}: the strength is a finite number; give for example 1")
        if not (0 <= self.p <= 1 and 0 < self.alpha < math.inf):
            raise BadInput(f"p={self.p}, alpha={self.alpha}: give a chance from 0 to 1 and a number above 0")


def advstyle(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: AdvStyle = AdvStyle(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model, trained with changed styles; it has no other layers than the model.

    Notes: `where` the layers stood; for advstyle `spreads`, for each of these the mean size of S_mu ("mean")
    and S_sigma ("deviation") after each epoch. Raises `DoesNotFit` for a network without such parts and data
    without class numbers, `BadInput` for batches of one example.
    """
    data = labelled(task)
    if how.batch < 2 or len(data) < 2:
        raise BadInput(
            f"batch={how.batch} of {len(data)} examples: styles vary over two examples or more; give more"
        )
    order = in_company(len(data), how.batch)
    first = data.x[order(torch.Generator().manual_seed(how.seed))[0]]
    where = () if settings.kind == "none" else settings.where or stages(model, first)
    network = copy.deepcopy(model)
    layers = {name: layer_for(x, settings) for name, x in features(model, where, first).items()}
    insert(network, layers)
    watch = Watch(how.epochs, len(where)) if settings.kind == "advstyle" else None
    hooks = Hooks(groups, order, after=watch.see, state=watch) if watch else Hooks(order=order)
    losses = train(network, data, loss, how, hooks=hooks, keep=about(keep, "advstyle", settings))
    names = [name for one in learnt(network) for name, layer in layers.items() if layer is one]
    notes = {"where": [*where], **({"spreads": watch.notes(names)} if watch else {})}
    take_out(network, where)
    return Trained(network, losses=losses, notes=notes)


def in_company(count: int, batch: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    """Rows of each step (`Hooks.order`): as `shuffled`, but no process is left with one row at the end."""

    def order(generator: torch.Generator) -> Sequence[Tensor]:
        rows = list(shuffled(count, batch)(generator))
        if len(rows) > 1 and len(rows[-1]) < 2 * distributed.count():
            rows[-2:] = [torch.cat(rows[-2:])]
        return rows

    return order


# Where ------------------------------------------------------------------------------------------------------


def stages(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names of the parts that the convolutional stages end with, in the order in which they run.

    A stage is a part with convolutions and those behind it that keep its channels and leave it several places
    (norm, activation, pooling). It does not count where all its places become one next, or at the end. Raises
    `DoesNotFit` where there is none.
    """
    parts = outermost(model)
    called, out = calls(model, tuple(parts), x)
    ends: list[str] = []
    channels = 0  # of the stage that is still open, 0 for none
    for name, before, after in [*called, ("", out, None)]:
        starts = bool(name) and has_convolutions(parts[name])
        if starts and has_style(after):
            ends.append(name)
            channels = after.shape[1]
        elif channels and not starts and has_style(after) and after.shape[1] == channels:
            ends[-1] = name
        elif channels:
            if size(before) == channels or (not starts and size(after) == channels):
                ends.pop()
            channels = 0
    if not ends:
        raise DoesNotFit(
            f"{type(model).__name__}: it has no convolutional stage with several places but one that is "
            "pooled; name the parts that styles are changed behind as where"
        )
    return tuple(ends)


def outermost(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name, those of a Sequential that holds all convolutions instead of it."""
    found = dict(model.named_children())
    while True:
        holds = [name for name, part in found.items() if has_convolutions(part)]
        if len(holds) != 1 or not isinstance(found[holds[0]], nn.Sequential):
            return found
        inner = {f"{holds[0]}.{name}": part for name, part in found[holds[0]].named_children()}
        found = {name: part for name, part in found.items() if name != holds[0]} | inner


def calls(
    model: nn.Module, names: Sequence[str], x: Tensor, seed: int = 0
) -> tuple[list[tuple[str, Any, Any]], Any]:
    """(name, first input, output) of each call of these parts, in order, and the output of the network.

    One pass of a copy in training mode, so that norms have the statistics of the batch x.
    """
    network, found = copy.deepcopy(model).train(), []

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, out: found.append((name, inputs[0] if inputs else None, out))

    for name in names:
        network.get_submodule(name).register_forward_hook(hook(name))
    device = next((p.device for p in model.parameters()), x.device)
    with own_chance(seed, device), torch.no_grad():
        return found, gradients.of_many(lambda: network(x.to(device)))


def features(model: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What these parts give for the batch x, by name.

    Raises `DoesNotFit` for a name that is no part of the network, or a part that is not run or gives no
    features `b c *places` with two places or more.
    """
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            raise DoesNotFit(
                f"{name or 'the whole network'}: no such part to change styles behind; name another"
            )
    found = {name: out for name, _, out in calls(model, names, x)[0]}
    for name in names:
        if name not in found:
            raise DoesNotFit(f"{name}: this part is not run by itself; name another as where")
        if not has_style(found[name]):
            raise DoesNotFit(
                f"{name}: what it gives has no style; name parts that give features b c *places with two "
                "places or more"
            )
    return {name: found[name] for name in names}


def has_convolutions(part: nn.Module) -> bool:
    """Whether it is a convolution or holds one."""
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in part.modules())


def has_style(out: Any) -> bool:
    """Whether these are features `b c *places` with two places or more."""
    floats = isinstance(out, Tensor) and out.is_floating_point()
    return floats and out.ndim > 2 and out[0, 0].numel() > 1


def size(out: Any) -> int:
    """Numbers of each example, 0 for what is no tensor."""
    return out[0].numel() if isinstance(out, Tensor) and out.ndim else 0


# Layers in and out ------------------------------------------------------------------------------------------


def layer_for(x: Tensor, settings: AdvStyle) -> nn.Module:
    """A style layer for these features, begun on them."""
    if settings.kind == "dsu":
        return style.DSU(settings.p)
    if settings.kind == "mixstyle":
        return style.MixStyle(settings.p, settings.alpha)
    found = style.AdvStyle(x.shape[1], settings.k).to(x.device)
    found.begin(x)
    return found


def insert(network: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer behind the part of that name; a part within a part comes first."""
    for name in sorted(layers, key=depth, reverse=True):
        network.set_submodule(name, nn.Sequential(network.get_submodule(name), layers[name]))


def take_out(network: nn.Module, names: Sequence[str]) -> None:
    """Undo `insert`."""
    for name in sorted(names, key=depth):
        network.set_submodule(name, network.get_submodule(name)[0])  # type: ignore[index]


def depth(name: str) -> int:
    """How many parts hold the one of that name."""
    return name.count(".")


# What is learnt ---------------------------------------------------------------------------------------------


def learnt(network: nn.Module) -> list[style.AdvStyle]:
    """The layers that learn spreads."""
    return [module for module in network.modules() if isinstance(module, style.AdvStyle)]


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups: weights, and spreads at the same rate without weight decay."""
    spreads = [p for layer in learnt(network) for p in layer.parameters()]
    apart = {id(p) for p in spreads}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in apart]
    return [{"params": rest}, {"params": spreads, "weight_decay": 0.0}]


class Watch(nn.Module):
    """Mean sizes of S_mu and S_sigma of each layer after each epoch, `epochs layers 2`, in a buffer."""

    sizes: Tensor

    def __init__(self, epochs: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.zeros(epochs, layers, 2, dtype=torch.float64))

    def see(self, run: Running, at: Moment) -> None:
        """`Hooks.after`: note the spreads where an epoch ends."""
        if (at.step + 1) % at.steps == 0:
            for index, layer in enumerate(learnt(run.model)):
                both = torch.stack([layer.mean_spread, layer.deviation_spread])
                self.sizes[at.epoch, index] = both.abs().mean(1).to(self.sizes)

    def notes(self, names: Sequence[str]) -> dict[str, Any]:
        """By layer and spread, a number for each epoch."""
        return {
            name: {"mean": means.tolist(), "deviation": deviations.tolist()}
            for name, (means, deviations) in zip(names, self.sizes.permute(1, 2, 0), strict=True)
        }
