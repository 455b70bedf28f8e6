"""Plain training of small language models, and the sizes that it is done at.

    loss = mean negative log-likelihood of the next token,
    AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101),
    rate r (1 + cos(pi t / T)) / 2 after a linear warm-up, gradient norm clipped at 1.

`python -m netweight.models.lm_training` trains the built-in language models and leaves them in the cache.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from netweight.core.task import METRICS, Data, outputs
from netweight.data.text import Tokenizer, wikitext2, windows

SEEDS = (0, 1, 2)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """`steps` of batch x length tokens each; rate: the highest learning rate; warmup: steps before it."""

    steps: int
    batch: int = 16
    length: int = 128
    rate: float = 2e-3
    warmup: int = 50
    decay: float = 0.05


def train(model: nn.Module, tokens: Int64[Tensor, " n"], how: Training, seed: int = 0) -> list[float]:
    """Train in place on random windows of the tokens; the loss of each step, in nats per token."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": how.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how.rate, betas=(0.9, 0.98))
    model.train()
    losses = []
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, how)
        starts = torch.randint(len(tokens) - how.length, (how.batch, 1), generator=generator)
        window = tokens[starts + torch.arange(how.length + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def rate_at(step: int, how: Training) -> float:
    """The learning rate of a step: linear up over the warm-up, then half a cosine down to 0 at the end."""
    warm = min(1.0, (step + 1) / max(how.warmup, 1))
    return how.rate * warm * (1 + math.cos(math.pi * step / how.steps)) / 2


def held_out(tokenizer: Tokenizer, length: int = 128) -> Data:
    """The test text of WikiText-2 as windows of that tokenizer."""
    return windows(tokenizer(wikitext2("test")), length, name="wikitext2")


def perplexity(model: nn.Module, data: Data) -> float:
    """exp of the mean negative log-likelihood per token."""
    metric = METRICS["perplexity"]
    return metric.summary(
        float(torch.cat([metric.of(outputs(model, part), part.y) for part in _parts(data)]).mean())
    )


def _parts(data: Data, size: int = 256) -> list[Data]:
    """The data in pieces whose logits fit into memory."""
    return [data.rows(slice(start, start + size)) for start in range(0, len(data), size)]


def main() -> None:
    """Train and keep every built-in language model, telling seconds and test perplexity of each."""
    from netweight.models.llama import small_llama
    from netweight.models.opt import small_opt

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for make in (small_llama, small_opt):
        for seed in SEEDS:
            start = time.perf_counter()
            model = make(seed)
            seconds = time.perf_counter() - start
            reached = perplexity(model, held_out(model.netweight_tokenizer).take(400))
            logger.info("%s seed %d: %.0f s, test perplexity %.2f", make.__name__, seed, seconds, reached)


if __name__ == "__main__":
    main()
