"""netweight verify: what is proven to hold for every point of a set around each input."""

from __future__ import annotations

from typing import Annotated

import typer

from netweight.cli import common


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
    from netweight.verification import bounds

    inside = common.perturbation(common.required(within, "--within", "linf=0.01"))
    with common.working():
        original, _ = common.open_model(against) if against else (None, None)
        network, _ = common.open_model(model, like=original)
        examples = common.open_task(data, network).test.take(limit)
        inside = common.in_range(inside, examples)
        if original is None:
            content = _certified(bounds.certify(network, examples, inside, method=method))
        else:
            content = _apart(bounds.equivalence(original, network, examples.x, inside))
    content = {"within": str(inside), "method": method, **content}
    common.answer(content, lambda: common.lines(content), as_json=json)


def _certified(found) -> dict:
    return dict(found.summary())


def _apart(found) -> dict:
    return {
        "examples": len(found.lower),
        "outputs differ by at most": float(found.upper.abs().maximum(found.lower.abs()).max()),
    }
