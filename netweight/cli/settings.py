"""NAME=VALUE of the command line as fields of a dataclass of settings."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from netweight.core.errors import BadInput, unknown

TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def given(texts: Sequence[str], *kinds: type[Any]) -> list[dict[str, Any]]:
    """What each of the classes is told; a name goes to the first of them that has such a field.

    Raises `BadInput` for a text that is no NAME=VALUE, a name that none of them has (with the nearest one), a
    name that is given twice, and a value that is not of the field's type.
    """
    fields = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    found: list[dict[str, Any]] = [{} for _ in kinds]
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise BadInput(f"--set {text!r}: expected NAME=VALUE; give for example --set rate=0.5")
        owner = next((i for i, names in enumerate(fields) if name in names), None)
        if owner is None:
            raise unknown("setting", name, set().union(*fields))
        if name in found[owner]:
            raise BadInput(f"--set {name} is given twice; give it once")
        found[owner][name] = read(name, value, typing.get_type_hints(kinds[owner])[name])
    return found


def read(name: str, text: str, kind: Any) -> Any:
    """The text as a value of that type: int, float, bool, str, None, tuples of these, and unions."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in inner and text.lower() == "none":
            return None
        return read(name, text, next(one for one in inner if one is not type(None)))
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
        each = inner[:1] * len(parts) if inner[-1] is Ellipsis else inner
        if len(parts) != len(each):
            raise BadInput(f"--set {name}={text}: {len(each)} values with commas between them are needed")
        return tuple(read(name, part, one) for part, one in zip(parts, each))
    if kind is bool:
        if text.lower() not in TRUTHS:
            raise BadInput(f"--set {name}={text}: expected true or false")
        return TRUTHS[text.lower()]
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise BadInput(f"--set {name}={text}: expected {wanted}") from error
