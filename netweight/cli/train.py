"""netweight train: a network trained by one of the methods of training."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import common
from netweight.cli.settings import given
from netweight.core import catalogue
from netweight.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from netweight.core.compressed import Compressed
    from netweight.core.task import Task
    from netweight.training.checkpoint import Checkpoint

    Job = Callable[[nn.Module, Task, Checkpoint], tuple[Compressed, dict[str, Any]]]

CERTIFIED = "certified"  # the one that is given a set, and has a schedule of its own
TRAINED = ("training", "search")  # rooms
METHODS = (CERTIFIED, *(s.slug for s in catalogue.SYSTEMS if s.room in TRAINED and s.method and s.settings))
EPOCHS = 10  # of the others; certified: 60


Method = Annotated[str, typer.Option(metavar="SLUG", help=f"One of {', '.join(METHODS)}.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method, or optimizer, decay, cosine, warmup, milestones, drop, clip.",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(help="The highest learning rate; 1e-3, for certified 2e-3 and a tenth of it at the end."),
]


def train(
    model: common.Model,
    data: common.DataName,
    method: Method = CERTIFIED,
    settings: Settings = None,
    within: common.Within = None,
    bounds: Annotated[
        str | None, typer.Option(metavar="NAME", help="certified: ibp or crown-ibp, the default.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="SET", help="certified: set around each layer's weight, for example l2=0.1."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="10, but for certified 60: a sixth without the set, half while it grows."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 64,
    rate: Rate = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Of the passes: float32, bfloat16 or float16.")
    ] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin with new random weights.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Train MODEL by a method of training; every other command takes the folder that comes out."""
    from netweight import pipeline
    from netweight.core import io
    from netweight.evidence import energy, widths
    from netweight.training import distributed
    from netweight.training.chance import restarted
    from netweight.training.checkpoint import Checkpoint

    out = checked(method, out, within=within, bounds=bounds, weights=weights)
    io.may_replace(out)
    keep = Checkpoint(out.parent / f"{out.name}.training", resume)
    asked = {"epochs": epochs, "batch": batch, "rate": rate, "precision": precision, "seed": seed}
    asked = {name: value for name, value in asked.items() if value is not None}
    sets = {"within": within, "bounds": bounds, "weights": weights} if method == CERTIFIED else {}
    job = (certified if sets else ordinary)(method, asked, settings or [], **sets)
    with distributed.joined() as place, common.working() if place.first else contextlib.nullcontext():
        network, _ = common.open_model(model)
        task = training_task(data, network)
        start = restarted(network, seed) if fresh else network
        small, said, took = metered(job, start.to(place.device), task, keep)
        if place.first:
            small.save(out)
            io.write_json(out / energy.FILE, {"method": method, "energy": said["energy"]})
            keep.forget()
            if widths.trained(small):
                pipeline.record_widths(out, network, small, task)
    if place.first:
        examples = len(task.train or task.calibration)
        content = {"out": str(out), "method": method, "examples": examples, "epochs": len(said["losses"])}
        content |= {"last_loss": said["losses"][-1], "processes": place.count, **said}
        common.answer(content, lambda: common.lines({**content, "energy": took}), as_json=json)


def metered(
    job: Job, network: nn.Module, task: Task, keep: Checkpoint
) -> tuple[Compressed, dict[str, Any], str]:
    """What the job gives, the energy of all its processes with it, and that energy in a few words."""
    from netweight.inspection import meters
    from netweight.training import distributed

    resumed = keep.resume and keep.path.exists()
    with meters.Meter(next((p.device for p in network.parameters()), None)) as meter:
        small, said = job(network, task, keep)
    took = meters.together(distributed.gathered(meter.energy))
    spent = took.told() | {"of": "the part since it was resumed" if resumed else "the whole run"}
    return small, said | {"energy": spent}, took.line()


def checked(method: str, out: Path | None, **only_certified: str | None) -> Path:
    """The folder to write; `BadInput` for an unknown method, no folder, and options of another method."""
    if method not in METHODS:
        raise unknown("method of training", method, METHODS)
    for name, value in only_certified.items():
        if value is not None and method != CERTIFIED:
            raise BadInput(f"--{name} belongs to the method {CERTIFIED}; leave it out for {method}")
    if only_certified["within"] is None and method == CERTIFIED:
        common.around(None)
    if out is None:
        raise BadInput("a trained network needs a place; give its folder, for example --out robust")
    return out


def told(kind: type[Any], sets: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What --set gives to the method's settings, and to those of any training."""
    from netweight.training.settings import Training

    own, shared = given(sets, kind, Training)
    for name in shared.keys() & {"epochs", "batch", "rate", "precision", "seed"}:
        raise BadInput(f"--set {name}: this one is an option; give it as --{name}")
    return own, shared


def ordinary(method: str, asked: dict[str, Any], sets: list[str]) -> Job:
    """Training by any method of the common signature (`netweight.training.trained`)."""
    from netweight.training.settings import Training

    function, kind = catalogue.method(method), catalogue.settings(method)
    own, shared = told(kind, sets)
    settings, how = kind(**own), Training(**{"epochs": EPOCHS, **shared, **asked})

    def job(network: nn.Module, task: Task, keep: Checkpoint) -> tuple[Compressed, dict[str, Any]]:
        trained = function(network, task.blind(), how, settings, keep=keep)
        said = {"settings": vars(settings), "losses": list(trained.losses), "notes": dict(trained.notes)}
        return trained.network(), said

    return job


def certified(
    method: str,
    asked: dict[str, Any],
    sets: list[str],
    *,
    within: str | None,
    bounds: str | None,
    weights: str | None,
) -> Job:
    """Training on bounds, which is given a set of inputs and maybe one of weights."""
    from netweight.core.compressed import Change, Compressed
    from netweight.core.plan import Plan
    from netweight.training import certified
    from netweight.training.settings import Training

    epochs = asked.get("epochs", 60)
    schedule = {"epochs": epochs, "rate": 2e-3, "milestones": (epochs * 5 // 6,), "clip": 8.0}
    inside, moving = common.around(within), common.perturbation(weights)
    own, shared = told(certified.Certified, sets)
    growth = {"method": bounds or "crown-ibp", "natural": epochs // 6, "ramp": epochs // 2}
    settings, how = certified.Certified(**{**growth, **own}), Training(**{**schedule, **shared, **asked})

    def job(network: nn.Module, task: Task, keep: Checkpoint) -> tuple[Compressed, dict[str, Any]]:
        trained, losses = certified.certified(network, task, inside, how, settings, weights=moving, keep=keep)
        said = {"bounds": settings.method, "within": str(inside), "weights": moving and str(moving)}
        return Compressed(trained, Plan(), Change({})), {**said, "losses": list(losses)}

    return job


def training_task(name: str, model: nn.Module) -> Task:
    """The task that DATA names, with what it holds to train on, checked against the model."""
    from netweight.core.task import Task
    from netweight.data import files

    split = files.load(name, model=model)
    task = Task(split.calibration, split.test, common.fitting(split.test), train=split.train)
    files.check(task.train or task.calibration, model)
    return task
