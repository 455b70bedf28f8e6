"""A translation task with an exact reference: real English phrases into a language that is made of rules.

Source: phrases of WikiText-2 (and the novels beside it) that consist of the `WORDS` most frequent words and
commas alone. Target, from the words w_1 .. w_n of a phrase:

    clauses    at commas the phrase falls into clauses; the words of each clause are put in reverse order
    swap       in the source, a word of part A right before one of part B changes places with it
    inflection w_t becomes the form d(w_t, c) of its translation d(w_t), c the class (0, 1, 2) of the word
               that followed w_t in the source phrase, 0 at its end

Dictionary, parts and classes are drawn once, at random (`LANGUAGE`): whoever translates has to look words
up, to look one word ahead, and to find the place that a word comes from. Tokens are 0 `begin`, 1 padding, 2
end, 3 comma, then the words, then three forms of each; a word's number is its rank by frequency.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from netweight.core.errors import BadInput
from netweight.core.task import IGNORED, Data
from netweight.data.split import Split
from netweight.data.text import wikitext2

NAME = "constructed"
WORDS = 100
LONGEST = 6  # tokens of a phrase
CALIBRATION = 512
FORMS = 3
BEGIN, PADDING, END, COMMA, FIRST = 0, 1, 2, 3, 4
LANGUAGE = 0
SHORTEST = 4


@dataclass(frozen=True)
class Language:
    """The rules by word: dictionary (a permutation), class of inflection, and part ("", A or B)."""

    dictionary: tuple[int, ...]
    classes: tuple[int, ...]
    parts: tuple[str, ...]

    @classmethod
    def drawn(cls, words: int = WORDS, seed: int = LANGUAGE) -> Language:
        """A language of that many words: a quarter of them of part A, a quarter of part B."""
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(words, generator=g).tolist()
        classes = torch.randint(FORMS, (words,), generator=g).tolist()
        parts = ["AB  "[i].strip() for i in torch.randint(4, (words,), generator=g).tolist()]
        return cls(tuple(order), tuple(classes), tuple(parts))

    @property
    def vocabulary(self) -> int:
        """How many tokens there are in both languages together."""
        return FIRST + (1 + FORMS) * len(self.dictionary)

    def translate(self, tokens: Sequence[int]) -> list[int]:
        """The target tokens of a phrase of source tokens, as many of them."""
        following = [*tokens[1:], COMMA]
        forms = [self.form(token, after) for token, after in zip(tokens, following)]
        order = self.swapped(tokens)
        found: list[int] = []
        clause: list[int] = []
        for place in [*order, None]:
            if place is None or tokens[place] == COMMA:
                found += clause[::-1] + ([] if place is None else [COMMA])
                clause = []
            else:
                clause.append(forms[place])
        return found

    def form(self, token: int, after: int) -> int:
        """The translation of a word, inflected by the one that follows it."""
        if token == COMMA:
            return COMMA
        kind = 0 if after == COMMA else self.classes[after - FIRST]
        return FIRST + len(self.dictionary) + FORMS * self.dictionary[token - FIRST] + kind

    def swapped(self, tokens: Sequence[int]) -> list[int]:
        """The places of a phrase, each A before a B changed with it."""
        parts = ["" if token == COMMA else self.parts[token - FIRST] for token in tokens]
        order, place = [*range(len(tokens))], 0
        while place + 1 < len(order):
            if parts[place] == "A" and parts[place + 1] == "B":
                order[place : place + 2] = [place + 1, place]
                place += 1
            place += 1
        return order


def parts() -> Split:
    """What the command line takes for `NAME`: all phrases, the first of training to calibrate on."""
    train = translation("train")
    return Split(train.take(CALIBRATION), translation("test"), lambda: train)


def translation(split: str, count: int | None = None, *, longest: int = LONGEST, words: int = WORDS) -> Data:
    """That many phrases (or all) of at most `longest` tokens, and translations; none of "test" is in "train".

    x: `b 2 (longest + 1)` token ids, the source with its end, padded, then the decoder's input (`BEGIN`, then
    the target), padded. y: `b longest + 1`, the target with its end, then `IGNORED`.
    Raises `BadInput` where there are fewer phrases than asked for.
    """
    if split not in ("train", "test"):
        raise BadInput(f"split {split!r}: the phrases are those of train or test")
    found = _phrases(split, longest, words)
    count = len(found) if count is None else count
    if not 1 <= count <= len(found):
        raise BadInput(f"{count} phrases of {split} up to {longest} tokens: there are {len(found)}")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(LANGUAGE))[:count]
    return encoded([found[i] for i in order.tolist()], Language.drawn(words), longest)


def encoded(phrases: Sequence[Sequence[int]], language: Language, longest: int) -> Data:
    """Phrases of source tokens as data, see `translation`."""
    length = longest + 1
    x = torch.full((len(phrases), 2 * length), PADDING)
    y = torch.full((len(phrases), length), IGNORED)
    for row, phrase in enumerate(phrases):
        target = torch.tensor([BEGIN, *language.translate(phrase), END])
        x[row, : len(phrase) + 1] = torch.tensor([*phrase, END])
        x[row, length : length + len(phrase) + 1] = target[:-1]
        y[row, : len(phrase) + 1] = target[1:]
    return Data(x, y, name="constructed language")


@functools.cache
def _phrases(split: str, longest: int, words: int) -> tuple[tuple[int, ...], ...]:
    """Each different phrase once, in the order of the text."""
    text = _tokens(wikitext2("train"))
    frequent = Counter(token for token in text if token.isalpha() and token != "unk").most_common(words)
    if len(frequent) < words:
        raise BadInput(f"{words} words: the text has {len(frequent)} different ones")
    number = {word: FIRST + rank for rank, (word, _) in enumerate(frequent)} | {",": COMMA}
    train = dict.fromkeys(_runs(text, number, longest))
    if split == "train":
        return tuple(train)
    return tuple(
        p for p in dict.fromkeys(_runs(_tokens(wikitext2("test")), number, longest)) if p not in train
    )


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


def _runs(text: Sequence[str], number: dict[str, int], longest: int) -> Iterator[tuple[int, ...]]:
    """The maximal runs of known words, without commas at their ends, that are neither short nor long."""
    run: list[int] = []
    for token in [*text, ""]:
        if token in number:
            run.append(number[token])
            continue
        while run and run[-1] == COMMA:
            run.pop()
        while run and run[0] == COMMA:
            run.pop(0)
        if SHORTEST <= len(run) <= longest:
            yield tuple(run)
        run = []
