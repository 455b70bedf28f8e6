"""netweight inspect: what a network is like, beside how good it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import common
from netweight.core.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

WHATS = ("energy",)


def inspect(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=f"One of: {', '.join(WHATS)}.")],
    model: common.Model,
    data: common.DataName,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER", help="energy: e_d / e_c of your machine; fitted on this one if not given."
        ),
    ] = None,
    json: common.Json = False,
) -> None:
    """Look at a network; energy: a model of each convolution's energy, and the group size it recommends."""
    if what not in WHATS:
        raise unknown("thing to inspect", what, WHATS)
    with common.working():
        network, _ = common.open_model(model)
        task = common.open_task(data, network)
        content = energy(network, task.test.x[:1], ratio)
    common.answer(content, lambda: shown(content), as_json=json)


def energy(network: nn.Module, x: Tensor, ratio: float | None) -> dict[str, Any]:
    """The energy model as JSON values."""
    from netweight.inspection.e2gc import Constants, e2gc

    given = (
        None
        if ratio is None
        else Constants(compute=1.0, data=ratio, how="given: units of one MAC, not joules")
    )
    found = e2gc(network, x, constants=given)
    rows = [
        {
            "layer": one.layer,
            "channels": one.conv.inputs,
            "outputs": one.conv.outputs,
            "group_size": one.conv.size,
            "macs": one.conv.macs,
            "intensity": one.conv.intensity,
            "energy": one.joules,
            "best_size": one.best,
            "recommended": one.recommended,
            "energy_recommended": one.joules_recommended,
        }
        for one in found.layers
    ]
    return {
        "group_size": found.size,
        "balance": found.constants.balance,
        "fit": found.constants.fit,
        "how": found.constants.how,
        "energy": sum(one.joules for one in found.layers),
        "energy_recommended": sum(one.joules_recommended for one in found.layers),
        "layers": rows,
        "left": dict(found.left),
    }


def shown(content: dict[str, Any]) -> str:
    """The figures, then a line for each convolution."""
    head = f"{'layer':<24}{'channels':>12}{'G':>5}{'MACs':>11}{'AI':>8}{'energy':>11}{'G*':>7}"
    lines = [
        f"{one['layer'][-23:]:<24}{str(one['channels']) + ' > ' + str(one['outputs']):>12}"
        f"{one['group_size']:>5}"
        f"{one['macs']:>11}{one['intensity']:>8.1f}{one['energy']:>11.3g}{one['best_size']:>7.1f}"
        for one in content["layers"]
    ]
    return "\n".join([common.lines(content), "", head, *lines])
