"""Song and Lin 2025: a layer split into three keeps outliers and resolution where one scale cannot.

The paper: BERT-Tiny with INT2 weights, accuracy, rounded -> split: emotion 86.5 -> 89.8 (float 90.2), SMS
spam 96.2 -> 98.3 (float 98.4). Here: (a) BERT-Tiny trained from nothing on the SMS messages, judged on
balanced accuracy; what 2 bits cost it varies much from seed to seed, from nothing to a collapse. Figures
without a bar show it with planted imbalance: one in eight rows of each value projection times 16, the columns
of the output projection divided by it, which leaves the function as it is. (b) ResNet-20 on JPEG images. One
asymmetric scale per tensor. Quick: the digits network, its error at 2 bits and the float split alone.

"stored bits" are counted: a code, the part that holds it, scales and zeros. At equal size plain rounding with
more bits is better: 2 bits split take 3.6, see the figures of RTN at 3 and 4.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.quantize.splitquant import SplitQuant, split, splitquant
from netweight.core.compressed import Change, assemble, weight_of, weighted
from netweight.core.grid import PER_TENSOR
from netweight.core.plan import Plan
from netweight.core.result import Bar, Claim
from netweight.core.rewrite import Scale, rewritten
from netweight.core.task import Data, Task, outputs
from netweight.data import digits, sms
from netweight.data.images import cifar10
from netweight.models import bert_tiny
from netweight.models.digits_cnn import digits_cnn
from netweight.models.resnet_tuned import tuned_resnet20

SHARE, FACTOR = 8, 16.0  # one in so many channels is planted, by so much


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Accuracies and weight errors of one seed's networks, plain rounding beside the split."""
    if quick:
        model, data = digits_cnn(seed), digits.test()
        found = measured(model, data, (2,))
        bar = Bar("digits INT2: weight error of split / RTN", found["INT2"]["error ratio"], 0.5, "at most")
        return Claim([bar, *exact(model, data.x[:100], "digits")], {"digits": found})
    images, messages = resnet(seed), bert(seed)
    return Claim([*images.bars, *messages.bars], {**images.figures, **messages.figures})


def resnet(seed: int) -> Claim:
    """(b) ResNet-20."""
    model, data = tuned_resnet20(seed), cifar10().test()
    found = measured(model, data, (2, 3, 4))
    gained = found["INT3"]["split"] - found["INT3"]["RTN"]
    bars = [
        Bar("ResNet-20 INT3: accuracy of split - RTN", gained, 0.08, "at least"),
        Bar("ResNet-20 INT3: weight error of split / RTN", found["INT3"]["error ratio"], 0.3, "at most"),
        Bar("ResNet-20 INT2: weight error of split / RTN", found["INT2"]["error ratio"], 0.4, "at most"),
    ]
    return Claim([*bars, *exact(model, data.x[:100], "ResNet-20")], {"ResNet-20": found})


def bert(seed: int) -> Claim:
    """(a) BERT-Tiny on the SMS messages, plain and planted."""
    model = bert_tiny.bert_tiny(seed)
    data = sms.test(model.netweight_tokenizer, bert_tiny.LENGTH)
    nets = {"BERT-Tiny": model, "BERT-Tiny, planted": rewritten(model, planted(model, seed))}
    figures = {name: measured(net, data, (2, 3, 4)) for name, net in nets.items()}
    whole, rounded = figures["BERT-Tiny"]["float"], figures["BERT-Tiny"]["INT2"]
    gained, lost = rounded["split"] - rounded["RTN"], whole - rounded["split"]
    bars = [
        Bar("BERT-Tiny INT2: balanced accuracy of split - RTN", gained, 0.05, "at least"),
        Bar("BERT-Tiny INT2: balanced accuracy of float - split", lost, 0.03, "at most"),
    ]
    return Claim(bars, figures)


def measured(model: nn.Module, data: Data, widths: tuple[int, ...]) -> dict[str, Any]:
    """Per width: accuracies, the ratio of the mean relative weight errors, and stored bits per weight."""
    task, layers = Task(data, data), weighted(model)
    found: dict[str, Any] = {"float": balanced(model, data)}
    for bits in widths:
        plain = rtn(model, task, layers, RTN(bits, symmetric=False, group=PER_TENSOR))
        parted = splitquant(model, task, layers, SplitQuant(bits))
        found[f"INT{bits}"] = {
            "RTN": accuracy(model, data, plain),
            "split": accuracy(model, data, parted),
            "RTN, error": error(model, plain),
            "split, error": error(model, parted),
            "error ratio": error(model, parted) / error(model, plain),
            "RTN, stored bits": stored_bits(model, plain),
            "split, stored bits": stored_bits(model, parted),
        }
    return found


def exact(model: nn.Module, x: Tensor, name: str) -> list[Bar]:
    """The float network against the same one in three layers each, in both arithmetics."""
    bars = []
    for dtype, mark in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        net, inputs = copy.deepcopy(model).to(dtype), x.to(dtype)
        with torch.no_grad():
            moved = float((split(net, weighted(net))(inputs) - net(inputs)).abs().max())
        kind = str(dtype).removeprefix("torch.")
        bars.append(
            Bar(f"{name}: largest logit difference of the float split, {kind}", moved, mark, "at most")
        )
    return bars


def planted(model: nn.Module, seed: int) -> list[Scale]:
    """In each attention some value channels times `FACTOR`, undone by the output projection: exact."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, module in model.named_modules():
        if name.endswith("attention.self.value"):
            scale = torch.ones(len(module.weight))
            scale[torch.randperm(len(scale), generator=generator)[: len(scale) // SHARE]] = 1 / FACTOR
            found.append(Scale(name, (name.replace("self.value", "output.dense"),), scale))
    return found


def accuracy(model: nn.Module, data: Data, change: Change) -> float:
    """Balanced accuracy of what the change makes of the model."""
    return balanced(assemble(model, change, Plan()).model, data)


def balanced(model: nn.Module, data: Data) -> float:
    """The mean over classes of the share that is recognised; the plain accuracy of balanced data."""
    found = outputs(model, data).argmax(1)
    return float(torch.stack([(found[data.y == c] == c).float().mean() for c in data.y.unique()]).mean())


def error(model: nn.Module, change: Change) -> float:
    """|W' - W|^2 / |W|^2, the mean over layers."""
    ratios = []
    for layer, form in change.packed.items():
        weight = weight_of(model, layer).double()
        ratios.append(float((form.decode() - weight).square().sum() / weight.square().sum()))
    return sum(ratios) / len(ratios)


def stored_bits(model: nn.Module, change: Change) -> float:
    """Stored bits per packed weight."""
    count = sum(weight_of(model, layer).numel() for layer in change.packed)
    return sum(form.bits() for form in change.packed.values()) / count
