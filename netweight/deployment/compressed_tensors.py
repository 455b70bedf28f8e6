"""A compressed transformer as a folder that Transformers and vLLM load: pack-quantized compressed-tensors.

Each Linear on a uniform grid becomes

    weight_packed       int32 `rows words`: codes of 4 or 8 bits along a row, the first one lowest
    weight_scale        float32 `rows groups`
    weight_zero_point   int32, zero points packed down the rows; asymmetric grids alone
    weight_shape        int64, rows and inputs

where (code - zero) scale is the weight; codes of 2 and 3 bits lie in 4, those of 5 to 7 in 8. config.json
says under "quantization_config" which layers have which bits and groups, and which stay as they are. Weights
in any other stored form are written as they decode.

Before the folder is written it is opened by Transformers, and its outputs are compared with the network's.
Transformers 5.23 opens an asymmetric grid only where all layers have one kind of code (decoding as it loads),
and several kinds only where all are symmetric. A plan of several kinds is therefore written with code - zero
as a symmetric code: the same weights, in 8 bits where the difference needs more than 4.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn

from netweight.core import io
from netweight.core.compressed import Compressed
from netweight.core.errors import DoesNotFit, need
from netweight.core.grid import PER_ROW, PER_TENSOR, in_groups
from netweight.core.origin import origin_of
from netweight.deployment.reopened import Reopened, reopened
from netweight.models.huggingface import Classifier, LanguageModel
from netweight.nn.packed import Affine


def export(small: Compressed, folder: str | Path, x: Int64[Tensor, "b t"]) -> Reopened:
    """Write the network as a folder of Transformers (whole or not at all), and compare the two on x.

    Raises `DoesNotFit` for a network that is not one of Transformers, or that it has no place for (rounded
    inputs, biases where the architecture has none), `MissingExtra` without the packages.
    """
    for package in ("transformers", "compressed_tensors"):
        need(package)
    hf = original(small)
    with tempfile.TemporaryDirectory() as beside:
        write(small, hf, Path(beside))
        made = compared(small, hf, Path(beside), x)
        with io.whole_folder(folder) as whole:
            for file in Path(beside).iterdir():
                shutil.copyfile(file, whole / file.name)
            io.write_json(whole / io.MARK, {"export": "compressed-tensors"})
    return made


def original(small: Compressed) -> nn.Module:
    """The model of Transformers inside, its packed layers included."""
    if not isinstance(small.model, LanguageModel | Classifier):
        kind = type(small.model).__name__
        raise DoesNotFit(f"{kind}: compressed-tensors holds models of Transformers; export it as onnx")
    if small.change.activations:
        layer = next(iter(small.change.activations))
        raise DoesNotFit(f"{layer}: its input is rounded, which this layout cannot say; export it as onnx")
    if small.change.biases:
        layer = next(iter(small.change.biases))
        raise DoesNotFit(f"{layer}: its bias was changed; compress with a method that leaves biases alone")
    return small.model.hf


@dataclass(frozen=True)
class Codes:
    """One weight as the layout has it: weight = (values - zero) scale.

    values: `rows n` int32, from -2^(bits - 1). zero: `rows groups` likewise, None for 0. scale: `rows
    groups`, or one number for the tensor. group: inputs, 0 a row, -1 the tensor.
    """

    values: Int32[Tensor, "rows n"]
    zero: Int32[Tensor, "rows groups"] | None
    scale: Float[Tensor, ...]
    bits: int
    group: int

    @property
    def kind(self) -> tuple[int, bool, int]:
        """What config.json says of it: bits, symmetric, group."""
        return self.bits, self.zero is None, self.group

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the weight by the names of the layout."""
        middle = 2 ** (self.bits - 1)
        parts = {
            "weight_packed": words(self.values + middle, self.bits),
            "weight_scale": self.scale.float(),
            "weight_shape": torch.tensor(self.values.shape, dtype=torch.int64),
        }
        if self.zero is not None:
            parts["weight_zero_point"] = words((self.zero + middle).T, self.bits).T
        return parts


def as_stored(form: Affine) -> Codes:
    """The codes of the form with its own zero points; those of one tensor are repeated for each row."""
    if form.zero is None:
        return as_symmetric(form)
    bits, rows = (4 if form.bits_per_code <= 4 else 8), form.shape[0]
    middle = 2 ** (bits - 1)
    group = PER_ROW if form.group == PER_TENSOR else form.group
    scale, zero = (t.expand(rows, -1) if len(t) == 1 else t for t in (form.scale, form.zeros().int()))
    return Codes(form.integers().int() - middle, zero - middle, scale, bits, group)


def as_symmetric(form: Affine) -> Codes:
    """code - zero as the code, with a zero point of 0; more than 8 bits where that does not fit."""
    groups = in_groups(form.integers().int(), form.group)
    values = (groups - form.zeros().int().reshape(-1, 1)).reshape(form.shape)
    low, high = int(values.min()), int(values.max())
    bits = next(b for b in (4, 8, 16) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1))
    scale = form.scale.reshape(-1) if form.group == PER_TENSOR else form.scale
    return Codes(values, None, scale, bits, form.group)


def codes_of(hf: nn.Module, forms: Mapping[str, Any]) -> dict[str, Codes]:
    """The Linear layers that stay codes: of one kind as they are stored, of several kinds all symmetric."""
    grids = {
        name: form
        for name, form in forms.items()
        if isinstance(form, Affine) and isinstance(hf.get_submodule(name).like, nn.Linear)
    }
    codes = {name: as_stored(form) for name, form in grids.items()}
    if len({code.kind for code in codes.values()}) > 1:
        codes = {name: as_symmetric(form) for name, form in grids.items()}
    return {name: code for name, code in codes.items() if code.bits <= 8}


def write(small: Compressed, hf: nn.Module, folder: Path) -> None:
    """The checkpoint, its config.json and the tokenizer's files."""
    forms = {name.removeprefix("hf."): form for name, form in small.packed.items()}
    codes = codes_of(hf, forms)
    tensors = dict(hf.state_dict())
    tensors |= {f"{name}.weight": form.decode() for name, form in forms.items() if name not in codes}
    for name, code in codes.items():
        tensors |= {f"{name}.{part}": value for part, value in code.tensors().items()}
    tensors = {name: value.detach().clone() for name, value in tensors.items() if name not in tied(hf)}
    io.write_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    config = hf.config.to_dict()
    config |= {"architectures": [type(hf).__name__], "dtype": "float32"}
    config["quantization_config"] = described(hf, codes)
    io.write_bytes(folder / "config.json", json.dumps(config, indent=2, default=str).encode())
    origin = origin_of(small.model)
    for name, content in (origin.files if origin else {}).items():
        if name != "config.json":
            io.write_bytes(io.inside(folder, name), content)


def tied(hf: nn.Module) -> set[str]:
    """Second names of tied tensors, which Transformers ties again."""
    return set(hf._tied_weights_keys or ()) if hf.config.tie_word_embeddings else set()


def words(codes: Int32[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Codes of a row in 32-bit words, the first one lowest; what is left of the last word is 0."""
    each = 32 // bits
    rows, n = codes.shape
    padded = torch.zeros(rows, math.ceil(n / each) * each, dtype=torch.int64, device=codes.device)
    padded[:, :n] = codes
    word = (padded.reshape(rows, -1, each) << bits * torch.arange(each, device=codes.device)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def described(hf: nn.Module, codes: Mapping[str, Codes]) -> dict[str, Any]:
    """What config.json says: one group for each kind of code."""
    kinds: dict[tuple[int, bool, int], list[str]] = {}
    for name, code in codes.items():
        kinds.setdefault(code.kind, []).append(name)
    linear = [n for n, m in hf.named_modules() if isinstance(m, nn.Linear) and not n.endswith(".like")]
    linear += [n for n, m in hf.named_modules() if isinstance(getattr(m, "like", None), nn.Linear)]
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": scheme(*kind),
            "input_activations": None,
            "output_activations": None,
        }
        for number, (kind, names) in enumerate(kinds.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in codes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def scheme(bits: int, symmetric: bool, group: int) -> dict[str, Any]:
    """One kind of code as compressed-tensors names it."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": {PER_TENSOR: "tensor", PER_ROW: "channel"}.get(group, "group"),
        "group_size": group if group > 0 else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }


def compared(small: Compressed, hf: nn.Module, folder: Path, x: Int64[Tensor, "b t"]) -> Reopened:
    """The outputs of the folder in Transformers beside those of the network."""
    codes = codes_of(hf, {name.removeprefix("hf."): form for name, form in small.packed.items()})
    symmetric = all(code.zero is None for code in codes.values())
    again = type(small.model)(opened(hf, folder, decoded=not symmetric)).eval()
    with torch.no_grad():
        return reopened(small, x, again(x.cpu()).float(), len(codes))


def opened(hf: nn.Module, folder: Path, *, decoded: bool) -> nn.Module:
    """The folder as Transformers loads it, in float32; `decoded`: codes are decoded as they are read."""
    transformers = need("transformers")
    transformers.utils.logging.disable_progress_bar()
    builder = getattr(transformers, type(hf).__name__)
    config = builder.config_class.from_pretrained(folder, local_files_only=True)
    config.quantization_config["dequantize"] = decoded
    try:
        return builder.from_pretrained(folder, config=config, local_files_only=True, dtype=torch.float32)
    finally:
        transformers.utils.logging.enable_progress_bar()
