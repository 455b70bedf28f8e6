"""netweight verify: what is proven to hold for every point of a set around each input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import certificate, common
from netweight.core.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from netweight.core.perturbation import Perturbation
    from netweight.core.task import Data
    from netweight.verification.bounds import Certificates


def verify(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As for `compress`.")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="As for `compress`.")] = None,
    within: common.Within = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="ibp, forward, forward+backward, crown-ibp, crown, alpha-crown or smoothing."
        ),
    ] = "crown",
    arithmetic: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What is covered: float32, float64, or real (fast, an estimate)."),
    ] = None,
    against: common.Against = None,
    spec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Decide a VNN-LIB property of an ONNX network.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For --spec.")] = 60.0,
    sigma: Annotated[float, typer.Option(help="Noise of --method smoothing, in units of the input.")] = 0.25,
    samples: Annotated[int, typer.Option(help="Votes for each input of --method smoothing.")] = 10_000,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a certificate.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check a certificate with independent code.")
    ] = None,
    limit: common.Limit = 100,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Prove on which inputs the class cannot change. With --against: how far two networks can part."""
    if check is not None:
        with common.working():
            content, right = certificate.checked(check, model, data)
        common.answer(content, lambda: common.lines(content), as_json=json)
        raise typer.Exit(0 if right else 1)
    if model is None:
        raise BadInput("MODEL is missing; give a network, or a certificate with --check FILE")
    if spec is not None:
        _decide(model, spec, timeout, arithmetic or "float64", seed, json)
        return
    if data is None:
        raise BadInput("--data is missing; give the inputs to prove something of, for example --data digits")
    with common.working():
        original, _ = common.open_model(against) if against else (None, None)
        network, _ = common.open_model(model, like=original)
        examples = common.open_task(data, network).test.take(limit)
        if method == "smoothing":
            content = _smoothed(network, examples, sigma, samples, seed)
        else:
            content = _proven(original, network, examples, within, (method, arithmetic), out, (model, data))
    common.answer(content, lambda: common.lines(content), as_json=json)


def _proven(
    original: nn.Module | None,
    network: nn.Module,
    examples: Data,
    within: str | None,
    how: tuple[str, str | None],
    out: Path | None,
    names: tuple[str, str],
) -> dict[str, Any]:
    """Verdicts on one network, or bounds on the difference of two."""
    from netweight.core.perturbation import with_range
    from netweight.verification import bounds

    (method, arithmetic), inside = how, with_range(common.around(within), examples.low, examples.high)
    if original is not None:
        found = _apart(original, network, examples, inside, method, arithmetic)
    else:
        proven = bounds.certify(
            network, examples, inside, method=method, arithmetic=arithmetic, slopes=out is not None
        )
        found = _certified(proven)
        if out is not None:
            certificate.write(out, proven, inside, (names[0], network), (names[1], examples))
            found["certificate"] = str(out)
    return {"within": str(inside), "method": method, "examples": len(examples), **found}


def _certified(found: Certificates) -> dict[str, Any]:
    """How many examples have each verdict, and the smallest margin that was proven."""
    counts = {verdict: found.verdicts.count(verdict) for verdict in ("verified", "unknown", "wrong")}
    sure = found.margin[found.verified]
    least = float(sure.min()) if len(sure) else None
    margins = found.margin.tolist()
    return {
        **counts,
        "least_margin": least,
        "arithmetic": found.arithmetic,
        "verdicts": found.verdicts,
        "margins": margins,
    }


def _apart(
    original: nn.Module,
    network: nn.Module,
    examples: Data,
    inside: Perturbation,
    method: str,
    arithmetic: str | None,
) -> dict[str, Any]:
    """By how much an output of the two networks can differ, and where they provably have the same class."""
    import torch

    from netweight.core import progress
    from netweight.verification import bounds

    widest, kept, covered = [], [], ""
    batches = examples.batched(examples.batch)
    total = -(-len(examples) // examples.batch)
    for x, _ in progress.steps(batches, "Proving", total=total):
        found = bounds.equivalence(original, network, x, inside, method=method, arithmetic=arithmetic)
        widest.append(found.lower.abs().maximum(found.upper.abs()).flatten(1).amax(1))
        covered = found.arithmetic
        if found.lower.ndim == 2 and found.lower.shape[1] > 1:
            kept.append(bounds.agreement(original, network, x, inside, method=method, arithmetic=arithmetic))
    apart = torch.cat(widest)
    share = float(torch.cat(kept).float().mean()) if kept else None
    return {
        "largest_difference": float(apart.max()),
        "mean_difference": float(apart.mean()),
        "same_class_proven": share,
        "arithmetic": covered,
    }


def _smoothed(network: nn.Module, examples: Data, sigma: float, samples: int, seed: int) -> dict[str, Any]:
    """The classical certificate of the smoothed network."""
    from netweight.verification.smoothing import report, smooth

    if examples.y is None:
        raise BadInput("smoothing counts right answers; give data with labels")
    found = smooth(network, examples, sigma, n=samples, seed=seed)
    return {"method": "smoothing", **report(found, examples.y)}


def _decide(model: str, spec: Path, timeout: float, arithmetic: str, seed: int, as_json: bool) -> None:
    """A property, decided in the words of VNN-COMP."""
    from netweight.verification.decide import decided

    with common.working():
        verdict = decided(model, spec, timeout=timeout, arithmetic=arithmetic, seed=seed)
    common.answer(verdict.summary(), verdict.text, as_json=as_json)
