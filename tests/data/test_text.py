import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.data.text import Bytes, Characters, Subwords, read_text, subwords, windows

TEXT = "the cat sat on the mat\nthe dog sat on the log\n" * 30


@given(st.text(alphabet=Characters().table))
def test_known_characters_come_back(text):
    tokenizer = Characters()
    tokens = tokenizer(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text)


def test_unknown_characters_are_the_last_token():
    tokenizer = Characters()
    assert tokenizer.size == 128
    assert len(set(tokenizer.table)) == 127
    assert tokenizer("a\u4e00").tolist()[1] == 127
    assert tokenizer.decode(tokenizer("a\u4e00")) == "a\ufffd"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_come_back(text):
    assert Bytes().decode(Bytes()(text)) == text


def test_subwords_come_back_and_are_shorter(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_CACHE", str(tmp_path))
    tokenizer = subwords(TEXT, 300)
    tokens = tokenizer(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT) / 3
    assert tokens.max() < tokenizer.size <= 300
    assert subwords(TEXT, 300) == tokenizer  # from the cache
    for kept in tmp_path.iterdir():
        kept.write_text("{broken")
    assert subwords(TEXT, 300) == tokenizer  # learnt again
    assert torch.equal(copy.deepcopy(tokenizer)(TEXT), tokens)


def test_foreign_tokenizer_is_one_sentence():
    with pytest.raises(BadInput, match=r"not a tokenizer\.json"):
        Subwords("{}")


@given(st.integers(2, 60), st.integers(1, 12))
def test_windows_follow_the_definition(count, length):
    tokens = torch.arange(count)
    if count < length + 1:
        with pytest.raises(BadInput, match="fewer than one window"):
            windows(tokens, length)
        return
    data = windows(tokens, length)
    assert len(data) == (count - 1) // length
    for i, (x, y) in enumerate(zip(data.x, data.y)):
        assert x.tolist() == list(range(i * length, (i + 1) * length))
        assert (y == x + 1).all()


def test_text_that_is_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine \xff\xfe")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(BadInput, match="byte 5"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="empty"):
        read_text(tmp_path / "empty.txt")
