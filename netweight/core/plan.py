"""Plans: per layer one option, chosen so that the budget holds and the summed distortion is least.

    minimise    sum_l sum_o D_lo z_lo
    subject to  sum_o z_lo = 1 for every layer l,   sum_lo C^k_lo z_lo <= B_k for every budget k,   z binary,

a multiple-choice knapsack, which `core.knapsack` solves exactly for any number of ceilings. Where there is no
ceiling the best option of each layer is taken.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from netweight.core.errors import BadInput, ImpossibleBudget, unknown
from netweight.core.knapsack import SLACK, solve

TELLING = ("bits", "symmetric", "group", "sparsity", "keep", "of")  # shown in tables and plots


@dataclass(frozen=True)
class Option:
    """One choice for one layer.

    method: a slug of the catalogue, or "keep" for the weight as it is. settings: of that method. cost: bits
    (stored for this weight), weights (how many it has), and where known bops (bit operations per example) and
    latency (seconds per example). distortion: what the planner adds up (see `evidence.sensitivity`).
    """

    layer: str
    method: str
    settings: Mapping[str, Any]
    cost: Mapping[str, float]
    distortion: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.distortion) and all(math.isfinite(c) for c in self.cost.values())):
            raise ValueError(
                f"{self.layer}: cost and distortion must be finite, got {self.cost}, {self.distortion}"
            )

    @property
    def label(self) -> str:
        """method(setting=value, ...) in one line, with the settings that tell options of one plan apart."""
        inside = ", ".join(f"{k}={v}" for k, v in self.settings.items() if k in TELLING)
        return f"{self.method}({inside})" if inside else self.method


@dataclass(frozen=True)
class Budget:
    """Ceilings; None is no ceiling.

    bits: stored bits per weight, on average over the planned layers, scales counted. size: bytes of the file.
    bops: bit operations per example. latency: seconds per example. share: size as a share of the float32
    file.
    """

    bits: float | None = None
    size: int | None = None
    bops: float | None = None
    latency: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BadInput(f"budget {item.name}={value}: a ceiling is a positive number")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "bits=4", "size=25%", "size=120k,bops=1e9"; sizes take k, M, G (1000s) or %."""
        values: dict[str, float] = {}
        known = [item.name for item in fields(cls) if item.name != "share"]
        for part in text.split(","):
            key, _, value = (word.strip() for word in part.partition("="))
            if key not in known:
                raise unknown("budget", key, known)
            if key in values or key == "size" and "share" in values:
                raise BadInput(f"budget {text!r}: {key} is given twice; give each ceiling once")
            if key == "size" and value.endswith("%"):
                values["share"] = _number(part, value[:-1]) / 100
            elif key == "size":
                values["size"] = math.floor(_bytes(part, value))
            else:
                values[key] = _number(part, value)
        return cls(**values)  # type: ignore[arg-type]

    def in_bytes(self, float_bytes: int) -> Budget:
        """The same with `share` turned into bytes of a float32 file of `float_bytes`."""
        if self.share is None:
            return self
        size = math.floor(self.share * float_bytes)
        return replace(self, share=None, size=size if self.size is None else min(size, self.size))

    def ceilings(self, weights: float) -> dict[str, float]:
        """Ceiling by cost name, for layers of `weights` weights in all."""
        found = {
            "bits": self.bits * weights if self.bits is not None else None,
            "size": self.size * 8.0 if self.size is not None else None,
            "bops": self.bops,
            "latency": self.latency,
        }
        return {name: value for name, value in found.items() if value is not None}


def _number(part: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"budget {part.strip()!r}: {value!r} is not a number; write for example bits=4")
    return number


def _bytes(part: str, value: str) -> float:
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(value[-1:], 1.0)
    return _number(part, value[:-1] if factor != 1.0 else value) * factor


@runtime_checkable
class PlacesBits(Protocol):
    """Settings of a method that shares the bits of a budget out among the layers by itself."""

    def within(self, budget: Budget, beside: float) -> Self:
        """These settings with the ceilings of a budget (no share of the size); beside: bits of the file that
        are no packed weights."""
        ...


@runtime_checkable
class KnowsBits(Protocol):
    """Settings of a method that stores a weight otherwise than a uniform grid does."""

    def stored_bits(self, shape: Sequence[int]) -> float:
        """The most bits that a weight of that shape takes: what a budget is held against."""
        ...


@dataclass
class Plan:
    """The chosen option of each layer.

    fixed: bits of what is stored beside the planned weights (norms, biases, file header), see `allocate`.
    after: the method whose exact rewrites come first, "" for none. tried: name of each plan that was carried
    out, and the distortion measured on the whole network (the least is this one); empty if only one was.
    """

    choices: dict[str, Option] = field(default_factory=dict)
    fixed: float = 0.0
    after: str = ""
    tried: dict[str, float] = field(default_factory=dict)

    @property
    def distortion(self) -> float:
        """Sum of the chosen distortions."""
        return sum(option.distortion for option in self.choices.values())

    def cost(self, name: str) -> float:
        """Sum of one cost over the chosen options, `fixed` not counted."""
        return sum(option.cost.get(name, 0.0) for option in self.choices.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per planned weight, NaN for an empty plan."""
        weights = self.cost("weights")
        return self.cost("bits") / weights if weights else math.nan

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` gives the same plan again."""
        return {
            "fixed": self.fixed,
            "after": self.after,
            "tried": self.tried,
            "choices": [asdict(option) for option in self.choices.values()],
        }

    @classmethod
    def from_json(cls, content: Any) -> Plan:
        """The plan that `to_json` wrote; raises `BadInput` for anything else."""
        try:
            options = [
                Option(**{**item, "settings": _frozen(item["settings"])}) for item in content["choices"]
            ]
            tried = {str(name): float(value) for name, value in content.get("tried", {}).items()}
            after = str(content.get("after", ""))
            return cls({option.layer: option for option in options}, float(content["fixed"]), after, tried)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"not a plan of netweight ({error}); expected what `netweight plan` wrote"
            ) from error


def _frozen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a method takes them: JSON's lists are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def allocate(options: Sequence[Option], budget: Budget, *, fixed: float = 0.0) -> Plan:
    """The plan of least summed distortion within the budget.

    options: any number per layer, each layer at least one. fixed: bits that the file holds besides, counted
    against `budget.size`. Of equal options the one given first is taken. Raises `ImpossibleBudget` with the
    smallest possible value where a ceiling cannot be met, `BadInput` where an option lacks a cost that is
    budgeted.
    """
    if budget.share is not None:
        raise BadInput(
            "a budget size in percent needs the size of the float file; call budget.in_bytes() first"
        )
    layers: dict[str, list[Option]] = {}
    for option in options:
        layers.setdefault(option.layer, []).append(option)
    weights = 0.0 if budget.bits is None else sum(float(c[0]) for c in _costs(layers, "weights"))
    ceilings = budget.ceilings(weights)
    if "size" in ceilings:
        ceilings["size"] -= fixed
    costs = {name: _costs(layers, "bits" if name == "size" else name) for name in ceilings}
    distortion = [np.array([option.distortion for option in group]) for group in layers.values()]
    picks = [int(d.argmin()) for d in distortion]
    if not all(_holds(sum(c[p] for c, p in zip(costs[n], picks)), ceilings[n]) for n in costs):
        least = {name: sum(float(group.min()) for group in costs[name]) for name in costs}
        for name, value in least.items():
            if not _holds(value, ceilings[name]):
                raise _impossible(name, budget, value, weights, fixed)
        together = [np.column_stack(rows) for rows in zip(*costs.values())]
        found = solve(distortion, together, list(ceilings.values()))
        if found is None:
            raise _impossible_together(costs, ceilings, budget, weights, fixed)
        picks = found
    return Plan({name: group[pick] for (name, group), pick in zip(layers.items(), picks)}, fixed)


def _holds(total: float, ceiling: float) -> bool:
    return total <= ceiling + SLACK * abs(ceiling)


def _costs(layers: Mapping[str, Sequence[Option]], name: str) -> list[np.ndarray]:
    """One cost of every option, an array per layer."""
    for group in layers.values():
        for option in group:
            if name not in option.cost:
                raise BadInput(f"{option.layer}: {option.label} has no known {name}, which the budget limits")
    return [np.array([option.cost[name] for option in group], dtype=float) for group in layers.values()]


def _impossible(
    name: str, budget: Budget, least: float, weights: float, fixed: float, beside: str = ""
) -> ImpossibleBudget:
    """The sentence that names the smallest possible value of a ceiling, rounded up so that it can be met."""
    if name == "size":
        size = math.ceil((least + fixed) / 8)
        given, smallest = f"{budget.size} bytes", str(size)
    else:
        given = f"{getattr(budget, name):g}"
        smallest = _rounded_up(least / weights if name == "bits" else least)
    return ImpossibleBudget(
        f"budget {name}={given} cannot be met{beside}: the smallest possible is {name}={smallest}"
    )


def _impossible_together(
    costs: Mapping[str, Sequence[np.ndarray]],
    ceilings: Mapping[str, float],
    budget: Budget,
    weights: float,
    fixed: float,
) -> ImpossibleBudget:
    """The sentence for ceilings that can be met alone, not together: the smallest value of one of them."""
    *others, last = costs
    for count in range(1, len(others) + 1):
        some = others[:count]
        name = [*others, last][count]
        rows = [np.column_stack(row) for row in zip(*(costs[other] for other in some))]
        picks = solve(costs[name], rows, [ceilings[other] for other in some])
        assert picks is not None, "the ceilings before this one hold together"
        least = sum(float(group[pick]) for group, pick in zip(costs[name], picks))
        if not _holds(least, ceilings[name]):
            return _impossible(name, budget, least, weights, fixed, f" with {', '.join(some)} within theirs")
    raise AssertionError("ceilings that no plan meets, yet each is met beside those before it")


def _rounded_up(value: float) -> str:
    """The value in four digits, rounded up."""
    with decimal.localcontext(prec=4, rounding=decimal.ROUND_CEILING):
        return f"{+decimal.Decimal(value):g}"
