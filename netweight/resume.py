"""Work in progress of one compression, beside the folder it is going to, so that a kill loses one layer at
most.

    small.partial/run.json            what is being done: a fingerprint of model, data, budget, method
    small.partial/plan.json           the plan and all its options, once it is made
    small.partial/forms/LAYER.*       each finished layer

`small.partial` is never taken for a result: it has no `netweight.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import netweight
from netweight.core import io
from netweight.core.compressed import Packed
from netweight.core.errors import BadInput
from netweight.core.plan import Budget, Option, Plan
from netweight.core.stored import put_together, take_apart
from netweight.core.task import Data, Task


def fingerprint(model: nn.Module, task: Task, budget: Budget, method: str, distortion: str) -> dict[str, Any]:
    """What has to be the same for work to go on: weights, calibration data, budget, method, version."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(dtype=_bytes()).numpy().tobytes())
    return {
        "version": netweight.__version__,
        "weights": weights.hexdigest(),
        "calibration": data_hash(task.calibration),
        "budget": asdict(budget),
        "method": method,
        "distortion": distortion,
    }


def data_hash(data: Data) -> str:
    """sha256 of the examples."""
    return hashlib.sha256(data.x.contiguous().reshape(-1).view(dtype=_bytes()).numpy().tobytes()).hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


@dataclass
class Work:
    """The folder of unfinished work; None keeps nothing."""

    folder: Path | None

    @classmethod
    def open(cls, out: Path | None, what: dict[str, Any], *, resume: bool) -> Work:
        """Start anew, or go on where `resume` is set; raises `BadInput` if other work lies there."""
        if out is None:
            return cls(None)
        folder = place(out)
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        if folder.exists() and io.read_json(folder / "run.json", "the head of unfinished work") != what:
            raise BadInput(
                f"{folder}: the unfinished work is of another model, data or budget; run without --resume"
            )
        if not folder.exists():
            io.write_json(folder / "run.json", what)
        return cls(folder)

    @staticmethod
    def done(out: Path) -> None:
        """Forget the unfinished work of a folder that is now whole."""
        shutil.rmtree(place(out), ignore_errors=True)

    def plan(self) -> Plan | None:
        """The plan, if it was made."""
        if self.folder is None or not (self.folder / "plan.json").exists():
            return None
        return Plan.from_json(io.read_json(self.folder / "plan.json", "a plan"))

    def keep_plan(self, plan: Plan, options: Sequence[Option]) -> None:
        """Write the plan with all its options."""
        if self.folder is not None:
            io.write_json(
                self.folder / "plan.json", {**plan.to_json(), "options": [asdict(o) for o in options]}
            )

    def options(self) -> list[Option]:
        """The options that the plan was chosen from; none if nothing was kept."""
        if self.folder is None or not (self.folder / "plan.json").exists():
            return []
        return [Option(**item) for item in io.read_json(self.folder / "plan.json").get("options", [])]

    def form(self, layer: str) -> Packed | None:
        """The finished form of a layer, if there is one."""
        if self.folder is None or not (self._file(layer) / "form.json").exists():
            return None
        settings = io.read_json(self._file(layer) / "form.json")
        return put_together(io.read_tensors(self._file(layer) / "form.safetensors"), settings)

    def keep_form(self, layer: str, form: Packed) -> None:
        """Write a finished layer: its tensors first, then the file that says that they are there."""
        if self.folder is not None:
            tensors, settings = take_apart(form)
            io.write_tensors(self._file(layer) / "form.safetensors", tensors)
            io.write_bytes(self._file(layer) / "form.json", json.dumps(settings).encode())

    def _file(self, layer: str) -> Path:
        assert self.folder is not None
        return self.folder / "forms" / hashlib.sha256(layer.encode()).hexdigest()[:16]


def place(out: Path) -> Path:
    """Where the unfinished work for `out` lies."""
    return out.parent / f"{out.name}.partial"
