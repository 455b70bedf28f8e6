"""Frantar et al. 2023: passing rounding errors on keeps a language model at 3 bits where rounding breaks it.

The paper (table 3): OPT-6.7B at 3 bits per row, perplexity of WikiText-2: float 10.86, rounded 5.8e3, GPTQ
15.00. Here: a Llama of 1.3 M weights trained on WikiText-2, 128 calibration windows of 128 tokens from the
training text, tested on 256 windows of the test text; one scale and zero per row, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from netweight.compression.quantize.gptq import GPTQ, gptq
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Change, assemble, weight_of, weighted
from netweight.core.grid import PER_ROW
from netweight.core.moments import Moments, moments
from netweight.core.plan import Plan
from netweight.core.result import Bar, Claim
from netweight.core.task import Task
from netweight.data import files
from netweight.models.llama import small_llama
from netweight.models.lm_training import perplexity


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Perplexities of one trained network at 4 and 3 bits; quick: the small variant, 3 bits per row alone."""
    model = small_llama(seed, quick=quick)
    parts = files.load("wikitext2", model=model, length=64 if quick else 128)
    test = parts.test.take(64) if quick else parts.test
    task = Task(parts.calibration.take(32) if quick else parts.calibration, test, "perplexity")
    layers = [name for name in weighted(model) if ".layers." in name]
    seen = moments(model, task.calibration, layers)

    figures: dict[str, Any] = {"perplexity, float": perplexity(model, test)}
    bars: list[Bar] = []
    for bits in (3,) if quick else (4, 3, 2):
        rounded = rtn(model, task, layers, RTN(bits, symmetric=False, group=PER_ROW))
        passed_on = gptq(model, task, layers, GPTQ(bits, symmetric=False, group=PER_ROW))
        reached = {
            name: perplexity(assemble(model, change, Plan({})).model, test)
            for name, change in (("rtn", rounded), ("gptq", passed_on))
        }
        figures[f"{bits} bits"] = reached
        if bits == 3:
            ratio = reached["gptq"] / reached["rtn"]
            bars.append(Bar("3 bits: perplexity of GPTQ / RTN", ratio, 1.0, "at most"))
            before, after = errors(model, rounded, seen), errors(model, passed_on, seen)
            worst = max(after[layer] / before[layer] for layer in layers)
            bars.append(Bar("3 bits: worst layer error of GPTQ / RTN", worst, 1.0, "at most"))
    return Claim(bars, figures)


def errors(model: nn.Module, change: Change, seen: Mapping[str, Moments]) -> dict[str, float]:
    """tr(dW H dW^T) of every layer."""
    return {
        layer: seen[layer].error(form.decode() - weight_of(model, layer))
        for layer, form in change.packed.items()
    }
