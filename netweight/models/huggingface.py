"""Networks of the transformers library, from a folder of config.json and safetensors, giving plain logits.

A folder is somebody else's: its code is never run, nothing is unpickled, nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core import io
from netweight.core.errors import BadInput, NetweightError, need
from netweight.core.origin import Origin, mark
from netweight.data.text import Subwords

KINDS = {  # the end of an architecture's name: the class of transformers that builds it
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}
KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
LARGEST = 64 << 20  # bytes of each of these


class LanguageModel(nn.Module):
    """A causal language model of transformers that gives logits.

    hf: the model itself. netweight_tokenizer: from text to token numbers, None where none came with it.
    """

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        self.netweight_tokenizer: Any = None

    def forward(self, ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t vocabulary"]:
        """Logits of the next token after each."""
        return self.hf(ids, use_cache=False).logits


class Classifier(nn.Module):
    """A classifier of transformers, of token numbers or of images, that gives logits."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        self.netweight_tokenizer: Any = None

    def forward(self, x: Tensor) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.hf(x).logits


def load(folder: str | Path) -> LanguageModel | Classifier:
    """The network of a folder in float32, in eval mode, with its tokenizer and its origin.

    Raises `BadInput` for a folder without safetensors, with weights missing or of other shapes, of an
    architecture that transformers does not have, or one that is quantised already; `MissingExtra` without
    transformers.
    """
    folder = Path(folder)
    config = io.read_json(folder / "config.json", "the config of a Hugging Face model", at_most=LARGEST)
    _refuse_pickles(folder)
    builder = _builder(config, folder)
    try:
        hf, report = builder.from_pretrained(
            folder.resolve(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except NetweightError:
        raise
    except Exception as error:  # transformers raises anything for a damaged folder
        raise BadInput(
            f"{folder}: transformers cannot load it ({_first_line(error)}); "
            "give a whole folder of safetensors"
        ) from error
    for what in ("missing_keys", "mismatched_keys"):
        if report.get(what):
            name = str(min(map(str, report[what])))
            raise BadInput(f"{folder}: tensor {name} is missing or of another shape; the folder is not whole")
    origin = describe(folder)
    return _wrapped(hf, origin.target, origin.files)


def describe(folder: str | Path) -> Origin:
    """Where the network of a folder comes from: its architecture, and the files beside its weights."""
    folder = Path(folder)
    config = io.read_json(folder / "config.json", "the config of a Hugging Face model", at_most=LARGEST)
    files = {name: _content(folder / name) for name in KEPT if (folder / name).is_file()}
    return Origin("huggingface", _architecture(config, folder), files)


def skeleton(target: str, files: Mapping[str, bytes]) -> LanguageModel | Classifier:
    """The architecture that config.json describes, with random weights; target is its name."""
    transformers = need("transformers")
    try:
        config = json.loads(files["config.json"])
    except (KeyError, ValueError, RecursionError) as error:
        raise BadInput(f"{target}: there is no readable config.json; the folder is not whole") from error
    builder = _builder(config, target)
    try:
        known = transformers.CONFIG_MAPPING[config["model_type"]]
        hf = builder.from_config(known.from_dict(config), attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # a config from outside may hold anything
        raise BadInput(f"{target}: its config.json cannot be built ({_first_line(error)})") from error
    return _wrapped(hf.float(), target, files)


def _wrapped(hf: nn.Module, architecture: str, files: Mapping[str, bytes]) -> LanguageModel | Classifier:
    """The model as one from tensor to logits, with its tokenizer, marked."""
    causal = KINDS[_ending(architecture)] == "AutoModelForCausalLM"
    model = LanguageModel(hf) if causal else Classifier(hf)
    if "tokenizer.json" in files:
        model.netweight_tokenizer = Subwords(files["tokenizer.json"].decode())
    mark(model, Origin("huggingface", architecture, dict(files)))
    return model.eval()


def _architecture(config: Any, where: object) -> str:
    """The class of transformers that the config names."""
    names = config.get("architectures") if isinstance(config, dict) else None
    if not (isinstance(names, list) and names and isinstance(names[0], str) and _ending(names[0])):
        raise BadInput(
            f"{where}: config.json names {names} as architectures; expected one ending in {', '.join(KINDS)}"
        )
    return names[0]


def _ending(architecture: str) -> str:
    return next((ending for ending in KINDS if architecture.endswith(ending)), "")


def _builder(config: Any, where: object) -> Any:
    """The class of transformers that loads or builds this config."""
    kind = KINDS[_ending(_architecture(config, where))]
    if config.get("quantization_config"):
        raise BadInput(f"{where}: the model is quantised already; give the folder of the original weights")
    return getattr(need("transformers"), kind)


def _refuse_pickles(folder: Path) -> None:
    """Raises `BadInput` unless the weights are safetensors that lie in the folder itself."""
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        found = f"only {pickled[0]}, a pickle, which is never loaded" if pickled else "no weights"
        raise BadInput(
            f"{folder}: there is {found}; save it as safetensors (save_pretrained does) and give that folder"
        )
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    content = io.read_json(index, "the index of a checkpoint", at_most=LARGEST)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise BadInput(f"{index}: there is no weight_map; give a whole folder of safetensors")
    for name in {str(n) for n in names.values()}:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index}: {name!r} is not a safetensors file beside it; give a whole folder")
        io.existing_file(folder / name, "a part of the checkpoint")


def _content(path: Path) -> bytes:
    return io.existing_file(path, "a file of a Hugging Face model", at_most=LARGEST).read_bytes()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
