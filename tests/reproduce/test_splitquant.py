"""The quick reproduction of SplitQuant reaches its bars; its parts are what they say."""

import pytest
import torch

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import weighted
from netweight.core.errors import BadInput
from netweight.core.rewrite import residual
from netweight.core.task import Data
from netweight.models import bert_tiny
from netweight.reproduce import splitquant
from netweight.testing import tiny_model, tiny_task


def test_quick():
    claim = splitquant.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [0.5, 1e-5, 1e-12]
    assert all(bar.passed for bar in claim.bars), claim.bars
    found = claim.figures["digits"]["INT2"]
    assert 3.6 <= found["split, stored bits"] <= 3.7 and 2 <= found["RTN, stored bits"] <= 2.1


def test_balanced_accuracy_does_not_hide_a_collapse():
    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    data = Data(torch.zeros(10, 1), torch.tensor([0] * 9 + [1]))
    assert splitquant.balanced(Always(), data) == 0.5


def test_error_and_bits_by_hand():
    model, task = tiny_model(), tiny_task()
    change = rtn(model, task, ["9"], RTN(2, False, -1))
    weight = model[9].weight.detach().double()
    expected = float((change.packed["9"].decode() - weight).square().sum() / weight.square().sum())
    assert splitquant.error(model, change) == pytest.approx(expected)
    assert splitquant.stored_bits(model, change) == (128 * 2 + 16 + 8) / 128
    assert len(weighted(model)) == 4


def test_the_plant_changes_nothing_but_ranges():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = bert_tiny.architecture().eval()
    rewrites = splitquant.planted(model, 0)
    assert len(rewrites) == bert_tiny.LAYERS
    assert all(int((s.scale == 1 / 16).sum()) == bert_tiny.WIDTH // 8 for s in rewrites)
    x = torch.randint(4, 100, (3, bert_tiny.LENGTH), generator=torch.Generator().manual_seed(0))
    assert residual(model, rewrites, x) <= 1e-9


def test_without_data_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(splitquant, "tuned_resnet20", lambda seed: tiny_model())
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        splitquant.reproduce()
