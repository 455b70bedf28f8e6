"""Text messages: what is in the files, how they become tokens, and files that are something else."""

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.data import sms
from netweight.data.shared import shared_data

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here")


@pytest.fixture
def words():
    pytest.importorskip("tokenizers")
    return sms.word_pieces()


@needs_data
def test_parts_are_those_of_the_set(words):
    train, test = sms.train(words), sms.test(words, 20)
    assert tuple(train.x.shape) == (3345, 48) and tuple(test.x.shape) == (1115, 20)
    assert train.classes == ("ham", "spam") and 0.12 < float(train.y.float().mean()) < 0.15
    for data in (train, test):
        assert (data.x[:, 0] == sms.CLS).all() and ((data.x == sms.SEP).sum(1) == 1).all()
        assert int(data.x.max()) < words.size <= sms.VOCABULARY


@needs_data
def test_word_pieces_know_the_words_of_spam_and_no_capitals(words):
    assert words.decode(words("FREE prize")) == words.decode(words("free Prize")) != ""
    assert len(words("free")) == 1 and words.size == sms.VOCABULARY
    row = sms.tokens("free " * 100, words, 8)
    assert row.tolist() == [sms.CLS, *[int(words("free")[0])] * 6, sms.SEP]
    row = sms.tokens("free", words, 6)
    assert row.tolist()[2:] == [sms.SEP, sms.PAD, sms.PAD, sms.PAD] and row.dtype == torch.int64


@needs_data
def test_a_length_without_room(words):
    with pytest.raises(BadInput, match="length=2"):
        sms.train(words, 2)


def test_other_files(monkeypatch, tmp_path):
    sms.messages.cache_clear()
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    (tmp_path / "sms_spam").mkdir()
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        sms.messages("train")
    (tmp_path / "sms_spam" / "sms_train.tsv").write_text("ham\thello\neggs\thello\n")
    with pytest.raises(BadInput, match="line 2 is not ham or spam"):
        sms.messages("train")
