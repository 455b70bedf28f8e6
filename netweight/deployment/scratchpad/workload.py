"""What is scheduled onto a scratchpad: operators, the tensors they read and make, and a schedule of them.

A captured graph becomes a `Workload`: elementwise operators on one tensor join the operator that makes it
(its result is used nowhere else), views are no operators and alias the tensor they look at, and a weight is a
tensor that lies on the host. In every step one operator runs; all it reads and what it makes is resident
then.

A `Schedule` is an order and `Stay`s: a tensor lies at one address from step `start` to before step `stop`. A
stay begins by making the tensor or by loading it. Then

    traffic = sum of S_t over loads + sum of S_t over tensors that are graph outputs or are ever loaded again,
    compulsory = S_t of every source that is read + S_t of every graph output that an operator makes,

and traffic - compulsory is what an order, a choice of what to drop, and addresses can save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from netweight.core.errors import BadInput, ImpossibleBudget
from netweight.core.graph import Graph, Node

# fmt: off
VIEWS = frozenset([
    "aten.reshape", "aten.view", "aten.permute", "aten.transpose", "aten.t", "aten.squeeze", "aten.unsqueeze",
    "aten.expand", "aten.flatten", "aten.slice", "aten.select", "aten.split", "aten.split_with_sizes",
    "aten.unbind", "aten.chunk", "aten.narrow", "aten.diagonal", "getitem",
])
ELEMENTWISE = frozenset([
    "aten.relu", "aten.sigmoid", "aten.tanh", "aten.gelu", "aten.silu", "aten.hardtanh", "aten.hardswish",
    "aten.hardsigmoid", "aten.mish", "aten.softplus", "aten.leaky_relu", "aten.elu", "aten.exp", "aten.log",
    "aten.sqrt", "aten.rsqrt", "aten.abs", "aten.neg", "aten.reciprocal", "aten.clamp", "aten.clamp_min",
    "aten.clamp_max", "aten.pow", "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.where", "aten.erf",
    "aten._native_batch_norm_legit_no_training", "aten._to_copy", "aten.sin", "aten.cos",
])
# fmt: on


@dataclass(frozen=True)
class Workload:
    """Operators 0 .. n-1 in an order that can be run; operator i makes tensor i, sources come after these.

    names: of the tensors. reads: of each operator, the tensors it reads, each once. sizes: bytes of each
    tensor. outputs: tensors that have to be on the host in the end.
    Raises `BadInput` for a read of what is made later, for sizes below 0 and for places that are not there.
    """

    names: tuple[str, ...]
    reads: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    outputs: frozenset[int]
    nodes: tuple[tuple[str, ...], ...] = field(default=(), compare=False)  # of the graph, in each operator

    def __post_init__(self) -> None:
        if not self.reads:
            raise BadInput("the network has no operator to schedule; give one that computes something")
        if len(self.names) != len(self.sizes) or len(self.sizes) < self.n:
            raise BadInput(f"{len(self.sizes)} sizes, {len(self.names)} names: give one for each tensor")
        for i, read in enumerate(self.reads):
            if len(set(read)) != len(read) or any(
                not 0 <= t < len(self.sizes) or i <= t < self.n for t in read
            ):
                raise BadInput(
                    f"operator {i} reads {read}: give each tensor once, made by an earlier operator"
                )
        if min(self.sizes) < 0 or any(not 0 <= t < len(self.sizes) for t in self.outputs):
            raise BadInput("sizes are bytes from 0 up, outputs are tensors; mend the workload")

    @property
    def n(self) -> int:
        """The number of operators."""
        return len(self.reads)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Of each tensor, the operators that read it, ascending."""
        found: list[list[int]] = [[] for _ in self.sizes]
        for i, read in enumerate(self.reads):
            for t in read:
                found[t].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def before(self) -> tuple[frozenset[int], ...]:
        """Of each operator, all operators that have to run before it."""
        found: list[frozenset[int]] = []
        for read in self.reads:
            direct = [t for t in read if t < self.n]
            found.append(frozenset(direct).union(*(found[t] for t in direct)))
        return tuple(found)

    @cached_property
    def passing(self) -> tuple[int, ...]:
        """Of each operator, the bytes of sources that it alone reads: they are there in its step only."""
        return tuple(sum(self.sizes[t] for t in read if self.private(t)) for read in self.reads)

    def private(self, t: int) -> bool:
        """Whether t is a source that one operator alone reads (most weights are)."""
        return t >= self.n and len(self.users[t]) == 1

    def touched(self, i: int) -> tuple[int, ...]:
        """What has to be resident while operator i runs."""
        return (*self.reads[i], i)

    def need(self, i: int) -> int:
        """Bytes that have to be resident while operator i runs."""
        return sum(self.sizes[t] for t in self.touched(i))

    @property
    def least(self) -> int:
        """Bytes of the smallest memory that any schedule fits in: the largest step."""
        return max(map(self.need, range(self.n)))

    @property
    def compulsory(self) -> int:
        """Bytes moved by every schedule: sources that are read once, outputs that are made once."""
        loads = sum(self.sizes[t] for t in range(self.n, len(self.sizes)) if self.users[t])
        return loads + sum(self.sizes[t] for t in self.outputs if t < self.n)

    def check_room(self, memory: int) -> None:
        """Raises `ImpossibleBudget` where the largest step does not fit."""
        if memory < self.least:
            worst = max(range(self.n), key=self.need)
            raise ImpossibleBudget(
                f"memory={memory}: operator {self.names[worst]} alone needs {self.least} bytes for "
                f"what it reads and makes; the smallest possible memory is {self.least} bytes"
            )


@dataclass(frozen=True)
class Stay:
    """Tensor `tensor` is resident during steps start .. stop-1, at `address` (-1: none chosen yet)."""

    tensor: int
    start: int
    stop: int
    address: int = -1

    def at(self, address: int) -> Stay:
        """The same stay at an address."""
        return replace(self, address=address)


@dataclass(frozen=True)
class Schedule:
    """order: operators by step. stays: by start, then tensor."""

    order: tuple[int, ...]
    stays: tuple[Stay, ...]

    def loads(self) -> list[Stay]:
        """The stays that begin with a load from the host."""
        return [stay for stay in self.stays if self.order[stay.start] != stay.tensor]

    def traffic(self, work: Workload) -> int:
        """Bytes loaded and written."""
        loaded = [stay.tensor for stay in self.loads()]
        written = {t for t in (*loaded, *work.outputs) if t < work.n}
        return sum(work.sizes[t] for t in loaded) + sum(work.sizes[t] for t in written)

    def occupied(self, work: Workload) -> list[int]:
        """Bytes resident in each step."""
        total = [0] * len(self.order)
        for stay in self.stays:
            for s in range(stay.start, stay.stop):
                total[s] += work.sizes[stay.tensor]
        return total


def schedule_of(work: Workload, order: Sequence[int], resident: Sequence[Iterable[int]]) -> Schedule:
    """The schedule with those residents, less what stays without being touched again before it is dropped.

    A stay lasts from the making or a use to the last use that it reaches without a break.
    """
    place = {i: s for s, i in enumerate(order)}
    inside = [set(r) for r in resident]
    stays: list[Stay] = []
    for t in range(len(work.sizes)):
        touches = sorted(place[i] for i in (*work.users[t], *((t,) if t < work.n else ())))
        begun = None
        for here, after in zip(touches, [*touches[1:], math.inf]):
            begun = here if begun is None else begun
            if after == math.inf or any(t not in inside[s] for s in range(here, int(after) + 1)):
                stays.append(Stay(t, begun, here + 1))
                begun = None
    return Schedule(tuple(order), tuple(sorted(stays, key=lambda s: (s.start, s.tensor))))


def workload(graph: Graph, *, fuse: bool = True) -> Workload:
    """What of a captured graph is scheduled; fuse: elementwise operators join the one before them.

    Bytes are those of the captured batch and dtypes; a weight that is stored packed counts as decoded.
    """
    owner: dict[str, str] = {}  # a value: the tensor that holds its bytes
    read: dict[str, list[str]] = {}  # tensors that make operators, and what these read
    parts: dict[str, list[str]] = {}
    sizes = {node.name: _bytes(node) for node in graph.inputs}
    sizes |= {name: value.numel() * value.element_size() for name, value in graph.constants.items()}
    owner |= {name: name for name in sizes}
    uses = _uses(graph)
    tuples = _tuple_bytes(graph)
    for node in graph.nodes:
        held = list(dict.fromkeys(owner[name] for name in node.inputs))
        if node.op in VIEWS and held:
            owner[node.name] = owner[node.inputs[0]]
            continue
        made = [t for t in held if t in read]
        joins = fuse and len(made) == 1 and _joins(node, parts[made[0]][-1], uses, graph)
        group = made[0] if joins else node.name
        if group != node.name:
            read[group] += [t for t in held if t not in read[group] and t != group]
        else:
            read[group] = held
        parts.setdefault(group, []).append(node.name)
        sizes[group] = tuples.get(node.name, _bytes(node))
        owner[node.name] = group
    made = [*read]
    used = {t for held in read.values() for t in held}
    sources = [name for name in sizes if name not in read and name in used]
    place = {name: index for index, name in enumerate([*made, *sources])}
    return Workload(
        names=(*made, *sources),
        reads=tuple(tuple(place[t] for t in read[name]) for name in made),
        sizes=tuple(sizes[name] for name in (*made, *sources)),
        outputs=frozenset(place[owner[name]] for name in graph.outputs if owner.get(name) in place),
        nodes=tuple(tuple(parts[name]) for name in made),
    )


def _joins(node: Node, last: str, uses: Mapping[str, int], graph: Graph) -> bool:
    """Whether it may run in the step that makes `last`: elementwise on that alone, read by nobody else."""
    alone = node.inputs[0] == last and uses[last] == 1 and last not in graph.outputs
    rest = [name for name in node.inputs if name != last]
    return node.op in ELEMENTWISE and alone and all(name in graph.constants for name in rest)


def _uses(graph: Graph) -> dict[str, int]:
    """By how many operators each value is read."""
    found = dict.fromkeys([n.name for n in (*graph.nodes, *graph.inputs)], 0) | dict.fromkeys(
        graph.constants, 0
    )
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            found[name] += 1
    return found


def _bytes(node: Node) -> int:
    return math.prod(node.shape) * node.dtype.itemsize


def _tuple_bytes(graph: Graph) -> dict[str, int]:
    """Bytes of the operators that give several tensors: of the ones that are read."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "getitem":
            found[node.inputs[0]] = found.get(node.inputs[0], 0) + _bytes(node)
    return found


def relabelled(work: Workload, order: Sequence[int]) -> Workload:
    """The same work with its operators numbered by an order that can be run."""
    place = {old: new for new, old in enumerate(order)} | {t: t for t in range(work.n, len(work.sizes))}
    tensors = [*order, *range(work.n, len(work.sizes))]
    return Workload(
        tuple(work.names[t] for t in tensors),
        tuple(tuple(place[t] for t in work.reads[i]) for i in order),
        tuple(work.sizes[t] for t in tensors),
        frozenset(place[t] for t in work.outputs),
        tuple(work.nodes[i] for i in order) if work.nodes else (),
    )
