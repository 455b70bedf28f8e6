"""llm-compressor (https://github.com/vllm-project/llm-compressor, Apache-2.0) as the other side of
`netweight bench compress`.

    PYTHON -m netweight.bench.compress_peer REQUEST    # started by the bench, with this library on its path

PYTHON is an environment with llmcompressor 0.14 (and so torch, transformers and datasets). Its `oneshot` runs
with its defaults, the grid apart: integers of the asked bits, one scale per row, of all Linear layers but the
head, on the same calibration windows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn

from netweight.bench.compress_worker import Request, serve


def load(folder: str) -> nn.Module:
    """The model, and everything that compressing it will import."""
    for name in ("llmcompressor", "llmcompressor.modifiers.gptq", "llmcompressor.modifiers.awq", "datasets"):
        import_module(name)
    transformers = import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def peer(model: nn.Module, calibration: Tensor, request: Request) -> Callable[[], nn.Module]:
    """One `oneshot` of GPTQ or AWQ; the weights of the model are rounded in place."""
    weights = {
        "num_bits": request["bits"],
        "type": "int",
        "symmetric": request["symmetric"],
        "strategy": "channel",
    }
    modifier = {"gptq": "GPTQModifier", "awq": "AWQModifier"}[request["method"]]
    recipe = getattr(import_module(f"llmcompressor.modifiers.{request['method']}"), modifier)(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    with torch.enable_grad():  # as it is called by itself
        import_module("llmcompressor").oneshot(
            model=model,
            processor=processor(),
            dataset=import_module("datasets").Dataset.from_dict(rows),
            recipe=recipe,
            max_seq_length=calibration.shape[1],
            num_calibration_samples=len(calibration),
            shuffle_calibration_samples=False,
        )
    return lambda: model


def processor() -> object:
    """A tokenizer of one word: it wants one, the windows are tokens already."""
    tokenizers = import_module("tokenizers")
    one = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    return import_module("transformers").PreTrainedTokenizerFast(tokenizer_object=one, pad_token="a")


if __name__ == "__main__":
    serve(load, peer, f"llmcompressor {import_module('llmcompressor').__version__}")
