"""Where the data files are: the folder that NETWEIGHT_DATA names, else the one beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

from netweight.core.errors import BadInput


def shared_data() -> Path | None:
    """The folder of data files: NETWEIGHT_DATA, else ../shared/data beside the repository; None if absent."""
    named = os.environ.get("NETWEIGHT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None


def shared_file(name: str) -> Path:
    """A file of the data folder; raises `BadInput` if the folder or the file is not there."""
    folder = shared_data()
    if folder is None or not (folder / name).is_file():
        where = "the data folder is not here" if folder is None else f"{folder} has no such file"
        raise BadInput(f"{name}: {where}; set NETWEIGHT_DATA to the folder that holds it")
    return folder / name


def shared_files(folder: str, pattern: str) -> list[Path]:
    """The files of a subfolder that match the pattern, sorted by name; raises `BadInput` if there is none."""
    root = shared_data()
    found = sorted((root / folder).glob(pattern)) if root else []
    if not found:
        raise BadInput(
            f"{folder}/{pattern}: no such data files; set NETWEIGHT_DATA to the folder that holds them"
        )
    return found
