"""Pictures as inline SVG: text stays text, lines take the colour of the page, nothing is global.

Each function gives one `<svg>` element as a string, the same for the same input.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from netweight.core.plan import Option, Plan
from netweight.core.result import Row
from netweight.report.table import bits_per_weight

INK = "#010203"  # stands for the colour of the page's text, put in when the SVG is written
COLOURS = ("#3b82c4", "#d97a1e", "#2f9e77", "#b65ca0", "#8f8a1d", "#c9543f", "#5f6fd0", "#4aa3b5")
KEPT = "#8b9097"
WIDTH = 5.0  # inches; one inch is 72 units of the SVG
NAMED = 80  # more layers than this are drawn without their names
SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
POINTS = 1500  # more points than this are drawn as pixels, which keeps the file small


def bits_per_layer(layers: Sequence[Mapping[str, Any]]) -> str:
    """Stored bits per weight of each layer (keys layer, method, bits_per_weight), coloured by method."""
    colours = colours_of([str(layer["method"]) for layer in layers])
    height = 0.9 + (0.24 * len(layers) if len(layers) <= NAMED else 12)
    figure, axes = canvas(height)
    places = range(len(layers))
    widths = [float(layer["bits_per_weight"]) for layer in layers]
    bars = axes.barh(places, widths, color=[colours[str(layer["method"])] for layer in layers], height=0.72)
    axes.invert_yaxis()
    axes.set_xlabel("stored bits per weight")
    axes.set_xlim(0, max(widths, default=1.0) * 1.15)
    if len(layers) <= NAMED:
        axes.set_yticks(places, [literal(shortened(str(layer["layer"]))) for layer in layers])
        axes.bar_label(bars, [f"{width:.3g}" for width in widths], padding=3, fontsize=8, color=INK)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(layers)} layers, first on top")
    axes.tick_params(axis="y", length=0)
    legend(axes, colours)
    return as_svg(figure, "bits", "Stored bits per weight of each layer")


def distortion_against_cost(plan: Plan, options: Sequence[Option]) -> str:
    """Every option of every layer: bits per weight against distortion, the chosen ones ringed."""
    every = [*options] or [*plan.choices.values()]
    colours = colours_of([option.method for option in every])
    smallest = min((option.distortion for option in every if option.distortion > 0), default=1.0)
    floor = 10.0 ** (math.floor(math.log10(smallest)) - 1)  # where no distortion at all is drawn
    figure, axes = canvas(3.6)
    for method, colour in colours.items():
        points = _points([option for option in every if option.method == method], floor)
        axes.scatter(*points, s=9, color=colour, alpha=0.55, linewidths=0, rasterized=len(every) > POINTS)
    axes.scatter(
        *_points([*plan.choices.values()], floor), s=34, facecolors="none", edgecolors=INK, linewidths=1.1
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.6 * floor)
    axes.yaxis.set_major_formatter(lambda value, _: "0" if value < 1.01 * floor else f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("distortion")
    legend(axes, {**colours, "chosen": "none"})
    return as_svg(figure, "distortion", "Distortion against stored bits per weight, all options")


def answers(rows: Sequence[Row]) -> str:
    """Rows that are shares: the original as a ring, the compressed network as a dot with its interval."""
    figure, axes = canvas(0.9 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        axes.plot([row.original, row.compressed], [place, place], color=KEPT, linewidth=1.2, zorder=1)
        if row.low == row.low and row.high == row.high:
            axes.plot([row.low, row.high], [place, place], color=COLOURS[0], linewidth=5, alpha=0.3, zorder=2)
    places = range(len(rows))
    before, after = [row.original for row in rows], [row.compressed for row in rows]
    axes.scatter(before, places, s=44, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=3)
    axes.scatter(after, places, s=26, color=COLOURS[0], zorder=4)
    axes.set_yticks(places, [literal(shortened(row.quantity)) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of examples")
    legend(axes, {"original": "none", "compressed": COLOURS[0]})
    return as_svg(figure, "answers", "Shares for the original and the compressed network")


def certified_accuracy(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each report of `verification.smoothing`, by name: the share certified at least to a radius."""
    colours = colours_of([*reports])
    figure, axes = canvas(3.0)
    for name, told in reports.items():
        radii = [0.0, *sorted(row["radius"] for row in told["inputs"] if row["class"] == row["label"])]
        shares = [(len(radii) - place) / told["examples"] for place in range(1, len(radii) + 1)]
        places, heights = [*radii, radii[-1]], [shares[0], *shares]
        axes.step(places, heights, where="pre", color=colours[name], linewidth=1.6)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("certified radius, L2 in units of the input")
    axes.set_ylabel("certified accuracy")
    legend(axes, {literal(shortened(name)): colour for name, colour in colours.items()})
    return as_svg(figure, "certified", "Certified accuracy against the radius")


def colours_of(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method in the order of first use; layers that are kept are grey."""
    names = [name for name in dict.fromkeys(methods) if name != "keep"]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    return {**colours, "keep": KEPT} if "keep" in methods else colours


def shortened(name: str, most: int = 26) -> str:
    """The end of a long name, which is the part that tells layers apart."""
    return name if len(name) <= most else "…" + name[1 - most :]


def literal(name: str) -> str:
    """The name without anything that is drawn as a formula."""
    return name.replace("$", r"\$")


def _points(options: Sequence[Option], floor: float) -> tuple[list[float], list[float]]:
    return [bits_per_weight(o.cost) for o in options], [max(o.distortion, floor) for o in options]


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure of `WIDTH` by `height` inches and its axes, in the colour of the page's text."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    figure.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_linewidth(0.6)
    axes.tick_params(colors=INK, labelsize=8, width=0.6)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    return figure, axes


def legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """One mark per name above the plot; "none" is a ring."""
    for name, colour in colours.items():
        edge = INK if colour == "none" else colour
        axes.scatter([], [], s=26, facecolors=colour, edgecolors=edge, label=name)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(4, len(colours)),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handletextpad=0.2,
        columnspacing=1.0,
        borderaxespad=0.2,
    )


def as_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as one element: no XML head, no metadata, ids of its own, as wide as its place."""
    text = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    with rc_context(settings):
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", metadata=nothing, dpi=200, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    head = rf'<svg role="img" aria-label="{title}" \1>'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, svg, count=1)


def standalone(svg: str) -> str:
    """The element as the content of a file, which needs the namespaces that a page does not."""
    return svg.replace("<svg ", f"<svg {SPACES} ", 1)
