"""A small Llama, trained on WikiText-2 where it is used: a language model with all parts of a large one.

Architecture: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971
(RMS norm, rotary positions, gated SiLU; here as many key as query heads), on 2048 byte-pair tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from netweight.core.errors import BadInput, need
from netweight.core.origin import Origin, mark
from netweight.data.text import VOCABULARY, Subwords, subwords, wikitext2
from netweight.models.huggingface import LanguageModel
from netweight.models.lm_training import Training, train
from netweight.models.trained import trained

VERSION = 1
FULL = Training(steps=1500, batch=8, rate=3e-3)
QUICK = Training(steps=60, batch=8, length=64, warmup=10)


def small_llama(seed: int = 0, *, quick: bool = False, steps: int | None = None) -> LanguageModel:
    """The trained model (width 128, 4 layers, 1.3 M weights), from the cache after the first time.

    quick: width 64, 2 layers, 60 steps. steps: another number of them. Raises `BadInput` without the text.
    """
    how = QUICK if quick else FULL
    how = how if steps is None else replace(how, steps=steps)
    tokenizer = subwords(wikitext2("train"))
    name = "small-llama-quick" if quick else "small-llama"
    model = trained(
        f"{name}-v{VERSION}-{how.steps}-{seed}",
        lambda: architecture(quick),
        lambda bare: train(bare, tokenizer(wikitext2("train")), how, seed),
        seed,
    )
    return with_tokenizer(model, name, tokenizer)


def quick_llama() -> LanguageModel:
    """The small variant: it knows little, and is there in a few seconds."""
    return small_llama(quick=True)


def skeleton(target: str, files: Mapping[str, bytes]) -> LanguageModel:
    """The network and tokenizer of an origin, with random weights."""
    if "tokenizer.json" not in files:
        raise BadInput(f"{target}: there is no tokenizer.json; the folder is not whole")
    model = architecture(quick=target.endswith("-quick"))
    return with_tokenizer(model, target, Subwords(files["tokenizer.json"].decode()))


def architecture(quick: bool = False) -> LanguageModel:
    """The same network with random weights."""
    transformers = need("transformers")
    width, layers = (64, 2) if quick else (128, 4)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LanguageModel(transformers.LlamaForCausalLM(config))


def with_tokenizer(model: LanguageModel, name: str, tokenizer: Subwords) -> LanguageModel:
    """The model, marked as the built-in `name`, with its tokenizer."""
    model.netweight_tokenizer = tokenizer
    mark(model, Origin("built-in", name, {"tokenizer.json": tokenizer.content.encode()}))
    return model
