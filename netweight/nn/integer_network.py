"""A network whose every operation between its input quantizer and its output is on integers.

    network = deployment.integer.lower(small, data)     # or read(folder)
    network(x)                                          # int32 logits; worth network.scale each
    executed(network, x)                                # every operator that ran, and on which dtypes

Only `Entrance` steps read real numbers; behind them no floating-point tensor exists, which `executed` watches
operator by operator. That no sum can leave int32 follows from the weights alone and is checked whenever a
network is made or read (`reaches`). A folder holds integer.safetensors and integer.json, nothing pickled.

Paper: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, arXiv:2011.10680.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from netweight.core import io
from netweight.core.errors import BadInput, DoesNotFit, NetweightError
from netweight.core.stored import put_together, take_apart
from netweight.nn.dyadic import INT32
from netweight.nn.integer_steps import Concat, Entrance, Join, Move, Pool, Product, Range, Step

INPUT = "input"  # the name of the real numbers that come in
FORMAT = 1
NAMES = ("integer.json", "integer.safetensors")
LARGEST = 1 << 28  # numbers in a value of one example


@dataclass(frozen=True)
class Call:
    """One step: its name, the names of what it reads."""

    name: str
    inputs: tuple[str, ...]
    step: Step


@dataclass(frozen=True)
class Reach:
    """What is known of a value before anything runs: shape for one example, range (None: real numbers)."""

    shape: tuple[int, ...]
    within: Range | None


class IntegerNetwork(nn.Module):
    """calls in an order of evaluation. shape: of one input. scales: by value, what 1 is worth in it.

    scales are float64, broadcast against `b *shape`, and never read while the network runs: they belong to
    its simulation (`nn.integer_twin`). The output has one, `scale`.
    """

    def __init__(
        self, calls: Sequence[Call], shape: Sequence[int], scales: Mapping[str, Tensor], output: str
    ) -> None:
        super().__init__()
        self.calls, self.shape = tuple(calls), tuple(shape)
        self.scales, self.output = dict(scales), output
        found = reaches(self.calls, self.shape)
        if output not in found or found[output].within is None:
            raise DoesNotFit(
                f"the output {output!r} is no integer; the network has no layer to run on integers"
            )
        if any(
            t.dtype != torch.float64 or not bool((t.isfinite() & (t > 0)).all()) for t in self.scales.values()
        ):
            raise DoesNotFit("a scale is not positive and finite; calibrate on other data")
        missing = [name for name, reach in found.items() if reach.within and name not in self.scales]
        if missing or self.scales[output].numel() != 1:
            raise DoesNotFit(
                f"the value {(missing or [output])[0]!r} lacks its scale; lower the network again"
            )

    @property
    def scale(self) -> float:
        """What 1 is worth in the output."""
        return float(self.scales[self.output])

    def forward(self, x: Tensor) -> Tensor:
        """The logits as int32, `b *out`, for real inputs `b *shape`."""
        values = self.entered(x)
        run(self.calls, values, self.output, lambda call, *q: call.step.run(*q))
        return values[self.output]

    def entered(self, x: Tensor) -> dict[str, Tensor]:
        """The inputs on their grids, by name: all that reads real numbers."""
        if tuple(x.shape[1:]) != self.shape or not x.is_floating_point():
            raise DoesNotFit(
                f"inputs of {x.dtype} {tuple(x.shape[1:])}, the network takes real numbers {self.shape}; "
                "give examples of that shape"
            )
        found = {INPUT: x}
        for call in self.calls:
            if enters(call) or (
                isinstance(call.step, Move) and call.inputs[0] in found and _real(call, self)
            ):
                found[call.name] = call.step.run(found[call.inputs[0]])
        return {name: value for name, value in found.items() if not value.is_floating_point()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerNetwork:
        """Steps follow to another device; their dtypes are what they are."""
        super()._apply(fn, recurse)
        device = fn(torch.zeros(1)).device
        self.calls = tuple(replace(call, step=_moved(call.step, device)) for call in self.calls)
        return self


def enters(call: Call) -> bool:
    """Whether the call takes real numbers to integers."""
    return isinstance(call.step, Entrance)


def _real(call: Call, network: IntegerNetwork) -> bool:
    return call.name not in network.scales


def _moved(thing: Any, device: torch.device) -> Any:
    """A step with its tensors on the device; what it holds is not checked again."""
    moved = copy.copy(thing)
    for each in fields(thing):
        value = getattr(thing, each.name)
        if isinstance(value, Tensor):
            object.__setattr__(moved, each.name, value.to(device))
        elif is_dataclass(value):
            object.__setattr__(moved, each.name, _moved(value, device))
    return moved


def run(calls: Sequence[Call], values: dict[str, Any], output: str, step: Callable[..., Any]) -> None:
    """Fill `values` call by call; each is dropped after its last use. Calls that have a value are skipped."""
    last = {name: index for index, call in enumerate(calls) for name in call.inputs}
    for index, call in enumerate(calls):
        if call.name not in values and all(name in values for name in call.inputs):
            values[call.name] = step(call, *(values[name] for name in call.inputs))
        for name in call.inputs:
            if last[name] == index and name != output:
                values.pop(name, None)


# What is known before it runs ----------------------------------------------------------------------------


def reaches(calls: Sequence[Call], shape: Sequence[int]) -> dict[str, Reach]:
    """Shape and range of every value. Raises `DoesNotFit` naming the first that could leave int32."""
    found = {INPUT: Reach(tuple(shape), None)}
    for call in calls:
        if call.name in found or not call.inputs or any(name not in found for name in call.inputs):
            raise DoesNotFit(f"{call.name}: it does not follow from {call.inputs}; lower the network again")
        found[call.name] = reach_of(call, [found[name] for name in call.inputs])
    return found


def reach_of(call: Call, inputs: Sequence[Reach]) -> Reach:
    """Of one call, its inputs given."""
    step, ranges = call.step, [each.within for each in inputs]
    shape = _shape(call, inputs)
    if isinstance(step, Move) and ranges == [None]:
        return Reach(shape, None)
    if enters(call) != (ranges == [None]) or None in ranges[1:]:
        raise DoesNotFit(f"{call.name}: an entrance alone reads real numbers; lower the network again")
    if len(inputs) > 1 and not isinstance(step, Join | Concat):
        raise DoesNotFit(f"{call.name}: a {type(step).__name__} reads one value; lower the network again")
    match step:
        case Entrance():
            within = step.reach()
        case Join() | Concat():
            within = step.reach(*ranges)
        case Pool():
            within = step.reach(*ranges[0], math.prod(step.kernel) if step.kernel else _met(inputs[0], shape))
        case _:
            within = step.reach(*ranges[0])
    size = step.largest(*ranges[0]) if isinstance(step, Product) else max(abs(end) for end in within)
    if size > INT32[1]:
        raise DoesNotFit(
            f"{call.name}: a sum may reach {size}, int32 ends at {INT32[1]}; use fewer bits for that layer"
        )
    return Reach(shape, within)


def _met(before: Reach, shape: Sequence[int]) -> int:
    return math.prod(before.shape) // max(1, math.prod(shape))


def _shape(call: Call, inputs: Sequence[Reach]) -> tuple[int, ...]:
    """Found on the meta device: nothing is computed and no memory taken."""
    dtypes = [torch.float64 if each.within is None else torch.int32 for each in inputs]
    given = [torch.empty(1, *each.shape, dtype=d, device="meta") for each, d in zip(inputs, dtypes)]
    try:
        made = _moved(call.step, torch.device("meta")).run(*given)
    except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DoesNotFit(f"{call.name}: it does not run on {inputs[0].shape} ({reason})") from error
    if len(made) != 1 or not 0 < made.numel() <= LARGEST:
        raise DoesNotFit(f"{call.name}: no value of one example has the shape {tuple(made.shape)}")
    return tuple(made.shape[1:])


# What has run --------------------------------------------------------------------------------------------


class IntegersOnly(TorchDispatchMode):
    """Counts operators by name and dtype; one that reads or makes a floating-point tensor raises."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at its tensors."""
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors([args, kwargs, made]):
            if tensor.is_floating_point() or tensor.is_complex():
                raise DoesNotFit(f"{func}: a tensor of {tensor.dtype} inside a network of integers")
        for tensor in _tensors([made]):
            self.seen[str(func), str(tensor.dtype).removeprefix("torch.")] += 1
        return made


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value
    return [t for v in values for t in _tensors(v)] if isinstance(value, Mapping | list | tuple) else []


def executed(network: IntegerNetwork, x: Tensor) -> Counter[tuple[str, str]]:
    """How often each operator ran behind the entrances, with the dtype of its result.

    Raises `DoesNotFit` naming the operator if a floating-point tensor is read or made there.
    """
    values = network.entered(x)
    with IntegersOnly() as watched:
        run(network.calls, values, network.output, lambda call, *q: call.step.run(*q))
    return watched.seen


# Files ---------------------------------------------------------------------------------------------------


def write(network: IntegerNetwork, folder: str | Path) -> None:
    """integer.safetensors, then integer.json with its hash: a folder without the second is not whole."""
    folder = Path(folder)
    tensors: dict[str, Tensor] = {f"|{name}": scale for name, scale in network.scales.items()}
    said = []
    for call in network.calls:
        inner, settings = take_apart(call.step)
        tensors.update({f"{call.name}|{part}": tensor for part, tensor in inner.items()})
        said.append({"name": call.name, "inputs": list(call.inputs), "step": settings})
    (folder / NAMES[0]).unlink(missing_ok=True)
    io.write_tensors(folder / NAMES[1], {name: tensor.clone() for name, tensor in tensors.items()})
    head = {"format": FORMAT, "shape": list(network.shape), "output": network.output, "calls": said}
    io.write_json(folder / NAMES[0], {**head, "sha256": _sha256(folder / NAMES[1])})


def read(folder: str | Path) -> IntegerNetwork:
    """What `write` wrote; every step is checked and every range found anew. Raises `BadInput` else."""
    folder = Path(folder)
    head = io.read_json(folder / NAMES[0], "the description of an integer network")
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise BadInput(f"{folder}: written in another format; use the version of netweight that wrote it")
    tensors = io.read_tensors(folder / NAMES[1], "the tensors of an integer network")
    if head.get("sha256") != _sha256(folder / NAMES[1]):
        raise BadInput(f"{folder}: {NAMES[1]} is not the file that {NAMES[0]} describes; export it again")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition("|")
        parts.setdefault(owner, {})[part] = tensor
    try:
        calls = [
            Call(
                str(c["name"]),
                tuple(map(str, c["inputs"])),
                put_together(parts.get(str(c["name"]), {}), c["step"]),
            )
            for c in head["calls"]
        ]
        if not all(isinstance(call.step, Step) for call in calls):
            raise BadInput(f"{folder}: it names a form that is no step of an integer network")
        return IntegerNetwork(calls, [int(n) for n in head["shape"]], parts.get("", {}), str(head["output"]))
    except NetweightError as error:
        raise BadInput(f"{folder}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"{folder}: what it describes is no integer network ({reason}); export it again"
        ) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
