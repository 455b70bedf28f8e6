"""What each method of compression/ is, in the words of the survey, so that methods can be told apart.

Source: Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference", 2021,
arXiv:2103.13630, sections III and IV. Plain text that imports nothing of what it names.

    fits("hawq-v3", *parse("arithmetic=dyadic"))       # True
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from netweight.core.errors import BadInput, unknown

What = Literal["weights", "activations", "gradients"]
Values = Literal["uniform", "non-uniform", "codebook", "pruned"]
Zero = Literal["symmetric", "asymmetric", "none"]
Granularity = Literal["tensor", "channel", "group", "token"]
Range = Literal["static", "dynamic", "learnt", "none"]
When = Literal["data-free", "calibration", "training"]
Nearness = Literal["nearest", "learnt", "second-order", "stochastic", "none"]
Mixed = Literal["none", "planner", "sensitivity", "search"]
Arithmetic = Literal["simulated", "integer", "dyadic"]
Help = Literal["clipping", "equalization", "bias", "transform", "splitting", "distillation"]
Extreme = Literal["none", "binary", "ternary"]
Need = Literal["calibration", "labels", "batch norms", "training"]
Cost = Literal["seconds", "minutes", "hours"]


@dataclass(frozen=True)
class Traits:
    """The fields of the survey's map; what a method can be set to do counts.

    what: is made smaller. grid: the values that are stored. zero: of a uniform grid. granularity: what shares
    a scale. range: of activations if these are rounded, else of weights. when: what it looks at. rounding: to
    which neighbour. mixed: how bits differ between layers ("planner": by `core/plan.py`). arithmetic: of the
    products at run time. help: what is done beside rounding. extreme: one bit, or three values. needs: what
    has to be there. cost: for a network of a million weights on one core.
    """

    what: tuple[What, ...] = ("weights",)
    grid: Values = "uniform"
    zero: tuple[Zero, ...] = ("symmetric", "asymmetric")
    granularity: tuple[Granularity, ...] = ("tensor", "channel", "group")
    range: tuple[Range, ...] = ("static",)
    when: When = "calibration"
    rounding: Nearness = "nearest"
    mixed: Mixed = "planner"
    arithmetic: Arithmetic = "simulated"
    help: tuple[Help, ...] = ()
    extreme: Extreme = "none"
    needs: tuple[Need, ...] = ("calibration",)
    cost: Cost = "seconds"


_BOTH: tuple[What, ...] = ("weights", "activations")
_SIGNED: tuple[Zero, ...] = ("symmetric",)
_NO_ZERO: tuple[Zero, ...] = ("none",)
_PRUNED = Traits(
    grid="pruned", zero=_NO_ZERO, granularity=(), range=("none",), when="data-free", rounding="none", needs=()
)

TRAITS = {
    "rtn": Traits(when="data-free", needs=()),
    "clip": Traits(when="data-free", needs=(), help=("clipping",)),
    "gptq": Traits(rounding="second-order"),
    "awq": Traits(
        zero=("asymmetric",), granularity=("channel", "group"), mixed="none",
        help=("clipping", "equalization"),
    ),
    "adaround": Traits(rounding="learnt", cost="minutes"),
    "brecq": Traits(
        what=_BOTH, range=("static", "learnt"), rounding="learnt", mixed="none", help=("distillation",),
        cost="minutes",
    ),
    "smoothquant": Traits(
        what=_BOTH, zero=_SIGNED, granularity=("tensor", "channel", "group", "token"),
        range=("static", "dynamic"), mixed="none", help=("clipping", "equalization"),
    ),
    "equalize": Traits(
        what=_BOTH, when="data-free", needs=(), mixed="none", help=("equalization", "bias", "clipping")
    ),
    "bias-correction": Traits(mixed="none", help=("bias",)),
    "zeroq": Traits(
        what=_BOTH, when="data-free", mixed="sensitivity", help=("clipping",), needs=("batch norms",),
        cost="minutes",
    ),
    "affinequant": Traits(
        what=_BOTH, zero=("asymmetric",), granularity=("channel", "group", "token"),
        range=("dynamic", "learnt"), mixed="none", help=("transform", "clipping", "equalization"),
        cost="minutes",
    ),
    "powerquant": Traits(
        what=_BOTH, grid="non-uniform", zero=_SIGNED, granularity=("tensor", "channel"), when="data-free",
        arithmetic="integer", needs=(),
    ),
    "nupes": Traits(
        what=_BOTH, grid="non-uniform", zero=_SIGNED, granularity=("tensor", "channel"), rounding="learnt",
        arithmetic="integer", cost="minutes",
    ),
    "splitquant": Traits(when="data-free", needs=(), help=("splitting",)),
    "kmeans": Traits(
        grid="codebook", zero=_NO_ZERO, granularity=("tensor",), range=("none",), when="data-free", needs=()
    ),
    "jlcm": Traits(
        grid="codebook", zero=_NO_ZERO, granularity=("group",), range=("none",), rounding="learnt",
        mixed="none", cost="minutes",
    ),
    "hawq-v3": Traits(
        what=_BOTH, zero=_SIGNED, granularity=("channel",), mixed="sensitivity", arithmetic="dyadic"
    ),
    "magnitude": _PRUNED,
    "nm-magnitude": _PRUNED,
    "rd-pruning": Traits(
        grid="pruned", zero=_NO_ZERO, granularity=(), range=("none",), rounding="none", mixed="sensitivity",
        cost="minutes",
    ),
}  # fmt: skip


def traits(slug: str) -> dict[str, tuple[str, ...]] | None:
    """The values of every field, None for a line that is no method of compression/."""
    found = TRAITS.get(slug)
    if found is None:
        return None
    values = {field.name: getattr(found, field.name) for field in fields(Traits)}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}


def allowed() -> dict[str, tuple[str, ...]]:
    """Every field and the values that it may have."""
    found = {}
    for name, kind in get_type_hints(Traits).items():
        values = get_args(kind)
        found[name] = values if isinstance(values[0], str) else get_args(values[0])
    return found


def parse(text: str) -> tuple[str, str]:
    """Field and value of "field=value"; raises `BadInput` for one that there is none of."""
    field, given, value = (part.strip() for part in text.partition("="))
    known = allowed()
    if not given:
        raise BadInput(f"{text!r} is no condition; write for example arithmetic=dyadic")
    if field not in known:
        raise unknown("field", field, known)
    if value not in known[field]:
        raise unknown(field, value, known[field])
    return field, value


def fits(slug: str, field: str, value: str) -> bool:
    """Whether the line has that value in that field."""
    found = traits(slug)
    return found is not None and value in found[field]
