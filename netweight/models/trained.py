"""Built-in networks are trained where they are used: once, the same way every time, and kept in the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from netweight.core import io
from netweight.core.errors import BadInput


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """One thread (sums in one order) and a fixed random state inside; both are restored after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def trained(
    key: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None], seed: int
) -> nn.Module:
    """The network `make()`, trained by `train` or filled from the cache, in eval mode.

    key: of the file in the cache; names the version of architecture and training, and the seed. Where the
    file is damaged, of other shapes or not finite, it is trained again; a cache that cannot be written is
    done without.
    """
    with seeded(seed):
        model = make()
        if not _filled(model, key):
            train(model)
            with contextlib.suppress(OSError, BadInput):
                io.write_tensors(cached_file(key), {n: t.clone() for n, t in model.state_dict().items()})
    return model.eval()


def cached_file(key: str) -> Path:
    """The place of a network's weights in the cache."""
    return io.cache_dir() / f"{key}.safetensors"


def _filled(model: nn.Module, key: str) -> bool:
    """Fill the model with the cached weights, if they are there, whole, finite and of the right shapes."""
    try:
        state = io.read_tensors(cached_file(key), "cached weights")
    except (OSError, BadInput):
        return False
    wanted = model.state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in wanted.items()}:
        return False
    if not all(t.isfinite().all() for t in state.values()):
        return False
    model.load_state_dict(state)
    return True
