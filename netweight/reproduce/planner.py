"""One plan over all methods distorts a network no more than the best single method at the same size.

No paper: this is what netweight itself promises. On four networks (ResNet-20 and ResNet-32 of CIFAR-10, a
small Llama, a BERT-Tiny that tells spam) every method of the catalogue that rounds or prunes weights meets
the same budget by itself, planned per layer where it can be; beside them `--method auto --thorough`, which
chooses among all of them on the calibration data. The distortion that is compared is measured on TEST data
that none of them saw: E KL(softmax f | softmax f'). Seeds draw the calibration examples.

The figures also hold how well each measure of distortion ranks random plans (`evidence.agreement`).
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
from netweight.core.plan import Budget
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits, sms
from netweight.data.files import load
from netweight.data.images import cifar10
from netweight.evidence.agreement import agreement
from netweight.evidence.sensitivity import divergence
from netweight.models.bert_tiny import LENGTH, bert_tiny
from netweight.models.digits_cnn import digits_cnn
from netweight.models.llama import small_llama
from netweight.models.resnet_cifar import resnet20, resnet32


@dataclass(frozen=True)
class Subject:
    """A network, its task, and the budgets it is held to."""

    name: str
    model: nn.Module
    task: Task
    budgets: tuple[Budget, ...]


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Distortion of the chosen plan over that of the best single method, the worst budget of each network."""
    bars, figures = [], {}
    for subject in quick_subjects(seed) if quick else subjects(seed):
        tables = {}
        for budget in subject.budgets:
            tables[said(budget)] = table(subject, budget, thorough=not quick)
        ratio = max(rows["ratio"] for rows in tables.values())
        bars.append(Bar(f"{subject.name}: distortion of auto / best single method", ratio, 1.0, "at most"))
        figures[subject.name] = tables
        if subject.name in ("ResNet-20", "Llama"):
            ranks = agreement(subject.model, subject.task, seed=seed)
            figures[f"{subject.name}: rank correlation of predicted and measured"] = {
                name: found.correlation for name, found in ranks.items()
            }
    return Claim(bars, figures)


def table(subject: Subject, budget: Budget, *, thorough: bool) -> dict[str, Any]:
    """Every plan that was tried: what it measured on calibration data and what it does to test data."""
    model, test = subject.model, subject.task.test
    tried = auto.trials(model, subject.task, budget, thorough=thorough)
    reference = outputs(model, test)
    truth = {
        trial.name: divergence(reference, outputs(assemble(model, trial.change, trial.plan).model, test))
        for trial in tried
    }
    chosen = auto.choose(tried)
    slugs = {system.slug for system in catalogue.SYSTEMS}
    singles = {name: value for name, value in truth.items() if name in slugs}
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
        yield Subject(name, model, task, (Budget(bits=3), Budget(share=0.15)))
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
    yield Subject("digits", digits_cnn(), task, (Budget(bits=3),))


def drawn(data: Data, count: int, seed: int) -> Data:
    """`count` of the examples, drawn with that seed."""
    generator = torch.Generator().manual_seed(seed)
    return data.rows(torch.randperm(len(data), generator=generator)[:count])
