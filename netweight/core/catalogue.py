"""The catalogue: one line per method and per system, as plain text that imports nothing of what it names.

A *system* is a published idea of which a reproduction holds the paper's claim against what we measure; it has
`reproduction`. A *method* can be called: it has `method` and, where the planner may choose it, `settings`.
README's table, `netweight methods`, the planner and the tests are read off this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netweight.core.errors import BadInput, unknown
from netweight.core.origin import named
from netweight.core.systems import attacks, compression, others, training, verification
from netweight.core.systems.system import System as System

SYSTEMS = (
    *compression.SYSTEMS,
    *attacks.SYSTEMS,
    *verification.SYSTEMS,
    *training.SYSTEMS,
    *others.SYSTEMS,
)


def find(slug: str) -> System:
    """The line of that slug; raises `BadInput` with the nearest known one."""
    for system in SYSTEMS:
        if system.slug == slug:
            return system
    raise unknown("method", slug, [system.slug for system in SYSTEMS])


def of_room(room: str | None = None) -> list[System]:
    """All lines of a room (the start of its name will do), or all; raises `BadInput` for another name."""
    rooms = {system.room for system in SYSTEMS}
    begun = [name for name in rooms if room and name.startswith(room)]  # compress, train: as the commands
    if room is not None and len(begun) != 1:
        raise unknown("room", room, rooms)
    room = begun[0] if begun else None
    return [system for system in SYSTEMS if room in (None, system.room)]


def reproductions() -> list[System]:
    """One line per reproduction: the systems that `netweight reproduce` runs."""
    return [system for system in SYSTEMS if system.result == f"{system.slug}.json"]


def reproduction(slug: str) -> System:
    """The system whose reproduction that is; raises `BadInput` for a slug that has none of its own."""
    find(slug)
    for system in reproductions():
        if system.slug == slug:
            return system
    where = find(slug).result.removesuffix(".json")
    hint = f"it is measured in {where!r}" if where else f"reproductions are: {', '.join(_slugs())}"
    raise BadInput(f"{slug!r} has no reproduction of its own; {hint}")


def _slugs() -> list[str]:
    return [system.slug for system in reproductions()]


def method(slug: str) -> Callable[..., Any]:
    """The function of a method, imported now; raises `BadInput` for a line that has none."""
    return _resolve(slug, find(slug).method, "method")


def settings(slug: str) -> type[Any]:
    """The settings class of a method of compression/, imported now; raises `BadInput` where there is none."""
    return _resolve(slug, find(slug).settings, "settings")  # type: ignore[return-value]


def rewrites(slug: str) -> Callable[..., Any]:
    """The function of a method's exact rewrites alone: (model, task, layers, settings) -> rewrites."""
    return _resolve(slug, find(slug).rewrites, "rewrites")


def _resolve(slug: str, path: str, what: str) -> Callable[..., Any]:
    if not path:
        raise BadInput(f"{slug!r} has no {what} to call; `netweight methods` lists what each line is")
    return named(path)
