"""OFQ: low-bit transformers whose weights do not go back and forth between two levels.

Paper: Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv:2302.02210. A learnt step size moves and takes weights that lie near a threshold over it and back; here

    StatsQ   the step of a row of b bits is 2 mean |w| / 2^(b-1), levels mid-rise, the gradient to w as it is
             (`nn.quantizer.FromMean.stats`); inputs are rounded by LSQ with a step for each token and a
             learnt shift before and after (`nn.shifted`),
    QKR      scores come from the rounded products W_q^T W_k of each head (`nn.qk_attention`), so that not
             two rounded factors are multiplied; W_q and W_k are what is trained,
    CGA      confidence-guided annealing: in the last steps only weights that are uncertain move. With u = w/s
             - 1/2 in steps, w is uncertain where |u - (i + 1/2)| <= `near` for a threshold i + 1/2 between
             two levels. The others get no gradient and are put back after each step of the optimizer, whose
             momentum and weight decay would move them; who they are is found again before each step.

The loss is cross-entropy + cross-entropy against the probabilities of the network as it was (float). Inner
layers take `bits` and `inputs`; the first and the last, patches and head, `edges` by LSQ.

Differs from the paper: annealing is the last share of one schedule, not a second run. Entries of the product
of query and key that are certain pass no gradient on to its factors; in the official code a
straight-through estimate goes around what was meant to do that. Factors are never put back, so certain
entries can drift. First and last layers have no shifts of their inputs and a single step for them. Weight
decay is on the weights of layers alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Packed, Rewrite, replace
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Task
from netweight.nn import oscillation
from netweight.nn.distillation import Teacher, soft
from netweight.nn.oscillation import Oscillations
from netweight.nn.qk_attention import Attention, JoinQueryKey, Product, QKAttention, like, parted, uncertain
from netweight.nn.quantized import Roundings, attach, begin, finished, pack, quantized, static
from netweight.nn.quantizer import FromMean, Learnt, Levels
from netweight.nn.shifted import Shifted
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Loss, Moment, Training, train
from netweight.training.trained import Trained, about, labelled

GELU = -0.18  # just under its least value

Weights = Callable[[Tensor], Learnt | FromMean]  # what rounds a weight like this one


@dataclass(frozen=True)
class OFQ:
    """Settings of `ofq`.

    bits, inputs, edges: of the weights and inputs of inner layers, and of both in the first and the last
    layer (0: left as they are), 1 to 8. joined: QKR in every `nn.qk_attention.Attention`. taught: whether the
    float network is a teacher. annealed: the share of the steps, the last ones, that are CGA. near: how far
    from a threshold, in steps, a weight is uncertain. layers: the inner layers, none for all but the first
    and the last.
    """

    bits: int = 2
    inputs: int = 2
    edges: int = 8
    joined: bool = True
    taught: bool = True
    annealed: float = 0.1
    near: float = 0.005
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = (self.bits, self.inputs, self.edges or 8)
        if not all(1 <= each <= 8 for each in widths):
            raise BadInput(
                f"bits={self.bits}, inputs={self.inputs}, edges={self.edges}: they take from 1 to 8 bits"
            )
        if not (0 <= self.annealed <= 1 and 0 <= self.near <= 0.5):
            raise BadInput(
                f"annealed={self.annealed}, near={self.near}: a share from 0 to 1, and at most half a step"
            )


def ofq(
    model: nn.Module, task: Task, how: Training, settings: OFQ = OFQ(), *, keep: Checkpoint | None = None
) -> Trained:
    """A copy of the model trained with rounded weights and inputs, which are packed.

    Notes: how often codes changed and oscillated, before and during annealing, per weight and step, and the
    share of the weights of each layer that oscillate at the end. Raises `DoesNotFit` for data without class
    numbers and for a network without inner layers to round.
    """
    data = labelled(task)
    network = rounded(model, data.x[: how.batch], settings)
    watch = Oscillations(rounded_weights(network), phases=2).to(next(model.parameters()).device)
    loss = judged(Teacher(model) if settings.taught else None)
    hooks = guided(network, how, settings, watch)
    losses = train(network, data, loss, how, hooks=hooks, keep=about(keep, "ofq", settings))
    plain, change = shipped(network)
    return Trained(plain, change, losses, watch.notes())


def judged(teacher: Teacher | None) -> Loss:
    """Cross-entropy with the labels, and against the teacher's probabilities."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        scores = model(x).float()
        hard = F.cross_entropy(scores.flatten(0, -2), y.flatten())
        return hard if teacher is None else hard + soft(scores, teacher(x))

    return loss


# The rounded network --------------------------------------------------------------------------------------


def statsq(bits: int) -> Weights:
    """StatsQ for every weight."""
    return lambda weight: FromMean.stats(bits)


def lsq(bits: int) -> Weights:
    """LSQ with one step per row: what the first and the last layer have."""
    return lambda weight: Learnt(Levels.signed(bits), places=len(weight), axis=0)


def rounded(model: nn.Module, x: Tensor, settings: OFQ, weights: Weights | None = None) -> nn.Module:
    """A copy of the model with every rounding in its place, begun from the batch x.

    weights: how inner weights are rounded; None for StatsQ.
    """
    weights = weights or statsq(settings.bits)
    network, x = copy.deepcopy(model), x.to(next(model.parameters()).device)
    ends, inner = layers_of(network, settings)
    whole = wholly(network, inner)
    for name in whole if settings.joined else ():
        old = network.get_submodule(name)
        new = like(old)
        new.product = Product(old, weights(new.product.weight))
        replace(network, name, new)
        inner = [each for each in inner if each not in (f"{name}.query", f"{name}.key")]
    places = [f"{name}.{place}" for name in whole for place in network.get_submodule(name).PLACES]
    seen = looked(network, x, [*inner, *ends, *places])
    for name in places:
        replace(network, name, between(name, seen[name], settings.inputs))

    def rule(name: str, layer: nn.Module) -> Roundings | None:
        if name in ends and settings.edges:
            return Roundings(lsq(settings.edges)(layer.weight), Learnt(levels(seen[name], settings.edges)))
        if name in inner and name in seen:
            within = name.rpartition(".")[0] in whole and not name.endswith(".output")
            return Roundings(weights(layer.weight), None if within else entering(seen[name], settings.inputs))
        return None

    network = attach(network, rule).to(x.device)
    begin(network, x)
    return network


@dataclass(frozen=True)
class Seen:
    """The shape of a batch's values, the least and the greatest of them."""

    shape: tuple[int, ...]
    least: float
    greatest: float


def wholly(network: nn.Module, inner: Sequence[str]) -> list[str]:
    """The attentions all of whose layers are to be rounded: what lies between these is rounded too."""
    parts = ("query", "key", "value", "output")
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, Attention) and {f"{name}.{part}" for part in parts} <= {*inner}
    ]


def layers_of(model: nn.Module, settings: OFQ) -> tuple[list[str], list[str]]:
    """The first and the last layer, and those to round between them; raises `DoesNotFit` where there is
    none, or a name that is no Linear or Conv layer."""
    modules = dict(model.named_modules())
    known = [name for name, layer in modules.items() if isinstance(layer, WEIGHTED)]
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            raise DoesNotFit(
                f"{name}: the values inside a MultiheadAttention cannot be rounded; build the network with "
                "netweight.nn.qk_attention.Attention"
            )
    for name in settings.layers:
        if name not in known:
            kind = type(modules[name]).__name__ if name in modules else None
            what = f"a {kind} is not rounded by ofq" if kind else "there is no such layer"
            raise DoesNotFit(f"{name}: {what}; give names of Linear or Conv layers")
    inner = [*settings.layers] or known[1:-1]
    if not inner:
        raise DoesNotFit(
            f"{type(model).__name__}: it has no Linear or Conv layer between its first and its last; name "
            "those that are to be rounded as layers"
        )
    return [name for name in (known[0], known[-1]) if name not in inner], inner


@torch.no_grad()
def looked(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Seen]:
    """What goes into those modules when the batch goes through the float network in evaluation mode."""
    seen: dict[str, Seen] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].is_floating_point():
                ends = (args[0].amin().item(), args[0].amax().item())
                seen[name] = Seen(tuple(args[0].shape), *ends)

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        begin(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def levels(seen: Seen, bits: int) -> Levels:
    """From 0 on for what a ReLU or a GELU gives, else on both sides of 0."""
    above = seen.least >= 0 or (seen.least > GELU and -2 * seen.least < seen.greatest)
    return Levels.unsigned(bits) if above else Levels.signed(bits)


def entering(seen: Seen, bits: int) -> Learnt | Shifted:
    """The rounding of a layer's input: a step per token of `b t d`, one for anything else."""
    if len(seen.shape) == 3:
        return Shifted(levels(seen, bits), seen.shape[1:2], features=seen.shape[2:])
    return Learnt(levels(seen, bits))


def between(name: str, seen: Seen, bits: int) -> Shifted:
    """The rounding of a value inside attention: steps per token, per feature for what is taken (values)."""
    shape = seen.shape
    match name.rpartition(".")[2]:
        case "values":
            return Shifted(Levels.signed(bits), shape[2:], -1, shape[2:])
        case "shares":
            return Shifted(Levels.unsigned(bits), shape[2:3])
        case "turned":
            return Shifted(Levels.signed(bits), shape[1:3], features=shape[2:])
    return Shifted(Levels.signed(bits), shape[1:2], features=shape[2:])


def products(network: nn.Module) -> dict[str, Product]:
    """The products of query and key by name."""
    return {name: each for name, each in network.named_modules() if isinstance(each, Product)}


def rounded_weights(network: nn.Module) -> dict[str, tuple[Tensor, Learnt | FromMean]]:
    """Every weight that is rounded, products of query and key included, and what rounds it."""
    own = {name: (each.joined(), each.weight_rounding) for name, each in products(network).items()}
    return {**oscillation.rounded_weights(network), **own}


def shipped(network: nn.Module) -> tuple[nn.Module, Change]:
    """The float network in evaluation mode, and the Change that makes of it what was trained, bit for bit."""
    plain = copy.deepcopy(network)
    packed: dict[str, Packed] = {}
    activations: dict[str, Any] = {}
    rewrites: list[Rewrite] = []
    for name, module in [*plain.named_modules()]:
        if not isinstance(module, Attention | QKAttention):
            continue
        for place in module.PLACES:
            if not isinstance(module.get_submodule(place), Shifted):
                continue
            activations[f"{name}.{place}"] = static(module.get_submodule(place), f"{name}.{place}")
            setattr(module, place, nn.Identity())
        if isinstance(module, QKAttention):
            packed[f"{name}.product"] = pack(module.product.joined(), module.product.weight_rounding)
            rewrites.append(JoinQueryKey(name))
            replace(plain, name, parted(module))
    plain, change = finished(plain)
    return plain, Change({**packed, **change.packed}, rewrites, {**activations, **change.activations})


# Annealing ------------------------------------------------------------------------------------------------


def guided(network: nn.Module, how: Training, settings: OFQ, watch: Oscillations) -> Hooks:
    """CGA in the last steps, oscillations counted in all of them, and weight decay on weights alone."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # of this step: weight, where it is certain, what it was

    def late(at: Moment) -> bool:
        return at.step >= (1 - settings.annealed) * how.epochs * at.steps

    def passes(run: Running, once: Callable[[], Tensor], at: Moment) -> Tensor:
        for each in products(run.model).values():
            each.held = settings.near if late(at) else None
        return once()

    def before(run: Running, at: Moment) -> None:
        kept[:] = []
        if not late(at):
            return
        for layer in quantized(run.model).values():
            if isinstance(layer.weight_rounding, FromMean):
                weight = layer.like.weight
                certain = ~uncertain(weight, layer.weight_rounding, settings.near)
                kept.append((weight, certain, weight.detach().clone()))
                if weight.grad is not None:
                    weight.grad.masked_fill_(certain, 0.0)

    def after(run: Running, at: Moment) -> None:
        for weight, certain, was in kept:
            weight.copy_(torch.where(certain, was, weight))
        watch.see(rounded_weights(run.model), int(late(at)))

    return Hooks(groups, None, passes, before, after, watch)


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups: weights of layers, and the rest without weight decay."""
    weights = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, WEIGHTED)}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in weights]
    return [{"params": [*weights.values()]}, {"params": rest, "weight_decay": 0.0}]
