"""Certificates: what was proven about a network, in a file that others can check (`check`).

    save("proof.json", written(found, model, data, within))      # found = certify(..., slopes=True)
    certificate = read("proof.json")

The JSON names the network and the data, each with a sha256, the set, the method, the arithmetic, and for
each input its index, label, verdict, bound and the sha256 of its slopes. Slopes that were optimised lie
beside it in FILE.slopes.safetensors; those of the other methods follow from the bounds and are not stored.
Nothing of the engine is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from netweight import __version__
from netweight.core import io
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import Graph
from netweight.core.perturbation import L1, L2, Linf, Perturbation, parse, with_range
from netweight.core.task import Data

FORMAT, VERSION = "netweight certificate", 1
VERDICTS, ARITHMETICS = ("verified", "unknown", "wrong"), ("float32", "float64", "real")
CHOSEN = ("alpha-crown",)  # the methods whose slopes do not follow from the bounds
LARGEST = 4 << 30  # bytes of slopes
WHAT = "a certificate of netweight"


class Proven(Protocol):
    """What `bounds.certify` gives. slopes: by name, an entry for each input, `b ...`."""

    labels: Int[Tensor, " b"]
    margin: Float[Tensor, " b"]
    method: str
    arithmetic: str
    slopes: Mapping[str, Tensor]

    @property
    def verdicts(self) -> list[str]: ...


@dataclass(frozen=True)
class Reference:
    """What a certificate speaks of: a name (of `--data`, or MODEL) and the sha256 of its content."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One input. index: in the data. bound: proven lower bound of its margin, -inf where there is none.
    slopes: their sha256, None where the proof has none.
    """

    index: int
    label: int
    verdict: str
    bound: float
    slopes: str | None


@dataclass(frozen=True, eq=False)
class Certificate:
    """A certificate as it is read.

    slopes: choices in [0, 1], `inputs rows *shape`, by "node/lower" and "node/upper". whole: whether the file
    is, by its own sha256, as it was written.
    """

    model: Reference
    data: Reference
    within: Perturbation
    method: str
    arithmetic: str
    inputs: tuple[Entry, ...]
    slopes: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = True


# What is named by its content ----------------------------------------------------------------------------


def model_hash(graph: Graph) -> str:
    """sha256 of a network: its operators with their settings, and its constants to the last bit."""
    seen = hashlib.sha256()
    for node in (*graph.inputs, *graph.nodes):
        seen.update(repr((node.name, node.op, node.overload, node.shape, node.dtype)).encode())
        seen.update(repr(sorted(node.params.items())).encode())
    seen.update(repr(graph.outputs).encode())
    return _with_tensors(seen, graph.constants)


def data_hash(data: Data) -> str:
    """sha256 of the examples, without their labels."""
    return _with_tensors(hashlib.sha256(), {"x": data.x})


def slopes_hash(slopes: Mapping[str, Tensor], row: int) -> str | None:
    """sha256 of the slopes of one input; None where there are none."""
    own = {name: tensor[row] for name, tensor in slopes.items()}
    return _with_tensors(hashlib.sha256(), own) if own else None


def _with_tensors(seen: Any, tensors: Mapping[str, Tensor]) -> str:
    from torch import uint8

    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        seen.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        seen.update(tensor.reshape(-1).view(uint8).numpy().tobytes())
    return seen.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    """sha256 of the JSON itself, without the entry that holds it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# Writing -------------------------------------------------------------------------------------------------


def written(
    found: Proven,
    model: Reference,
    data: Reference,
    within: Perturbation,
    indices: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The JSON of a certificate; without `indices`, the inputs are the first of the data.

    Raises `DoesNotFit` for a set that has no words (a box), and where the slopes were not kept.
    """
    if found.method in CHOSEN and not found.slopes and "verified" in found.verdicts:
        raise DoesNotFit(f"the slopes of {found.method} were not kept; certify with slopes=True")
    places = range(len(found.labels)) if indices is None else indices
    rows = zip(places, found.labels.tolist(), found.verdicts, found.margin.tolist())
    inputs = [
        {
            "index": index,
            "label": label,
            "verdict": verdict,
            "bound": bound if math.isfinite(bound) else None,
            "slopes": slopes_hash(found.slopes, row),
        }
        for row, (index, label, verdict, bound) in enumerate(rows)
    ]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "netweight": __version__,
        "model": {"name": model.name, "sha256": model.sha256},
        "data": {"name": data.name, "sha256": data.sha256},
        "within": _spelled(within),
        "method": found.method,
        "arithmetic": found.arithmetic,
        "stored slopes": bool(found.method in CHOSEN and found.slopes),
        "inputs": inputs,
    }
    return {**content, "sha256": _digest(content)}


def _spelled(within: Perturbation) -> dict[str, Any]:
    """The set in words that `parse` reads to the last bit, and its valid range."""
    if not isinstance(within, Linf | L2 | L1):
        raise DoesNotFit(f"a certificate is about linf, l2 or l1, not {within}; use one of these sets")
    return {"set": f"{type(within).__name__.lower()}={within.eps!r}", "low": within.low, "high": within.high}


def save(path: str | Path, found: Proven, content: Mapping[str, Any]) -> None:
    """Write the certificate that `written` gave, and the slopes that it needs beside it."""
    if content["stored slopes"]:
        io.write_tensors(beside(path), found.slopes)
    io.write_json(path, dict(content))


def beside(path: str | Path) -> Path:
    """Where the slopes of a certificate lie."""
    return Path(f"{path}.slopes.safetensors")


# Reading -------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Certificate:
    """A certificate from outside: nothing in it is trusted, nothing it names is opened.

    Raises `BadInput` for what is no certificate, too large, or has slopes that are no choices of its inputs.
    """
    content = io.read_json(path, WHAT)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path}: this is not {WHAT}; give a file that `netweight verify --out` wrote")
    if content.get("version") != VERSION:
        raise BadInput(
            f"{path}: version {content.get('version')!r} of the format, version {VERSION} is known; "
            "read it with the netweight that wrote it"
        )
    entries = _field(path, content, "inputs", list)
    inputs = tuple(_entry(path, i, entry) for i, entry in enumerate(entries))
    if not inputs:
        raise BadInput(f"{path}: the certificate is about no input; write it again")
    return Certificate(
        model=_reference(path, content, "model"),
        data=_reference(path, content, "data"),
        within=_within(path, _field(path, content, "within", dict)),
        method=_field(path, content, "method", str),
        arithmetic=_one_of(path, content, "arithmetic", ARITHMETICS),
        inputs=inputs,
        slopes=_slopes(path, len(inputs)) if _field(path, content, "stored slopes", bool) else {},
        whole=content.get("sha256") == _digest(content),
    )


def _field(path: str | Path, content: Mapping[str, Any], key: str, kind: type) -> Any:
    """An entry of the JSON of the type that it has to have."""
    value = content.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInput(f"{path}: {key!r} is not of type {kind.__name__}, as in {WHAT}; write it again")
    return value


def _one_of(path: str | Path, content: Mapping[str, Any], key: str, known: Sequence[str]) -> str:
    value = _field(path, content, key, str)
    if value not in known:
        raise BadInput(f"{path}: {key!r} is {value[:40]!r}, expected {', '.join(known)}; write it again")
    return value


def _number(path: str | Path, content: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None for null."""
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:
        raise BadInput(f"{path}: {key!r} is not a finite number; write the certificate again")
    return float(value)


def _reference(path: str | Path, content: Mapping[str, Any], key: str) -> Reference:
    found = _field(path, content, key, dict)
    return Reference(_field(path, found, "name", str), _field(path, found, "sha256", str))


def _within(path: str | Path, content: Mapping[str, Any]) -> Perturbation:
    within = parse(_field(path, content, "set", str)[:200])
    if not isinstance(within, Linf | L2 | L1):
        raise BadInput(f"{path}: the set {within} is not linf, l2 or l1; write the certificate again")
    return with_range(within, _number(path, content, "low"), _number(path, content, "high"))


def _entry(path: str | Path, place: int, content: Any) -> Entry:
    if not isinstance(content, dict):
        raise BadInput(f"{path}: input {place} has no fields; write the certificate again")
    index, label = (_field(path, content, key, int) for key in ("index", "label"))
    if not (0 <= index < 2**62 and 0 <= label < 2**62):
        raise BadInput(f"{path}: input {place} has index {index} and label {label}; both count from 0")
    bound = _number(path, content, "bound")
    return Entry(
        index,
        label,
        _one_of(path, content, "verdict", VERDICTS),
        -math.inf if bound is None else bound,
        None if content.get("slopes") is None else _field(path, content, "slopes", str),
    )


def _slopes(path: str | Path, count: int) -> dict[str, Tensor]:
    """The slopes beside the certificate, checked to be choices in [0, 1] for each of its inputs."""
    place = io.existing_file(beside(path), "the slopes of a certificate", at_most=LARGEST)
    found = io.read_tensors(place, "the slopes of a certificate")
    for name, tensor in found.items():
        fits = tensor.is_floating_point() and tensor.ndim >= 2 and len(tensor) == count
        if not fits or not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise BadInput(
                f"{place}: {name[:80]!r} is not made of numbers from 0 to 1 for each of {count} inputs; "
                "write the certificate again"
            )
    return found
