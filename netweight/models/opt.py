"""A small OPT of characters, trained on WikiText-2 where it is used: ReLU and layer norms with biases.

Architecture: Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022, arXiv:2205.01068
(learnt positions, norm before each part), on the 128 characters of `data.text.Characters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from netweight.core.errors import need
from netweight.core.origin import Origin, mark
from netweight.data.text import Characters, wikitext2
from netweight.models.huggingface import LanguageModel
from netweight.models.lm_training import Training, train
from netweight.models.trained import trained

VERSION = 1
FULL = Training(steps=1200, rate=4e-3)  # to about 1.8 nats a character; half of it leaves 2.1 and noisy gaps
QUICK = Training(steps=60, batch=8, length=64, warmup=10)


def small_opt(seed: int = 0, *, quick: bool = False, steps: int | None = None) -> LanguageModel:
    """The trained model (width 128, 4 layers, 0.8 M weights), from the cache after the first time.

    quick: width 64, 2 layers, 60 steps. steps: another number of them. Raises `BadInput` without the text.
    """
    how = QUICK if quick else FULL
    how = how if steps is None else replace(how, steps=steps)
    name = "small-opt-quick" if quick else "small-opt"
    model = trained(
        f"{name}-v{VERSION}-{how.steps}-{seed}",
        lambda: architecture(quick),
        lambda bare: train(bare, Characters()(wikitext2("train")), how, seed),
        seed,
    )
    mark(model, Origin("built-in", name))
    return model


def quick_opt() -> LanguageModel:
    """The small variant: it knows little, and is there in a few seconds."""
    return small_opt(quick=True)


def skeleton(target: str, files: Mapping[str, bytes]) -> LanguageModel:
    """The network of an origin, with random weights."""
    model = architecture(quick=target.endswith("-quick"))
    mark(model, Origin("built-in", target))
    return model


def architecture(quick: bool = False) -> LanguageModel:
    """The same network with random weights, and its tokenizer."""
    transformers = need("transformers")
    width, layers = (64, 2) if quick else (128, 4)
    config = transformers.OPTConfig(
        vocab_size=Characters().size,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LanguageModel(transformers.OPTForCausalLM(config))
    model.netweight_tokenizer = Characters()
    return model
