"""Operators that move elements, split and join values: what they become among integers.

The scale of a value is moved like the value itself, so that a number per channel stays with its channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from netweight.core.graph import Node
from netweight.deployment.integer_draft import Draft, Value, refuse, source
from netweight.nn.integer_steps import Concat, Move

Rule = Callable[[Draft, Node], Value | list[Value]]


def moved(by: Callable[[Node, int], tuple[str, dict[str, Any]]]) -> Rule:
    """`by` gives the kind of move and its settings."""

    def rule(draft: Draft, node: Node) -> Value:
        value = source(draft, node, "self")
        return move(draft, node, value, Move(*by(node, len(value.reach.shape) + 1)), node.name)

    return rule


def move(draft: Draft, node: Node, value: Value, step: Move, name: str) -> Value:
    """The value and its scale, moved alike. What padding brings in is 0, at any scale."""
    if step.how == "pad" and not value.real:
        scale = step.run(value.spread(value.scale))
        scale = torch.where(scale > 0, scale, scale.max())
    else:
        scale = step.run(value.spread(value.scale))
    made = draft.emit(name, step, [value], scale)
    if not value.real:
        return made
    return replace(made, offset=step.run(value.spread(value.offset)), scale=scale)


def reshaped(node: Node, ndim: int) -> tuple[str, dict[str, Any]]:
    """view, flatten, squeeze: the shape that comes out, for one example."""
    return "reshape", {"shape": list(node.shape[1:])}


def permuted(node: Node, ndim: int) -> tuple[str, dict[str, Any]]:
    """permute and transpose."""
    dims = list(range(ndim))
    if node.op == "aten.permute":
        dims = [d % ndim for d in node.params["dims"]]
    else:
        a, b = node.params["dim0"] % ndim, node.params["dim1"] % ndim
        dims[a], dims[b] = b, a
    if dims[0] != 0:
        raise refuse(node, "it moves the axis of the examples; keep it in front")
    return "permute", {"dims": dims}


def cut(node: Node, ndim: int) -> tuple[str, dict[str, Any]]:
    """slice and select."""
    p, dim = node.params, node.params["dim"] % ndim
    if dim == 0:
        whole = node.op == "aten.slice" and not p["start"] and (p["end"] is None or p["end"] >= 1)
        if whole and p["step"] == 1:
            return "reshape", {"shape": list(node.shape[1:])}
        raise refuse(node, "it takes some of the examples; they are independent here")
    if node.op == "aten.select":
        return "select", {"dim": dim, "index": p["index"]}
    start, end = p["start"] or 0, 2**31 - 1 if p["end"] is None else min(p["end"], 2**31 - 1)
    return "slice", {"dim": dim, "start": start, "end": end, "step": p["step"]}


def flipped(node: Node, ndim: int) -> tuple[str, dict[str, Any]]:
    """flip."""
    dims = [d % ndim for d in node.params["dims"]]
    if 0 in dims:
        raise refuse(node, "it turns the examples around; they are independent here")
    return "flip", {"dims": dims}


def padded(node: Node, ndim: int) -> tuple[str, dict[str, Any]]:
    """constant_pad_nd with 0."""
    if node.params["value"] != 0 or len(node.params["pad"]) >= 2 * ndim:
        raise refuse(node, "padding with anything but 0 has no integer form; pad with 0")
    return "pad", {"pad": list(node.params["pad"])}


def concatenated(draft: Draft, node: Node) -> Value:
    """cat: branches on one scale."""
    branches = [draft.look(ref) for ref in node.params["tensors"]]
    if not all(isinstance(branch, Value) for branch in branches):
        raise refuse(node, "a constant beside values has no integer form; take it out")
    branches, scale = draft.joined(branches, 0.0, node)
    return draft.emit(node.name, Concat(node.params["dim"] % len(node.shape)), branches, scale)


def split(draft: Draft, node: Node) -> list[Value]:
    """split_with_sizes: slices."""
    value, dim = source(draft, node, "self"), node.params["dim"] % len(node.shape)
    found, start = [], 0
    for index, size in enumerate(node.params["split_sizes"]):
        step = Move("slice", {"dim": dim, "start": start, "end": start + size, "step": 1})
        found.append(replace(move(draft, node, value, step, f"{node.name}.{index}"), size=value.size))
        start += size
    return found


def item(draft: Draft, node: Node) -> Value:
    """One of several results."""
    found = draft.look(node.params["self"])
    if not isinstance(found, list):
        raise refuse(node, "the places of extremes have no integer form; use their values alone")
    return found[node.params["index"]]


MOVED: Mapping[str, Rule] = {
    **{f"aten.{name}": moved(reshaped) for name in ("reshape", "squeeze", "unsqueeze")},
    **{f"aten.{name}": moved(permuted) for name in ("permute", "transpose")},
    **{f"aten.{name}": moved(cut) for name in ("slice", "select")},
    "aten.flip": moved(flipped),
    "aten.constant_pad_nd": moved(padded),
    "aten.cat": concatenated,
    "aten.split_with_sizes": split,
    "getitem": item,
}
