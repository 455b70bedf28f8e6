"""Two networks of half the width, joined into one of full width whose new weights are mixtures of theirs.

Paper: Pham et al., "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters", WACV 2024,
arXiv:2311.04251. With the layers of `nn.mixture`,

    member 0 is trained for E epochs, then member 1: own templates, coefficients and batch norms each;
    growth: W = [[P_0, P_2], [P_3, P_1]], batch norms laid side by side, logits summed;
    everything (templates, all coefficients, norms) is trained on for a few epochs at a smaller rate.

A member takes a quarter of the full network's products, the first and the last layer half. At the end each
weight is folded: the network is an ordinary one. Weight decay does not reach the coefficients.

Differs from the paper: in a network without batch norms templates are drawn with the fan-in of a piece (the
official code's are smaller by the root of its outputs, which only a norm makes good); momentum without
Nesterov's step; the schedule after growth is that of the members without a warm-up (cosine without restarts),
from `share` of their rate on.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from netweight.core.compressed import WEIGHTED
from netweight.core.compressed import replace as put
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.task import Data, Task, outputs
from netweight.nn.mixture import GROWTHS, Bank, Halves, Mixed
from netweight.nn.switch_norm import BATCH_NORMS, SwitchNorm
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Hooks, Training, train
from netweight.training.trained import Trained, about, labelled, loss

MEMBERS = 2


@dataclass(frozen=True)
class MixtureGrowth:
    """Settings of `mixture_growth`; `Training.epochs` are those of each member.

    epochs: after growth. share: of the members' rate, after growth. templates: of each of the two sets of a
    layer. growth: orthogonal, random, copy or zero, and noise (see `nn.mixture.new_coefficients`). bank:
    layers of one shape share their templates, and the coefficients of the first and last layer stay at 1.
    """

    epochs: int = 40
    share: float = 0.2
    templates: int = 2
    growth: str = "orthogonal"
    noise: float = 1.0
    bank: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.templates < 1:
            raise BadInput(f"epochs={self.epochs}, templates={self.templates}: give at least one of each")
        if not (math.isfinite(self.share) and self.share > 0 and math.isfinite(self.noise)):
            raise BadInput(f"share={self.share}, noise={self.noise}: give a share above 0 and a finite noise")
        if self.growth not in GROWTHS:
            raise unknown("growth", self.growth, GROWTHS)


def mixture_growth(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: MixtureGrowth = MixtureGrowth(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A network like `model`, trained as two members of half its width and grown; its weights are not used.

    Losses: those of member 0, of member 1 and of the grown network, one after the other. Raises `DoesNotFit`
    with the layer's name where the network cannot be cut in two halves.
    """
    data = labelled(task)
    net = templates_of(model, data, settings, how.seed)
    keep, losses = about(keep, "mixture-growth", settings), ()
    for member in range(MEMBERS):
        losses += train_member(net, data, how, member, keep=keep and keep.part(f"member-{member}"))
    grow(net, settings, how.seed)
    losses += train_grown(net, data, how, settings, keep=keep and keep.part("grown"))
    stored = sum(p.numel() for p in net.parameters())
    plain = folded(net)
    return Trained(plain, losses=losses, notes={
        "parameters while training": stored, "parameters": sum(p.numel() for p in plain.parameters()),
    })  # fmt: skip


# The network of templates --------------------------------------------------------------------------------


def templates_of(model: nn.Module, data: Data, settings: MixtureGrowth, seed: int) -> nn.Module:
    """The model with weights of templates and a batch norm for each member, computing as member 0.

    The first Linear or Conv layer does not split its input, the last not its output.
    """
    net, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    bank: Bank = {}
    names = [name for name, layer in net.named_modules() if isinstance(layer, WEIGHTED)]
    if len(names) < 2:
        raise DoesNotFit(f"{type(model).__name__}: growth needs two Linear or Conv layers or more")
    normed = any(isinstance(layer, BATCH_NORMS) for layer in net.modules())
    for name, layer in [*net.named_modules()]:
        if name in names:
            halves = Halves(inputs=name != names[0], outputs=name != names[-1])
            mixed = Mixed(
                layer, halves, generator, templates=settings.templates, small=normed, name=name,
                bank=bank if settings.bank else None,
            )  # fmt: skip
            if settings.bank and halves.pieces == 2:
                for row in mixed.coefficients:
                    row.data.fill_(1.0)
                    row.requires_grad_(False)
            put(net, name, mixed)
        elif isinstance(layer, BATCH_NORMS):
            put(net, name, SwitchNorm(half_norm(layer, name), [str(m) for m in range(MEMBERS)]))
        elif any(True for _ in layer.parameters(recurse=False)):
            raise DoesNotFit(f"{name}: a {type(layer).__name__} does not split in two; grow without it")
    _check_runs(net, model, data)
    return net


def half_norm(norm: nn.Module, name: str) -> nn.Module:
    """A new batch norm of half as many channels."""
    if norm.num_features % 2:
        raise DoesNotFit(f"{name}: {norm.num_features} channels do not split in two; give an even number")
    half = type(norm)(norm.num_features // 2, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    return half.to(norm.weight if norm.affine else norm.running_mean)


def _check_runs(net: nn.Module, model: nn.Module, data: Data) -> None:
    """Raises `DoesNotFit` where the network does not run at half its width."""
    one = data.take(1)
    try:
        found = outputs(net, one)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DoesNotFit(
            f"{type(model).__name__}: it does not run at half its width ({reason}); widths that are written "
            "into its forward pass cannot be halved"
        ) from error
    if found.shape != outputs(model, one).shape:
        raise DoesNotFit(f"{type(model).__name__}: at half its width it gives {tuple(found.shape)}")


def mixed_layers(net: nn.Module) -> list[Mixed]:
    """The layers of templates in order."""
    return [layer for layer in net.modules() if isinstance(layer, Mixed)]


def use(net: nn.Module, member: int) -> None:
    """Compute as that member from now on."""
    for layer in mixed_layers(net):
        layer.use(member)
    for norm in net.modules():
        if isinstance(norm, SwitchNorm):
            norm.use(str(member))


# Training and growth -------------------------------------------------------------------------------------


def train_member(
    net: nn.Module, data: Data, how: Training, member: int, *, keep: Checkpoint | None = None
) -> tuple[float, ...]:
    """Train one member in place: its templates, coefficients, biases and norms, nothing of the other's."""
    use(net, member)  # what does not compute gets no gradient, and so no step and no decay either
    return train(net, data, loss, how, hooks=Hooks(groups=groups), keep=keep)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """All that is trained; no weight decay on coefficients."""
    rows = {id(row) for layer in mixed_layers(net) for row in layer.coefficients}
    trained = [p for p in net.parameters() if p.requires_grad]
    mixing = [p for p in trained if id(p) in rows]
    rest = {"params": [p for p in trained if id(p) not in rows]}
    return [rest, {"params": mixing, "weight_decay": 0.0}] if mixing else [rest]


def grow(net: nn.Module, settings: MixtureGrowth, seed: int) -> None:
    """Full width in place. Raises `BadInput` for a network that is grown already."""
    generator = torch.Generator().manual_seed(seed)
    for layer in mixed_layers(net):
        layer.grow(settings.growth, settings.noise, generator)
    for name, norm in [*net.named_modules()]:
        if isinstance(norm, SwitchNorm):
            put(net, name, side_by_side([norm.norms[str(m)] for m in range(MEMBERS)]))


@torch.no_grad()
def side_by_side(norms: list[nn.Module]) -> nn.Module:
    """One batch norm with the channels of all; steps counted as those of the first."""
    wide = copy.deepcopy(norms[0])
    wide.num_features = sum(norm.num_features for norm in norms)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(wide, kind).items():
            if tensor is not None and tensor.ndim:
                joined = torch.cat([getattr(norm, name).detach() for norm in norms])
                setattr(wide, name, nn.Parameter(joined) if kind == "_parameters" else joined)
    return wide


def train_grown(
    net: nn.Module, data: Data, how: Training, settings: MixtureGrowth, *, keep: Checkpoint | None = None
) -> tuple[float, ...]:
    """Train everything in place, for the epochs and at the rate of after growth."""
    after = replace(how, epochs=settings.epochs, rate=how.rate * settings.share, warmup=0.0)
    return train(net, data, loss, after, hooks=Hooks(groups=groups), keep=keep)


def folded(net: nn.Module, member: int | None = None) -> nn.Module:
    """The ordinary network in evaluation mode: the grown one, or that member before growth."""
    plain = copy.deepcopy(net)
    if member is not None:
        use(plain, member)
    for name, layer in [*plain.named_modules()]:
        if isinstance(layer, Mixed):
            put(plain, name, layer.plain())
        elif isinstance(layer, SwitchNorm):
            put(plain, name, layer.norms[layer.now])
    return plain.eval().requires_grad_(False)
