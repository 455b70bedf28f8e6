"""netweight train: a network trained for a property that can be proven of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from netweight.cli import common
from netweight.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from netweight.core.task import Data

METHODS = ("certified",)


def train(
    model: common.Model,
    data: common.DataName,
    within: common.Within = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=" or ".join(METHODS))] = "certified",
    bounds: Annotated[str, typer.Option(metavar="NAME", help="ibp or crown-ibp.")] = "crown-ibp",
    epochs: Annotated[int, typer.Option(min=1, help="A sixth without the set, half while it grows.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 64,
    rate: Annotated[float, typer.Option(help="Learning rate of Adam; a tenth of it at the end.")] = 2e-3,
    weights: Annotated[
        str | None, typer.Option(metavar="SET", help="Set around each layer's weight, for example l2=0.1.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin with new random weights.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Train MODEL so that its class can be proven within a set around each input."""
    from netweight.core import io
    from netweight.core.compressed import Change, Compressed
    from netweight.core.plan import Plan
    from netweight.training import certified
    from netweight.training.checkpoint import Checkpoint
    from netweight.training.chance import restarted
    from netweight.training.loop import Training

    if method not in METHODS:
        raise unknown("method of training", method, METHODS)
    inside, moving = common.around(within), common.perturbation(weights)
    if out is None:
        raise BadInput("a trained network needs a place; give its folder, for example --out robust")
    io.may_replace(out)
    how = Training(epochs, batch, rate, milestones=(epochs * 5 // 6,), clip=8.0, seed=seed)
    settings = certified.Certified(bounds, natural=epochs // 6, ramp=epochs // 2)
    keep = Checkpoint(out.parent / f"{out.name}.training", resume)
    with common.working():
        network, _ = common.open_model(model)
        examples = training_data(data, network)
        start = restarted(network, seed) if fresh else network
        trained, losses = certified.certified(
            start, examples, inside, how, settings, weights=moving, keep=keep
        )
        Compressed(trained, Plan(), Change({})).save(out)
    keep.path.unlink(missing_ok=True)
    content = {
        "out": str(out),
        "method": method,
        "bounds": bounds,
        "within": str(inside),
        "weights": None if moving is None else str(moving),
        "examples": len(examples),
        "epochs": epochs,
        "last_loss": losses[-1],
        "losses": list(losses),
    }
    common.answer(content, lambda: common.lines(content), as_json=json)


def training_data(name: str, model: object) -> Data:
    """What DATA holds to train on; where it has no such part, what it is calibrated on."""
    from netweight.data import files

    split = files.load(name, model=model)
    found = split.train or split.calibration
    files.check(found, model)
    return found
