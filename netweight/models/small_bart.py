"""A small BART that translates: an encoder, a decoder, one table of tokens for both and for the output.

Paper: Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation,
Translation, and Comprehension", ACL 2020, arXiv:1910.13461; the code is that of transformers. `Translator`
makes of any such network one from a tensor to logits: source and decoder input lie side by side in one row of
token ids (as `data.constructed` gives them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit, need
from netweight.core.origin import Origin, mark
from netweight.core.progress import steps
from netweight.core.task import IGNORED, Data
from netweight.data.constructed import LONGEST, Language, translation
from netweight.models.trained import trained

VERSION = 1
WIDTH, INNER = 96, 384
STEPS, BATCH, RATE = 1000, 32, 2e-3


class Translator(nn.Module):
    """A BartForConditionalGeneration `hf` of transformers; the first `source` ids of a row are the source."""

    def __init__(self, hf: nn.Module, source: int) -> None:
        super().__init__()
        tables: Any = hf
        tables.set_input_embeddings(tables.get_input_embeddings())  # one module, where there are three
        self.hf, self.source = hf, source

    def mask(self, x: Int64[Tensor, "b n"]) -> Bool[Tensor, "b s"]:
        """Where the source is no padding."""
        return x[:, : self.source] != self.hf.config.pad_token_id

    def forward(self, x: Int64[Tensor, "b n"]) -> Float[Tensor, "b t vocabulary"]:
        """Logits of the target token after each of the decoder's inputs."""
        if x.shape[1] <= self.source:
            raise DoesNotFit(
                f"{x.shape[1]} token ids, of which the source takes {self.source}; the decoder's come after"
            )
        source, target = x[:, : self.source], x[:, self.source :]
        return self.hf(
            input_ids=source, attention_mask=self.mask(x), decoder_input_ids=target, use_cache=False
        ).logits

    @torch.no_grad()
    def generate(self, x: Int64[Tensor, "b n"], longest: int) -> Int64[Tensor, "b longest"]:
        """The most likely token again and again, `longest` tokens; padded after the end."""
        found = self.hf.generate(
            x[:, : self.source], attention_mask=self.mask(x).long(), max_new_tokens=longest, num_beams=1,
            do_sample=False,
        )  # fmt: skip
        missing = longest + 1 - found.shape[1]  # all came to their end before
        return F.pad(found, (0, missing), value=self.hf.config.pad_token_id)[:, 1:]


def small_bart(
    vocabulary: int, source: int, *, width: int = 128, layers: int = 2, heads: int = 4, inner: int = 512
) -> Translator:
    """Random weights, those of Linear layers as Glorot and Bengio drew them (AISTATS 2010).

    There are as many layers in the encoder as in the decoder. Tokens 0, 1 and 2 begin, pad and end.
    """
    if width % heads:
        raise DoesNotFit(f"a width of {width} is not a multiple of {heads} heads; give another")
    transformers: Any = need("transformers")
    config = transformers.BartConfig(
        vocab_size=vocabulary, max_position_embeddings=source, d_model=width, encoder_layers=layers,
        decoder_layers=layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=inner, decoder_ffn_dim=inner, dropout=0.0, bos_token_id=0, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None, use_cache=True,
        attn_implementation="eager",
    )  # fmt: skip
    hf = transformers.BartForConditionalGeneration(config)
    for layer in hf.model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return Translator(hf, source).eval()


def translator(seed: int = 0) -> nn.Module:
    """The network that translates into the constructed language, in eval mode; from the cache after the first
    time, the same for the same seed."""
    model = trained(
        f"small-bart-v{VERSION}-{seed}",
        architecture,
        lambda bare: learn(bare, translation("train"), seed),
        seed,
    )
    return mark(model, Origin("built-in", "small-bart"))


def skeleton(target: str, files: Mapping[str, bytes]) -> nn.Module:
    """The same network, marked, with random weights."""
    return mark(architecture(), Origin("built-in", target))


def architecture() -> Translator:
    """2 + 2 layers of width 96 with random weights."""
    return small_bart(Language.drawn().vocabulary, LONGEST + 1, width=WIDTH, inner=INNER)


def learn(model: nn.Module, data: Data, seed: int, count: int = STEPS) -> None:
    """That many steps of AdamW with one rise and fall of the rate, over the examples again and again."""
    assert data.y is not None
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=count, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    rows = torch.cat(
        [torch.randperm(len(data), generator=generator) for _ in range(-(-count * BATCH // len(data)))]
    )
    for which in steps(rows[: count * BATCH].split(BATCH), "Training small-bart"):
        scores = model(data.x[which]).flatten(0, 1)
        loss = F.cross_entropy(scores, data.y[which].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
