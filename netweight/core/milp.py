"""Integer programmes by name: variables and rows have names, the solver (HiGHS through scipy) sees matrices.

    p = Programme()
    for i, worth in enumerate(worths):
        p.binary(("take", i), cost=-worth)
    p.row([(("take", i), size) for i, size in enumerate(sizes)], high=room)
    found = p.solve(seconds=10)
    found.status, found.value, found.bound, found[("take", 0)]

The programme minimises. What it gives is the solver's answer with its tolerances (1e-6 on rows and on whole
numbers): who needs an exact answer checks it in whole numbers afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from netweight.core.errors import BadInput
from netweight.core.knapsack import silent

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True)
class Solved:
    """What the solver found.

    status: "feasible" is a solution without a proof, "unknown" neither a solution nor a proof that there is
    none. value: of the solution, infinite without one. bound: no solution is below it. values: by name.
    """

    status: Status
    value: float
    bound: float
    values: Mapping[Hashable, float]
    seconds: float

    @property
    def gap(self) -> float:
        """value - bound, in units of the cost; infinite without a solution."""
        return self.value - self.bound

    def __getitem__(self, name: Hashable) -> float:
        """The value of a variable; KeyError without a solution."""
        return self.values[name]

    def on(self, name: Hashable) -> bool:
        """Whether a binary variable is 1."""
        return self.values[name] > 0.5


class Programme:
    """minimise c x, rows low <= A x <= high, bounds on x, some of it whole numbers; filled name by name."""

    def __init__(self) -> None:
        self.names: dict[Hashable, int] = {}
        self._costs: list[float] = []
        self._lows: list[float] = []
        self._highs: list[float] = []
        self._whole: list[bool] = []
        self._entries: list[tuple[int, int, float]] = []
        self._rows: list[tuple[float, float]] = []

    def variable(
        self,
        name: Hashable,
        *,
        cost: float = 0.0,
        low: float = 0.0,
        high: float = math.inf,
        whole: bool = False,
    ) -> None:
        """A new variable in [low, high]; raises `BadInput` for a name that is taken or an empty range."""
        if name in self.names:
            raise BadInput(f"{name}: the programme has this variable already; give each one its own name")
        if not low <= high:
            raise BadInput(f"{name}: no number lies in [{low}, {high}]; give a low end below the high end")
        self.names[name] = len(self.names)
        self._costs.append(cost)
        self._lows.append(low)
        self._highs.append(high)
        self._whole.append(whole)

    def binary(self, name: Hashable, *, cost: float = 0.0, low: int = 0, high: int = 1) -> None:
        """A new variable that is 0 or 1; low = high fixes it."""
        self.variable(name, cost=cost, low=low, high=high, whole=True)

    def row(
        self, terms: Iterable[tuple[Hashable, float]], *, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """low <= sum of factor * variable <= high; names may come again, their factors add up."""
        number = len(self._rows)
        self._rows.append((low, high))
        try:
            self._entries += [(number, self.names[name], factor) for name, factor in terms]
        except KeyError as error:
            raise BadInput(f"{error.args[0]}: no such variable in the programme; add it first") from error

    def solve(self, seconds: float = 60.0, gap: float = 0.0) -> Solved:
        """The best solution found in `seconds`; gap: the relative gap at which the solver may stop."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        started = time.perf_counter()
        rows, columns, factors = zip(*self._entries) if self._entries else ((), (), ())
        shape = (len(self._rows), len(self.names))
        limits = []
        if self._rows:
            matrix = csr_array((np.array(factors, float), (rows, columns)), shape=shape)
            lows, highs = zip(*self._rows)
            limits.append(LinearConstraint(matrix, np.array(lows), np.array(highs)))
        with silent():
            found = milp(
                np.array(self._costs),
                integrality=np.array(self._whole, int),
                bounds=Bounds(np.array(self._lows), np.array(self._highs)),
                constraints=limits,
                options={"time_limit": seconds, "mip_rel_gap": gap},
            )
        spent = time.perf_counter() - started
        if found.status == 2:
            return Solved("infeasible", math.inf, math.inf, {}, spent)
        dual = getattr(found, "mip_dual_bound", None)
        bound = -math.inf if dual is None or math.isnan(dual) else float(dual)
        if found.x is None:
            return Solved("unknown", math.inf, bound, {}, spent)
        values = {name: float(found.x[place]) for name, place in self.names.items()}
        return Solved("optimal" if found.status == 0 else "feasible", float(found.fun), bound, values, spent)
