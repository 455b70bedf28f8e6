"""VNN-LIB 1.0: the language in which VNN-COMP says what a network must never do (vnnlib.org).

    prop = read("prop_3.vnnlib")        # or .vnnlib.gz

    (declare-const X_0 Real)                    the inputs X_i and outputs Y_j, in the order of the ONNX file
    (assert (<= X_0 0.5))                       every assertion has to hold for a counterexample
    (assert (or (and (>= Y_1 Y_0)) (and (>= Y_2 (+ Y_0 0.1)))))

The property describes what is unsafe: an input in one of its boxes whose outputs satisfy one of the
conjunctions of that box. "sat" means that such an input exists. Any nesting of and, or is multiplied out;
terms are linear. Numbers are read as the nearest float64, sums of them are computed in float64.

The file is hostile: its size, nesting and number of cases are limited, and nothing of it is evaluated.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core import io
from netweight.core.errors import BadInput

LARGEST = 256 << 20  # bytes of a file, unpacked
DEEPEST = 64  # parentheses inside each other
MOST = 1 << 18  # disjuncts of an assertion, or of all of them together
NUMBERS = 1 << 27  # of all boxes together
TOKEN = re.compile(r"[()]|[^\s();]+|;[^\n]*")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NAME = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
IGNORED = frozenset(["set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"])


@dataclass(frozen=True, eq=False)
class Unsafe:
    """The outputs with rows @ y <= limits, all of them."""

    rows: Float[Tensor, "k out"]
    limits: Float[Tensor, " k"]

    def excess(self, y: Float[Tensor, "b out"]) -> Float[Tensor, " b"]:
        """max over the rows of rows @ y - limits: the outputs are unsafe where it is at most 0."""
        return (y @ self.rows.to(y).T - self.limits.to(y)).amax(1)


@dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs, float64, lower <= x <= upper, and what is unsafe in it: any one of `unsafe`."""

    lower: Float[Tensor, " in"]
    upper: Float[Tensor, " in"]
    unsafe: tuple[Unsafe, ...]

    def excess(self, y: Float[Tensor, "b out"]) -> Float[Tensor, " b"]:
        """How far the outputs are from the nearest unsafe set: unsafe where it is at most 0."""
        return torch.stack([one.excess(y) for one in self.unsafe]).amin(0)


@dataclass(frozen=True, eq=False)
class Property:
    """What must not happen, box by box; the numbers of inputs and outputs that were declared."""

    cases: tuple[Case, ...]
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Atom:
    """sum of coefficient times variable <= limit, all variables of one kind, "X" or "Y"."""

    kind: str
    terms: tuple[tuple[int, float], ...]
    limit: float


def read(path: str | Path) -> Property:
    """The property of a .vnnlib or .vnnlib.gz file; raises `BadInput` for one that cannot be understood."""
    path = io.existing_file(path, "a VNN-LIB property", at_most=LARGEST)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a whole VNN-LIB text ({error}); fetch or write it again") from error
    if len(content) > LARGEST:
        raise BadInput(f"{path}: unpacks to more than the {LARGEST} bytes that a VNN-LIB property may have")
    return parse(text, str(path))


def parse(text: str, where: str = "the property") -> Property:
    """The property that the text describes; `where` names it in the sentence of a `BadInput`."""
    try:
        commands = _tree(text)
        declared = _declared(commands)
        asserted = [_disjuncts(body, declared) for body in _asserted(commands)]
        return _property(asserted, declared)
    except _Wrong as wrong:
        raise BadInput(f"{where}: {wrong}") from None


class _Wrong(Exception):
    """What is wrong with a text, without its name."""


# Text to nested lists ------------------------------------------------------------------------------------


def _tree(text: str) -> list[Any]:
    """The nested lists of words that parentheses make; comments are left out."""
    stack: list[list[Any]] = [[]]
    for found in TOKEN.finditer(text):
        word = found[0]
        if word == "(":
            if len(stack) > DEEPEST:
                raise _Wrong(f"more than {DEEPEST} parentheses lie inside each other; write it flatter")
            stack.append([])
        elif word == ")":
            if len(stack) == 1:
                raise _Wrong(f"a parenthesis is closed at character {found.start()} that was never opened")
            done = stack.pop()
            stack[-1].append(done)
        elif word[0] != ";":
            stack[-1].append(word)
    if len(stack) > 1:
        raise _Wrong(f"{len(stack) - 1} parentheses are never closed; the file is not whole")
    return stack[0]


def _declared(commands: Sequence[Any]) -> dict[str, int]:
    """How many inputs "X" and outputs "Y" there are; each X_i and Y_j up to that number is declared once."""
    seen: dict[str, set[int]] = {"X": set(), "Y": set()}
    for command in commands:
        if not isinstance(command, list) or not command or not isinstance(command[0], str):
            raise _Wrong(f"{_short(command)} is no command; expected (declare-const ...) or (assert ...)")
        if command[0] not in ("declare-const", "declare-fun"):
            continue
        name, kind = (command[1], command[-1]) if len(command) >= 3 else ("", "")
        variable = NAME.fullmatch(name) if isinstance(name, str) else None
        if variable is None or kind != "Real":
            raise _Wrong(f"{_short(command)}: expected (declare-const X_0 Real), X for inputs, Y for outputs")
        if int(variable[2]) in seen[variable[1]]:
            raise _Wrong(f"{name} is declared twice; declare each variable once")
        seen[variable[1]].add(int(variable[2]))
    for kind, places in seen.items():
        if not places:
            raise _Wrong(f"no {kind}_0 is declared; a property needs inputs X_i and outputs Y_j")
        if max(places) != len(places) - 1:
            raise _Wrong(f"{kind}_{_gap(places)} is not declared, but {kind}_{max(places)} is; declare all")
    return {kind: len(places) for kind, places in seen.items()}


def _gap(places: set[int]) -> int:
    return next(i for i in range(len(places)) if i not in places)


def _asserted(commands: Sequence[Any]) -> list[Any]:
    """What is asserted, in order."""
    found = []
    for command in commands:
        if command[0] == "assert":
            if len(command) != 2:
                raise _Wrong(f"{_short(command)}: an assertion holds one formula; join several by (and ...)")
            found.append(command[1])
        elif command[0] not in IGNORED and not command[0].startswith("declare-"):
            raise _Wrong(f"{command[0]!r} is no command of VNN-LIB 1.0; expected declare-const or assert")
    return found


# Formulas to disjunctions of conjunctions ----------------------------------------------------------------


def _disjuncts(formula: Any, declared: Mapping[str, int]) -> list[tuple[Atom, ...]]:
    """The formula multiplied out: one of the conjunctions has to hold."""
    if not isinstance(formula, list) or len(formula) < 2 or not isinstance(formula[0], str):
        raise _Wrong(f"{_short(formula)} is no formula; expected (<= a b), (>= a b), (and ...) or (or ...)")
    word, *rest = formula
    if word in ("<=", ">="):
        if len(rest) != 2:
            raise _Wrong(f"{_short(formula)}: {word} compares two terms")
        return [(_atom(*(rest if word == "<=" else rest[::-1]), declared),)]
    if word == "or":
        found = [each for part in rest for each in _disjuncts(part, declared)]
    elif word == "and":
        parts = [_disjuncts(part, declared) for part in rest]
        _not_too_many(math.prod(len(part) for part in parts))
        found = [tuple(atom for each in chosen for atom in each) for chosen in product(*parts)]
    else:
        raise _Wrong(f"{word!r} is not known in {_short(formula)}; expected <=, >=, and, or")
    _not_too_many(len(found))
    return found


def _not_too_many(count: int) -> None:
    if count > MOST:
        raise _Wrong(f"multiplied out it has {count} cases, more than {MOST}; split it into several files")


def _atom(low: Any, high: Any, declared: Mapping[str, int]) -> Atom:
    """low <= high."""
    terms, constant = _linear(low, declared)
    for variable, coefficient in (more := _linear(high, declared))[0].items():
        terms[variable] = terms.get(variable, 0.0) - coefficient
    limit = more[1] - constant
    kept = {variable: c for variable, c in terms.items() if c != 0}
    kinds = {kind for kind, _ in kept}
    if not kept:
        raise _Wrong(f"(<= {_short(low)} {_short(high)}) depends on no variable; leave it out")
    if len(kinds) == 2:
        raise _Wrong(f"(<= {_short(low)} {_short(high)}) relates inputs to outputs; only boxes are read")
    if not all(math.isfinite(c) for c in (*kept.values(), limit)):
        raise _Wrong(f"(<= {_short(low)} {_short(high)}) leaves the range of float64; scale it")
    return Atom(kinds.pop(), tuple((place, c) for (_, place), c in kept.items()), limit)


def _linear(term: Any, declared: Mapping[str, int]) -> tuple[dict[tuple[str, int], float], float]:
    """(coefficients by variable, constant) of a linear term."""
    if isinstance(term, str):
        variable = NAME.fullmatch(term)
        if variable is not None:
            if int(variable[2]) >= declared[variable[1]]:
                raise _Wrong(f"{term} is not declared; declare it, or correct its name")
            return {(variable[1], int(variable[2])): 1.0}, 0.0
        if NUMBER.fullmatch(term) is None:
            raise _Wrong(f"{_short(term)} is neither a number nor a variable X_i or Y_j")
        return {}, float(term)
    if not term or term[0] not in ("+", "-", "*") or len(term) < 2:
        raise _Wrong(f"{_short(term)} is no linear term; expected numbers, variables, +, - and *")
    first, *rest = [_linear(part, declared) for part in term[1:]]
    if term[0] == "*":
        return _times([first, *rest], term)
    if term[0] == "-" and not rest:
        return _scaled(first, -1.0)
    terms, constant = dict(first[0]), first[1]
    sign = -1.0 if term[0] == "-" else 1.0
    for more, value in rest:
        constant += sign * value
        for variable, coefficient in more.items():
            terms[variable] = terms.get(variable, 0.0) + sign * coefficient
    return terms, constant


def _times(parts: Sequence[tuple[dict[tuple[str, int], float], float]], term: Any) -> Any:
    variable = [part for part in parts if part[0]]
    if len(variable) > 1:
        raise _Wrong(f"{_short(term)} multiplies variables; only linear terms are read")
    factor = math.prod(constant for terms, constant in parts if not terms)
    return _scaled(variable[0], factor) if variable else ({}, factor)


def _scaled(part: tuple[dict[tuple[str, int], float], float], factor: float) -> Any:
    return {variable: factor * c for variable, c in part[0].items()}, factor * part[1]


# Conjunctions to boxes and what is unsafe in them --------------------------------------------------------


def _property(asserted: Sequence[list[tuple[Atom, ...]]], declared: Mapping[str, int]) -> Property:
    """Each choice of one disjunct per assertion; choices with the same box become one case."""
    inputs, outputs = declared["X"], declared["Y"]
    common = [atom for disjuncts in asserted if len(disjuncts) == 1 for atom in disjuncts[0]]
    several = [disjuncts for disjuncts in asserted if len(disjuncts) > 1]
    count = math.prod(len(disjuncts) for disjuncts in several)
    _not_too_many(count)
    around = _narrowed([-math.inf] * inputs, [math.inf] * inputs, common)
    found: dict[Any, tuple[list[float], list[float], list[Unsafe]]] = {}
    for chosen in product(*several):
        atoms = [atom for each in chosen for atom in each]
        bounds = [atom for atom in atoms if atom.kind == "X"]
        lower, upper = _narrowed(list(around[0]), list(around[1]), bounds) if bounds else around
        if any(a > b for a, b in zip(lower, upper)):
            continue
        key = (tuple(lower), tuple(upper)) if bounds else None
        case = found.setdefault(key, (lower, upper, []))
        case[2].append(_unsafe([atom for atom in (*common, *atoms) if atom.kind == "Y"], outputs))
        if len(found) * inputs > NUMBERS:
            raise _Wrong(f"its boxes hold more than {NUMBERS} numbers; split it into several files")
    if not found:
        empty = next((i for i, (a, b) in enumerate(zip(*around)) if a > b), None)
        what = "all of its boxes are" if empty is None else f"the range of X_{empty} is"
        raise _Wrong(f"{what} empty, lower above upper; check the order of the bounds")
    return Property(tuple(_case(*one) for one in found.values()), inputs, outputs)


def _narrowed(
    lower: list[float], upper: list[float], atoms: Sequence[Atom]
) -> tuple[list[float], list[float]]:
    """The box cut by bounds on single inputs, in place."""
    for atom in atoms:
        if atom.kind == "Y":
            continue
        if len(atom.terms) > 1:
            names = " and ".join(f"X_{place}" for place, _ in atom.terms[:2])
            raise _Wrong(f"an assertion relates {names}; only boxes of inputs are read")
        ((place, coefficient),) = atom.terms
        bound = atom.limit / coefficient
        if coefficient > 0:
            upper[place] = min(upper[place], bound)
        else:
            lower[place] = max(lower[place], bound)
    return lower, upper


def _unsafe(atoms: Sequence[Atom], outputs: int) -> Unsafe:
    if not atoms:
        raise _Wrong("it says nothing about the outputs Y_j in one of its cases; assert what is unsafe")
    rows = torch.zeros(len(atoms), outputs, dtype=torch.float64)
    for row, atom in zip(rows, atoms):
        for place, coefficient in atom.terms:
            row[place] = coefficient
    return Unsafe(rows, torch.tensor([atom.limit for atom in atoms], dtype=torch.float64))


def _case(lower: list[float], upper: list[float], unsafe: list[Unsafe]) -> Case:
    for i, (a, b) in enumerate(zip(lower, upper)):
        if not (math.isfinite(a) and math.isfinite(b)):
            side = "lower" if not math.isfinite(a) else "upper"
            raise _Wrong(f"X_{i} has no {side} bound; assert one, since only bounded inputs can be searched")
    sides = [torch.tensor(side, dtype=torch.float64) for side in (lower, upper)]
    return Case(sides[0], sides[1], tuple(unsafe))


def _short(tree: Any) -> str:
    """The beginning of a part of the text, for a sentence."""
    parts: list[str] = []

    def spell(node: Any) -> None:
        if sum(map(len, parts)) > 60:
            return
        if isinstance(node, str):
            parts.append(node[:60])
            return
        parts.append("(")
        for i, inner in enumerate(node[:8]):
            parts.append(" " if i else "")
            spell(inner)
        parts.append(")")

    spell(tree)
    text = "".join(parts)
    return text if len(text) <= 60 else text[:57] + "..."
