"""Images in folders, one folder per class."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from netweight.core.errors import BadInput, NetweightError
from netweight.core.task import Data
from netweight.data.split import Split, at_random, calibration_count, part

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
LARGEST_IMAGE = 64 << 20  # pixels
LARGEST = 16 << 30  # bytes of all images as float32


def load(folder: str | Path, seed: int = 0) -> Split:
    """The parts of a folder of images: folder/CLASS/image.png, or that below folder/train and folder/test.

    Images are `b 3 h w` (`b 1 h w` if all are grey) in [0, 1] and of one size; classes are numbered in sorted
    order. Raises `BadInput` for a folder without images, an unreadable one, and images of different sizes.
    """
    folder = Path(folder)
    if {entry.name for entry in folder.iterdir() if entry.is_dir()} != {"train", "test"}:
        return at_random(read_folder(folder), seed)
    train, test = read_folder(folder / "train"), read_folder(folder / "test")
    if train.classes != test.classes or train.x.shape[1:] != test.x.shape[1:]:
        raise BadInput(f"{folder}: train and test differ in their classes or image sizes; give both the same")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Split(part(train, order[: calibration_count(len(train))], "calibration"), test, lambda: train)


def read_folder(folder: Path) -> Data:
    """All images below folder/CLASS/, in sorted order."""
    classes = sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    found = [
        (path, number)
        for number, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in FORMATS and path.is_file()
    ]
    if not found:
        raise BadInput(f"{folder}: no images; expected {folder.name}/CLASS/image.png (or .jpg, .bmp, .webp)")
    sizes = [_size(path) for path, _ in found]
    channels = 1 if all(grey for _, _, grey in sizes) else 3
    width, height, _ = sizes[0]
    for (path, _), (w, h, _) in zip(found, sizes, strict=True):
        if (w, h) != (width, height):
            raise BadInput(
                f"{path}: {w} x {h} pixels, but {found[0][0]} has {width} x {height}; resize to one size"
            )
    if len(found) * channels * width * height * 4 > LARGEST:
        raise BadInput(
            f"{folder}: {len(found)} images need more than {LARGEST} bytes; give fewer or smaller ones"
        )
    pixels = np.stack([_pixels(path, channels) for path, _ in found])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()
    y = torch.tensor([number for _, number in found])
    return Data(x, y, name=folder.name, classes=tuple(classes), low=0.0, high=1.0)


def _size(path: Path) -> tuple[int, int, bool]:
    """Width, height, and whether it is grey, from the header alone."""
    with _opened(path) as image:
        if image.width * image.height > LARGEST_IMAGE:
            raise BadInput(
                f"{path}: {image.width} x {image.height} pixels, more than {LARGEST_IMAGE}; make it smaller"
            )
        return image.width, image.height, image.mode in ("1", "L")


def _pixels(path: Path, channels: int) -> np.ndarray:
    """One image, `h w c` uint8."""
    with _opened(path) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of the format that its ending says; whatever goes wrong inside is one `BadInput`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[FORMATS[path.suffix.lower()]]) as image:
                yield image
    except NetweightError:
        raise
    except Exception as error:  # decoders raise anything for a damaged image
        raise BadInput(f"{path}: not a whole image ({error}); remove it or save it again") from error
