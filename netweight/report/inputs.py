"""Inputs that an attack found, as files to be added to a test set: arrays, or images in folders by class."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.io import inside, may_replace, whole_folder, write_bytes
from netweight.core.task import Data


def check_place(path: Path, data: Data) -> None:
    """Raises before anything is searched: `BadInput` for a place in use, `DoesNotFit` for no images."""
    if path.suffix == ".npz":
        if path.is_dir():
            raise BadInput(
                f"{path}: this is a folder, but a name that ends in .npz is a file; choose another"
            )
        return
    may_replace(path)
    if not are_images(data.x):
        raise DoesNotFit(
            f"{data.name}: inputs of shape {tuple(data.x.shape[1:])} are no images; "
            "name a file: --out found.npz"
        )


def are_images(x: Tensor) -> bool:
    """Whether inputs are `b 1 h w` or `b 3 h w`, floating point."""
    return x.ndim == 4 and x.shape[1] in (1, 3) and x.is_floating_point()


def save(path: Path, x: Float[Tensor, "k *in"], index: Int[Tensor, " k"], labels: Tensor, data: Data) -> None:
    """Write the points and what they should be; index: which test example each was made of.

    path: NAME.npz gets arrays x, y and index, which `--data NAME.npz` reads; any other name becomes a folder
    CLASS/INDEX.png, rounded to 8 bits, which `--data` reads as well.
    """
    if path.suffix == ".npz":
        content = io.BytesIO()
        np.savez(content, x=x.cpu().numpy(), y=labels.cpu().numpy(), index=index.cpu().numpy())
        write_bytes(path, content.getvalue())
        return
    low, high = data.low if data.low is not None else 0.0, data.high if data.high is not None else 1.0
    width = len(str(len(data.classes) - 1)) if data.classes else 4
    with whole_folder(path) as folder:
        for point, at, label in zip(x, index.tolist(), labels.tolist(), strict=True):
            name = data.classes[label] if 0 <= label < len(data.classes) else f"{label:0{width}}"
            place = inside(folder, name)
            place.mkdir(exist_ok=True)
            (place / f"{at:06}.png").write_bytes(png(point, low, high))


def png(image: Float[Tensor, "c h w"], low: float = 0.0, high: float = 1.0) -> bytes:
    """An image with c 1 or 3 and values from low to high, rounded to 8 bits."""
    from PIL import Image

    pixels = (image.detach().cpu().float() - low) / (high - low)
    pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()
