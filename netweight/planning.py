"""Which option for which layer, and carrying it out.

priced(model, task, budget)             every option of every layer, its cost and its distortion
plan(model, task, budget)               per layer the option that fits and distorts least
carry_out(model, task, chosen)          the packed weights of a plan
alone(model, task, budget, "awq")       one method, planned per layer or run on the whole
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core import catalogue
from netweight.core.compressed import Change, Packed, weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit, ImpossibleBudget
from netweight.core.plan import Budget, KnowsBits, Option, PlacesBits, Plan, allocate
from netweight.core.progress import steps
from netweight.core.task import Task
from netweight.evidence import sensitivity
from netweight.evidence.sensitivity import Candidate, Distortion, keep
from netweight.resume import Work

NOTHING = Work(None)  # keeps no unfinished work
LEARNT = "learnt"  # the catalogue's tag of methods that train for minutes: too slow to try every setting
WHOLE = "whole network"  # the catalogue's tag of methods that rewrite across layers
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (0, 32, 128)
SPARSITIES = (0.5, 0.65, 0.8, 0.9, 0.95)
HEADER = 8 * 128  # bits of file header per stored tensor: name, dtype, shape, offsets
AUTO = {  # what "auto" mixes: the most bits at which each is tried; with more an even grid does as well
    "gptq": 8, "powerquant": 4, "kmeans": 4, "splitquant": 4, "nm-magnitude": 0, "magnitude": 0,
}  # fmt: skip
# Rounding to nearest is only ever better where GPTQ has no inputs to look at: embedding tables.
AUTO_TABLES = "rtn"


def candidates(
    method: str,
    *,
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = GROUPS,
    symmetric: Sequence[bool] = (False, True),
) -> list[Candidate]:
    """The settings that a method is tried with; "auto" tries those of `AUTO`.

    A method with `bits` is tried at all widths, with `group` at all group sizes, with `symmetric` both ways.
    """
    found_: list[Candidate] = []
    for slug in (*AUTO,) if method == "auto" else (method,):
        function, settings = catalogue.method(slug), catalogue.settings(slug)
        function = untrained(function) if LEARNT in catalogue.find(slug).tags else function
        names = {field.name for field in dataclasses.fields(settings)}
        if "sparsity" in names:
            found_ += [Candidate(slug, function, settings(sparsity=share)) for share in SPARSITIES]
            continue
        if "bits" not in names:
            found_.append(Candidate(slug, function, settings()))
            continue
        schemes: Sequence[dict[str, Any]] = [{}]
        if "group" in names:
            schemes = [{"group": group} for group in groups]
        if "symmetric" in names:
            schemes = [{**scheme, "symmetric": way} for scheme in schemes for way in symmetric]
        tried = [b for b in bits if method != "auto" or b <= AUTO[slug]]
        found_ += [Candidate(slug, function, settings(bits=b, **scheme)) for b in tried for scheme in schemes]
    return found_


def untrained(method: Callable[..., Change]) -> Callable[..., Change]:
    """The start of a method that learns, which has the same cost: its own with no steps, else plain rounding
    on the grid of its settings. The planner prices it by that."""

    def start(model: nn.Module, task: Task, layers: Sequence[str], settings: Any) -> Change:
        try:
            settings = dataclasses.replace(settings, steps=0)
        except ValueError:
            return rtn(model, task, layers, RTN(settings.bits, settings.symmetric, settings.group))
        return method(model, task, layers, settings)

    return start


def plan(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    method: str = "auto",
    distortion: Distortion = "kl",
) -> tuple[Plan, list[Option]]:
    """The best plan within the budget, and all options that it was chosen from.

    Raises `BadInput` for a network without layers to compress or with NaN weights, `ImpossibleBudget` for a
    budget that cannot be met.
    """
    options = priced(model, task, budget, method=method, distortion=distortion)
    return allotted(model, options, budget), options


def priced(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    method: str = "auto",
    distortion: Distortion = "kl",
    among: Collection[str] | None = None,
) -> list[Option]:
    """Every option of every layer that the budget speaks of; raises `DoesNotFit` where a method fits none.

    among: the only methods that "auto" prices, None for all that it mixes.
    """
    layers = planned_layers(model, budget)
    tables = [layer for layer in layers if isinstance(model.get_submodule(layer), nn.Embedding)]
    rest = [layer for layer in layers if layer not in tables]
    how = {"distortion": distortion, "timed": budget.latency is not None}
    chosen = [c for c in candidates(method) if among is None or c.slug in among]
    found = sensitivity.options(model, task, rest, chosen, **how)
    if tables:
        by_hand = candidates(AUTO_TABLES if method == "auto" else method)
        found += sensitivity.options(model, task, tables, by_hand, **how)
    if all(option.method == "keep" for option in found):
        raise DoesNotFit(
            f"{method}: none of the {len(layers)} layers can be treated; choose another --method"
        )
    return found


def allotted(
    model: nn.Module, options: Sequence[Option], budget: Budget, of: nn.Module | None = None
) -> Plan:
    """The plan that the budget allows; a share of the size is one of the network `of` (else of `model`)."""
    layers = list(dict.fromkeys(option.layer for option in options))
    ceilings = budget.in_bytes(float_bytes(model if of is None else of))
    return allocate(options, ceilings, fixed=fixed_bits(model, layers))


def planned_layers(model: nn.Module, budget: Budget) -> list[str]:
    """The layers that a budget speaks of: Linear and Conv; a budget of bytes also takes embedding tables in.

    Raises `BadInput` where there are none, or where a weight is not finite.
    """
    layers = weighted(model, embeddings=budget.size is not None or budget.share is not None)
    if not layers:
        raise BadInput(
            "the network has no Linear or Conv layer with a weight of its own; there is nothing to compress"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadInput(f"the network's tensor {name} holds NaN or Inf; repair or retrain it first")
    return layers


def float_bytes(model: nn.Module) -> int:
    """Bytes of the network's tensors with every floating-point number in float32, shared ones counted
    once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum((4 if t.is_floating_point() else t.element_size()) * t.numel() for t in tensors.values())


def fixed_bits(model: nn.Module, layers: Sequence[str]) -> float:
    """Bits of the file that planning cannot change: other tensors, and the file's header."""
    planned = {weight_of(model, layer).data_ptr() for layer in layers}
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if t.data_ptr() not in planned}
    stored = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    return float(stored + HEADER * (len(tensors) + 3 * len(layers)))


def carry_out(model: nn.Module, task: Task, chosen: Plan, work: Work = NOTHING) -> dict[str, Packed]:
    """The packed weight of every layer of a plan; finished ones are taken from `work`, new ones kept
    there."""
    packed: dict[str, Packed] = {}
    for option in steps([*chosen.choices.values()], "Compressing"):
        if option.method == "keep":
            continue
        key = f"{chosen.after}|{option.layer}|{option.method}|{dict(option.settings)}"
        form = work.form(key)
        if form is None:
            settings = catalogue.settings(option.method)(**option.settings)
            change = catalogue.method(option.method)(model, task.blind(), [option.layer], settings)
            form = change.packed[option.layer]
            work.keep_form(key, form)
        packed[option.layer] = form
    return packed


def alone(
    model: nn.Module,
    task: Task,
    budget: Budget,
    method: str,
    *,
    distortion: Distortion = "kl",
    work: Work = NOTHING,
) -> tuple[Plan, Change]:
    """One method by itself: its best setting per layer, or the widest that fits where it treats the whole."""
    if is_whole(method):
        settings = uniform(model, budget, method)
        change = catalogue.method(method)(model, task.blind(), planned_layers(model, budget), settings)
        return as_plan(model, change, method, settings), change
    chosen = work.plan()
    if chosen is None:
        chosen, options = plan(model, task, budget, method=method, distortion=distortion)
        work.keep_plan(chosen, options)
    return chosen, Change(carry_out(model, task, chosen, work))


def is_whole(method: str) -> bool:
    """Whether a method treats the network as a whole: its layers cannot be planned one by one."""
    return method != "auto" and WHOLE in catalogue.find(method).tags


def uniform(model: nn.Module, budget: Budget, method: str) -> Any:
    """The widest settings of a whole-network method whose codes, scales and zeros fit the budget, one for
    all layers.

    A group size that does not divide every layer becomes one scale per row. Raises `ImpossibleBudget` with
    the smallest possible, `BadInput` for a budget that such a method cannot be held to.
    """
    layers = planned_layers(model, budget)
    kind = catalogue.settings(method)
    default = kind()
    if isinstance(default, PlacesBits):  # three more tensors a layer: range and bias
        beside = fixed_bits(model, layers) + 3 * HEADER * len(layers)
        return default.within(budget.in_bytes(float_bytes(model)), beside)
    if budget.bops is not None or budget.latency is not None:
        raise BadInput(f"{method} treats the network as a whole and takes a budget of bits or size")
    weights = [weight_of(model, layer) for layer in layers]
    group = getattr(default, "group", 0)
    if group > 0 and any(weight[0].numel() % group for weight in weights):
        default = dataclasses.replace(default, group=0)
    ceilings = budget.in_bytes(float_bytes(model)).ceilings(sum(weight.numel() for weight in weights))
    fixed = fixed_bits(model, layers)
    needed = 0.0
    for bits in sorted(BITS, reverse=True):
        needed = sum(most_bits(dataclasses.replace(default, bits=bits), weight.shape) for weight in weights)
        if needed <= ceilings.get("bits", needed) and needed + fixed <= ceilings.get("size", needed + fixed):
            return dataclasses.replace(default, bits=bits)
    least = needed / sum(weight.numel() for weight in weights)
    raise ImpossibleBudget(f"{method} cannot meet this budget: the smallest possible is bits={least:.3g}")


def most_bits(settings: Any, shape: Sequence[int]) -> float:
    """Bits of a weight of that shape: what the settings say where they know, else those of a grid."""
    if isinstance(settings, KnowsBits):
        return settings.stored_bits(shape)
    return affine_bits(shape, settings.bits, getattr(settings, "group", 0))


def affine_bits(shape: Sequence[int], bits: int, group: int) -> float:
    """Bits of codes, float16 scales and zero points of an asymmetric grid, rounded up to whole bytes by 8."""
    count = math.prod(shape)
    scales = 1 if group == -1 else shape[0] * (1 if group == 0 else count // shape[0] // group)
    return 16.0 * scales + 8 * bits * (-(-count // 8) + -(-scales // 8))


def as_plan(model: nn.Module, change: Change, method: str, settings: Any) -> Plan:
    """What a whole-network method chose, as a plan; distortion is |dW|^2 / |W|^2 after the rewrites."""
    rewritten = copy.deepcopy(model)
    for rewrite in change.rewrites:
        rewrite.apply(rewritten)
    choices = {}
    for layer, form in change.packed.items():
        weight = weight_of(rewritten, layer).double()
        cost = {"bits": float(form.bits()), "weights": float(weight.numel())}
        moved = float(
            (form.decode().double() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        )
        said = dataclasses.asdict(settings)
        if isinstance(said.get("bits"), tuple):  # the widths it chose from
            said["bits"] = (form.bits_per_code,)
        choices[layer] = Option(layer, method, said, cost, moved)
    for layer in change.left:
        choices[layer] = keep(layer, weight_of(model, layer))
    return Plan(choices)
