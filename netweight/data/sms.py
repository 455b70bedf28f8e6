"""The SMS Spam Collection: 5,574 text messages, of which one in eight is spam (Almeida and Hidalgo, 2011).

    words = word_pieces()                 # a vocabulary learnt on the training messages
    data = train(words, length=48)        # x `b 48` token numbers, y 1 for spam

Plain accuracy hides a collapse here, as 86.6 % are no spam: judge on balanced accuracy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from netweight.core.errors import BadInput, need
from netweight.core.task import Data
from netweight.data.shared import shared_file
from netweight.data.text import Subwords, read_text

CLASSES = ("ham", "spam")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # the first token numbers, in this order
PAD, CLS, SEP = 0, 2, 3
VOCABULARY = 4096


def train(tokenizer: Subwords, length: int = 48) -> Data:
    """3,345 messages; raises `BadInput` without the data folder."""
    return _part("train", tokenizer, length)


def test(tokenizer: Subwords, length: int = 48) -> Data:
    """1,115 messages that `train` does not hold."""
    return _part("test_a", tokenizer, length)


@functools.cache
def word_pieces(size: int = VOCABULARY) -> Subwords:
    """A word-piece vocabulary, without capitals, of at most `size` tokens, learnt on the training messages.

    Wu et al., "Google's Neural Machine Translation System", 2016, arXiv:1609.08144. The same every time: the
    library numbers the characters inside words in the order of a hash table and breaks ties by these numbers,
    so they are given to it in order.
    """
    library = need("tokenizers")

    def bare(vocabulary: dict[str, int]) -> Any:
        tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=SPECIAL[1]))
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece()
        return tokenizer

    texts = [text for _, text in messages("train")]
    tokenizer = bare({})
    inside = sorted(set("".join(map(tokenizer.normalizer.normalize_str, texts))) - set(" "))
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *(f"##{c}" for c in inside)], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Subwords(bare(tokenizer.get_vocab()).to_str())


@functools.cache
def messages(part: str) -> tuple[tuple[int, str], ...]:
    """(class, text) of each message of a part, "train" or "test_a"."""
    path = shared_file(f"sms_spam/sms_{part}.tsv")
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, tab, text = line.partition("\t")
        if name not in CLASSES or not tab:
            raise BadInput(f"{path}: line {number} is not ham or spam, a tab, and a message; fetch it again")
        found.append((CLASSES.index(name), text))
    return tuple(found)


def tokens(text: str, tokenizer: Subwords, length: int) -> Int64[Tensor, " length"]:
    """[CLS], the message as far as there is room, [SEP], and padding."""
    words = tokenizer(text)[: length - 2].tolist()
    row = [CLS, *words, SEP]
    return torch.tensor(row + [PAD] * (length - len(row)))


def _part(part: str, tokenizer: Subwords, length: int) -> Data:
    if length < 3:
        raise BadInput(f"length={length}: a message needs room for its two marks and a token, 3 at least")
    found = messages(part)
    x = torch.stack([tokens(text, tokenizer, length) for _, text in found])
    return Data(x, torch.tensor([label for label, _ in found]), 100, f"sms ({part})", CLASSES)
