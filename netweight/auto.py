"""`--method auto`: several plans are carried out and measured on the whole network.

    bases    the network as it is, and after the exact rewrites of each method that has some (AWQ's scales,
             equalization): the same function, so that every layer may still take any method
    plans    on each base: all methods mixed layer by layer, and each method alone, within the budget
             (bases after the first: of the methods that the plans of the first made use of)
    trials   the plans worth it carried out; distortion measured on the WHOLE network and the calibration
             data, E KL(softmax f(x) | softmax f'(x)); then the mean errors taken off the biases of the best

What the planner adds up per layer is a model of that distortion; a model that is wrong by a few per cent may
prefer the wrong plan, hence the trials. They are measured on few examples: the first plan, one method on the
network as it is, gives way only to what is better by `SURELY` standard errors. With `thorough` every
whole-network and every learning method of the catalogue that rounds weights is tried as well. The plan says
what was tried.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from netweight.compression.quantize.bias_correction import corrected
from netweight.core import catalogue
from netweight.core.compressed import WEIGHTED, Change, Compressed, Rewrite, assemble
from netweight.core.errors import BadInput, DoesNotFit, ImpossibleBudget
from netweight.core.plan import Budget, Option, Plan
from netweight.core.progress import steps
from netweight.core.rewrite import rewritten
from netweight.core.task import Data, Task, outputs
from netweight.evidence.sensitivity import Distortion, Judge
from netweight.planning import (
    HEADER,
    LEARNT,
    NOTHING,
    WHOLE,
    allotted,
    alone,
    carry_out,
    float_bytes,
    planned_layers,
    priced,
    uniform,
)
from netweight.resume import Work

SURELY = 2.0
WORTH = 4.0  # plans whose predicted distortion is more times the least are not carried out
JUDGED = 1024  # calibration examples on which a trial is measured
OUTPUTS = 2**27  # numbers that outputs on them may have
MIXED = "all methods mixed"


@dataclass(frozen=True)
class Base:
    """A network of the same function. after: the method whose rewrites were applied, "" for none."""

    after: str
    rewrites: Sequence[Rewrite]
    model: nn.Module

    @property
    def words(self) -> str:
        """What a plan's name ends in."""
        return f", after {self.after}" if self.after else ""


@dataclass(frozen=True)
class Trial:
    """A plan carried out, and what was measured: nats of KL for each example of the calibration data."""

    name: str
    plan: Plan
    change: Change
    each: Float[Tensor, " b"]

    @property
    def distortion(self) -> float:
        """The mean over the examples."""
        return float(self.each.mean())

    def better(self, than: Trial) -> bool:
        """Whether it distorts less by `SURELY` standard errors of the difference on the same examples."""
        if not than.each.isfinite().all():
            return bool(self.each.isfinite().all())
        gain = than.each - self.each
        error = float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else 0.0
        return float(gain.mean()) > SURELY * error


def best(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    distortion: Distortion = "kl",
    thorough: bool = False,
    work: Work = NOTHING,
) -> Compressed:
    """The network of the plan that is kept, which is the first in `plan.tried`. The model is untouched.

    Raises what `planning.plan` raises where not one plan meets the budget.
    """
    tried = trials(model, task, budget, distortion=distortion, thorough=thorough, work=work)
    kept = choose(tried)
    rest = sorted((trial for trial in tried if trial is not kept), key=lambda trial: trial.distortion)
    plan = dataclasses.replace(kept.plan, tried={trial.name: trial.distortion for trial in (kept, *rest)})
    return assemble(model, kept.change, plan)


def choose(tried: Sequence[Trial]) -> Trial:
    """The first of the trials, or what is surely better: a plan that measures best by chance does not."""
    kept = tried[0]
    for trial in sorted(tried[1:], key=lambda trial: trial.distortion):
        if trial.better(kept):
            kept = trial
    return kept


def trials(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    distortion: Distortion = "kl",
    thorough: bool = False,
    work: Work = NOTHING,
) -> list[Trial]:
    """Every plan that was carried out, in the order of the trials."""
    judge = Judge(model, task.calibration.take(judged(model, task.calibration)))

    def measured(name: str, plan: Plan, change: Change) -> Trial:
        return Trial(name, plan, change, judge.each(assemble(model, change, plan).model))

    options: list[Option] = []
    tried: list[Trial] = []
    useful: set[str] | None = None  # methods that the plans of the network as it is made use of
    least = math.inf
    for base in bases(model, task, budget):  # one after the other: moments of one network are kept
        found = priced(base.model, task, budget, distortion=distortion, among=useful)
        options = options or found
        made = dict(plans(base, model, found, budget))
        least = min([least, *(plan.distortion for plan in made.values())])
        for name, plan in steps([*made.items()], f"Trying plans{base.words}"):
            if plan.distortion > WORTH * least and tried:  # the first one always: predictions can be wrong
                continue
            if not tried:
                work.keep_plan(plan, options)
            change = Change(carry_out(base.model, task, plan, work), base.rewrites)
            tried.append(measured(name, plan, change))
        useful = useful or {o.method for trial in tried for o in trial.plan.choices.values()}
    if not tried:  # the sentence that says what the smallest possible is
        allotted(model, options, budget)
    if thorough:
        for slug, plan, change in others(model, task, budget, distortion):
            tried.append(measured(slug, plan, change))
    best_yet = choose(tried)
    change = shifted(model, task, best_yet.change, best_yet.plan, budget)
    if change is not None:
        tried.append(measured(f"{best_yet.name}, biases corrected", best_yet.plan, change))
    return tried


def judged(model: nn.Module, data: Data) -> int:
    """How many examples trials are measured on: `JUDGED`, fewer where their outputs would fill the memory."""
    each = outputs(model, data.take(1)).numel()
    return max(min(JUDGED, OUTPUTS // each), 1)


def bases(model: nn.Module, task: Task, budget: Budget) -> Iterator[Base]:
    """The network as it is, then after the rewrites of each method that has some and fits it."""
    yield Base("", (), model)
    layers = [
        name for name in planned_layers(model, budget) if isinstance(model.get_submodule(name), WEIGHTED)
    ]
    for system in catalogue.SYSTEMS:
        if not system.rewrites:
            continue
        try:
            settings = uniform(model, budget, system.slug)
            rewrites = catalogue.rewrites(system.slug)(model, task.blind(), layers, settings)
        except (BadInput, DoesNotFit, ImpossibleBudget):
            continue
        if rewrites:
            yield Base(system.slug, rewrites, rewritten(model, rewrites))


def plans(
    base: Base, original: nn.Module, options: Sequence[Option], budget: Budget
) -> Iterator[tuple[str, Plan]]:
    """Each method alone, then all mixed, within the budget; a plan that is there already is left out."""
    tables = {o.layer for o in options if isinstance(base.model.get_submodule(o.layer), nn.Embedding)}
    methods = dict.fromkeys(o.method for o in options if o.method != "keep" and o.layer not in tables)
    seen: list[dict[str, Option]] = []
    for method in (*methods, None):
        some = [o for o in options if method is None or o.method in (method, "keep") or o.layer in tables]
        try:
            plan = allotted(base.model, some, budget, of=original)
        except ImpossibleBudget:
            continue
        if plan.choices not in seen:
            seen.append(plan.choices)
            name = MIXED if method is None else method
            yield name + base.words, dataclasses.replace(plan, after=base.after)


def others(
    model: nn.Module, task: Task, budget: Budget, distortion: Distortion
) -> Iterator[tuple[str, Plan, Change]]:
    """Every method of the catalogue that learns or treats the whole network, by itself."""
    slow = [s.slug for s in catalogue.SYSTEMS if s.settings and {WHOLE, LEARNT} & {*s.tags}]
    for slug in steps(slow, "Trying whole-network and learning methods"):
        try:
            plan, change = alone(model, task, budget, slug, distortion=distortion)
        except (BadInput, DoesNotFit, ImpossibleBudget):
            continue
        if not change.activations:  # rounds more than weights: another question
            yield slug, plan, change


def shifted(model: nn.Module, task: Task, change: Change, plan: Plan, budget: Budget) -> Change | None:
    """The change with its mean errors taken off the biases; None where they would not fit the budget."""
    after = corrected(model, task, change)
    net = rewritten(model, change.rewrites)
    new = [name for name in after.biases if net.get_submodule(name).bias is None]
    more = sum(HEADER + 8 * after.biases[n].numel() * after.biases[n].element_size() for n in new)
    ceiling = budget.in_bytes(float_bytes(model)).size
    if ceiling is not None and plan.cost("bits") + plan.fixed + more > 8 * ceiling:
        return None
    return after
