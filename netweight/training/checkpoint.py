"""The state of a training on disk: everything that its next epoch depends on, written whole or not at all.

    keep = Checkpoint(path, resume=True)      # go on from it if it is there
    train(model, data, loss, how, keep=keep)

It holds the weights, the optimizer's state, the state of every source of chance and the losses so far, and a
fingerprint of what the numbers depend on; it is read without unpickling anything but tensors and numbers.
"""

from __future__ import annotations

import glob
import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from netweight.core.errors import BadInput
from netweight.core.io import existing_file, write_bytes
from netweight.core.task import Data
from netweight.training import distributed


@dataclass(frozen=True)
class Checkpoint:
    """Where the state is kept, after every `every` epochs and the last. resume: go on from it if it is there.

    about: whatever else the numbers depend on (the settings of a method); it has to be the same to go on.
    """

    path: Path
    resume: bool = False
    about: str = ""
    every: int = 1

    def part(self, name: str) -> Checkpoint:
        """One of its own, beside it, for each of several trainings of a method."""
        path = self.path.with_name(f"{self.path.name}.part-{name}")
        return replace(self, path=path, about=f"{self.about} part {name}")

    def forget(self) -> None:
        """Remove what lies there, its parts included."""
        for path in (self.path, *self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*")):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Running:
    """What a training changes as it goes."""

    model: nn.Module
    optimizer: Optimizer
    generator: torch.Generator
    losses: list[float]
    scaler: torch.amp.GradScaler
    state: nn.Module | None = None  # what a method remembers from step to step


def fingerprint(model: nn.Module, data: Data, settings: object, about: str) -> str:
    """sha256 of what has to be the same for a training to go on: settings, first weights, examples."""
    seen = hashlib.sha256(repr((settings, about)).encode())
    labels = [each for each in (data.y, data.domain) if each is not None]
    for tensor in (*model.state_dict().values(), data.x, *labels):
        seen.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def store(path: Path, what: str, run: Running) -> None:
    """Write the state of a run and of torch's own chance."""
    state: dict[str, Any] = {"what": what, "losses": run.losses, "generator": run.generator.get_state()}
    state.update(
        distributed.whole({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    )
    if not distributed.first():
        return
    state.update(scaler=run.scaler.state_dict(), method=run.state.state_dict() if run.state else {})
    state["chance"] = [torch.get_rng_state(), *_cuda_chance()]
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, content.getvalue())


def read(path: Path) -> dict[str, Any]:
    """The state in a file; its "what" is the fingerprint. Raises `BadInput` where it is damaged."""
    content = io.BytesIO(existing_file(path, "a checkpoint").read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
        state["what"]
    except Exception as error:  # a damaged file makes it raise anything
        raise BadInput(f"{path}: not a whole checkpoint of a training; train without --resume") from error
    return state


def restore(path: Path, what: str, run: Running) -> None:
    """Put a state back into the run. Raises `BadInput` where it is damaged or of another training."""
    state = read(path)
    if state["what"] != what:
        raise BadInput(
            f"{path}: the checkpoint is of other weights, data or settings; train without --resume"
        )
    distributed.fill(run.model, run.optimizer, state)
    run.scaler.load_state_dict(state["scaler"])
    if run.state is not None:
        run.state.load_state_dict(state["method"])
    run.generator.set_state(state["generator"])
    run.losses[:] = state["losses"]
    torch.set_rng_state(state["chance"][0])
    for device, chance in enumerate(state["chance"][1:]):
        torch.cuda.set_rng_state(chance, device)


def _cuda_chance() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
