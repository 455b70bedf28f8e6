"""What was found out: rows of evidence with how each number is known, and claims with their bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from netweight.core import io
from netweight.core.errors import BadInput

AVERAGE, FOUND, POSSIBLE = "average", "worst found", "worst possible"
QUESTIONS = (AVERAGE, FOUND, POSSIBLE)


@dataclass(frozen=True)
class Row:
    """One quantity of both networks.

    question: one of `QUESTIONS`, or "cost". low, high: 95% interval of the compressed network's value (NaN:
    exact).
    n: examples it was had on. method: how. arithmetic: of the number ("float32", "float64", "counted").
    """

    question: str
    quantity: str
    original: float
    compressed: float
    low: float
    high: float
    n: int
    method: str
    arithmetic: str
    unit: str = ""


@dataclass
class Evidence:
    """The three answers for two networks, and what lies behind them.

    rows: the table. flipped: indices of test examples whose prediction changed. layers: per layer, JSON
    values (bits, distortion, method). notes: what the reader has to know. context: data, versions, machine.
    """

    rows: list[Row]
    flipped: list[int] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        """The first row with that question or that quantity; KeyError where there is none."""
        for row in self.rows:
            if name in (row.question, row.quantity):
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        """The table, 80 columns wide."""
        head = f"{'question':<15}{'quantity':<27}{'original':>12}{'compressed':>12}  {'95%':<12}"
        lines = [head.rstrip(), "-" * 80]
        for row in self.rows:
            spread = "" if math.isnan(row.low) else f"{row.low:.3g}..{row.high:.3g}"
            values = f"{short(row.original):>12}{short(row.compressed):>12}"
            lines.append(f"{row.question:<15}{row.quantity:<27}{values}  {spread}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As JSON values: NaN becomes null, infinities the words "inf" and "-inf"."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evidence:
        """The evidence that `to_json` wrote; raises `BadInput` for anything else."""
        try:
            rows = [Row(**{k: _back(k, v) for k, v in row.items()}) for row in content["rows"]]
            rest = {k: content[k] for k in ("flipped", "layers", "notes", "context")}
            return cls(rows, **rest)
        except (KeyError, TypeError) as error:
            raise BadInput(
                f"not evidence of netweight ({error}); expected what `netweight compare` wrote"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Write evidence.json into the folder."""
        io.write_json(Path(folder) / "evidence.json", self.to_json())


def short(value: float) -> str:
    """Four significant digits, whole numbers in full, a dash for NaN."""
    if math.isnan(value):
        return "-"
    return (
        f"{value:.0f}" if abs(value) >= 1e4 or (value == int(value) and abs(value) >= 10) else f"{value:.4g}"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _back(key: str, value: Any) -> Any:
    if key in ("original", "compressed", "low", "high"):
        return math.nan if value is None else float(value)
    return value


@dataclass(frozen=True)
class Bar:
    """One mark of a claim: what was measured, what it is held against, and which way."""

    name: str
    measured: float
    bar: float
    direction: Literal["at most", "at least"]

    @property
    def passed(self) -> bool:
        """Whether the mark is reached; NaN never is."""
        return self.measured <= self.bar if self.direction == "at most" else self.measured >= self.bar


@dataclass(frozen=True)
class Claim:
    """What a reproduction returns for one seed: bars, and the figures behind them (any JSON values)."""

    bars: list[Bar]
    figures: Mapping[str, Any] = field(default_factory=dict)
