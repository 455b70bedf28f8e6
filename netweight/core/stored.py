"""Frozen dataclasses of tensors and plain values, as named tensors plus JSON, and back.

A packed weight, a rewrite or an activation rounding is a small frozen dataclass. Its tensor fields become
tensors of a safetensors file, the other fields JSON, nested dataclasses both. Only classes of `KNOWN` are
ever built, each checks itself in `__post_init__`, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from netweight.core.errors import BadInput, unknown

KNOWN = {  # class name: the module that holds it
    "Affine": "netweight.nn.packed",
    "Dense": "netweight.nn.packed",
    "NM": "netweight.nn.packed",
    "Sparse": "netweight.nn.packed",
    "Split": "netweight.nn.split",
    "Power": "netweight.nn.power",
    "PowerRounding": "netweight.nn.power",
    "StaticRounding": "netweight.nn.fake",
    "DynamicRounding": "netweight.nn.fake",
    "ElasticRounding": "netweight.nn.elastic",
    "RoundProducts": "netweight.nn.ternary_attention",
    "Codebook": "netweight.nn.codebook",
    "PlacedRounding": "netweight.nn.shifted",
    "JoinQueryKey": "netweight.nn.qk_attention",
    "Buckets": "netweight.nn.buckets",
    "DoubleRounded": "netweight.nn.double_rounding",
    "WidthRounding": "netweight.nn.double_rounding",
    "SwitchNorms": "netweight.nn.switch_norm",
    "FoldBatchNorm": "netweight.core.rewrite",
    "Permute": "netweight.core.permute",
    "Scale": "netweight.core.rewrite",
    "Unclip": "netweight.core.rewrite",
    "Convert": "netweight.models.converting",
    "AddExits": "netweight.nn.exits",
    "AddGates": "netweight.nn.skipping",
    "InsertPowerNorm": "netweight.nn.power_rewrites",
    "InsertPassports": "netweight.nn.passport",
    "FoldPowerNorm": "netweight.nn.power_rewrites",
    "Shift": "netweight.core.affine",
    "Turn": "netweight.core.affine",
    "Mixing": "netweight.core.affine",
    "Facing": "netweight.core.affine",
    "Entrance": "netweight.nn.integer_steps",
    "Product": "netweight.nn.integer_steps",
    "Rescale": "netweight.nn.integer_steps",
    "Join": "netweight.nn.integer_steps",
    "Concat": "netweight.nn.integer_steps",
    "Clip": "netweight.nn.integer_steps",
    "Negate": "netweight.nn.integer_steps",
    "Pool": "netweight.nn.integer_steps",
    "Move": "netweight.nn.integer_steps",
    "Dyadic": "netweight.nn.dyadic",
}


def take_apart(thing: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by field name, JSON settings with the class name under "is"); nested names are joined by a
    dot."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {"is": type(thing).__name__}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif dataclasses.is_dataclass(value):
            inner, settings[field.name] = take_apart(value)
            tensors.update({f"{field.name}.{name}": tensor for name, tensor in inner.items()})
        else:
            settings[field.name] = list(value) if isinstance(value, tuple) else value
    return tensors, settings


def put_together(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
    """The dataclass again; raises `BadInput` if the file names another class or lacks or adds a field."""
    if not isinstance(settings, Mapping):
        raise BadInput(f"a stored form is described by names and values, not by {settings!r}")
    name = str(settings.get("is"))
    if name not in KNOWN:
        raise unknown("stored form", name, KNOWN)
    cls = getattr(importlib.import_module(KNOWN[name]), name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "is" in value:
            inside = {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}
            values[key] = put_together(inside, value)
        elif key != "is":
            values[key] = tuple(value) if isinstance(value, list) else value
    values.update({n: t for n, t in tensors.items() if "." not in n})
    if not values.keys() <= fields.keys():
        raise BadInput(f"stored form {name}: it has no {', '.join(sorted(values.keys() - fields.keys()))}")
    try:
        return cls(**values)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"stored form {name}: {error}") from error
