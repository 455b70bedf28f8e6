"""Bit widths of a network that holds several: which it has, which are in use, and a change in its folder.

    switch("small", "4")                        every layer at 4 bits
    switch("small", "8,layer1.0.conv2=4")       all at 8, one at 4

A folder of such a network (see `nn.double_rounding`) keeps one set of codes for all widths; which width each
layer decodes them at, which step its input is rounded with and which batch norm follows it are names and
numbers of netweight.json. A change of width is thus one small file, written beside its place and renamed into
it: a reader sees the network before or after, never a mixture. No tensor is read and torch is not imported.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netweight.core import io
from netweight.core.errors import BadInput, unknown

FORM, INPUT, NORMS = "DoubleRounded", "WidthRounding", "SwitchNorms"  # as `core.stored` names them


@dataclass(frozen=True)
class Switch:
    """What `switch` did: the width of each layer before and after, the widths there are, and the seconds."""

    before: dict[str, int]
    after: dict[str, int]
    widths: tuple[int, ...]
    seconds: float


def switch(folder: str | Path, text: str | None) -> Switch:
    """Change the widths of a folder in place, whole or not at all.

    text: as `asked` takes it; None only looks. Raises `BadInput` for a folder without switchable layers or a
    width that it was not trained for.
    """
    started = time.perf_counter()
    folder = Path(folder)
    head = described(folder)
    try:
        before, known = in_use(head), trained(head)
        if not before:
            raise BadInput(
                f"{folder}: it holds one bit width alone; train one that can be switched "
                "(netweight train --method double-rounding)"
            )
        after = before if text is None else asked(text, before, known)
        new = edited(head, after)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / io.MARK}: the widths it describes are damaged; write it again") from error
    if after != before:
        io.write_json(folder / io.MARK, new)
    return Switch(before, after, known, time.perf_counter() - started)


def described(folder: Path) -> dict[str, Any]:
    """netweight.json of a folder; raises `BadInput` where it has none that is sane."""
    if not (folder / io.MARK).exists():
        raise BadInput(f"{folder}: not a folder that netweight wrote whole (there is no {io.MARK})")
    head = io.read_json(folder / io.MARK, "the description of a compressed network")
    kinds = {"packed": dict, "activations": dict, "rewrites": list}
    if not isinstance(head, dict) or any(not isinstance(head.get(k), t) for k, t in kinds.items()):
        raise BadInput(f"{folder}: {io.MARK} does not describe a compressed network; write the folder again")
    return head


def in_use(head: Mapping[str, Any]) -> dict[str, int]:
    """The width of each layer that can be switched."""
    return {name: form["width"] for name, form in head["packed"].items() if form.get("is") == FORM}


def trained(head: Mapping[str, Any]) -> tuple[int, ...]:
    """The widths that every switchable layer was trained for, highest first."""
    lists = [form["widths"] for form in head["packed"].values() if form.get("is") == FORM]
    common = set.intersection(*map(set, lists)) if lists else set()
    return tuple(sorted(common, reverse=True))


def asked(text: str, now: Mapping[str, int], widths: Sequence[int]) -> dict[str, int]:
    """The width of every layer: "4" sets all, "name=4" one, and what comes later wins.

    now: the widths in use, kept where nothing else is said. Raises `BadInput` for an unknown layer or width.
    """
    found = dict(now)
    for part in text.split(","):
        layer, _, value = part.strip().rpartition("=")
        if not value.isdecimal() or int(value) not in widths:
            raise BadInput(
                f"bits {part.strip()!r}: the network was trained for {', '.join(map(str, widths))}; give one "
                "of these"
            )
        if layer and layer not in found:
            raise unknown("switchable layer", layer, found)
        found.update(dict.fromkeys([layer] if layer else found, int(value)))
    return found


def edited(head: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """The description with these widths in use."""
    new = copy.deepcopy(dict(head))
    for kind, name_of in (("packed", FORM), ("activations", INPUT)):
        for layer, thing in new[kind].items():
            if thing.get("is") == name_of:
                thing["width"] = widths[layer]
    for rewrite in new["rewrites"]:
        if rewrite.get("is") == NORMS:
            rewrite["now"] = norm_keys(rewrite["follows"], rewrite["before"], rewrite["pairs"], widths)
    return new


def of_one_width(quantity: str) -> bool:
    """Whether a row of evidence is of one of several widths: "accuracy at 4 bits"."""
    return re.fullmatch(r".+ at \d+ bits", quantity) is not None


def norm_keys(
    follows: Sequence[str], before: Sequence[str], pairs: bool, widths: Mapping[str, int]
) -> list[str]:
    """Which set of each batch norm is in use: that of the layer it follows, or of the two layers before it.

    follows: the layer in front of each norm. before: the layer in front of that one, "" for none.
    """
    if not pairs:
        return [str(widths[layer]) for layer in follows]
    return [f"{widths[b or own]}_{widths[own]}" for own, b in zip(follows, before)]
