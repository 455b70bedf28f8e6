"""The command line. Nothing is computed here, and nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from netweight import __version__
from netweight.cli.attack import attack
from netweight.cli.bench import bench
from netweight.cli.common import command
from netweight.cli.compare import compare
from netweight.cli.compress import compress
from netweight.cli.export import export
from netweight.cli.inspect import inspect
from netweight.cli.methods import methods
from netweight.cli.plan import plan
from netweight.cli.reproduce import reproduce
from netweight.cli.schedule import schedule
from netweight.cli.switch import switch
from netweight.cli.train import train
from netweight.cli.verify import verify

app = typer.Typer(
    name="netweight",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    compress, plan, compare, verify, attack, inspect, train, switch, export, schedule, methods,
    reproduce, bench,
)  # fmt: skip
for function in COMMANDS:
    app.command(function.__name__)(command(function))


def print_version(asked: bool) -> None:
    """Print the version and end, if that was asked for."""
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Makes trained networks smaller and shows what that did to them: measured, attacked, proven."""


def main() -> None:
    """Run the command that the arguments name."""
    app()
