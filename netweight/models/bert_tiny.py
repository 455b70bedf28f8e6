"""BERT-Tiny, trained from nothing to tell spam from other text messages.

Architecture: Turc et al., "Well-Read Students Learn Better: On the Importance of Pre-training Compact
Models", 2019, arXiv:1908.08962 (2 layers, width 128, 2 heads, 512 hidden units), on the word pieces of
`data.sms`. Weights start at a standard deviation of 1 / sqrt(width): BERT's own 0.02 is made for widths near
1000, and leaves so much to the embeddings here that nothing done to the layers is felt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.errors import need
from netweight.core.origin import Origin, mark
from netweight.data import sms
from netweight.models.huggingface import Classifier
from netweight.models.trained import trained

VERSION = 2
WIDTH, LAYERS, HEADS, HIDDEN, LENGTH = 128, 2, 2, 512, 32
EPOCHS, BATCH, RATE, DECAY = 6, 32, 5e-4, 1e-2


def bert_tiny(seed: int = 0) -> Classifier:
    """The trained network (0.9 M weights): token numbers `b t` to two logits, from the cache after the first
    time; raises `BadInput` without the data folder."""
    model = trained(f"bert-tiny-sms-v{VERSION}-{seed}", architecture, lambda bare: fit(bare, seed), seed)
    words = sms.word_pieces()
    files = {"config.json": config().to_json_string().encode(), "tokenizer.json": words.content.encode()}
    mark(model, Origin("huggingface", "BertForSequenceClassification", files))
    model.netweight_tokenizer = words
    return model


def config():
    """The sizes, as the transformers library takes them."""
    return need("transformers").BertConfig(
        vocab_size=sms.VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=LENGTH,
        pad_token_id=sms.PAD,
        num_labels=2,
        initializer_range=WIDTH**-0.5,
        architectures=["BertForSequenceClassification"],
        attn_implementation="sdpa",
    )


def architecture() -> Classifier:
    """The same network with random weights."""
    return Classifier(need("transformers").BertForSequenceClassification(config()))


def fit(model: nn.Module, seed: int) -> None:
    """AdamW on the training messages with one rise and fall of the rate; both classes weigh the same."""
    data = sms.train(sms.word_pieces(), LENGTH)
    assert data.y is not None
    weight = len(data) / (2 * torch.bincount(data.y).float())
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(data), generator=generator)
        for rows in order[: len(data) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows], weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
