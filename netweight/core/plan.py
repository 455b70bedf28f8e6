"""Plans: per layer one option, chosen so that the budget holds and the summed distortion is least.

    minimise    sum_l sum_o D_lo z_lo
    subject to  sum_o z_lo = 1 for every layer l,   sum_lo C^k_lo z_lo <= B_k for every budget k,   z binary,

a multiple-choice knapsack. `allocate` is exact: a mixed-integer programme on HiGHS (`scipy.optimize.milp`,
gap 0) for any number of ceilings. Where there is no ceiling the best option of each layer is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from netweight.core.errors import BadInput, ImpossibleBudget, unknown


@dataclass(frozen=True)
class Option:
    """One choice for one layer.

    method: a slug of the catalogue, or "keep" for the weight as it is. settings: of that method.
    cost: bits (stored for this weight), weights (how many it has), and where known bops (bit operations per
    example) and latency (seconds per example). distortion: what the planner adds up (see `evidence.sensitivity`).
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
        """method(setting=value, ...) in one line."""
        inside = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.method}({inside})" if inside else self.method


@dataclass(frozen=True)
class Budget:
    """Ceilings; None is no ceiling.

    bits: stored bits per weight, on average over the planned layers, scales counted. size: bytes of the file.
    bops: bit operations per example. latency: seconds per example. share: size as a share of the float32 file.
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
        """From "bits=4", "size=25%", "size=120k,bops=1e9"; sizes take k, M, G (1000s) or a share of float32."""
        values: dict[str, float] = {}
        known = [item.name for item in fields(cls) if item.name != "share"]
        for part in text.split(","):
            key, _, value = (word.strip() for word in part.partition("="))
            if key not in known:
                raise unknown("budget", key, known)
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
        return float(value)
    except ValueError:
        raise BadInput(
            f"budget {part.strip()!r}: {value!r} is not a number; write for example bits=4"
        ) from None


def _bytes(part: str, value: str) -> float:
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(value[-1:], 1.0)
    return _number(part, value[:-1] if factor != 1.0 else value) * factor


@dataclass
class Plan:
    """The chosen option of each layer.

    fixed: bits of what is stored beside the planned weights (norms, biases, file header), see `allocate`.
    """

    choices: dict[str, Option] = field(default_factory=dict)
    fixed: float = 0.0

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
        return {"fixed": self.fixed, "choices": [asdict(option) for option in self.choices.values()]}

    @classmethod
    def from_json(cls, content: Any) -> Plan:
        """The plan that `to_json` wrote; raises `BadInput` for anything else."""
        try:
            options = [Option(**item) for item in content["choices"]]
            return cls({option.layer: option for option in options}, float(content["fixed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"not a plan of netweight ({error}); expected what `netweight plan` wrote"
            ) from error


def allocate(options: Sequence[Option], budget: Budget, *, fixed: float = 0.0) -> Plan:
    """The plan of least summed distortion within the budget.

    options: any number per layer, each layer at least one. fixed: bits that the file holds besides, counted
    against `budget.size`. Ties go to the option given first. Raises `ImpossibleBudget` with the smallest
    possible value where a ceiling cannot be met, `BadInput` where an option lacks a cost that is budgeted.
    """
    layers: dict[str, list[Option]] = {}
    for option in options:
        layers.setdefault(option.layer, []).append(option)
    weights = sum(group[0].cost.get("weights", 0.0) for group in layers.values())
    ceilings = budget.ceilings(weights)
    if "size" in ceilings:
        ceilings["size"] -= fixed
    rows = {name: _costs(layers, name) for name in ceilings}
    for name, costs in rows.items():
        least = sum(float(min(group)) for group in costs)
        if least > ceilings[name] * (1 + 1e-12):
            raise _impossible(name, budget, least, weights, fixed)
    distortion = [np.array([option.distortion for option in group]) for group in layers.values()]
    if all(
        sum(float(c[d.argmin()]) for c, d in zip(costs, distortion)) <= ceilings[n]
        for n, costs in rows.items()
    ):
        picks = [int(d.argmin()) for d in distortion]
    else:
        picks = _solve(distortion, list(rows.values()), list(ceilings.values()), budget)
    return Plan({name: group[pick] for (name, group), pick in zip(layers.items(), picks)}, fixed)


def _costs(layers: Mapping[str, Sequence[Option]], name: str) -> list[np.ndarray]:
    """One cost of every option, an array per layer; the size ceiling reads the cost `bits`."""
    key = "bits" if name == "size" else name
    for group in layers.values():
        for option in group:
            if key not in option.cost:
                raise BadInput(f"{option.layer}: {option.label} has no known {key}, which the budget limits")
    return [np.array([option.cost[key] for option in group], dtype=float) for group in layers.values()]


def _impossible(name: str, budget: Budget, least: float, weights: float, fixed: float) -> ImpossibleBudget:
    """The sentence that names the smallest possible value of a ceiling."""
    if name == "bits":
        return ImpossibleBudget(
            f"budget bits={budget.bits:g} cannot be met: the smallest possible is bits={math.ceil(least / weights * 100) / 100:g}"
        )
    if name == "size":
        size = math.ceil((least + fixed) / 8)
        return ImpossibleBudget(
            f"budget size={budget.size} bytes cannot be met: the smallest possible is size={size}"
        )
    return ImpossibleBudget(
        f"budget {name}={getattr(budget, name):g} cannot be met: the smallest possible is {name}={least:g}"
    )


def _solve(
    distortion: Sequence[np.ndarray],
    rows: Sequence[Sequence[np.ndarray]],
    ceilings: Sequence[float],
    budget: Budget,
) -> list[int]:
    """Index of the chosen option per layer, by MILP to gap 0."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(d) for d in distortion]
    ends = np.cumsum(sizes)
    objective = np.concatenate(distortion)
    scale = float(np.abs(objective).max()) or 1.0
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array(
        (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(sizes), len(owner))
    )
    limits = [
        LinearConstraint(np.concatenate(row)[None, :] / c, ub=np.array([1.0]))
        for row, c in zip(rows, ceilings)
    ]
    found = milp(
        objective / scale,
        constraints=[LinearConstraint(one_each, lb=1.0, ub=1.0), *limits],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ImpossibleBudget(f"no plan meets all ceilings of {budget} together; raise one of them")
    return [int(np.argmax(found.x[end - size : end])) for end, size in zip(ends, sizes)]
