"""Tables for the terminal, 80 columns wide: evidence, plans, the catalogue, bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from netweight.core.plan import Plan
from netweight.core.result import QUESTIONS, Evidence, Row, short

WIDTH = 80


def evidence(found: Evidence) -> Table:
    """The three answers and the cost: one line per quantity, with the compressed network's interval."""
    table = _table("question", "quantity", right=("original", "compressed", "95%"))
    for question, rows in by_question(found.rows):
        for index, row in enumerate(rows):
            table.add_row(
                question if index == 0 else "",
                Text(with_unit(row)),
                short(row.original),
                short(row.compressed),
                interval(row),
                end_section=index == len(rows) - 1,
            )
    return table


def plan(chosen: Plan) -> Table:
    """One line per layer: what was chosen, its stored bits per weight and its distortion."""
    table = _table("layer", "choice", right=("weights", "bits", "distortion"))
    for layer, option in chosen.choices.items():
        table.add_row(
            Text(layer),
            Text(option.label),
            short(option.cost.get("weights", math.nan)),
            f"{bits_per_weight(option.cost):.3g}",
            f"{option.distortion:.3g}",
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        short(chosen.cost("weights")),
        f"{chosen.bits_per_weight:.3g}",
        f"{chosen.distortion:.3g}",
    )
    return table


def catalogue(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Room by room: slug, title, where it was published, how many bars of its reproduction are reached."""
    table = _table("method", "title", "published", "reached")
    table.columns[0].min_width = max((len(line["slug"]) for line in lines), default=0)
    for room in dict.fromkeys(line["room"] for line in lines):
        table.add_section()
        table.add_row(Text(f"{room}/", style="bold"))
        for line in (line for line in lines if line["room"] == room):
            state = line["state"].removesuffix(" bars reached")
            cells = (line["slug"], line["title"], f"{line['venue']} {line['year']}", state)
            table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def traits(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The fields of `core.taxonomy` of every method that has them, "none" left out."""
    table = _table("method", "what it is")
    for line in lines:
        if line["traits"]:
            said = (f"{name}: {', '.join(values)}" for name, values in line["traits"].items() if values)
            shown = "; ".join(text for text in said if not text.endswith(": none"))
            table.add_row(Text(line["slug"]), Text(shown), end_section=True)
    return table


def bars(outcome: Mapping[str, Any]) -> Table:
    """Each bar of a reproduction: mean and spread over the seeds, the mark, and whether it is reached."""
    table = _table("bar", right=("measured", "spread", "mark", "reached"))
    for bar in outcome["bars"]:
        table.add_row(
            Text(bar["name"]),
            _number(bar["mean"]),
            _number(bar["std"]),
            f"{bar['direction']} {short(bar['bar'])}",
            "yes" if bar["passed"] else "NO",
        )
    return table


def by_question(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each question, average first, cost last."""
    names = [*QUESTIONS, *dict.fromkeys(row.question for row in rows if row.question not in QUESTIONS)]
    grouped = [(name, [row for row in rows if row.question == name]) for name in names]
    return [(name, inside) for name, inside in grouped if inside]


def with_unit(row: Row) -> str:
    """The quantity with its unit, if that says more than the quantity."""
    return (
        f"{row.quantity} ({row.unit})"
        if row.unit and row.unit != "share" and row.unit not in row.quantity
        else row.quantity
    )


def interval(row: Row) -> str:
    """The 95% interval, "" where the number is exact."""
    return "" if math.isnan(row.low) or math.isnan(row.high) else f"{short(row.low)} to {short(row.high)}"


def bits_per_weight(cost: Mapping[str, float]) -> float:
    """Stored bits per weight of one option, NaN where it has no weights."""
    return cost["bits"] / cost["weights"] if cost.get("weights") else math.nan


def _number(value: float | str | None) -> str:
    return "-" if value is None else short(float(value))


def _table(*left: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, width=WIDTH, pad_edge=False, padding=(0, 1))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table
