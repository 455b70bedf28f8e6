"""netweight attack: search a set around each input for the worst."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import common
from netweight.core.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from netweight.core.perturbation import Found
    from netweight.core.task import Data

BATCH = 50
OF_ALL = ("gd-uap",)  # attacks that make one change for all examples


def attack(
    model: common.Model,
    data: common.DataName,
    within: common.Within = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="SLUG", help="One of `netweight methods --room attacks`; by default what fits."),
    ] = None,
    against: common.Against = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each search; by default the method's own.")
    ] = None,
    restarts: Annotated[int, typer.Option(min=1, help="Searches for each input.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz|DIR", help="Save the inputs that were found: arrays, or PNG images."),
    ] = None,
    limit: common.Limit = 100,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Search for inputs that MODEL gets wrong. With --against: on which it leaves ORIGINAL."""
    from netweight.core.perturbation import over_the_range, with_range
    from netweight.report import inputs

    slug = method or ("disagree" if against else "pgd")
    if slug in ("bit-flips", "fooling"):
        flips = slug == "bit-flips"
        one = flipped(model, data, within, limit) if flips else nothing(model, data, within, steps, seed, out)
        common.answer(one, lambda: common.lines(one), as_json=json)
        return
    search, how = asked(slug, against, steps)
    how |= {"restarts": restarts, "seed": seed}
    inside = common.around(within)
    with common.working():
        original, _ = common.open_model(against) if against else (None, None)
        network, _ = common.open_model(model, like=original)
        examples = common.open_task(data, network).test.take(limit)
        if out is not None:
            inputs.check_place(out, examples)
        inside = with_range(inside, examples.low, examples.high)
        networks = [network] if original is None else [original, network]
        found, clean = in_batches(search, networks, batched(slug, examples), inside, how)
        labels = examples.y if examples.y is not None and original is None else clean
        wrong = clean != labels
        if out is not None:
            inputs.save(out, found.points[found.hit], found.hit.nonzero()[:, 0], labels[found.hit], examples)
    hits = int(found.hit.sum())
    content = {
        "method": slug,
        "within": str(inside),
        "examples": len(examples),
        "wrong before": int(wrong.sum()),
        "found": hits,
        "share": hits / len(examples),
        "hits": found.hit.nonzero()[:, 0].tolist(),
        "out": None if out is None else str(out),
        "notes": [note] if (note := over_the_range(inside, examples.low, examples.high)) else [],
    }
    common.answer(content, lambda: common.lines(content), as_json=json)


def flipped(model: str, data: str, within: str | None, limit: int) -> dict[str, Any]:
    """What flipping stored bits of a compressed network does to its test accuracy.

    The bits are chosen on calibration data and judged on `limit` test examples.
    """
    from netweight.attacks.bit_flips import bit_flips, with_memory
    from netweight.evidence.found import predictions

    inside = common.around(within)
    with common.working():
        _, small = common.open_model(model)
        if small is None:
            raise BadInput(
                f"{model}: bit-flips needs a compressed network; give a folder that compress wrote"
            )
        task = common.open_task(data, small.model)
        found = bit_flips(small, task.calibration.x[:limit], None, inside)
        test = task.test.take(limit)
        clean = predictions(small.model, test.x)
        labels = clean if test.y is None else test.y
        after = predictions(with_memory(small, found.points).model, test.x)
    return {
        "method": "bit-flips",
        "within": str(inside),
        "examples": len(test),
        "right before": int((clean == labels).sum()),
        "right after": int((after == labels).sum()),
        "no better than guessing": bool(found.hit),
    }


def nothing(
    model: str, data: str, within: str | None, steps: int | None, seed: int, out: Path | None
) -> dict[str, Any]:
    """How sure a network can be made of each class by an image that shows nothing; steps: generations.

    The data says the shape and the range of inputs (0 to 1 where it has none); its values are not looked at.
    """
    import torch

    from netweight.attacks.fooling import Evolution, fooling
    from netweight.report import inputs

    if within is not None:
        raise BadInput("fooling searches all inputs, not a set around each; leave --within out")
    with common.working():
        network, _ = common.open_model(model)
        examples = common.open_task(data, network).test
        if out is not None:
            inputs.check_place(out, examples)
        low, high = (
            default if end is None else end for end, default in ((examples.low, 0.0), (examples.high, 1.0))
        )
        generations = 200 if steps is None else steps
        how = Evolution(generations=generations, enough=0.9999, low=low, high=high)
        found = fooling(network, examples.x[:1], how, seed=seed)
        classes = torch.arange(len(found.images))
        if out is not None:
            inputs.save(out, found.images, classes, classes, examples)
    return {
        "method": "fooling",
        "generations": len(found.median) - 1,
        "median confidence": found.median[-1],
        "confidence": found.confidence.tolist(),
        "out": None if out is None else str(out),
    }


def asked(slug: str, against: str | None, steps: int | None) -> tuple[Callable[..., Any], dict[str, int]]:
    """The attack and its steps, if they are given; raises `BadInput` for what does not go together."""
    from netweight.core import catalogue

    if catalogue.find(slug).room != "attacks":
        raise BadInput(f"{slug!r} is no attack; `netweight methods --room attacks` lists them")
    if (slug == "disagree") != (against is not None):
        raise BadInput("--method disagree and --against ORIGINAL belong together; give both or neither")
    search = catalogue.method(slug)
    parameters = signature(search).parameters
    if "graph" in parameters:
        call = f"{search.__module__}.{search.__name__}(graph, EdgeFlips(k))"
        raise BadInput(f"{slug} flips edges of a graph, not inputs; call {call} from Python")
    if steps is None:
        return search, {}
    if "steps" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise BadInput(f"{slug} has no --steps; leave it out")
    return search, {"steps": steps}


def batched(slug: str, examples: Data) -> Data:
    """The examples in batches, or all in one for an attack that makes one change for all."""
    return examples.batched(len(examples) if slug in OF_ALL else BATCH)


def in_batches(
    search: Callable[..., Found], networks: list[Any], examples: Data, within: Any, how: Any
) -> Any:
    """(what was found on all examples, the class that the first network gives each without any change)."""
    import torch

    from netweight.core import progress
    from netweight.core.perturbation import Found
    from netweight.evidence.found import predictions

    found, clean = [], []
    for x, y in progress.steps(examples, "Attacking", total=-(-len(examples) // examples.batch)):
        found.append(search(*networks, x, *([y] if len(networks) == 1 else []), within, **how))
        clean.append(predictions(networks[0], x))
    points, hit = (torch.cat([getattr(one, name).cpu() for one in found]) for name in ("points", "hit"))
    return Found(points, hit), torch.cat(clean)
