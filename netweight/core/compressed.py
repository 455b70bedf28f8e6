"""What a method does to a network (`Change`), and the network that comes out of it (`Compressed`).

change = method(model, task, layers, settings)      # rewrites, a code per weight, activation rounding
small = assemble(model, change, plan)               # the one place where a Change becomes a network
small.model(x)                                      # runs as it is stored
small.plain()(x)                                    # the float twin with the same function
small.save("small/"); Compressed.load("small/")
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from netweight.core import io
from netweight.core.errors import BadInput, NetweightError, unknown
from netweight.core.origin import Origin, build, mark, origin_of
from netweight.core.plan import Plan
from netweight.core.stored import put_together, take_apart

FORMAT = 1
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@runtime_checkable
class Packed(Protocol):
    """How one weight is stored: a frozen dataclass of tensors and plain values (see `core.stored`)."""

    def decode(self) -> Tensor:
        """The weight, bit for bit the one that the layer computes with."""
        ...

    def bits(self) -> int:
        """Bits of all stored tensors: codes, scales, zeros, books, places; counted, never claimed."""
        ...

    def project(self, weight: Tensor) -> Packed:
        """The nearest of the same form; idempotent."""
        ...

    def layer(self, like: nn.Module) -> nn.Module:
        """The layer `like` with this as its weight, its tensors as buffers that state_dict leaves out.

        It has `form`, the Packed it was made of, and `plain()`, the float layer with the decoded weight.
        """
        ...


@runtime_checkable
class Rewrite(Protocol):
    """An exact change of form: fold, scale, shift, permute, split, affine; the function stays the same."""

    def apply(self, model: nn.Module) -> None:
        """Change the model in place."""
        ...


@runtime_checkable
class ActivationRounding(Protocol):
    """How the input of a layer is rounded at run time."""

    def module(self) -> nn.Module:
        """The rounding as a module from tensor to tensor, its tensors as buffers that state_dict leaves
        out."""
        ...


@dataclass(frozen=True)
class Change:
    """What a method does: exact rewrites in order, then one lossy code per weight, then activation rounding.

    packed: by layer name, the code of that layer's weight AFTER the rewrites.
    left: layers that the method was asked for and left as they are, with the reason.
    biases: by layer name, the bias in place of the one it has after the rewrites (a part of the lossy step).
    """

    packed: Mapping[str, Packed]
    rewrites: Sequence[Rewrite] = ()
    activations: Mapping[str, ActivationRounding] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


class RoundedInput(nn.Module):
    """A layer whose input is rounded first."""

    def __init__(self, rounding: ActivationRounding, layer: nn.Module) -> None:
        super().__init__()
        self.how = rounding
        self.rounding = rounding.module()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for the rounded input."""
        return self.layer(self.rounding(x))


def weighted(model: nn.Module, *, embeddings: bool = False) -> list[str]:
    """Names of the layers whose weight a method can pack: Linear and Conv1d to 3d, with `embeddings` also
    tables.

    A weight that several modules share (tied) is left out: packing one of them would untie it. So is what a
    module names in `beside`: parts that it does not run when it is called as a whole (early exits).
    """
    kinds = (*WEIGHTED, nn.Embedding) if embeddings else WEIGHTED
    beside = {
        id(inner)
        for module in model.modules()
        for part in getattr(module, "beside", ())
        for inner in part.modules()
    }
    owners: dict[int, int] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and name and owners[id(module.weight)] == 1 and id(module) not in beside
    ]


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """The layer's weight, `out in *kernel`, detached; raises `BadInput` for a name that is not there."""
    try:
        weight = model.get_submodule(layer).weight
    except AttributeError:
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        ]
        raise unknown("layer", layer, names) from None
    return weight.detach()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands, and wherever else the network uses the same layer."""
    before = model.get_submodule(name)
    for parent in list(model.modules()):
        for last, child in list(parent.named_children()):
            if child is before:
                setattr(parent, last, module)


def assemble(model: nn.Module, change: Change, plan: Plan) -> Compressed:
    """The network that `change` makes of `model`, which stays as it is. Nothing else ever builds one."""
    small = copy.deepcopy(model).eval()
    for rewrite in change.rewrites:
        rewrite.apply(small)
    for name, bias in change.biases.items():
        small.get_submodule(name).bias = nn.Parameter(bias.to(weight_of(small, name)).clone())
    for name, form in change.packed.items():
        replace(small, name, form.layer(small.get_submodule(name)))
    for name, rounding in change.activations.items():
        replace(small, name, RoundedInput(rounding, small.get_submodule(name)))
    return Compressed(small, plan, change)


@dataclass
class Compressed:
    """A compressed network: `model` runs as it is stored and is what will be shipped; `plan` says what was
    chosen."""

    model: nn.Module
    plan: Plan
    change: Change

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs of the packed network."""
        return self.model(x)

    @property
    def packed(self) -> Mapping[str, Packed]:
        """The stored form of each compressed layer."""
        return self.change.packed

    def plain(self) -> nn.Module:
        """The float twin with the same function: weights decoded, activation rounding kept as fake
        rounding."""
        twin = copy.deepcopy(self.model)
        for name in self.packed:
            place = f"{name}.layer" if name in self.change.activations else name
            replace(twin, place, twin.get_submodule(place).plain())
        return twin

    def bits(self) -> int:
        """Bits stored for the packed weights."""
        return sum(form.bits() for form in self.packed.values())

    def save(self, folder: str | Path) -> None:
        """Write weights.safetensors, plan.json and netweight.json; the folder is there whole or not at
        all."""
        with io.whole_folder(folder) as beside:
            self.write(beside)

    def write(self, folder: Path) -> None:
        """The same into a folder that somebody else makes whole (see `io.whole_folder`)."""
        tensors, forms = described(self.change)
        io.write_tensors(folder / "weights.safetensors", {**_untied(self.model.state_dict()), **tensors})
        io.write_json(folder / "plan.json", self.plan.to_json())
        origin = origin_of(self.model)
        for name, content in (origin.files if origin else {}).items():
            io.write_bytes(io.inside(folder, name), content)
        io.write_json(
            folder / io.MARK,
            {
                "format": FORMAT,
                "origin": origin
                and {"kind": origin.kind, "target": origin.target, "files": sorted(origin.files)},
                "left": dict(self.change.left),
                **forms,
            },
        )

    @classmethod
    def load(cls, folder: str | Path, *, like: nn.Module | None = None) -> Compressed:
        """Read what `save` wrote; outputs are bit for bit the same.

        like: the original network, where the folder cannot say how to build it (a factory of yours).
        Raises `BadInput` for a folder that is not whole, of another format, or whose shapes do not fit.
        """
        folder = Path(folder)
        if not (folder / io.MARK).exists():
            raise BadInput(
                f"{folder}: not a folder that netweight wrote whole (there is no {io.MARK}); compress again"
            )
        head = io.read_json(folder / io.MARK, "the description of a compressed network")
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise BadInput(f"{folder}: written in another format; use the version of netweight that wrote it")
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("weights*.safetensors")):
            tensors.update(io.read_tensors(file, "packed weights"))
        plan = Plan.from_json(io.read_json(folder / "plan.json", "a plan"))
        with _said_in_one_sentence(folder):
            change = _read_change(head, tensors)
            if like is None:
                model, origin = _build(folder, head)
                mark(model, origin)
            else:
                model = like
            small = assemble(model, change, plan)
        _fill(small, {k: v for k, v in tensors.items() if "|" not in k}, folder)
        return small


def described(change: Change) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A Change as tensors (names joined by |) and JSON values; `_read_change` makes it a Change again.

    The tensors are copies: safetensors refuses two names for one memory, which forms and biases may share.
    """
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {"packed": {}, "activations": {}, "rewrites": []}
    for kind, things in (("packed", change.packed), ("activations", change.activations)):
        for name, thing in things.items():
            inner, said[kind][name] = take_apart(thing)
            tensors.update({f"{kind}|{name}|{part}": tensor for part, tensor in inner.items()})
    for index, rewrite in enumerate(change.rewrites):
        inner, settings = take_apart(rewrite)
        said["rewrites"].append(settings)
        tensors.update({f"rewrites|{index}|{part}": tensor for part, tensor in inner.items()})
    tensors.update({f"biases|{name}": bias for name, bias in change.biases.items()})
    return {name: tensor.clone() for name, tensor in tensors.items()}, said


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with each shared tensor once, under its first name: safetensors refuses aliases."""
    seen: dict[tuple[int, int, torch.Size], str] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        kept[name] = tensor
    return kept


@contextmanager
def _said_in_one_sentence(folder: Path) -> Iterator[None]:
    """A description that cannot be carried out raises `BadInput`."""
    try:
        yield
    except NetweightError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"{folder}: what it describes does not fit the network ({reason}); give the one it was made of"
        ) from error


def _read_change(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Change:
    """The Change that a folder describes."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }

    return Change(
        packed={n: put_together(part(f"packed|{n}|"), s) for n, s in head.get("packed", {}).items()},
        rewrites=[put_together(part(f"rewrites|{i}|"), s) for i, s in enumerate(head.get("rewrites", []))],
        activations={
            n: put_together(part(f"activations|{n}|"), s) for n, s in head.get("activations", {}).items()
        },
        left=head.get("left", {}),
        biases=part("biases|"),
    )


def _build(folder: Path, head: Mapping[str, Any]) -> tuple[nn.Module, Origin]:
    """The architecture that a folder names, and its origin."""
    said = head.get("origin")
    if not said:
        return build(None), Origin("", "")
    files = {name: io.inside(folder, name).read_bytes() for name in said.get("files", [])}
    origin = Origin(str(said.get("kind")), str(said.get("target")), files)
    return build(origin), origin


def _fill(small: Compressed, state: Mapping[str, Tensor], folder: Path) -> None:
    """Load the tensors that are not packed; every one has to have its place and its shape."""
    wanted = small.model.state_dict()
    missing = _untied(wanted).keys() - state.keys()
    for name, tensor in state.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            expected = f"{tuple(wanted[name].shape)}" if name in wanted else "no such tensor"
            raise BadInput(
                f"{folder}: tensor {json.dumps(name)} has shape {tuple(tensor.shape)}, the network has "
                f"{expected}; the folder belongs to another network"
            )
    if missing:
        raise BadInput(f"{folder}: tensor {json.dumps(min(missing))} is missing; the folder is not whole")
    small.model.load_state_dict(dict(state), strict=False)
