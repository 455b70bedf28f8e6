"""A scratchpad that is played through: every load, run, write and free of a schedule, checked one by one.

The simulator trusts nothing of the solver: it keeps its own map of the memory and its own list of what the
host holds, counts bytes as they move, and stops at the first thing that cannot be. `execute` plays the same
instructions on real bytes: one buffer of M bytes, every tensor a slice of it, every operator run on slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from netweight.core.errors import BadInput, NetweightError
from netweight.core.graph import Graph, call, filled
from netweight.deployment.scratchpad.workload import Schedule, Workload


class Impossible(NetweightError):
    """A schedule that cannot be played: the step, the tensor and what is wrong."""


@dataclass(frozen=True)
class Instruction:
    """do: "free" a tensor, "load" it to an address, "run" what makes it, "store" it to the host."""

    do: Literal["free", "load", "run", "store"]
    step: int
    tensor: int
    address: int = -1


@dataclass(frozen=True)
class Played:
    """Bytes that moved, and the highest byte that was ever used."""

    loaded: int
    stored: int
    peak: int

    @property
    def traffic(self) -> int:
        """All bytes that moved."""
        return self.loaded + self.stored


def instructions(work: Workload, schedule: Schedule) -> list[Instruction]:
    """What the machine is told: frees, loads, one run, then a write of what is needed on the host later."""
    loaded = {stay.tensor for stay in schedule.loads()}
    starts: dict[int, list[Any]] = {}
    stops: dict[int, list[Any]] = {}
    for stay in schedule.stays:
        starts.setdefault(stay.start, []).append(stay)
        stops.setdefault(stay.stop, []).append(stay)
    found: list[Instruction] = []
    for s, i in enumerate(schedule.order):
        found += [Instruction("free", s, stay.tensor) for stay in stops.get(s, ())]
        begun = starts.get(s, ())
        found += [Instruction("load", s, stay.tensor, stay.address) for stay in begun if stay.tensor != i]
        found += [Instruction("run", s, stay.tensor, stay.address) for stay in begun if stay.tensor == i]
        if i in loaded or i in work.outputs:
            found.append(Instruction("store", s, i))
    return found


def replay(work: Workload, schedule: Schedule, memory: int) -> Played:
    """Play the schedule in a memory of that many bytes; raises `Impossible` at the first thing that cannot
    be.

    Checked: one run of every operator, nothing outside the memory, no two tensors on one byte, nothing read
    that is not resident, nothing loaded that the host does not hold, every output on the host in the end.
    """
    held: dict[int, tuple[int, int]] = {}
    host = set(range(work.n, len(work.sizes)))
    run: set[int] = set()
    loaded = stored = peak = 0
    for told in instructions(work, schedule):
        t, size = told.tensor, work.sizes[told.tensor]
        where = f"step {told.step}, {told.do} of {work.names[t]}"
        if told.do in ("load", "run"):
            first, last = told.address, told.address + size
            if t in held or first < 0 or last > memory:
                raise Impossible(
                    f"{where}: bytes {first} to {last} of {memory}, resident before: {t in held}"
                )
            for other, (a, b) in held.items():
                if first < b and a < last:
                    raise Impossible(f"{where}: bytes {first} to {last} are those of {work.names[other]}")
            held[t] = (first, last)
            peak = max(peak, last)
        if told.do == "free" and held.pop(t, None) is None:
            raise Impossible(f"{where}: it is not resident")
        if told.do == "load":
            if t not in host:
                raise Impossible(f"{where}: the host does not hold it")
            loaded += size
        elif told.do == "run":
            absent = [work.names[r] for r in work.reads[t] if r not in held]
            if absent or t in run:
                raise Impossible(f"{where}: not resident: {absent}; run before: {t in run}")
            run.add(t)
        elif told.do == "store":
            if t not in held:
                raise Impossible(f"{where}: it is not resident")
            host.add(t)
            stored += size
    if len(run) < work.n or not work.outputs <= host:
        raise Impossible(f"{len(run)} of {work.n} operators ran; outputs on the host: {work.outputs <= host}")
    return Played(loaded, stored, peak)


def execute(graph: Graph, work: Workload, schedule: Schedule, memory: int, *x: Tensor) -> Any:
    """The network's outputs, computed inside one buffer of `memory` bytes as the schedule says.

    Equal to `core.graph.evaluate` bit for bit where operators do not depend on memory layout. Operators that
    give several tensors are refused with `BadInput`.
    """
    if not work.nodes:
        raise BadInput("this workload comes from no graph; make it with `workload(capture(model, x))`")
    nodes = {node.name: node for node in graph.nodes}
    if any(
        not isinstance(nodes[part].shape, tuple) or _several(graph, part) for g in work.nodes for part in g
    ):
        raise BadInput(
            "an operator of this graph gives several tensors; the schedule can be replayed instead"
        )
    pad = torch.zeros(memory, dtype=torch.uint8)
    place = {name: index for index, name in enumerate(work.names)}
    host: dict[int, Tensor] = {
        place[name]: value.contiguous()
        for name, value in {**graph.constants, **dict(zip((i.name for i in graph.inputs), x))}.items()
        if name in place
    }
    like: dict[int, Tensor] = dict(host)  # shape and dtype of what lies in the pad
    held: dict[int, tuple[int, int]] = {}
    owner = {part: g for g, group in enumerate(work.nodes) for part in group}

    def inside(t: int) -> Tensor:
        first, last = held[t]
        return pad[first:last].clone().view(like[t].dtype).reshape(like[t].shape)

    def value(name: str, known: Mapping[str, Tensor]) -> Tensor:
        if name in known:
            return known[name]
        if name in place and place[name] in held and place[name] >= work.n:
            return inside(place[name])
        if name in owner:
            return inside(owner[name])
        node = nodes[name]  # a view: looked at when it is read
        return call(node, filled(node.params, {n: value(n, known) for n in node.inputs}))

    for told in instructions(work, schedule):
        t = told.tensor
        if told.do == "free":
            held.pop(t)
            continue
        if told.do == "store":
            host[t] = inside(t)
            continue
        if told.do == "run":
            known: dict[str, Tensor] = {}
            for part in work.nodes[t]:
                node = nodes[part]
                known[part] = call(node, filled(node.params, {n: value(n, known) for n in node.inputs}))
            result = known[work.nodes[t][-1]].contiguous()
            like[t] = result
        else:
            result = host[t]
        held[t] = (told.address, told.address + work.sizes[t])
        pad[held[t][0] : held[t][1]] = result.reshape(-1).view(torch.uint8)
    return _outputs(graph, work, owner, host, x)


def _several(graph: Graph, name: str) -> bool:
    return any(node.op == "getitem" and node.inputs[0] == name for node in graph.nodes)


def _outputs(graph: Graph, work: Workload, owner: dict[str, int], host: dict[int, Tensor], x: Any) -> Any:
    """The outputs as the host holds them, views of tensors taken there."""
    nodes = {node.name: node for node in graph.nodes}
    given = {**graph.constants, **dict(zip((i.name for i in graph.inputs), x))}

    def value(name: str) -> Tensor:
        if name in owner:
            return host[owner[name]]
        if name in given:
            return given[name]
        node = nodes[name]
        return call(node, filled(node.params, {n: value(n) for n in node.inputs}))

    found = tuple(value(name) for name in graph.outputs)
    return found[0] if len(found) == 1 else found
