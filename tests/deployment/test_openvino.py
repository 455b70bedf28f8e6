"""OpenVINO gives what the packed network gives."""

import pytest
import torch
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Change, assemble, weighted
from netweight.core.plan import Plan
from netweight.deployment import openvino as exporter
from netweight.nn.fake import StaticRounding
from netweight.testing import tiny_language_model, tiny_model, tiny_task

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("settings", [RTN(4, group=8), RTN(8, symmetric=True), RTN(2, group=-1)], ids=repr)
@pytest.mark.parametrize("rounding", [None, StaticRounding.of(-1.0, 2.0), StaticRounding.of(0.0, 1.0, 5)])
def test_images(tmp_path, settings, rounding):
    model, x = tiny_model(), tiny_task().test.x
    layers = [
        n for n in weighted(model) if settings.group < 1 or model.get_submodule(n).weight[0].numel() % 8 == 0
    ]
    packed = rtn(model, tiny_task(), layers, settings).packed
    small = assemble(
        model, Change(packed, activations=dict.fromkeys(layers, rounding) if rounding else {}), Plan()
    )
    made = exporter.export(small, tmp_path / "net.xml", x)
    assert made.same and made.largest_difference < 1e-4 and made.same_class == 1.0
    assert made.integer_weights == made.packed_weights == len(layers)
    found = exporter.outputs(openvino, tmp_path / "net.xml", x[:3])  # another number of examples
    torch.testing.assert_close(found, small.model(x[:3]).detach(), rtol=0, atol=1e-4)


def test_words(tmp_path):
    model = tiny_language_model()
    small = assemble(model, rtn(model, tiny_task(), weighted(model), RTN(4)), Plan())
    made = exporter.export(small, tmp_path / "net", torch.randint(0, 12, (3, 6)))
    assert made.same and made.largest_difference < 1e-4
    assert {file.name for file in tmp_path.iterdir()} == {"net.xml", "net.bin"}


def test_another_function_is_noticed(tmp_path, monkeypatch):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval(), torch.rand(4, 1, 16, 16)
    small = assemble(model, rtn(model, tiny_task(), ["1"], RTN(4)), Plan())
    right = exporter.outputs
    monkeypatch.setattr(exporter, "outputs", lambda *given: right(*given) * 1.01 + 0.01)
    assert not exporter.export(small, tmp_path / "net.xml", x).same
