"""What every command shares: its options, how it answers, and what a mistake looks like.

Exit codes: 0 done; 1 done, but a promise does not hold; 2 bad input or usage; 130 stopped by the user.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.core import progress
from netweight.core.errors import BadInput, NetweightError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from netweight.core.compressed import Compressed
    from netweight.core.perturbation import Perturbation
    from netweight.core.task import Data, Task

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Built-in name, file.onnx, file.pt2, package.module:factory, checkpoint or netweight folder.",
    ),
]
DataName = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Built-in name, file.npz, folder of images by class, file.csv:target, or file.txt.",
    ),
]
BudgetText = Annotated[
    str, typer.Option("--budget", metavar="KEY=VALUE[,..]", help="For example bits=4, size=25% or size=120k.")
]
Within = Annotated[
    str | None,
    typer.Option("--within", metavar="SET", help="Set of perturbed inputs, for example linf=0.01 or l2=0.5."),
]
Method = Annotated[str, typer.Option(metavar="SLUG", help="A method of `netweight methods`, or auto.")]
DistortionName = Annotated[
    str,
    typer.Option(
        "--distortion", metavar="NAME", help="What is kept small: kl, output, network or curvature."
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="accuracy, loss, perplexity or mse; by default what fits the labels."),
]
Against = Annotated[
    str | None, typer.Option(metavar="ORIGINAL", help="The original network, to compare outputs with.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Limit = Annotated[int, typer.Option(min=1, help="Examples looked at, the first of the test set.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(function: Callable[..., bool | None]) -> Callable[..., None]:
    """The function as a command with `--debug`: False from it is exit code 1, a mistake one sentence."""

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            kept = function(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, typer.Exit | typer.Abort):
                raise
            if debug:
                traceback.print_exc()
            typer.echo(sentence(error), err=True)
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
        if kept is False:
            raise typer.Exit(1)

    signature = inspect.signature(function, eval_str=True)
    added = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    return run


def sentence(error: BaseException) -> str:
    """What the user reads: the thing, what was expected, what to do."""
    if isinstance(error, NetweightError):
        return f"netweight: {' '.join(str(error).split())}"
    if isinstance(error, KeyboardInterrupt):
        return "netweight: stopped; to go on from here, run the same command with --resume"
    if isinstance(error, MemoryError):
        return "netweight: the memory of this machine is full; give fewer examples or a smaller network"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "netweight: no space is left on that disk; free some or choose another place with --out"
    if isinstance(error, OSError) and error.filename:
        return f"netweight: {error.filename}: {error.strerror}; check the path and what you may do there"
    kind, text = type(error).__name__, " ".join(str(error).split())
    return f"netweight: unexpected {kind}: {text}; run it again with --debug and report what it shows"


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Work inside it shows its progress on stderr, and what libraries print on stdout goes there too."""
    with progress.shown(), contextlib.redirect_stdout(sys.stderr):
        yield


def answer(content: dict[str, Any], shown: Callable[[], RenderableType | str], *, as_json: bool) -> None:
    """Print the content as one JSON object, or what `shown` makes of it for people."""
    if as_json:
        typer.echo(json.dumps(finite(content), allow_nan=False))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 80
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(shown())


def finite(value: Any) -> Any:
    """JSON values: NaN becomes null, infinities the words "inf" and "-inf"."""
    if isinstance(value, float) and value - value != 0:
        return None if value != value else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def open_model(name: str, like: nn.Module | None = None) -> tuple[nn.Module, Compressed | None]:
    """The network that MODEL names, and its packed form where it is a folder that netweight wrote."""
    from netweight.core.io import MARK

    if (Path(name) / MARK).exists():
        from netweight import pipeline

        small = pipeline.load(Path(name), like=like)
        return small.plain(), small
    from netweight.models.load import load

    return load(name), None


def packed(name: str, like: nn.Module) -> Compressed:
    """The smaller network beside its original; one that netweight did not write is taken as it is."""
    from netweight.core.compressed import Change, Compressed
    from netweight.core.plan import Plan

    model, small = open_model(name, like)
    return small or Compressed(model, Plan(), Change({}))


def open_task(data: str, model: nn.Module, metric: str | None = None) -> Task:
    """The task that DATA names, checked against the model; the metric is by default what fits the labels."""
    from netweight.core.task import Task
    from netweight.data import files

    split = files.load(data, model=model)
    files.check(split.test, model)
    return Task(split.calibration, split.test, metric or fitting(split.test))


def fitting(data: Data) -> str:
    """accuracy for a class per example, perplexity for the next tokens, mse for real targets."""
    if data.y is not None and data.y.is_floating_point():
        return "mse"
    next_tokens = not data.x.is_floating_point() and (data.y is None or data.y.ndim > 1)
    return "perplexity" if next_tokens else "accuracy"


def perturbation(text: str | None) -> Perturbation | None:
    """The set that SET names, or None."""
    from netweight.core.perturbation import parse

    return None if text is None else parse(text)


def around(text: str | None) -> Perturbation:
    """The set that SET names; raises `BadInput` if none was given."""
    found = perturbation(text)
    if found is None:
        raise BadInput("--within is missing; give the set to look at, for example --within linf=0.01")
    return found


def lines(content: dict[str, Any]) -> str:
    """One "name: value" line for each entry; lists are left to `--json`."""
    shown = {name: value for name, value in content.items() if not isinstance(value, list | dict)}
    return "\n".join(
        f"{name.replace('_', ' ')}: {'none' if value is None else value}" for name, value in shown.items()
    )
