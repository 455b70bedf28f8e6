"""Liu et al. 2023: a generator of binary or ternary weights and inputs that still generates.

The paper: BART on XSUM, ROUGE-1 43.8 in floating point, 42.4 with ternary weights and 8-bit inputs (ternary
weight networks, TWN: 40.0), 36.2 with ternary inputs (12.8), 41.0 with binary weights and 8-bit inputs
(binary weight networks, BWN: 1.9), 31.7 with binary inputs (1.9); English to Romanian 21.7 and 17.6 BLEU of
26.8; 532 MB become 39.6 and 23.2. Here: phrases of WikiText-2 and novels translated into a constructed
language with an exact reference (`data.constructed`, 100 words, up to 6 tokens), a BART of width 96 with 2 +
2 layers (`models.small_bart`), students on the same batches with the same distillation. TBT against TWN
(threshold 0.7 of the mean, scale the mean above it) or BWN weights and inputs on the range of the batch,
clipped at 2.5 as in the released code: levels -r, 0, r (one bit: -r, r) where inputs have both signs, else
2^bits from the smallest to the largest; in evaluation the running range, as TBT's smallest number. With 8
bits inputs are rounded alike on both sides. Both sides have the steps and rates of `STUDENTS`. BLEU of greedy
decoding on the 305 phrases of the test text, none of which is in training; perplexity of the target tokens
there.

Sizes are those of all that is stored, the shared table counted once in floating point and twice when rounded
(input and output). The head is rounded too: the sizes of the paper count it so.
Quick: ternary weights and inputs, 60 steps after 100 of the float network: perplexity and size alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.bleu import bleu
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs, token_loss
from netweight.data.constructed import END, LONGEST, PADDING, translation
from netweight.models.small_bart import Translator, architecture, learn, translator
from netweight.models.trained import seeded
from netweight.nn.elastic import Elastic
from netweight.nn.quantized import begin, quantized
from netweight.nn.quantizer import straight
from netweight.nn.ternary_attention import RoundedAttention
from netweight.training.loop import train
from netweight.training.settings import Training
from netweight.training.tbt import TBT, fullest, rounded, taught, tbt

BATCH = 32
CLIP, MOMENTUM = 2.5, 0.1


@dataclass(frozen=True)
class Student:
    """Bits of weights and activations, optimizer steps, and the highest rate of TBT and of the baseline."""

    weights: int
    activations: int
    steps: int
    rate: float
    baseline: float

    @property
    def name(self) -> str:
        """As the paper writes it."""
        return f"W{self.weights}A{self.activations}"


STUDENTS = (
    Student(2, 8, 200, 2e-3, 2e-3),
    Student(1, 8, 200, 4e-3, 4e-3),
    Student(2, 2, 300, 4e-3, 4e-3),
    Student(1, 1, 600, 8e-3, 8e-3),
)


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """BLEU, perplexity and bytes of the float network and of its students."""
    if quick:
        return short(seed)
    data, test = translation("train"), translation("test")
    model = translator(seed)
    scores, perplexities = {"float": translated(model, test)}, {"float": perplexity(model, test)}
    smaller: dict[str, float] = {}
    for student in steps(STUDENTS, "Students"):
        small = tbt(
            model, Task(data, data, train=part(data, student)), recipe(student.rate, seed), settings(student)
        )
        network = small.network()
        smaller[student.name] = size(model) / (size(network.model) + network.bits() / 8)
        sides = {
            student.name: network.model,
            f"{student.name} baseline": baseline(model, data, student, seed),
        }
        scores |= {name: translated(net, test) for name, net in sides.items()}
        perplexities |= {name: perplexity(net, test) for name, net in sides.items()}
    figures = {"BLEU": scores, "target perplexity": perplexities, "times smaller": smaller}
    return Claim(bars(scores, perplexities, smaller), figures)


def bars(scores: dict[str, float], perplexities: dict[str, float], smaller: dict[str, float]) -> list[Bar]:
    """What the claim is held against."""
    found = [Bar("BLEU of the float network", scores["float"], 85, "at least")]
    for name, share in (("W2A8", 0.93), ("W1A8", 0.85), ("W1A1", 0.3)):
        found.append(Bar(f"{name}: BLEU / float", scores[name] / scores["float"], share, "at least"))
    for name in ("W2A2", "W1A1"):
        other = f"{name} baseline"
        found.append(Bar(f"{name}: BLEU, TBT - baseline", scores[name] - scores[other], 0.0, "at least"))
        ratio = perplexities[name] / perplexities[other]
        found.append(Bar(f"{name}: perplexity, TBT / baseline", ratio, 0.99, "at most"))
    for name in ("W2A8", "W1A8"):
        apart = scores[name] - scores[f"{name} baseline"]
        found.append(Bar(f"{name}: BLEU, TBT - baseline", apart, -1.0, "at least"))
    return [*found, Bar("times smaller, the least", min(smaller.values()), 10, "at least")]


def short(seed: int) -> Claim:
    """Ternary weights and inputs after a short training: perplexity beside the float network's."""
    data, test = translation("train"), translation("test", 100)
    with seeded(seed):
        model = architecture()
    learn(model, data, seed, 100)
    small = tbt(
        model, Task(data, data, train=data.take(BATCH * 60)), recipe(4e-3, seed), TBT(2, 2, head=True)
    )
    network = small.network()
    times = size(model) / (size(network.model) + network.bits() / 8)
    ratio = perplexity(network.model, test) / perplexity(model, test)
    figures = {"losses": list(small.losses)}
    bars = [
        Bar("W2A2: perplexity / float", ratio, 1.15, "at most"),
        Bar("W2A2: times smaller", times, 10, "at least"),
    ]
    return Claim(bars, figures)


def settings(student: Student) -> TBT:
    """The head is rounded as well."""
    return TBT(student.weights, student.activations, head=True)


def part(data: Data, student: Student) -> Data:
    """As many examples as its steps take, from the first on again where there are too few."""
    return data.rows(torch.arange(BATCH * student.steps) % len(data))


def recipe(rate: float, seed: int) -> Training:
    """One pass, with the optimizer of the paper."""
    return Training(1, BATCH, rate, optimizer="adamw", warmup=0.05, cosine=True, seed=seed)


# The baseline -----------------------------------------------------------------------------------------------


def baseline(model: Translator, data: Data, student: Student, seed: int) -> nn.Module:
    """A student of the same loss on the same batches, with TWN or BWN weights and inputs on their range."""
    x = fullest(model, part(data, student).x)[:BATCH]
    net = rounded(model, x, settings(student))
    for module in (*quantized(net).values(), *(m for m in net.modules() if isinstance(m, RoundedAttention))):
        for name, child in [*module.named_children()]:
            if name == "weight_rounding":
                setattr(module, name, Threshold() if student.weights == 2 else Signs())
            elif isinstance(child, Elastic):
                setattr(module, name, Range(student.activations, signed=child.signed))
    begin(net, x)
    train(net, part(data, student), taught(model, settings(student)), recipe(student.baseline, seed))
    return net


class Threshold(nn.Module):
    """Ternary weights (Li, Zhang and Liu 2016, arXiv:1605.04711): rows of -s, 0, s."""

    def forward(self, w: Tensor) -> Tensor:
        """0 up to 0.7 of a row's mean |w|, else the mean of those above; the gradient passes as it is."""
        size = w.detach().abs()
        above = size > 0.7 * size.mean(1, keepdim=True)
        scale = (size * above).sum(1, keepdim=True) / above.sum(1, keepdim=True).clamp(min=1)
        return straight(w, w.detach().sign() * above * scale)


class Signs(nn.Module):
    """Binary weights (Rastegari et al. 2016, arXiv:1603.05279), centred as in the paper's code."""

    def forward(self, w: Tensor) -> Tensor:
        """The mean |w| of a row with the sign of w - mean; the gradient passes as it is."""
        values = w.detach()
        return straight(w, (values - values.mean()).sign() * values.abs().mean(1, keepdim=True))


class Range(nn.Module):
    """Inputs on levels that lie evenly in the range of the batch; in evaluation in the running range."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.signed, self.count = signed, (1 if bits == 1 else 2) if signed else 2**bits - 1
        self.register_buffer("low", torch.tensor(math.nan))
        self.register_buffer("high", torch.tensor(math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """x on the levels; the gradient passes where nothing was clipped."""
        x = x.clamp(-CLIP, CLIP)
        values = x.detach()
        high = values.abs().max() if self.signed else values.max()
        low = -high if self.signed else values.min()
        for name, now in (("low", low), ("high", high)):
            before = getattr(self, name)
            if before.isnan():
                before.copy_(now)
            elif self.training:
                before.lerp_(now, MOMENTUM)
        if not self.training:
            low, high = self.low, self.high
        step = ((high - low) / self.count).clamp(min=1e-5)
        return straight(x, ((values - low) / step).round().clamp(0, self.count) * step + low)


# What is measured -------------------------------------------------------------------------------------------


def translated(net: nn.Module, test: Data) -> float:
    """BLEU of greedy translations."""
    assert isinstance(net, Translator) and test.y is not None
    net.eval()
    found = torch.cat([net.generate(x, LONGEST + 1) for x, _ in test])
    wanted = test.x[:, LONGEST + 2 :]
    return bleu([until_end(row) for row in found.tolist()], [until_end(row) for row in wanted.tolist()])


def until_end(row: list[int]) -> list[int]:
    """The tokens before the end."""
    stops = [place for place, token in enumerate(row) if token in (END, PADDING)]
    return row[: stops[0]] if stops else row


def perplexity(net: nn.Module, test: Data) -> float:
    """e to the mean over phrases of the mean negative log-likelihood of their target tokens."""
    assert test.y is not None
    return math.exp(float(token_loss(outputs(net, test), test.y).mean()))


def size(net: nn.Module) -> float:
    """Bytes of what is stored in floating point, shared tensors once."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in net.state_dict().values()}
    return float(sum(seen.values()))
