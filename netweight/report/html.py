"""The report as one HTML file: no network, no script, light and dark, readable on a phone and on paper.

    page = render(evidence, plan, options, examples(original, small, task, evidence))

Whatever comes from outside (layer names, class names, notes) is escaped by the template.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from torch import Tensor, nn

import netweight
from netweight.core.compressed import Compressed
from netweight.core.plan import Option, Plan
from netweight.core.result import AVERAGE, FOUND, POSSIBLE, Evidence, Row, short
from netweight.core.task import Data, Task, outputs
from netweight.report import plots, table
from netweight.report.inputs import png

SHOWN = 12  # examples of each kind
IN_UNITS = {"share": (100, "%"), "seconds": (1000, "ms")}  # shown as a factor times the value, and a unit
MEANING = {
    AVERAGE: "measured on the test data",
    FOUND: "searched for: an attack",
    POSSIBLE: "proven: holds for every point of the set",
    "cost": "counted, or timed on this machine",
}


@dataclass(frozen=True)
class Example:
    """One input on which the two networks part. before, after, truth: classes, as text ("" where unknown).

    kind: "flipped" (a test example) or "found" (by attack). pictures: PNG data URIs. text: shown where there
    are no pictures.
    """

    kind: str
    title: str
    before: str
    after: str
    truth: str = ""
    pictures: tuple[str, ...] = ()
    text: str = ""


def render(evidence: Evidence, plan: Plan, options: Sequence[Option], examples: Sequence[Example]) -> str:
    """The page. options: all that the plan was chosen from, may be empty; examples: see `examples`."""
    layers = evidence.layers or layers_of(plan)
    shares = [row for row in evidence.rows if is_share(row)]
    return template().render(
        version=netweight.__version__,
        tiles=tiles(evidence.rows),
        groups=[
            (name, MEANING.get(name, ""), [_line(row) for row in rows]) for name, rows in grouped(evidence)
        ],
        answers=Markup(plots.answers(shares)) if shares else "",
        bits=Markup(plots.bits_per_layer(layers)) if layers else "",
        distortion=Markup(plots.distortion_against_cost(plan, options)) if plan.choices else "",
        layers=layers,
        total={"bits": short(plan.bits_per_weight), "distortion": short(plan.distortion)}
        if plan.choices
        else None,
        options=len(options),
        tried=[*plan.tried.items()],
        flipped=[example for example in examples if example.kind == "flipped"],
        flips=len(evidence.flipped),
        found=[example for example in examples if example.kind == "found"],
        notes=evidence.notes,
        context={
            name: value for name, value in evidence.context.items() if isinstance(value, str | int | float)
        },
        short=short,
    )


@functools.cache
def template() -> Template:
    """The page's template, everything put into it escaped."""
    loader = PackageLoader("netweight.report", "")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("template.html.j2")


def grouped(evidence: Evidence) -> list[tuple[str, list[Row]]]:
    """The rows of each question, cost last."""
    return table.by_question(evidence.rows)


def tiles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The first row of every question as a headline: what it was, what it is."""
    firsts = [inside[0] for _, inside in table.by_question(rows)]
    return [
        {
            "question": row.question,
            "quantity": _quantity(row),
            "before": _value(row, row.original),
            "after": _value(row, row.compressed),
        }
        for row in firsts
    ]


def is_share(row: Row) -> bool:
    """Whether the row can be drawn between 0 and 1."""
    return row.unit == "share" and all(0 <= value <= 1 for value in (row.original, row.compressed))


def layers_of(plan: Plan) -> list[dict[str, Any]]:
    """The planned layers in the form of `Evidence.layers`, for a network that was not compressed yet."""
    return [
        {
            "layer": layer,
            "method": option.method,
            "option": option.label,
            "weights": int(option.cost.get("weights", 0)),
            "bits_per_weight": table.bits_per_weight(option.cost),
            "distortion": option.distortion,
        }
        for layer, option in plan.choices.items()
        if option.cost.get("weights")
    ]


def _line(row: Row) -> dict[str, str]:
    how = (row.method, f"n = {row.n}" if row.n > 1 else "", row.arithmetic)
    return {
        "quantity": _quantity(row),
        "original": _value(row, row.original),
        "compressed": _value(row, row.compressed),
        "interval": ""
        if math.isnan(row.low)
        else f"{_value(row, row.low)} to {_value(row, row.high)}".replace(" ", "\N{NO-BREAK SPACE}"),
        "how": ", ".join(part for part in dict.fromkeys(how) if part),
    }


def _quantity(row: Row) -> str:
    """The quantity, with its unit where that does not stand behind the number."""
    return row.quantity if row.unit in IN_UNITS else table.with_unit(row)


def _value(row: Row, value: float) -> str:
    """A share in percent, seconds as milliseconds, thousands apart, else four digits."""
    if math.isfinite(value) and row.unit in IN_UNITS:
        factor, unit = IN_UNITS[row.unit]
        return f"{factor * value:.4g}\N{NO-BREAK SPACE}{unit}"
    if math.isfinite(value) and abs(value) >= 1e4:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return short(value)


def examples(
    original: nn.Module, small: Compressed | nn.Module, task: Task, evidence: Evidence
) -> list[Example]:
    """The first few test examples whose prediction changed, and those that an attack found."""
    after = small.model if isinstance(small, Compressed) else small
    rows = evidence.flipped[:SHOWN]
    shown: list[Example] = []
    if rows:
        data = task.test.rows(torch.tensor(rows))
        said = [outputs(network, data) for network in (original, after)]
        for place, row in enumerate(rows):
            truth = "" if data.y is None else _named(data.y[place], data)
            before, now = (_named(_prediction(out[place]), data) for out in said)
            shown.append(
                Example("flipped", f"test example {row}", before, now, truth, *_looks(data, [data.x[place]]))
            )
    return shown + found_by_attack(task.test, evidence)


def found_by_attack(data: Data, evidence: Evidence) -> list[Example]:
    """What `evidence.found` keeps: test examples beside the points on which the networks part."""
    shown = []
    for item in evidence.context.get("disagreements", [])[:SHOWN]:
        index = item["example"]
        classes = [_named(torch.tensor(item[name]), data) for name in ("original", "compressed")]
        truth = "" if data.y is None else _named(data.y[index], data)
        points = [torch.tensor(item[name]) for name in ("input", "point") if name in item]
        looks = _looks(data, points) if points else ((), "")
        title = f"test example {index}, moved by at most {item['moved']:.3g}"
        shown.append(Example("found", title, *classes, truth, *looks))
    return shown


def _prediction(out: Tensor) -> Tensor:
    """The class of one example, or of each position of a sequence."""
    return out.argmax(-1)


def _named(label: Tensor, data: Data) -> str:
    """The class's name; for a sequence the first few tokens."""
    if label.ndim == 0 and not label.is_floating_point():
        index = int(label)
        return data.classes[index] if 0 <= index < len(data.classes) else str(index)
    values = [f"{value:.4g}" for value in label.flatten()[:8].tolist()]
    return " ".join(values) + (" …" if label.numel() > 8 else "")


def _looks(data: Data, inputs: Sequence[Tensor]) -> tuple[tuple[str, ...], str]:
    """(pictures, text): a PNG of each image, or the numbers of an input that is none."""
    if all(x.ndim == 3 and x.shape[0] in (1, 3) and x.is_floating_point() for x in inputs):
        low, high = data.low if data.low is not None else 0.0, data.high if data.high is not None else 1.0
        return tuple(picture(x, low, high) for x in inputs), ""
    return (), " | ".join(_named(x.flatten(), data) for x in inputs)


def picture(image: Tensor, low: float = 0.0, high: float = 1.0) -> str:
    """An image `c h w` with c 1 or 3 and values from low to high, as the data URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png(image, low, high)).decode()
