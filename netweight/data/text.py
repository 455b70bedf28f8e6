"""Text for language models: the corpora, two tokenizers, and windows of tokens.

    tokens = subwords(text)                          # `n` int64
    data = windows(tokens, length=128, name="text")  # x `b t`, y the next tokens, `b t`

WikiText-2: Merity et al., "Pointer Sentinel Mixture Models", 2017. Its training part is not among the data
files; the validation part and seven novels are trained on instead, and its test part is tested on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from netweight.core import io
from netweight.core.errors import BadInput, NetweightError, need
from netweight.core.task import Data
from netweight.data.shared import shared_file, shared_files

VOCABULARY = 2048  # of `subwords`
LARGEST_TEXT = 1 << 30  # bytes
TABLE = "\n " + string.digits + string.ascii_letters + string.punctuation + "–—‘’“”…′£°½×àáâäæçèéêëíîñóôöøœü"
UNKNOWN = "\ufffd"


@runtime_checkable
class Tokenizer(Protocol):
    """From text to token numbers and back."""

    @property
    def size(self) -> int:
        """How many tokens there are; numbers are 0 to size - 1."""
        ...

    def __call__(self, text: str) -> Int64[Tensor, " n"]:
        """The token numbers of the text."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of those tokens."""
        ...


@dataclass(frozen=True)
class Characters:
    """One token per character of `table`; every other character is the last token."""

    table: str = TABLE

    @property
    def size(self) -> int:
        """Characters of the table, and one for all others."""
        return len(self.table) + 1

    def __call__(self, text: str) -> Int64[Tensor, " n"]:
        """The place of each character in the table."""
        place = {ord(c): i for i, c in enumerate(self.table)}
        return torch.tensor([place.get(ord(c), len(self.table)) for c in text], dtype=torch.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters again, U+FFFD for unknown ones."""
        letters = self.table + UNKNOWN
        return "".join(letters[int(t)] for t in tokens)


@dataclass(frozen=True)
class Bytes:
    """One token per UTF-8 byte."""

    size: int = 256

    def __call__(self, text: str) -> Int64[Tensor, " n"]:
        """The bytes of the text."""
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text again, U+FFFD where the bytes are not UTF-8."""
        return bytes(int(t) for t in tokens).decode(errors="replace")


@dataclass(frozen=True)
class Subwords:
    """A `tokenizer.json` of the tokenizers library, by its content (JSON text)."""

    content: str = field(repr=False)

    def __post_init__(self) -> None:
        try:
            self._tokenizer.get_vocab_size()
        except NetweightError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise BadInput(
                f"not a tokenizer.json ({error}); give the one that belongs to the model"
            ) from error

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return need("tokenizers").Tokenizer.from_str(self.content)

    def __getstate__(self) -> dict[str, str]:
        return {"content": self.content}

    @property
    def size(self) -> int:
        """Entries of the vocabulary, special tokens counted."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, text: str) -> Int64[Tensor, " n"]:
        """The token numbers, without special tokens at the ends; long text is encoded line by line."""
        lines = self._tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
        return torch.tensor([i for line in lines for i in line.ids], dtype=torch.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text again."""
        return self._tokenizer.decode([int(t) for t in tokens])


def wikitext2(split: str) -> str:
    """The text of a split: "train" (validation part of WikiText-2, then the novels) or "test" (31 articles).

    Raises `BadInput` where the data folder is not there.
    """
    if split == "test":
        return read_text(shared_file("text/wikitext2_test_a.txt"))
    parts = [shared_file("text/wikitext2_valid.txt"), *shared_files("text", "book_*.txt")]
    return "\n".join(read_text(part) for part in parts)


def shakespeare() -> str:
    """Plays of Shakespeare: another kind of English, to calibrate on one text and test on another."""
    return read_text(shared_file("text/tiny_shakespeare.txt"))


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 file of at most 1 GiB; raises `BadInput` for anything else."""
    path = io.existing_file(path, "a UTF-8 text", at_most=LARGEST_TEXT)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def subwords(text: str, size: int = VOCABULARY) -> Subwords:
    """A byte-level byte-pair encoding of `size` tokens learnt on the text, kept in the cache.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, arXiv:1508.07909.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, BadInput):
        kept = io.existing_file(io.cache_dir() / f"subwords-{size}-{digest}.json", "a tokenizer")
        return Subwords(kept.read_text(encoding="utf-8"))
    library = need("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    content = tokenizer.to_str()
    with contextlib.suppress(OSError, BadInput):
        io.write_bytes(io.cache_dir() / f"subwords-{size}-{digest}.json", content.encode())
    return Subwords(content)


def windows(tokens: Int64[Tensor, " n"], length: int = 128, *, name: str = "text", batch: int = 16) -> Data:
    """Consecutive windows of `length` tokens as x, each token's successor as y; a shorter rest is left out.

    Raises `BadInput` for fewer than length + 1 tokens.
    """
    if length < 1:
        raise BadInput(f"{name}: a window needs at least one token, got length={length}")
    count = (len(tokens) - 1) // length
    if count < 1:
        raise BadInput(
            f"{name}: {len(tokens)} tokens, fewer than one window of {length} + 1; give a longer text"
        )
    x = tokens[: count * length].reshape(count, length)
    y = tokens[1 : count * length + 1].reshape(count, length)
    return Data(x, y, batch=batch, name=name)
