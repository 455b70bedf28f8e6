"""Networks from .pt2 files of `torch.export.save`, read without the loader of torch.

That loader unpickles, evaluates expressions and calls whatever a node's target says: nothing for files from
outside. Here the graph is taken from its JSON and the tensors from their raw bytes: a node may call `aten`
operators and integer arithmetic only. Where the graph applies a weight the way a layer does, the layer is put
there (`nn.Linear`, `nn.Conv2d`, ...), under its own name, so that it can be compressed.
"""

from __future__ import annotations

import json
import math
import operator
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from netweight.core.errors import BadInput, NetweightError
from netweight.core.io import existing_file
from netweight.core.origin import Origin, mark
from netweight.models.layer_of import layer_of

LARGEST_GRAPH = 256 << 20  # bytes of the JSON
LARGEST = 64 << 30  # bytes of all tensors
KINDS = {  # the numbers that the format gives to element types
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge")
WORDS = (
    "none",
    "tanh",
    "floor",
    "trunc",
)  # texts that an operator of a network takes; never the name of a file
PLAIN = ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools")


def read(path: str | Path) -> fx.GraphModule:
    """The network of a .pt2 file, in eval mode, from one tensor to one tensor.

    Raises `BadInput` for a file that is missing, damaged, holds pickles, or does more than such a network.
    """
    path = existing_file(path, "a .pt2 file of torch.export.save")
    try:
        with zipfile.ZipFile(path) as archive:
            graph = _json(archive, "models/model.json")["graph_module"]
            tensors = _tensors(archive, "weights") | _tensors(archive, "constants")
        model = _Builder(graph, tensors).module()
    except NetweightError as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:  # whatever is missing or of another type in somebody else's JSON
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise BadInput(
            f"{path}: not a whole .pt2 file ({reason}); write it with torch.export.save"
        ) from error
    mark(model, Origin("factory", str(path)))
    return model.eval()


def _member(archive: zipfile.ZipFile, ending: str, at_most: int) -> bytes:
    """The content of the one member whose path ends so below the archive's root folder."""
    found = [i for i in archive.infolist() if i.filename.partition("/")[2] == ending]
    if len(found) != 1:
        raise BadInput(
            f"it holds {len(found)} of {ending}, expected one; save one network with torch 2.9 or newer"
        )
    if found[0].file_size > at_most:
        raise BadInput(
            f"{ending} has {found[0].file_size} bytes, more than {at_most}; give a smaller network"
        )
    return archive.read(found[0])


def _json(archive: zipfile.ZipFile, ending: str) -> Any:
    return json.loads(_member(archive, ending, LARGEST_GRAPH))


def _tensors(archive: zipfile.ZipFile, what: str) -> dict[str, Tensor]:
    """The stored weights or constants by name."""
    config = _json(archive, f"data/{what}/model_{what}_config.json")["config"]
    tensors = {}
    for name, entry in config.items():
        if entry["use_pickle"]:
            raise BadInput(
                f"tensor {name!r} is pickled, and pickles are never loaded; export plain dense tensors"
            )
        tensors[name] = _tensor(
            _member(archive, f"data/{what}/{entry['path_name']}", LARGEST), entry["tensor_meta"]
        )
    return tensors


def _tensor(content: bytes, meta: Mapping[str, Any]) -> Tensor:
    """A tensor from its bytes; a view that would leave them raises ValueError."""
    sizes = [size["as_int"] for size in meta["sizes"]]
    strides = [stride["as_int"] for stride in meta["strides"]]
    offset = meta["storage_offset"]["as_int"]
    kind = KINDS[meta["dtype"]]
    if min([offset, *sizes, *strides], default=0) < 0:
        raise ValueError(f"a tensor of sizes {sizes}")
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=kind)
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides))
    if (last + 1) * kind.itemsize > len(content):
        raise ValueError(f"a tensor of sizes {sizes} in {len(content)} bytes")
    flat = torch.frombuffer(bytearray(content), dtype=kind)
    return flat.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)


class _Builder:
    """One graph of the file as an `fx.GraphModule`."""

    def __init__(self, graph_module: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.said, self.signature = graph_module["graph"], graph_module["signature"]
        self.tensors = tensors
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Any] = {}  # by the name in the file: a node, or the name of a stored tensor
        self.layers: dict[str, nn.Module] = {}  # those put in place of operators

    def module(self) -> fx.GraphModule:
        """The network."""
        for spec in self.signature["input_specs"]:
            self._input(spec)
        for node in self.said["nodes"]:
            self._node(node)
        outputs = self.signature["output_specs"]
        if len(outputs) != 1 or "user_output" not in outputs[0]:
            raise BadInput(
                "it has several outputs or changes its own buffers; export a network with one output tensor"
            )
        self.graph.output(self._argument(outputs[0]["user_output"]["arg"]))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def _input(self, spec: Mapping[str, Any]) -> None:
        (kind, what), *_ = spec.items()
        if kind == "user_input":
            if any(isinstance(value, fx.Node) for value in self.values.values()):
                raise BadInput("it takes several inputs; export a network with one input tensor")
            name = what["arg"]["as_tensor"]["name"]
            self.values[name] = self.graph.placeholder("x")
        elif kind in ("parameter", "buffer", "tensor_constant"):
            name = what[f"{kind}_name"]
            if not all(part.isidentifier() or part.isdigit() for part in name.split(".")):
                raise BadInput(f"{name!r} cannot be the name of a tensor; export the network again")
            self.values[what["arg"]["name"]] = (name, kind == "parameter")
        else:
            raise BadInput(f"it takes a {kind}, expected tensors only; export a network of tensors")

    def _node(self, node: Mapping[str, Any]) -> None:
        target = _operator(node["target"])
        stored = {
            i["name"]: self._stored(i["arg"]) for i in node["inputs"] if self._stored(i["arg"]) is not None
        }
        made = self._as_layer(node, stored)
        if made is None:
            positional = [self._argument(i["arg"]) for i in node["inputs"] if i.get("kind") != 2]
            named = {i["name"]: self._argument(i["arg"]) for i in node["inputs"] if i.get("kind") == 2}
            made = self.graph.call_function(target, tuple(positional), named)
        self._outputs(made, node["outputs"])

    def _as_layer(self, node: Mapping[str, Any], stored: Mapping[str, str]) -> fx.Node | None:
        """The call of a layer that does what the node does, or None."""
        place, _, last = stored.get("weight", "").rpartition(".")
        if last != "weight" or not place:
            return None
        plain = {i["name"]: i["arg"].get(k) for i in node["inputs"] for k in PLAIN if k in i["arg"]}
        tensors = {argument: self.tensors[name] for argument, name in stored.items()}
        agree = all(name == f"{place}.{argument}" for argument, name in stored.items())
        entered = node["inputs"][0]["arg"].get("as_tensor", {}).get("name")
        dims = len(self.said["tensor_values"].get(entered, {}).get("sizes", []))
        layer = layer_of(node["target"], tensors, plain, dims) if agree else None
        if layer is None or repr(self.layers.setdefault(place, layer)) != repr(layer):
            return None
        self._container(place, layer if self.layers[place] is layer else None)
        which = "indices" if node["target"].endswith("aten.embedding.default") else "input"
        (x,) = (i["arg"] for i in node["inputs"] if i["name"] == which)
        return self.graph.call_module(place, (self._argument(x),))

    def _container(self, place: str, layer: nn.Module | None = None) -> nn.Module:
        """The module at that place, made where it is not there; `layer` takes the place of a bare one."""
        module = self.root
        *before, last = place.split(".") if place else [""]
        for part in before:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if not last:
            return module
        if layer is not None:
            for name, inner in getattr(module, last, nn.Module())._parameters.items():
                layer._parameters.setdefault(name, inner)
            module.add_module(last, layer)
        elif last not in module._modules:
            module.add_module(last, nn.Module())
        return module.get_submodule(last)

    def _stored(self, argument: Mapping[str, Any]) -> str | None:
        """The name of the stored tensor that the argument is, or None."""
        value = self.values.get((argument.get("as_tensor") or {}).get("name"))
        return value[0] if isinstance(value, tuple) else None

    def _value(self, name: str) -> fx.Node:
        """The node of that name; a stored tensor is fetched from its place."""
        value = self.values[name]
        if isinstance(value, fx.Node):
            return value
        full, is_parameter = value
        place, _, last = full.rpartition(".")
        home = self._container(place)
        if last not in home._parameters and last not in home._buffers:
            tensor = self.tensors[full]
            if is_parameter and tensor.is_floating_point():
                home.register_parameter(last, nn.Parameter(tensor))
            else:
                home.register_buffer(last, tensor)
        self.values[name] = self.graph.get_attr(full)
        return self.values[name]

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        """An argument as a value or a node."""
        (kind, value), *_ = argument.items()
        if kind in PLAIN:
            return value
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self._value(value["name"])
            case "as_tensors":
                return [self._value(v["name"]) for v in value]
            case "as_optional_tensors":
                return [None if "as_none" in v else self._value(v["as_tensor"]["name"]) for v in value]
            case "as_sym_int" | "as_sym_bool" | "as_sym_float":
                return self._symbol(value)
            case "as_sym_ints":
                return [self._symbol(v) for v in value]
            case "as_scalar_type":
                return KINDS[value]
            case "as_device":
                return torch.device("cpu")
            case "as_memory_format":
                return torch.contiguous_format if value == 1 else torch.preserve_format
            case "as_layout":
                return torch.strided
            case "as_string" if value in WORDS:
                return value
        raise BadInput(f"an argument {kind} cannot be read; export a network of plain tensors and numbers")

    def _symbol(self, value: Mapping[str, Any]) -> Any:
        return self.values[value["as_name"]] if "as_name" in value else next(iter(value.values()))

    def _outputs(self, made: fx.Node, outputs: list[Mapping[str, Any]]) -> None:
        """Give the results of a node their names in the file."""
        flat = [name for output in outputs for name in _names(output)]
        if len(outputs) == 1 and "as_tensors" not in outputs[0]:
            self.values[flat[0]] = made
            return
        for index, name in enumerate(flat):
            self.values[name] = self.graph.call_function(operator.getitem, (made, index))


def _names(output: Mapping[str, Any]) -> list[str]:
    (kind, value), *_ = output.items()
    if kind == "as_tensors":
        return [v["name"] for v in value]
    return [value.get("name") or value["as_name"]] if isinstance(value, dict) else [""]


def _operator(target: str) -> Any:
    """The function that a node calls; raises `BadInput` for one that is neither of aten nor arithmetic."""
    match target.split("."):
        case ["torch", "ops", "aten", name, overload] if name.isidentifier() and not name.startswith(
            "from_file"
        ):
            packet = getattr(torch.ops.aten, name)
            return getattr(packet, overload)
        case ["_operator", name] if name in ARITHMETIC:
            return getattr(operator, name)
    raise BadInput(
        f"it calls {target}, which is no operator of a network; call run_decompositions() on it before saving"
    )
