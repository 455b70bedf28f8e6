"""BDWP: training with N of every M weights in the forward and in the backward pass, by a mask for each.

Paper: Fang, Sun, Zhou & Wang, "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow
Co-Design", IEEE TCAD 2023, arXiv:2309.13015.

Of the three products of a layer with dense weight W (see `nn.nm_sparse`), each arm makes N:M

    dense     nothing                                                                     3       products
    sr-ste    FF: W_F, groups along inputs, also used in BP, where no hardware can skip    2 + N/M
    sdwp      BP: W_B, groups along outputs                                               2 + N/M
    sdgp      BP: dY, groups along outputs                                                2 + N/M
    bdwp      FF: W_F,  BP: W_B                                                           1 + 2 N/M

WU and its gradient stay dense, and the optimizer moves the dense W. With `refined` (the paper's SR-STE term)

    dL/dW  is added  refined (1 - m_F) W,

which pulls pruned weights to 0: 2e-4 for sr-ste, 0 for the others unless given. Masks are remade at each
update. What is shipped is W_F, stored as N:M, where FF was sparse, and W where it was not.

Linear and Conv layers are treated whose channels are multiples of M (the first layer has 3 colours and stays
dense); norms, biases and products of attention are dense. With `block` > 1 rows share patterns (`nn.nm_cpu`):
Linear layers of the bdwp arm then run by its kernels, whose patterns are looked up every `refresh` updates.

Differs from the paper: float32 unless `precision` says otherwise (the paper: FP16 operands); SDGP keeps the
scale of its official code, on convolutions. Speed on the paper's accelerator is modelled, not measured
(`inspection.accelerator`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.compressed import Change, replace, weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import capture, layer_macs
from netweight.core.task import Task
from netweight.nn.nm_cpu import REFRESH, BlockLinear
from netweight.nn.nm_sparse import BOTH, NEITHER, Pattern, Sides, SparseLayer, misfit, stored
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.trained import Trained, about, labelled, loss

ARMS: Mapping[str, Sides] = {
    "dense": NEITHER,
    "sr-ste": Sides(backward=False),
    "sdwp": Sides(forward=False),
    "sdgp": Sides(forward=False, backward=False, gradients=True),
    "bdwp": BOTH,
}
REFINED = 2e-4  # of sr-ste, as its paper has it


@dataclass(frozen=True)
class BDWP:
    """Settings of `bdwp`.

    keep, of: N and M. arm: bdwp, or one of those it is compared with: sr-ste, sdwp, sdgp, dense. refined:
    factor of the SR-STE term, None for the arm's own. layers: names of the layers to treat, () for all that
    the pattern divides. block: neighbouring rows that share a pattern. refresh: updates between two look-ups
    of the patterns of layers that run by block-shared kernels.
    """

    keep: int = 2
    of: int = 8
    arm: str = "bdwp"
    refined: float | None = None
    layers: tuple[str, ...] = ()
    block: int = 1
    refresh: int = REFRESH

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise unknown("arm", self.arm, ARMS)
        if not (math.isfinite(self.pull) and self.pull >= 0):
            raise BadInput(f"refined={self.refined}: a factor from 0 on; give for example 2e-4")
        if self.refresh < 1:
            raise BadInput(f"refresh={self.refresh}: updates between two look-ups; give at least 1")
        Pattern(self.keep, self.of, self.block)

    @property
    def pattern(self) -> Pattern:
        """N:M."""
        return Pattern(self.keep, self.of, self.block)

    @property
    def sides(self) -> Sides:
        """What is N:M."""
        return ARMS[self.arm]

    @property
    def pull(self) -> float:
        """The factor of the SR-STE term."""
        return (REFINED if self.arm == "sr-ste" else 0.0) if self.refined is None else self.refined


def bdwp(
    model: nn.Module, task: Task, how: Training, settings: BDWP = BDWP(), *, keep: Checkpoint | None = None
) -> Trained:
    """A copy of the model trained with N:M operands; weights that are sparse in FF are W_F, packed as `NM`.

    Notes: the MACs of training (`training_macs`), the share of weights kept, the layers that are sparse.
    Raises `DoesNotFit` for data without class numbers, for a layer of `settings.layers` that the pattern does
    not divide, and for a network in which it divides none.
    """
    data = labelled(task)
    layers, left = treated(model, settings)
    network = attached(model, layers, settings)
    pull = settings.pull if settings.sides.forward else 0.0
    hooks = Hooks(before=lambda run, at: refine(run, at, pull)) if pull else Hooks()
    losses = train(network, data, loss, how, hooks=hooks, keep=about(keep, "bdwp", settings))
    device = next(model.parameters()).device
    counted = training_macs(model, data.x[:1].to(device), layers, settings)
    return finished(network, left, losses, counted)


def treated(model: nn.Module, settings: BDWP) -> tuple[list[str], dict[str, str]]:
    """Names of the layers that are made N:M, and why the others are not; raises `DoesNotFit`."""
    if settings.arm == "dense":
        return [], {}
    reasons = {
        name: misfit(model.get_submodule(name), settings.pattern, settings.sides) for name in weighted(model)
    }
    for name in settings.layers:
        weight_of(model, name)  # raises for a name that is not there
        reason = reasons.get(name, "it is no Linear or Conv layer with a weight of its own")
        if reason:
            raise DoesNotFit(f"{name}: {reason}; leave it out or give another pattern")
    wanted = settings.layers or tuple(reasons)
    found = [name for name in reasons if name in wanted and not reasons[name]]
    if not found:
        said = "; ".join(f"{name}: {reason}" for name, reason in [*reasons.items()][:3])
        raise DoesNotFit(
            f"{settings.keep}:{settings.of} divides no layer of this {type(model).__name__} "
            f"({said or 'it has no Linear or Conv layer'}); give another pattern"
        )
    return found, {name: reason or "not asked for" for name, reason in reasons.items() if name not in found}


def attached(model: nn.Module, layers: Sequence[str], settings: BDWP) -> nn.Module:
    """A copy of the model whose `layers` have N:M operands."""
    network = copy.deepcopy(model)
    for name in layers:
        like = network.get_submodule(name)
        if settings.block > 1 and settings.arm == "bdwp" and isinstance(like, nn.Linear):
            layer: nn.Module = BlockLinear(like, settings.pattern, settings.refresh, name)
        else:
            layer = SparseLayer(like, settings.pattern, settings.sides, name)
        replace(network, name, layer)
    return network


def sparse(network: nn.Module) -> dict[str, SparseLayer | BlockLinear]:
    """The layers with N:M operands by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, SparseLayer | BlockLinear)}


@torch.no_grad()
def refine(run: Running, at: Moment, pull: float) -> None:
    """Add pull (1 - m_F) W to the gradient of each weight that is sparse in FF."""
    for layer in sparse(run.model).values():
        weight = layer.like.weight
        assert weight.grad is not None
        weight.grad.add_(weight.detach() - layer.weight, alpha=pull)


@torch.no_grad()
def finished(
    network: nn.Module, left: Mapping[str, str], losses: tuple[float, ...], macs: Mapping[str, float]
) -> Trained:
    """Plain layers again: W_F, packed, where the forward pass was sparse, else W."""
    plain = copy.deepcopy(network).eval()
    packed, kept, total = {}, 0, 0
    for name, layer in sparse(plain).items():
        if isinstance(layer, BlockLinear) or layer.sides.forward:
            mask = layer.kept()
            packed[name] = stored(layer.like.weight, mask, layer.pattern.of)
            layer.like.weight = nn.Parameter(packed[name].decode())
            kept, total = kept + int(mask.sum()), total + mask.numel()
        replace(plain, name, layer.like)
    notes = {"macs": dict(macs), "kept": kept / total if total else 1.0, "sparse": sorted(packed)}
    return Trained(plain.requires_grad_(False), Change(packed, left=dict(left)), losses, notes)


def training_macs(model: nn.Module, x: Tensor, layers: Sequence[str], settings: BDWP) -> dict[str, float]:
    """MACs of the three products of one training step for one example: "dense", "sparse" and their ratio.

    Every layer counts three dense products, also the first, whose input needs no gradient: that is the less
    favourable count, as it stays dense.
    """
    share = sum(settings.sides.products(settings.pattern))
    counts = layer_macs(capture(copy.deepcopy(model).eval(), x))
    dense = 3.0 * sum(counts.values())
    found = sum(count * (share if name in layers else 3.0) for name, count in counts.items())
    return {"dense": dense, "sparse": found, "ratio": found / dense}
