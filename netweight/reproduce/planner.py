"""One plan over all methods distorts a network no more than the best single method at the same size.

No paper: this is what netweight itself promises. On four networks (ResNet-20 and ResNet-32 of CIFAR-10, a
small Llama, a BERT-Tiny that tells spam) every method of the catalogue that rounds or prunes weights meets
the same budget by itself, planned per layer where it can be; beside them `--method auto`, which chooses
among all of them on the calibration data. The distortion that is compared is measured on TEST data
that none of them saw: E KL(softmax f | softmax f'). Seeds draw the calibration examples.

Methods that learn or treat the network as a whole take minutes each: they are run with seed 0 alone, for the
first budget of each network but ResNet-32; everywhere else `auto` is compared with the methods that it mixes.
How well each measure of distortion ranks random plans is `netweight bench distortion`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from netweight import auto
from netweight.core import catalogue
from netweight.core.compressed import assemble
from netweight.core.errors import BadInput, DoesNotFit, ImpossibleBudget
from netweight.core.plan import Budget
from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits, sms
from netweight.data.files import load
from netweight.data.images import cifar10
from netweight.evidence.sensitivity import divergence
from netweight.models.bert_tiny import LENGTH, bert_tiny
from netweight.models.digits_cnn import digits_cnn
from netweight.models.llama import small_llama
from netweight.models.resnet_cifar import resnet20, resnet32
from netweight.planning import alone


@dataclass(frozen=True)
class Subject:
    """A network, its task, and the budgets it is held to. thorough: beside every method there is."""

    name: str
    model: nn.Module
    task: Task
    budgets: tuple[Budget, ...]
    thorough: bool = True


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Distortion of the chosen plan over that of the best single method, the worst budget of each network."""
    bars, figures = [], {}
    for subject in quick_subjects(seed) if quick else subjects(seed):
        tables = {}
        for budget in subject.budgets:
            thorough = seed == 0 and subject.thorough and budget == subject.budgets[0]
            tables[said(budget)] = table(subject, budget, thorough=thorough)
        ratio = max(rows["ratio"] for rows in tables.values())
        bars.append(Bar(f"{subject.name}: distortion of auto / best single method", ratio, 1.0, "at most"))
        figures[subject.name] = tables
    return Claim(bars, figures)


def table(subject: Subject, budget: Budget, *, thorough: bool) -> dict[str, Any]:
    """Every plan that was tried: what it measured on calibration data and what it does to test data.

    thorough: also of the methods that `auto` does not try.
    """
    model, test = subject.model, subject.task.test
    tried = auto.trials(model, subject.task, budget, thorough=thorough)
    reference = outputs(model, test)
    truth = {
        trial.name: divergence(reference, outputs(assemble(model, trial.change, trial.plan).model, test))
        for trial in tried
    }
    chosen = auto.choose(tried)
    methods = [system.slug for system in catalogue.of_room("compression") if system.settings]
    for method in steps([m for m in methods if thorough and m not in truth], "Methods by themselves"):
        try:
            plan, change = alone(model, subject.task, budget, method)
        except (BadInput, DoesNotFit, ImpossibleBudget):
            continue
        if not change.activations:  # rounds more than weights: another question
            truth[method] = divergence(reference, outputs(assemble(model, change, plan).model, test))
    singles = {name: value for name, value in truth.items() if name in methods}
    best = min(singles, key=lambda name: singles[name])
    return {
        "chosen": chosen.name,
        "bits per weight": chosen.plan.bits_per_weight,
        "best single": best,
        "ratio": truth[chosen.name] / singles[best],
        "test": truth,
        "calibration": {trial.name: trial.distortion for trial in tried},
    }


def said(budget: Budget) -> str:
    """The budget in a word."""
    return f"bits={budget.bits:g}" if budget.bits is not None else f"size={budget.share:.0%}"


def subjects(seed: int) -> Iterator[Subject]:
    """The four networks; raises `BadInput` without the data folder."""
    images = cifar10()
    for name, model in (("ResNet-20", resnet20()), ("ResNet-32", resnet32())):
        task = Task(drawn(images.calibration(1024), 256, seed), images.test().take(1000))
        both = name == "ResNet-20"
        budgets = (Budget(bits=3), Budget(share=0.15)) if both else (Budget(bits=3),)
        yield Subject(name, model, task, budgets, thorough=both)
    llama = small_llama(seed)
    text = load("wikitext2", model=llama, length=128)
    yield Subject(
        "Llama", llama, Task(drawn(text.calibration, 64, seed), text.test.take(64)), (Budget(bits=3),)
    )
    words = sms.word_pieces()
    messages = drawn(sms.train(words, LENGTH), 256, seed)
    yield Subject("BERT-Tiny", bert_tiny(seed), Task(messages, sms.test(words, LENGTH)), (Budget(bits=3),))


def quick_subjects(seed: int) -> Iterator[Subject]:
    """The embedded network, without the methods that learn."""
    task = Task(drawn(digits.calibration(), 128, seed), digits.test())
    yield Subject("digits", digits_cnn(), task, (Budget(bits=3),), thorough=False)


def drawn(data: Data, count: int, seed: int) -> Data:
    """`count` of the examples, drawn with that seed."""
    generator = torch.Generator().manual_seed(seed)
    return data.rows(torch.randperm(len(data), generator=generator)[:count])
