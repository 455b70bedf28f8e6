"""The picture of a scratchpad schedule: which bytes hold which tensor, step by step."""

from __future__ import annotations

from matplotlib.patches import Rectangle

from netweight.deployment.scratchpad.workload import Schedule, Workload
from netweight.report.plots import COLOURS, INK, KEPT, as_svg, canvas, legend


def residency(work: Workload, schedule: Schedule, memory: int) -> str:
    """Steps to the right, addresses upwards, a box for each stay.

    Colour: how the stay begins (made, loaded for the first time, loaded again). Stays of no bytes are not
    drawn.
    """
    unit, name = (1024, "KiB") if memory >= 4096 else (1, "bytes")
    figure, axes = canvas(3.6)
    seen: set[int] = set()
    kinds = {"made": COLOURS[0], "loaded": KEPT, "loaded again": COLOURS[1]}
    for stay in schedule.stays:
        again = stay.tensor in seen
        seen.add(stay.tensor)
        made = schedule.order[stay.start] == stay.tensor
        colour = kinds["made" if made else "loaded again" if again else "loaded"]
        corner = (stay.start, stay.address / unit)
        size = work.sizes[stay.tensor] / unit
        if size:
            box = Rectangle(
                corner,
                stay.stop - stay.start,
                size,
                facecolor=colour,
                alpha=0.75,
                edgecolor=INK,
                linewidth=0.4,
            )
            axes.add_patch(box)
    axes.axhline(memory / unit, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(0, len(schedule.order))
    axes.set_ylim(0, 1.04 * memory / unit)
    axes.set_xlabel("step")
    axes.set_ylabel(f"address, {name}")
    legend(axes, kinds)
    return as_svg(figure, "residency", "Which bytes of the scratchpad hold which tensor, step by step")
