"""Tables from .csv files: every column but one is a feature, the one is what is to be told from them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from netweight.core.errors import BadInput, unknown
from netweight.core.io import existing_file
from netweight.core.task import Data

LARGEST = 1 << 30  # bytes
MOST_CLASSES = 100  # whole numbers with more different values are targets, not classes


def load(path: str | Path, target: str | None = None) -> Data:
    """The examples of a table: x `b f` float32 in the units of the file, y from column `target` (else last).

    The first line is a header if it holds `target`, or no number where the next line has some. Commas,
    semicolons or tabs separate cells. A target of words, or of at most 100 different whole numbers, becomes
    class numbers in sorted order; any other becomes `b 1` float32. Raises `BadInput` for anything else.
    """
    rows, header = _rows(existing_file(path, "a table", at_most=LARGEST), target)
    names = header or [f"number {i + 1}" for i in range(len(rows[0]))]
    place = len(names) - 1 if target is None else _place(header, target)
    if len(names) < 2:
        raise BadInput(f"{path}: there is one column; a table needs at least one feature and the target")
    columns = [[row[i] for row in rows] for i in range(len(names))]
    features = [
        _numbers(c, f"{path}: column {n!r}") for i, (c, n) in enumerate(zip(columns, names)) if i != place
    ]
    y, classes = target_of(columns[place], f"{path}: column {names[place]!r}")
    x = torch.from_numpy(np.stack(features, axis=1).astype(np.float32))
    return Data(x, y, name=Path(path).name, classes=classes)


def _rows(path: Path, target: str | None) -> tuple[list[list[str]], list[str] | None]:
    """The cells of all lines of one length, and of the header, where there is one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.lstrip("\r\n").partition("\n")[0]
        separator = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not a table ({error}); expected a UTF-8 .csv file") from error
    if not lines:
        raise BadInput(f"{path}: the table is empty; expected one line per example")
    width = len(lines[0][1])
    for number, row in lines:
        if len(row) != width:
            raise BadInput(
                f"{path}: line {number} has {len(row)} cells, the first has {width}; mend that line"
            )
    rows = [row for _, row in lines]
    words = not any(_is_number(cell) for cell in rows[0])
    is_header = (words and any(_is_number(c) for row in rows[1:2] for c in row)) or target in rows[0]
    if not is_header:
        return rows, None
    if len(rows) == 1:
        raise BadInput(f"{path}: there is a header and no line below it; expected one line per example")
    return rows[1:], rows[0]


def _place(header: list[str] | None, target: str) -> int:
    """Where the target stands."""
    if header is None or target not in header:
        raise unknown(
            "column", target, header or ["(there is no header: leave the name out for the last column)"]
        )
    return header.index(target)


def _numbers(cells: list[str], where: str) -> np.ndarray:
    """A column of numbers; raises `BadInput` with the first cell that is none."""
    for line, cell in enumerate(cells, 1):
        if not _is_number(cell):
            what = f"holds {cell[:40]!r}" if cell else "is empty"
            raise BadInput(
                f"{where}, example {line} {what}; give a finite number, or leave the column or row out"
            )
    return np.array([float(cell) for cell in cells])


def target_of(cells: list[str], where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers and their names, or float targets `b 1`."""
    if all(_is_number(cell) for cell in cells):
        values = np.array([float(cell) for cell in cells])
        different = np.unique(values)
        if len(different) > MOST_CLASSES or (different != different.round()).any():
            return torch.from_numpy(values.astype(np.float32))[:, None], ()
        names = [f"{value:.0f}" for value in different]
        return torch.from_numpy(np.searchsorted(different, values)), tuple(names)
    if "" in cells:
        raise BadInput(f"{where}, example {cells.index('') + 1} is empty; give a class, or leave the row out")
    names = sorted(set(cells))
    rank = {name: i for i, name in enumerate(names)}
    return torch.tensor([rank[cell] for cell in cells]), tuple(names)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
