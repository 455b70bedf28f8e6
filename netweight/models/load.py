"""MODEL of the command line, as a network: in eval mode, from tensor to tensor, marked with its origin.

model = load("digits-cnn")                      # built in, trained on first use
model = load("model.onnx")                      # or model.pt2 of torch.export
model = load("./checkpoint")                    # a folder of Hugging Face
model = load("mine.nets:build@best.safetensors")  # a function of yours, and weights for what it returns
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from netweight.core import io
from netweight.core.errors import BadInput, unknown
from netweight.core.origin import Origin, mark, named, origin_of

BUILT_IN = {  # name: the function that gives it, trained
    "digits-cnn": "netweight.models.digits_cnn:digits_cnn",
    "digits-vit": "netweight.models.digits_vit:digits_vit",
    "resnet20": "netweight.models.resnet_cifar:resnet20",
    "resnet32": "netweight.models.resnet_cifar:resnet32",
    "resnet44": "netweight.models.resnet_cifar:resnet44",
    "small-llama": "netweight.models.llama:small_llama",
    "small-llama-quick": "netweight.models.llama:quick_llama",
    "small-opt": "netweight.models.opt:small_opt",
    "small-opt-quick": "netweight.models.opt:quick_opt",
    "small-bart": "netweight.models.small_bart:translator",
    "bert-tiny": "netweight.models.bert_tiny:bert_tiny",
}
ARCHITECTURE = {  # name: the function that gives it with random weights, from the files of its origin
    "digits-cnn": "netweight.models.digits_cnn:skeleton",
    "digits-vit": "netweight.models.digits_vit:skeleton",
    "resnet20": "netweight.models.resnet_cifar:skeleton",
    "resnet32": "netweight.models.resnet_cifar:skeleton",
    "resnet44": "netweight.models.resnet_cifar:skeleton",
    "small-llama": "netweight.models.llama:skeleton",
    "small-llama-quick": "netweight.models.llama:skeleton",
    "small-opt": "netweight.models.opt:skeleton",
    "small-opt-quick": "netweight.models.opt:skeleton",
    "small-bart": "netweight.models.small_bart:skeleton",
}
PICKLED = (".pt", ".pth", ".th", ".bin", ".pkl", ".ckpt")
FACTORY = "package.module:factory[@weights.safetensors]"
KINDS = f"a built-in name, file.onnx, file.pt2, a Hugging Face folder, or {FACTORY}"


def load(name: str) -> nn.Module:
    """The network that `name` says.

    Raises `BadInput` with one sentence for anything that is not one, and for weights that hold NaN or Inf.
    Nothing is unpickled and no code runs but that of a factory that `name` itself spells out.
    """
    model = _found(name)
    _refuse_not_finite(model, name)
    return model.eval()


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The architecture of a built-in network with random weights: nothing is trained or read from a file."""
    if target not in ARCHITECTURE:
        raise unknown("model", target, ARCHITECTURE)
    return named(ARCHITECTURE[target])(target, files).eval()


def _found(name: str) -> nn.Module:
    """The network, not checked yet."""
    if name in BUILT_IN:
        return named(BUILT_IN[name])()
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    kind = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix  # .onnx.gz as well
    match kind.lower():
        case ".onnx":
            path = io.existing_file(path, "an ONNX network")
            return named("netweight.models.onnx_reader:read")(path)
        case ".pt2":
            return named("netweight.models.exported:read")(path)
        case suffix if suffix in PICKLED or (suffix == ".safetensors" and ":" not in name):
            raise BadInput(
                f"{name}: the file holds weights and no architecture, and pickles are never loaded; "
                "give the function that builds it as package.module:factory@weights.safetensors"
            )
    if ":" in name:
        return _factory(name)
    if path.suffix or "/" in name:
        raise BadInput(f"{name}: there is no such file or folder; expected {KINDS}")
    raise unknown("model", name, BUILT_IN)


def _folder(path: Path) -> nn.Module:
    """The network of a Hugging Face folder, or the float64 twin of an integer network."""
    if (path / io.MARK).exists():
        raise BadInput(f"{path}: this folder holds a compressed network; read it with Compressed.load")
    if (path / "integer.json").is_file():
        return named("netweight.nn.integer_twin:load")(path)
    if not (path / "config.json").is_file():
        raise BadInput(
            f"{path}: there is no config.json; expected a Hugging Face folder (config.json, *.safetensors)"
        )
    return named("netweight.models.huggingface:load")(path)


def _factory(name: str) -> nn.Module:
    """What `package.module:factory` returns, filled with the weights behind the @."""
    where, _, weights = name.partition("@")
    module_name, _, function = where.partition(":")
    try:
        sys.path.insert(0, "")  # as `python -m` does: modules beside the user are found
        try:
            module = importlib.import_module(module_name)
        finally:
            sys.path.remove("")
    except (ImportError, ValueError) as error:
        raise BadInput(
            f"{name}: the module {module_name!r} cannot be imported ({error}); expected {KINDS}"
        ) from error
    if not callable(getattr(module, function, None)):
        functions = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
        raise unknown(f"function of {module_name}", function, functions)
    model = getattr(module, function)()
    if not isinstance(model, nn.Module):
        raise BadInput(f"{where}: it returned a {type(model).__name__}; expected a torch.nn.Module")
    if weights:
        fill(model, io.read_tensors(weights, "the weights as safetensors"), weights)
    return model if origin_of(model) else mark(model, Origin("factory", where))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors by name; where one does not agree, `BadInput` names the tensor and both shapes."""
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        if name not in wanted:
            raise BadInput(
                f"{source}: tensor {name!r} {tuple(tensor.shape)} has no place in the network; give its own"
            )
        if tensor.shape != wanted[name].shape:
            raise BadInput(
                f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}, the network has "
                f"{tuple(wanted[name].shape)}; give the weights of this network"
            )
    present = {wanted[name].data_ptr() for name in tensors}
    absent = [
        n for n, t in wanted.items() if n not in tensors and (t.data_ptr() not in present or not t.numel())
    ]
    if absent:
        shape = tuple(wanted[absent[0]].shape)
        raise BadInput(f"{source}: tensor {absent[0]!r} {shape} is missing; give the weights of this network")
    model.load_state_dict(dict(tensors), strict=False)


def _refuse_not_finite(model: nn.Module, source: str) -> None:
    """Raises `BadInput` for the first tensor that holds NaN or Inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadInput(f"{source}: tensor {name!r} holds NaN or Inf; mend or train the network again")
