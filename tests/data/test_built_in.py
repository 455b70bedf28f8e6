"""Digits, CIFAR-10, MNIST and the texts: shapes, ranges, and parts that do not overlap."""

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.data import digits, files, images, text
from netweight.data.shared import shared_data, shared_file

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here (NETWEIGHT_DATA)")


def rows(x):
    return {tuple(row) for row in x.flatten(1).tolist()}


def test_digits_have_the_whole_range_and_no_test_image_is_trained_on():
    train, calibration, test = digits.train(), digits.calibration(), digits.test()
    assert (len(train), len(calibration), len(test)) == (1257, 256, 540)
    assert train.x.shape[1:] == (1, 8, 8)
    assert (train.x.min(), train.x.max(), train.low, train.high) == (0, 1, 0, 1)
    assert rows(calibration.x) <= rows(train.x)
    assert not rows(test.x) & rows(train.x)
    assert test.y.unique().tolist() == list(range(10))
    assert test.classes == tuple("0123456789")
    assert torch.equal(test.x, digits.test().x)


@needs_data
def test_cifar10_and_mnist():
    source = images.cifar10()
    calibration, test = source.calibration(20), source.test(30)
    assert test.x.shape == (30, 3, 32, 32)
    assert test.x.dtype == torch.float32
    assert 0 <= test.x.min() < 0.1 < 0.9 < test.x.max() <= 1
    assert torch.equal(calibration.x, source.train(20).x)
    assert test.classes[3] == "cat"
    grey = images.mnist().test(50)
    assert grey.x.shape == (50, 1, 28, 28)
    assert grey.y[:5].tolist() == [7, 2, 1, 0, 4]  # as everybody knows them


def test_absent_data_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path / "none"))
    assert shared_data() is None
    for read in (images.cifar10().test, text.shakespeare, lambda: text.wikitext2("train")):
        with pytest.raises(BadInput, match="set NETWEIGHT_DATA to the folder"):
            read()
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="has no such file"):
        shared_file("mnist/mnist_test_a.npz")


@needs_data
def test_wikitext2_parts():
    split = files.load("wikitext2", length=32)
    tokenizer = text.Characters()
    assert split.test.x.shape[1] == 32
    assert torch.equal(split.test.x[0, 1:], split.test.y[0, :-1])
    assert text.wikitext2("test").startswith(tokenizer.decode(split.test.x[0]))
    assert (len(split.calibration), len(split.test)) == (128, 256)
    assert split.test.y.max() < tokenizer.size
