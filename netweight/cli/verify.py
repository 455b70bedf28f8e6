"""netweight verify: what is proven to hold for every point of a set around each input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import common

if TYPE_CHECKING:
    from netweight.verification.bounds import Bounds, Certificates


def verify(
    model: common.Model,
    data: common.DataName,
    within: common.Within = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="How bounds are computed.")] = "ibp",
    against: common.Against = None,
    limit: common.Limit = 100,
    json: common.Json = False,
) -> None:
    """Prove on which inputs the class cannot change. With --against: how far two networks can part."""
    from netweight.core.perturbation import with_range
    from netweight.verification import bounds

    inside = common.around(within)
    with common.working():
        original, _ = common.open_model(against) if against else (None, None)
        network, _ = common.open_model(model, like=original)
        examples = common.open_task(data, network).test.take(limit)
        inside = with_range(inside, examples.low, examples.high)
        if original is None:
            found = _certified(bounds.certify(network, examples, inside, method=method))
        else:
            found = _apart(bounds.equivalence(original, network, examples.x, inside, method=method))
    content = {"within": str(inside), "method": method, "examples": len(examples), **found}
    common.answer(content, lambda: common.lines(content), as_json=json)


def _certified(found: Certificates) -> dict[str, Any]:
    """How many examples have each verdict, and the smallest margin that was proven."""
    counts = {verdict: found.verdicts.count(verdict) for verdict in ("verified", "unknown", "wrong")}
    sure = found.margin[found.verified]
    least = float(sure.min()) if len(sure) else None
    return {**counts, "least_margin": least, "arithmetic": found.arithmetic, "verdicts": found.verdicts}


def _apart(found: Bounds) -> dict[str, Any]:
    """By how much an output of the two networks can differ, in the worst of the examples and on average."""
    widest = found.lower.abs().maximum(found.upper.abs()).flatten(1).amax(1)
    return {
        "largest_difference": float(widest.max()),
        "mean_difference": float(widest.mean()),
        "arithmetic": found.arithmetic,
    }
