"""Files: every one from outside is hostile, every one we write is there whole or not at all.

Reading: sizes are checked before anything is allocated, nothing is unpickled, no path leaves its folder.
Writing: beside the place, flushed to disk, then renamed into it; `whole_folder` does the same for folders.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from netweight.core.errors import BadInput

MARK = "netweight.json"  # the file that makes a folder one of ours; written last


def cache_dir() -> Path:
    """Where trained built-in networks and decoded data are kept: NETWEIGHT_CACHE, else the user's cache."""
    named = os.environ.get("NETWEIGHT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(base) / "netweight"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def existing_file(path: str | Path, what: str, *, at_most: int | None = None) -> Path:
    """The path, if it is a file that is neither empty nor larger than `at_most` bytes; else `BadInput`."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path}: there is no such file; give the path of {what}")
    if path.is_dir():
        raise BadInput(f"{path}: this is a folder, but {what} is a file")
    size = path.stat().st_size
    if size == 0:
        raise BadInput(f"{path}: the file is empty, expected {what}")
    if at_most is not None and size > at_most:
        raise BadInput(f"{path}: {size} bytes, more than the {at_most} that {what} may have")
    return path


def inside(folder: str | Path, name: str) -> Path:
    """The path of `name` in `folder`; raises `BadInput` if it would leave the folder."""
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise BadInput(f"{folder}: {name!r} leaves the folder; files may only name what lies beside them")
    return path


def read_json(path: str | Path, what: str = "a JSON file", *, at_most: int = 64 << 20) -> Any:
    """The content of a JSON file of at most `at_most` bytes."""
    path = existing_file(path, what, at_most=at_most)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error}); expected {what}") from error


def read_tensors(path: str | Path, what: str = "a safetensors file") -> dict[str, Any]:
    """All tensors of a safetensors file; a truncated or foreign file raises `BadInput`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = existing_file(path, what)
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); expected {what}") from error


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into one sentence."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space is left on that disk; free some or choose another place with --out",
            errno.EDQUOT: "your disk quota is used up; free some space or choose another place with --out",
            errno.EACCES: "writing there is not allowed; choose another place with --out",
            errno.EROFS: "that disk is read-only; choose another place with --out",
        }
        if error.errno not in reasons:
            raise
        raise BadInput(f"{place}: {reasons[error.errno]}") from error


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed into it."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON (NaN is refused: it is not JSON), indented, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all; tensors go to the CPU and become contiguous."""
    from safetensors.torch import save

    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` only if the block ends well.

    An existing folder of ours is replaced, an empty one is filled; one with foreign files raises `BadInput`.
    """
    folder = Path(folder)
    may_replace(folder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with disk_errors(folder):
            yield beside
            os.chmod(beside, 0o755)
            if folder.exists():
                old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
                os.replace(folder, old / "old")
                os.replace(beside, folder)
                shutil.rmtree(old)
            else:
                os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def may_replace(folder: str | Path) -> None:
    """Raises `BadInput` unless `folder` is absent, empty, or one that netweight wrote."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: this is a file, but --out names a folder; choose another name")
    if any(folder.iterdir()) and not (folder / MARK).exists():
        raise BadInput(
            f"{folder}: the folder holds files that are not netweight's; choose another with --out"
        )
