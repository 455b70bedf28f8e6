"""An exported network computes the same in ONNX Runtime, and its packed weights stay integers in the file."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from netweight.compression.prune.magnitude import Magnitude, magnitude
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core import errors
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import DoesNotFit, MissingExtra
from netweight.core.plan import Plan
from netweight.deployment.onnx import export, integers, laid_out
from netweight.models.onnx_reader import read
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.packed import Affine
from netweight.testing import tiny_language_model, tiny_model, tiny_task


def packed(model, settings, activations=None):
    layers = weighted(model, embeddings=True)
    if settings.group > 0:
        layers = [
            name for name in layers if model.get_submodule(name).weight[0].numel() % settings.group == 0
        ]
    change = rtn(model, tiny_task(), layers, settings)
    if activations is not None:
        rounded = {
            name: activations
            for name in layers
            if not isinstance(model.get_submodule(name), torch.nn.Embedding)
        }
        change = dataclasses.replace(change, activations=rounded)
    return assemble(model, change, Plan())


def run(path, x, level="1"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    runtime = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(runtime.run(None, {"input": x.numpy()})[0])


@pytest.mark.parametrize(
    ("settings", "activations"),
    [
        (RTN(4, group=8), None),
        (RTN(3, symmetric=True), StaticRounding.of(-1.0, 2.0)),
        (RTN(8, group=-1), DynamicRounding(8)),
    ],
    ids=["4 bits in groups", "3 bits per row, static rounding", "8 bits, dynamic rounding"],
)
def test_images_are_classified_alike(tmp_path, settings, activations):
    small, x = packed(tiny_model(), settings, activations), tiny_task().test.x
    made = export(small, tmp_path / "net.onnx", x)
    assert made.same and made.largest_difference <= 1e-5 and made.same_class == 1.0
    assert made.examples == 16 and made.integer_weights == made.packed_weights == len(small.packed) > 2
    for count in (1, 5):  # any number of examples
        wanted = small.model(x[:count]).detach()
        torch.testing.assert_close(run(tmp_path / "net.onnx", x[:count]), wanted, rtol=0, atol=1e-5)
    proto = onnx.load(tmp_path / "net.onnx")
    stored = {t.name: t for t in proto.graph.initializer}
    kind = TensorProto.UINT4 if settings.bits <= 4 else TensorProto.UINT8
    codes = [t for name, t in stored.items() if name.endswith(".codes")]
    assert len(codes) == len(small.packed) and all(t.data_type == kind for t in codes)
    assert sum(np.prod(t.dims) for t in stored.values() if t.data_type == TensorProto.FLOAT) < 1500
    again = read(tmp_path / "net.onnx")
    torch.testing.assert_close(again(x), small.model(x), rtol=0, atol=1e-5)


def test_words_are_predicted_alike(tmp_path):
    small, x = packed(tiny_language_model(), RTN(4)), torch.randint(0, 12, (3, 6))
    made = export(small, tmp_path / "net.onnx", x)
    assert made.same and made.integer_weights == 8
    assert made.default_difference == pytest.approx(
        float((run(tmp_path / "net.onnx", x, "4") - small.model(x).detach()).abs().max()), abs=1e-6
    )
    proto = onnx.load(tmp_path / "net.onnx")
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    decoded = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    assert sum(bool(decoded & set(node.input)) for node in products) == 7  # no transposition in between


def test_other_forms_are_written_as_they_decode(tmp_path):
    model, x = tiny_model(), tiny_task().test.x[:3]
    small = assemble(model, magnitude(model, tiny_task(), weighted(model), Magnitude(sparsity=0.5)), Plan())
    made = export(small, tmp_path / "net.onnx", x)
    assert made.same and (made.integer_weights, made.packed_weights) == (0, 4)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert (stored["0.weight"] == small.packed["0"].decode().numpy()).all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "settings", [RTN(4, group=8), RTN(2), RTN(8, symmetric=True, group=-1), RTN(5)], ids=repr
)
def test_stored_tensors_decode_to_the_weight(settings, turned):
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    form = (
        rtn(torch.nn.Sequential(torch.nn.Linear(24, 6)), tiny_task(), ["0"], settings)
        .packed["0"]
        .project(weight)
    )
    assert isinstance(form, Affine)
    codes, scale, zero, said = laid_out(form, turned)
    if "block_size" in said:
        scale, zero = (np.repeat(part, said["block_size"], said["axis"]) for part in (scale, zero))
    elif said:
        scale, zero = (np.expand_dims(part, 1 - said["axis"]) for part in (scale, zero))
    decoded = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
    assert (decoded == form.decode().numpy().T if turned else decoded == form.decode().numpy()).all()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4)])
def test_four_bit_integers_are_packed_low_code_first(shape):
    values = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    tensor = integers("codes", values, TensorProto.UINT4)
    assert (numpy_helper.to_array(tensor).astype(np.uint8) == values).all()
    assert len(tensor.raw_data) == -(-values.size // 2)


def test_what_cannot_be_written_is_one_sentence_and_leaves_no_file(tmp_path, monkeypatch):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return torch.special.bessel_j1(self.linear(x))

    small, x = packed(Odd(), RTN(4)), torch.randn(2, 4)
    with pytest.raises(DoesNotFit, match="cannot be written as ONNX.*bessel") as caught:
        export(small, tmp_path / "net.onnx", x)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    monkeypatch.setitem(errors.EXTRAS, "onnxscript", "onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match="onnxscript is not installed"):
        export(small, tmp_path / "net.onnx", x)
