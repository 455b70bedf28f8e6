"""What one line of the catalogue says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One line. Paths are "package.module:name"; "" where there is none.

    room: the folder the method lies in. method: its function. settings: its dataclass of settings.
    reproduction: the module whose `reproduce(seed=, quick=)` returns the Claim. tags: what one looks for;
    "learnt" is a method that trains, so that the planner prices it by plain rounding on the same grid.
    "whole network" is a method that changes more than the weights of one layer, so that no planner mixes it.
    rewrites: the function that gives its exact rewrites alone, after which others may be planned.
    """

    slug: str
    title: str
    venue: str
    year: int
    room: str
    method: str = ""
    reproduction: str = ""
    settings: str = ""
    tags: tuple[str, ...] = ()
    rewrites: str = ""

    @property
    def result(self) -> str:
        """Name of the file under results/ that its reproduction writes, "" where it has none."""
        module = self.reproduction.rpartition(".")[2]
        return f"{module.replace('_', '-')}.json" if module else ""
