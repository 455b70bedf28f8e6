"""TBT: a trained generator (BART) with weights of one or two bits, and inputs of one, two or eight.

Paper: Liu et al., "Binary and Ternary Natural Language Generation", ACL 2023, arXiv:2306.01841. With m the
mean of |w| over a row (an output of a layer, a token of a table),

    two bits (ternary)    s round(clip(w / s, -1, 1)),  s = 4/3 m
    one bit (binary)      s sign(w),  s = m, the s of least squared error

Weights even in [-a, a] have three equally likely levels so, and s is the mean of the outer thirds. s is
taken as fixed, and the gradient to w passes as it is (`nn.quantizer.FromMean`). Inputs of one or two
bits have a learnt step (`nn.elastic`); eight bits take the range of each token. So are, in an attention of
BART, queries, keys, values and weights rounded (`nn.ternary_attention`). Positions, norms, biases and the
output head stay as they are; with `head` its weights are rounded as the others.

The network as it was is the teacher, over the target tokens that are no padding:

    L = CE(labels) + soft CE(teacher's probabilities) + inner (sum of MSE(weights of each attention)
        + sum of MSE(hidden states of encoder and decoder) + MSE(output of the encoder))

Networks that are no BART are trained so as well, on the first two terms. Inputs are rounded to levels from
0 on (unsigned) where none of the first batch lies below -0.17, the least value of GELU.

Differs from the paper: steps of one bit start where the squared error is least, at half of what the released
code has (`nn.elastic`). Eight-bit inputs have the range of each token, not one for all that is in the batch,
and are not clipped at 2.5, so that an example's result depends on it alone; weights of the three terms are 1,
which the paper does not say; means of the MSE leave padding out; binary weights are not centred (nor are they
in the released code). The paper's sizes count the output head, which shares its table with the inputs, as
rounded, while the released code computes it in floating point: `head` chooses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import IGNORED, Task
from netweight.models.small_bart import Translator
from netweight.nn.distillation import Teacher, soft
from netweight.nn.elastic import Elastic
from netweight.nn.fake import Dynamic
from netweight.nn.quantized import Roundings, attach, begin, finished
from netweight.nn.quantizer import FromMean
from netweight.nn.ternary_attention import (
    ProductRoundings,
    RoundedAttention,
    RoundProducts,
    Stored,
    attentions,
    put,
)
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Loss, Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled

LOWEST = -0.17  # about the least value of GELU
FLOAT = 32


@dataclass(frozen=True)
class TBT:
    """Settings of `tbt`.

    weights: bits of a weight, 1 or 2. activations: bits of an input, 1, 2 or 8; 32 leaves them. head: whether
    the weights of the last layer are rounded too. soft, inner: weights of the teacher's probabilities and of
    attention weights and hidden states in the loss, 0 to leave them out.
    """

    weights: int = 2
    activations: int = 8
    head: bool = False
    soft: float = 1.0
    inner: float = 1.0

    def __post_init__(self) -> None:
        if self.weights not in (1, 2) or self.activations not in (1, 2, 8, FLOAT):
            raise BadInput(
                f"weights={self.weights}, activations={self.activations}: weights take 1 or 2 bits, "
                "activations 1, 2, 8 or 32"
            )
        if not all(math.isfinite(each) and each >= 0 for each in (self.soft, self.inner)):
            raise BadInput(f"soft={self.soft}, inner={self.inner}: parts of the loss are at least 0")


def tbt(
    model: nn.Module, task: Task, how: Training, settings: TBT = TBT(), *, keep: Checkpoint | None = None
) -> Trained:
    """A copy of the model trained with few bits on `task.train`, taught by the model itself.

    Labels of -100 count for nothing. Notes: rounded `layers`, the `attentions` whose products are rounded,
    and stored `bits` of the rounded weights. Raises `DoesNotFit` for data without class numbers and a network
    without a layer to round.
    """
    data = labelled(task)
    student = rounded(model, fullest(model, data.x)[: how.batch], settings)
    losses = train(student, data, taught(model, settings), how, keep=about(keep, "tbt", settings))
    plain, change = shipped(student, model)
    notes = {
        "layers": sorted(change.packed),
        "attentions": [each.name for each in change.rewrites if isinstance(each, RoundProducts)],
        "bits": sum(form.bits() for form in change.packed.values()),
    }
    return Trained(plain, change, losses, notes)


# The rounded network ----------------------------------------------------------------------------------------


def rounded(model: nn.Module, x: Tensor, settings: TBT) -> nn.Module:
    """A copy of the model with every rounding in its place, begun from the batch x."""
    x = x.to(next(model.parameters()).device)
    layers = layers_of(model, settings.head)
    lowest = least(
        model, x, [name for name in layers if not isinstance(model.get_submodule(name), nn.Embedding)]
    )
    weight = FromMean.binary if settings.weights == 1 else FromMean.ternary
    last = linear(model)[-1]

    def rule(name: str, layer: nn.Module) -> Roundings | None:
        if name not in layers:
            return None
        if name not in lowest or name == last or settings.activations == FLOAT:
            return Roundings(weight())
        return Roundings(weight(), rounding(settings.activations, lowest[name] < LOWEST))

    network = attach(model, rule)
    for name in attentions(network) if settings.activations != FLOAT else ():
        signed = [rounding(settings.activations, True) for _ in range(3)]
        put(network, name, ProductRoundings(*signed, rounding(settings.activations, False)))
    begin(network, x)
    return network


def rounding(bits: int, signed: bool) -> Elastic | Dynamic:
    """What rounds an input: a learnt step for one and two bits, else each token's own range."""
    return Elastic(bits, signed=signed) if bits <= 2 else Dynamic(bits)


def layers_of(model: nn.Module, head: bool) -> list[str]:
    """Linear and Conv layers, the last with `head` alone, and tables of tokens; not those of positions."""
    last = linear(model)[-1:]
    names = [name for name, layer in model.named_modules() if isinstance(layer, WEIGHTED) or _table(layer)]
    found = [name for name in names if head or name not in last]
    if not found:
        raise DoesNotFit(
            f"{type(model).__name__}: it has no layer to round but its last; give another network"
        )
    return found


def linear(model: nn.Module) -> list[str]:
    """The Linear and Conv layers."""
    return [name for name, layer in model.named_modules() if isinstance(layer, WEIGHTED)]


def _table(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) and "Positional" not in type(layer).__name__


@torch.no_grad()
def least(model: nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, float]:
    """The smallest number in the input of each of those layers, for the batch x."""
    found: dict[str, float] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = min(float(inputs[0].min()), found.get(name, math.inf))

    network = copy.deepcopy(model).eval()
    for name in layers:
        network.get_submodule(name).register_forward_pre_hook(partial(watch, name))
    network(x)
    return found


def fullest(model: nn.Module, x: Tensor) -> Tensor:
    """The examples, those with the least padding first: it would draw steps to what nobody reads."""
    if not isinstance(model, Translator):
        return x
    return x[model.mask(x).sum(1).argsort(descending=True, stable=True)]


# The loss ---------------------------------------------------------------------------------------------------


def taught(model: nn.Module, settings: TBT) -> Loss:
    """L, with a copy of the model as the teacher."""
    teacher = Teacher(model)
    maps, states = inner_of(model) if settings.inner else ((), ())

    def loss(student: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        with tapped(student, {*maps, *states}) as own:
            scores = student(x).float().flatten(0, -2)
        with tapped(teacher.model, {*maps, *states}) as wanted:
            said = teacher(x).flatten(0, -2)
        kept = y.flatten() != IGNORED
        found = F.cross_entropy(scores, y.flatten(), ignore_index=IGNORED)
        if settings.soft:
            found = found + settings.soft * soft(scores[kept], said[kept])
        for name in (*maps, *states):
            where = model.mask(x) if isinstance(model, Translator) and ".encoder." in name else y != IGNORED
            found = found + settings.inner * apart(own[name], wanted[name], where)
        return found

    return loss


def apart(own: Tensor, wanted: Tensor, where: Tensor) -> Tensor:
    """The mean squared difference of hidden states `b t d` or attention weights `b h t s` of those tokens."""
    if own.ndim == 4:
        own, wanted = own.transpose(1, 2), wanted.transpose(1, 2)
    return (own[where].float() - wanted[where].float()).square().mean()


def inner_of(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a BART's attentions, and of what gives its hidden states, the encoder's output twice."""
    maps = tuple(attentions(model))
    if not maps or not isinstance(model, Translator):
        return (), ()
    kinds = ("BartEncoderLayer", "BartDecoderLayer")
    states = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in kinds or name.endswith("layernorm_embedding")
    ]
    output = [name for name in states if ".encoder.layers." in name][-1]
    return maps, (*states, output)


@contextmanager
def tapped(network: nn.Module, names: set[str]) -> Iterator[Mapping[str, Tensor]]:
    """What those modules give inside: attention weights, or hidden states."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, Tensor]) -> None:
        found[name] = output if isinstance(output, Tensor) else output[1]

    hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in sorted(names)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# What is shipped --------------------------------------------------------------------------------------------


def shipped(student: nn.Module, model: nn.Module) -> tuple[nn.Module, Change]:
    """The float network with the trained weights, and the Change that rounds it, bit for bit as trained."""
    plain, change = finished(student)
    stock = copy.deepcopy(model).eval().requires_grad_(False)
    trained = plain.state_dict()
    stock.load_state_dict({name: trained[name] for name in stock.state_dict()})
    products = [
        RoundProducts(
            name, *map(_stored, (m.query_rounding, m.key_rounding, m.value_rounding, m.weights_rounding))
        )
        for name, m in plain.named_modules()
        if isinstance(m, RoundedAttention)
    ]
    return stock, Change(change.packed, products, change.activations)


def _stored(rounding: nn.Module) -> Stored:
    assert isinstance(rounding, Elastic | Dynamic)
    return rounding.stored()
