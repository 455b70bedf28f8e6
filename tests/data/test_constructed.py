"""The constructed language by hand, and what the data is made of."""

from functools import partial

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.core.task import IGNORED, METRICS, Data
from netweight.data import constructed
from netweight.data.constructed import (
    BEGIN,
    COMMA,
    END,
    FIRST,
    PADDING,
    Language,
    encoded,
)
from netweight.data.files import check, load

BY_HAND = Language((2, 0, 1), (1, 2, 0), ("A", "B", ""))  # words 4, 5, 6; forms of word w from 7 + 3 d(w)


def test_translation_by_hand():
    # the class of what follows: 4 -> class of 5 = 2, 5 -> class of 6 = 0, 6 -> end = 0; 4 5 is A B: swapped
    assert BY_HAND.translate([4, 5, 6]) == [10, 15, 7]
    assert BY_HAND.translate([6]) == [10]
    # a comma inflects nothing, ends its clause and stays in its place
    assert BY_HAND.translate([5, 6, COMMA, 6, 4]) == [10, 7, COMMA, 13, 11]


def test_language_is_a_rule_and_invertible():
    language = Language.drawn(40, seed=1)
    assert language == Language.drawn(40, seed=1) != Language.drawn(40, seed=2)
    assert sorted(language.dictionary) == [*range(40)]
    assert {*language.parts} == {"A", "B", ""} and {*language.classes} == {0, 1, 2}
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        phrase = (FIRST + torch.randint(40, (6,), generator=g)).tolist()
        target = language.translate(phrase)
        places = [language.dictionary.index((t - FIRST - 40) // 3) + FIRST for t in target]
        assert sorted(places) == sorted(phrase)
        assert max(target) < language.vocabulary


def test_rows_are_source_then_decoder_input_and_the_next_tokens():
    data = encoded([[4, 5, 6], [6]], BY_HAND, 4)
    assert data.x.tolist() == [
        [4, 5, 6, END, PADDING, BEGIN, 10, 15, 7, PADDING],
        [6, END, PADDING, PADDING, PADDING, BEGIN, 10, PADDING, PADDING, PADDING],
    ]
    assert data.y.tolist() == [[10, 15, 7, END, IGNORED], [10, END, IGNORED, IGNORED, IGNORED]]


def test_metrics_leave_padding_out():
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 4, IGNORED], [2, IGNORED, IGNORED]])
    log_p = scores.log_softmax(-1)
    wanted = torch.stack([-(log_p[0, 0, 1] + log_p[0, 1, 4]) / 2, -log_p[1, 0, 2]])
    assert torch.allclose(METRICS["perplexity"].of(scores, y), wanted)
    best = scores.argmax(-1)
    right = torch.where(y == IGNORED, y, best)
    right[0, 0] = (best[0, 0] + 1) % 5
    assert METRICS["accuracy"].of(scores, right).tolist() == [0.5, 1]
    assert METRICS["loss"].of(scores[:1], torch.full((1, 3), IGNORED)).tolist() == [0]  # nothing to judge


def test_labels_of_padding_are_taken_where_there_are_others():
    model = torch.nn.Embedding(5, 5)
    x = torch.zeros(2, 3, dtype=torch.long)
    check(Data(x, torch.tensor([[1, 4, IGNORED], [2, IGNORED, IGNORED]])), model)
    with pytest.raises(BadInput, match="all labels are -100"):
        check(Data(x, torch.full((2, 3), IGNORED)), model)
    with pytest.raises(BadInput, match="labels go from -1"):
        check(Data(x, torch.full((2, 3), -1)), model)


@pytest.fixture
def little_text(monkeypatch):
    texts = {
        "train": "The cat and the dog, the cat, and the dog! A cat a dog cat. <unk> the, cat and dog 5 the",
        "test": "the cat and the dog, the cat, and the dog. the dog and the cat.",
    }
    monkeypatch.setattr(constructed, "wikitext2", texts.__getitem__)
    constructed._phrases.cache_clear()
    yield
    constructed._phrases.cache_clear()


def test_phrases_are_runs_of_frequent_words(little_text, monkeypatch):
    # by frequency: the cat dog and a; what is short or long is left out, and so is what was in training
    numbers = {"the": 4, "cat": 5, "dog": 6, "and": 7, "a": 8, ",": COMMA}
    train = constructed._phrases("train", 12, 5)
    wanted = ("the cat and the dog , the cat , and the dog", "a cat a dog cat", "the , cat and dog")
    assert train == tuple(tuple(numbers[word] for word in phrase.split()) for phrase in wanted)
    assert constructed._phrases("test", 12, 5) == ((4, 6, 7, 4, 5),)
    data = constructed.translation("train", 2, longest=6, words=5)
    assert data.x.shape == (2, 14) and data.y.shape == (2, 7)
    monkeypatch.setattr(constructed, "translation", partial(constructed.translation, words=5))
    split = load("constructed")
    assert (len(split.calibration), len(split.train), len(split.test)) == (2, 2, 1)
    assert torch.equal(split.train.x, data.x)
    with pytest.raises(BadInput, match="3 phrases of train up to 6 tokens: there are 2"):
        constructed.translation("train", 3, longest=6, words=5)
    with pytest.raises(BadInput, match="split 'valid'"):
        constructed.translation("valid", 1)
    with pytest.raises(BadInput, match="9 words: the text has"):
        constructed.translation("train", 1, words=9)
