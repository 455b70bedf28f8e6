"""netweight attack: search a set around each input for the worst."""

from __future__ import annotations

from typing import Annotated

import typer

from netweight.cli import common
from netweight.core.errors import BadInput


def attack(
    model: common.Model,
    data: common.DataName,
    within: common.Within = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="SLUG", help="pgd, or disagree (with --against); by default what fits."),
    ] = None,
    against: common.Against = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each search.")] = 40,
    restarts: Annotated[int, typer.Option(min=1, help="Searches for each input.")] = 1,
    limit: common.Limit = 100,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Search for inputs that MODEL gets wrong. With --against: on which it leaves ORIGINAL."""
    from netweight.core import catalogue
    from netweight.core.perturbation import with_range

    slug = method or ("disagree" if against else "pgd")
    if catalogue.find(slug).room != "attacks":
        raise BadInput(f"{slug!r} is no attack; `netweight methods --room attacks` lists them")
    if (slug == "disagree") != (against is not None):
        raise BadInput("--method disagree and --against ORIGINAL belong together; give both or neither")
    inside = common.around(within)
    search = catalogue.method(slug)
    with common.working():
        original, _ = common.open_model(against) if against else (None, None)
        network, _ = common.open_model(model, like=original)
        examples = common.open_task(data, network).test.take(limit)
        inside = with_range(inside, examples.low, examples.high)
        how = {"steps": steps, "restarts": restarts, "seed": seed}
        if original is None:
            found = search(network, examples.x, examples.y, inside, **how)
        else:
            found = search(original, network, examples.x, inside, **how)
    hits = int(found.hit.sum())
    content = {
        "method": slug,
        "within": str(inside),
        "examples": len(examples),
        "found": hits,
        "share": hits / len(examples),
        "hits": found.hit.nonzero()[:, 0].tolist(),
    }
    common.answer(content, lambda: common.lines(content), as_json=json)
