"""A Hugging Face checkpoint larger than memory, compressed block by block from its safetensors.

    X_0 = embedding(tokens)
    for each decoder block i:   load its float weights -> plan and compress on X_i -> X_(i+1) = compressed
    block(X_i)
                                -> write its shard, forget it

Peak memory is one block, its Gram matrices and two sets of calibration activations, whatever the depth.
Each block is an ordinary network to the methods: the planner sees a module from hidden states to hidden
states. Because X_(i+1) comes from the COMPRESSED block, later blocks make up for earlier errors (Frantar et
al. 2023, section 4). Embedding, final norm and head stay as they are. A killed run goes on at the first
block without a shard.

Differs from the in-memory path: the budget of mean bits holds for every block by itself, not for the whole
network.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core import catalogue, io
from netweight.core.compressed import FORMAT, Change, Compressed, assemble, described
from netweight.core.errors import BadInput, need
from netweight.core.plan import Budget, Plan, allocate
from netweight.core.progress import steps
from netweight.core.rewrite import rewritten
from netweight.core.task import Data, Task, outputs
from netweight.data import files
from netweight.data.text import Subwords
from netweight.evidence.sensitivity import options
from netweight.models.huggingface import describe
from netweight.planning import as_plan, candidates, carry_out, is_whole, planned_layers, uniform
from netweight.resume import data_hash, place

BLOCKS = ("model.layers", "model.decoder.layers")  # where decoder blocks lie in a transformers model
PREFIX = "hf"  # under which `models.huggingface.LanguageModel` holds the model


class Block(nn.Module):
    """One decoder block as a network from hidden states `b t d` to hidden states, positions and mask built
    in."""

    def __init__(self, block: nn.Module, rotary: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.rotary = [rotary]  # in a list: shared by all blocks, part of none

    def forward(self, x: Tensor) -> Tensor:
        """The block's output with a causal mask."""
        time = x.shape[1]
        mask = torch.full((time, time), torch.finfo(x.dtype).min, device=x.device).triu(1)[None, None]
        rotary = self.rotary[0]
        extra = {}
        if rotary is not None:
            extra["position_embeddings"] = rotary(x, torch.arange(time, device=x.device)[None])
        out = self.block(x, attention_mask=mask.to(x.dtype), **extra)
        return out[0] if isinstance(out, tuple) else out


def compress_folder(
    folder: str | Path,
    tokens: Data,
    budget: Budget,
    out: Path,
    *,
    method: str = "gptq",
    group: int = 128,
    resume: bool = False,
) -> Plan:
    """Compress the decoder blocks of a checkpoint folder to `out`; the same folder that `Compressed.save`
    writes.

    tokens: calibration windows `b t`. budget: mean bits per weight, held in every block (other ceilings raise
    `BadInput`). group: the group size offered to the planner beside one scale per row.
    """
    folder, out = Path(folder), Path(out)
    if budget != Budget(bits=budget.bits) or budget.bits is None:
        raise BadInput(
            "a checkpoint that is compressed block by block takes a budget of mean bits alone: bits=4"
        )
    io.may_replace(out)
    shell, rotary = _shell(folder)
    where, blocks = _blocks(shell)
    index = Shards(folder)
    partial = _open(out, folder, tokens, budget, method, resume)
    done = sum((partial / f"block-{number:05}.json").exists() for number in range(len(blocks)))
    x = (
        io.read_tensors(partial / f"hidden-{done:05}.safetensors")["x"]
        if done
        else _embed(shell, index, tokens)
    )
    for number in steps(range(done, len(blocks)), "Compressing block by block"):
        hidden = Data(x, batch=tokens.batch, name=f"block {number}")
        small = _one_block(
            Block(_load(blocks[number], index, f"{where}.{number}."), rotary), hidden, budget, method, group
        )
        x = outputs(small.model, hidden)
        io.write_tensors(partial / f"hidden-{number + 1:05}.safetensors", {"x": x})
        _write_block(partial, number, small, f"{PREFIX}.{where}.{number}.")
        (partial / f"hidden-{number:05}.safetensors").unlink(missing_ok=True)
        blocks[number] = nn.Identity()
        del small
        gc.collect()
    return _finish(folder, out, partial, index, len(blocks), where)


def calibration(folder: str | Path, data: str) -> Data:
    """Windows of tokens to calibrate on: DATA of the command line through the checkpoint's own tokenizer."""
    files_ = describe(folder).files
    if "tokenizer.json" not in files_:
        raise BadInput(f"{folder}: there is no tokenizer.json; put it beside config.json to use text")
    reader = nn.Module()
    reader.netweight_tokenizer = Subwords(files_["tokenizer.json"].decode())
    return files.load(data, model=reader).calibration


class Shards:
    """The tensors of a checkpoint folder by name, read one at a time from however many safetensors files."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.files: dict[str, Path] = {}
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise BadInput(
                f"{folder}: there is no safetensors file; save the checkpoint with safe_serialization=True"
            )
        for file in found:
            try:
                with safe_open(file, framework="pt") as opened:
                    self.files.update(dict.fromkeys(opened.keys(), file))
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    f"{file}: not a whole safetensors file ({error}); download it again"
                ) from error

    def read(self, name: str) -> Tensor:
        """One tensor; raises `BadInput` where the checkpoint lacks it or it holds NaN."""
        from safetensors import safe_open

        if name not in self.files:
            raise BadInput(f"the checkpoint has no tensor {name}; it does not belong to its config.json")
        with safe_open(self.files[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadInput(f"the checkpoint's tensor {name} holds NaN or Inf; repair it first")
        return tensor


def _shell(folder: Path) -> tuple[nn.Module, nn.Module | None]:
    """The model without weights (on the meta device), and its rotary embedding with real buffers."""
    transformers = need("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rotary = getattr(shell.model, "rotary_emb", None)
    return shell, None if rotary is None else type(rotary)(config)


def _blocks(shell: nn.Module) -> tuple[str, nn.ModuleList]:
    """Where the decoder blocks lie, and the blocks."""
    for where in BLOCKS:
        try:
            return where, shell.get_submodule(where)
        except AttributeError:
            continue
    raise BadInput(
        f"{type(shell).__name__}: decoder blocks are expected at {' or '.join(BLOCKS)}; load it whole instead"
    )


def _load(module: nn.Module, index: Shards, prefix: str) -> nn.Module:
    """The module with its tensors in float32 on the CPU."""
    module = module.to_empty(device="cpu").float()
    for name, parameter in module.state_dict(keep_vars=True).items():
        tensor = index.read(prefix + name)
        if tensor.shape != parameter.shape:
            raise BadInput(
                f"{prefix}{name}: shape {tuple(tensor.shape)}, the config says {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensor)
    return module


def _embed(shell: nn.Module, index: Shards, tokens: Data) -> Tensor:
    """The inputs of the first block, `b t d` float32: token embeddings, and positions where the model adds
    them."""
    prefix = "model.decoder." if hasattr(shell.model, "decoder") else "model."
    inner = shell.get_submodule(prefix.removesuffix("."))
    table = index.read(prefix + "embed_tokens.weight")
    if int(tokens.x.max()) >= len(table):
        raise BadInput(
            f"{tokens.name}: token {int(tokens.x.max())}, vocabulary of {len(table)}; check the tokenizer"
        )
    x = torch.nn.functional.embedding(tokens.x, table).float()
    positions = getattr(inner, "embed_positions", None)
    if positions is not None:
        weight = index.read(prefix + "embed_positions.weight").float()
        x = x + weight[torch.arange(x.shape[1]) + positions.offset]
    return x


def _one_block(block: Block, hidden: Data, budget: Budget, method: str, group: int) -> Compressed:
    """One block, planned and compressed on its own inputs."""
    task = Task(calibration=hidden, test=hidden, metric="mse")
    layers = planned_layers(block, budget)
    assert budget.bits is not None
    if is_whole(method):
        return _rewritten(block, task, budget, method)
    near = [bits for bits in (2, 3, 4, 5, 6, 8) if abs(bits - budget.bits) <= 1] or [8]
    tried = candidates(method, bits=near, groups=(0, group), symmetric=(False,))
    chosen = allocate(options(block, task, layers, tried, distortion="output"), budget)
    return assemble(block, Change(carry_out(block, task, chosen)), chosen)


def _rewritten(block: Block, task: Task, budget: Budget, method: str) -> Compressed:
    """One block by a method that rewrites across its layers: what has other values is stored as it then is.

    Raises `BadInput` for what gives the block other modules or tensors, which no folder of values can say.
    """
    settings = uniform(block, budget, method)
    change = catalogue.method(method)(block, task.blind(), planned_layers(block, budget), settings)
    exact = rewritten(block, change.rewrites)
    bare = [layer for layer in change.biases if getattr(block.get_submodule(layer), "bias", None) is None]
    if change.activations or bare or _built(exact) != _built(block):
        raise BadInput(
            f"{method} adds to a network what cannot be stored block by block; load it whole instead"
        )
    return assemble(block, change, as_plan(block, change, method, settings))


def _built(module: nn.Module) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """Of which modules and tensors a network consists, by name."""
    modules = {name: type(part) for name, part in module.named_modules()}
    return modules, {name: tensor.shape for name, tensor in module.state_dict().items()}


def _write_block(partial: Path, number: int, small: Compressed, prefix: str) -> None:
    """The block's shard first, then the file that says it is whole."""
    renamed = Compressed(
        small.model,
        Plan({_full(n, prefix): replace(o, layer=_full(n, prefix)) for n, o in small.plan.choices.items()}),
        Change({_full(n, prefix): form for n, form in small.packed.items()}),
    )
    own = {_full(name, prefix): tensor for name, tensor in small.model.state_dict().items()}
    tensors, forms = described(renamed.change)
    io.write_tensors(partial / f"weights-{number:05}.safetensors", {**own, **tensors})
    io.write_json(partial / f"block-{number:05}.json", {"plan": renamed.plan.to_json(), **forms})


def _full(name: str, prefix: str) -> str:
    return prefix + name.removeprefix("block.")


def _open(out: Path, folder: Path, tokens: Data, budget: Budget, method: str, resume: bool) -> Path:
    """The folder of unfinished work, new or gone on with."""
    partial = place(out)
    head = {
        "checkpoint": str(folder.resolve()),
        "tokens": data_hash(tokens),
        "bits": budget.bits,
        "method": method,
    }
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    if partial.exists() and io.read_json(partial / "run.json") != head:
        raise BadInput(
            f"{partial}: the unfinished work is of another checkpoint, data or budget; run without --resume"
        )
    io.write_json(partial / "run.json", head)
    return partial


def _finish(folder: Path, out: Path, partial: Path, index: Shards, count: int, where: str) -> Plan:
    """All shards, the tensors outside the blocks, and the description, as one folder."""
    heads: Sequence[Mapping[str, Any]] = [io.read_json(partial / f"block-{n:05}.json") for n in range(count)]
    plan = Plan({o.layer: o for head in heads for o in Plan.from_json(head["plan"]).choices.values()})
    rest = {f"{PREFIX}.{n}": index.read(n) for n in index.files if not n.startswith(f"{where}.")}
    origin = describe(folder)
    with io.whole_folder(out) as beside:
        for number in range(count):
            shutil.copy2(partial / f"weights-{number:05}.safetensors", beside)
        io.write_tensors(beside / "weights-rest.safetensors", rest)
        io.write_json(beside / "plan.json", plan.to_json())
        for name, content in origin.files.items():
            io.write_bytes(io.inside(beside, name), content)
        packed = {name: form for head in heads for name, form in head["packed"].items()}
        io.write_json(
            beside / io.MARK,
            {
                "format": FORMAT,
                "origin": {"kind": origin.kind, "target": origin.target, "files": sorted(origin.files)},
                "left": {},
                "packed": packed,
                "activations": {},
                "rewrites": [],
            },
        )
    shutil.rmtree(partial)
    return plan
