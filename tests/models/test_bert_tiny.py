"""BERT-Tiny: its sizes, its training, and the way to a folder and back."""

import pytest
import torch

from netweight.compression.quantize.splitquant import SplitQuant, splitquant
from netweight.core.compressed import Compressed, assemble, weighted
from netweight.core.plan import Plan
from netweight.core.task import Data
from netweight.data.shared import shared_data
from netweight.models import bert_tiny

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here")


@pytest.fixture
def model(monkeypatch, tmp_path):
    """Trained for one step on a handful of messages."""
    monkeypatch.setenv("NETWEIGHT_CACHE", str(tmp_path))
    real = bert_tiny.sms.train
    monkeypatch.setattr(bert_tiny.sms, "train", lambda *how: real(*how).take(64))
    monkeypatch.setattr(bert_tiny, "EPOCHS", 2)
    return bert_tiny.bert_tiny(7)


def test_it_is_trained_and_kept(model, monkeypatch):
    again = bert_tiny.bert_tiny(7)
    torch.manual_seed(7)
    fresh = bert_tiny.architecture()
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters())]
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters())]
    assert all(same) and sum(moved) > 30
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.94e6, rel=0.02)


def test_compressed_and_loaded_without_the_original(model, tmp_path):
    x = torch.randint(4, 4000, (5, bert_tiny.LENGTH), generator=torch.Generator().manual_seed(0))
    data = Data(x)
    change = splitquant(model, bert_tiny_task(data), weighted(model), SplitQuant(3))
    assert len(change.packed) == 2 * 6 + 2 and len(change.packed["hf.classifier"].scale) == 1
    small = assemble(model, change, Plan())
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small")
    with torch.no_grad():
        assert tuple(small(x).shape) == (5, 2) and torch.equal(back(x), small(x))


def bert_tiny_task(data):
    from netweight.core.task import Task

    return Task(data, data)
