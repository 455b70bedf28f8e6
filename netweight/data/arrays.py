"""Arrays from .npz files of anybody: sizes are checked before anything is allocated, nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.core.io import existing_file
from netweight.core.task import Data
from netweight.data.split import Split, at_random, calibration_count, part

LARGEST = 4 << 30  # bytes of all arrays that are read from one file
PARTS = ("", "_train", "_calibration", "_test")


def read_arrays(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that the file holds.

    Raises `BadInput` for a file that is missing, empty, truncated, no .npz, larger than 4 GiB when unpacked,
    or that holds Python objects.
    """
    path = existing_file(path, "a .npz file of arrays")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")
            }
            wanted = {name: members[name] for name in names if name in members}
            total = sum(info.file_size for info in wanted.values())
            if total > LARGEST:
                raise BadInput(
                    f"{path}: its arrays unpack to {total} bytes, more than {LARGEST}; give fewer examples"
                )
            return {name: _read_array(archive, info, path) for name, info in wanted.items()}
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise BadInput(
            f"{path}: not a whole .npz file ({error}); write it with numpy.savez(x=..., y=...)"
        ) from error


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """One array, whose header has to agree with the size that the archive states."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"array {info.filename} has format {version}")
        shape, columns_first, kind = read_header(stream)
        if kind.hasobject:
            raise BadInput(
                f"{path}: array {info.filename} holds Python objects, not numbers; store plain arrays"
            )
        size = math.prod(shape) * kind.itemsize
        if min(shape, default=0) < 0 or size != info.file_size - stream.tell():
            raise ValueError(
                f"array {info.filename} says {shape} of {kind}, but holds another number of bytes"
            )
        values = np.frombuffer(bytearray(stream.read(size)), dtype=kind)
        return values.reshape(shape, order="F" if columns_first else "C")


def load(path: str | Path, seed: int = 0) -> Split:
    """The parts of a .npz file of examples.

    x, y: examples and labels, split by the seed; or x_calibration, x_test, x_train (and y_...) as they are.
    domain: where it is there, the domain of each example, a whole number or a name.
    """
    arrays = read_arrays(path, [f"{axis}{suffix}" for suffix in PARTS for axis in ("x", "y", "domain")])
    found = {suffix: _data(arrays, suffix, Path(path)) for suffix in PARTS if f"x{suffix}" in arrays}
    if not found:
        raise BadInput(f"{path}: there is no array x; write it with numpy.savez(x=..., y=...)")
    rest = found.get("", found.get("_train"))
    test = found.get("_test", rest if "_calibration" in found and "" in found else None)
    if test is None:
        if rest is None:
            raise BadInput(f"{path}: there is nothing to test on; add the arrays x_test and y_test")
        return at_random(rest, seed)
    calibration, train = found.get("_calibration"), found.get("_train", rest if rest is not test else None)
    if calibration is None:
        if rest is None:
            raise BadInput(f"{path}: there is nothing to calibrate on; add the array x_calibration")
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        calibration = part(rest, order[: calibration_count(len(rest))], "calibration")
    return Split(calibration, test, (lambda: train) if train is not None else None)


def _data(arrays: dict[str, np.ndarray], suffix: str, path: Path) -> Data:
    """One part of the file as examples."""
    x, y = arrays[f"x{suffix}"], arrays.get(f"y{suffix}")
    if x.ndim == 0 or x.dtype.kind not in "buif":
        raise BadInput(
            f"{path}: x{suffix} has shape {x.shape} of {x.dtype}; give numbers, one row per example"
        )
    labels, classes = (None, ()) if y is None else labels_of(y, f"{path}: y{suffix}")
    domain = arrays.get(f"domain{suffix}")
    domain = None if domain is None else labels_of(domain, f"{path}: domain{suffix}")[0]
    name = f"{path.name}{suffix and f' ({suffix[1:]})'}"
    if x.dtype.kind in "iu" and y is not None and x.ndim == 2 and x.shape == y.shape and y.dtype.kind in "iu":
        return Data(torch.from_numpy(x.astype(np.int64)), labels, batch=16, name=name, domain=domain)
    values, low, high = values_of(x)
    return Data(values, labels, name=name, classes=classes, low=low, high=high, domain=domain)


def values_of(x: np.ndarray) -> tuple[Tensor, float | None, float | None]:
    """The examples as float32, and the range of a valid input.

    uint8 is taken as pixels: divided by 255, channels put first, range 0 to 1, as for float images inside it.
    """
    if x.dtype == np.uint8:
        if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        x = x[:, None] if x.ndim == 3 else x
        return torch.from_numpy(np.ascontiguousarray(x)).float() / 255, 0.0, 1.0
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    image = values.ndim == 4 and values.numel() and values.min() >= 0 and values.max() <= 1
    return values, *((0.0, 1.0) if image else (None, None))


def labels_of(y: np.ndarray, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels: int64 class numbers (words by their rank) or tokens, or float32 targets; the classes' names."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 and y.dtype.kind != "f" else y
    if y.dtype.kind in "US" and y.ndim == 1:
        names, numbers = np.unique(y.astype(str), return_inverse=True)
        return torch.from_numpy(numbers.astype(np.int64)), tuple(names.tolist())
    if y.ndim == 0 or y.dtype.kind not in "buif":
        raise BadInput(
            f"{where} has shape {y.shape} of {y.dtype}; give one class number or target per example"
        )
    kind = np.float32 if y.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.ascontiguousarray(y, dtype=kind)), ()
