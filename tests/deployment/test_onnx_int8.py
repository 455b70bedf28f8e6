"""A network on 8-bit integers is fused throughout by ONNX Runtime, and gives what its simulation gives."""

import dataclasses
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from netweight.compression.quantize.hawq_v3 import HAWQV3, hawq_v3
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import DoesNotFit, MissingExtra
from netweight.core.grid import Grid
from netweight.core.plan import Plan
from netweight.core.task import Data, Task
from netweight.deployment import exports, onnx_codes, onnx_edges, onnx_exact, onnx_int8
from netweight.deployment import onnx as onnx_export
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.packed import Affine
from netweight.testing import tiny_model, tiny_task


class Residual(nn.Module):
    """What ResNets are made of: two kinds of shortcut, a pool, a mean over places; images of two channels."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=bias)
        self.one = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.two = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=bias)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.first(x - 0.5)), 2)
        x = self.one(x) + x  # below 0 too, so that the code of 0 is not 0
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.last(torch.relu(self.two(x) + short).mean((2, 3)))


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Data(torch.rand(count, 2, 16, 16, generator=generator), torch.zeros(count, dtype=torch.int64))


class Branches(nn.Module):
    """Two branches side by side, a mean over windows, clips at 6 and a product of two branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.next, self.gate = nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 3, dilation=2)
        self.last = nn.Linear(8 * 4 * 4, 3)

    def forward(self, x):
        x = torch.cat([F.relu6(self.left(x)), F.relu6(self.right(x))], 1)
        x = F.avg_pool2d(x, 2)
        x = torch.relu(self.next(x)) * F.hardtanh(self.gate(x))
        return self.last(x.flatten(1))


@functools.cache
def small_residual(bits=8):
    model = Residual().eval()
    task = Task(calibration=images(32), test=images(64, 1))
    settings_ = HAWQV3(bits=(bits,), ends=bits, probes=1, examples=16)
    return assemble(model, hawq_v3(model, task, weighted(model), settings_), Plan()), task


def optimized(path, place):
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(place / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(place / "optimized.onnx").graph.node]


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_residual_network_stays_on_integers_and_equals_its_simulation(tmp_path, bits):
    small, task = small_residual(bits)
    made = onnx_int8.export(small, tmp_path / "net.onnx", task.calibration, task.test.x)
    assert made.same and made.largest_difference <= 1e-5 * 10
    assert made.integer_weights == made.packed_weights == 4 and made.examples == 64
    # inputs of 4 layers, the two branches; sums lie on the grids of what reads them, the second on its own
    assert made.edges == 7 and made.measured_edges == 3
    assert 0 < made.from_network < 0.2 and made.same_class >= 0.9
    kinds = optimized(tmp_path / "net.onnx", tmp_path)
    assert kinds.count("QLinearConv") == 3 and kinds.count("QLinearAdd") == 2 and kinds.count("QGemm") == 1
    assert kinds.count("QLinearGlobalAveragePool") == 1 and kinds.count("QuantizeLinear") == 1
    assert not {"Conv", "Add", "Relu", "DequantizeLinear", "ReduceMean", "Gemm"} & set(kinds)
    assert kinds.count("Slice") == 1
    made = onnx_edges.edged(small, task.calibration)
    for count in (1, 5):
        x = task.test.x[:count]
        torch.testing.assert_close(
            run(tmp_path / "net.onnx", x), onnx_int8.simulated(made, x), rtol=0, atol=1e-5
        )


def test_branches_are_joined_and_averaged_on_integers(tmp_path):
    model, task = Branches().eval(), Task(calibration=images(32), test=images(32, 1))
    change = hawq_v3(model, task, weighted(model), HAWQV3(bits=(8,), probes=1, examples=16))
    small = assemble(model, change, Plan())
    made = onnx_int8.export(small, tmp_path / "net.onnx", task.calibration, task.test.x)
    assert made.same and made.integer_weights == 5
    kinds = optimized(tmp_path / "net.onnx", tmp_path)
    assert {"QLinearConcat", "QLinearAveragePool", "QLinearMul"} <= set(kinds)


def test_the_simulation_is_the_network_with_more_rounding():
    small, task = small_residual()
    made = onnx_edges.edged(small, task.calibration)
    x = task.test.x
    with torch.no_grad():
        plain, exact, network = made.twin(x), onnx_int8.simulated(made, x), small.model(x)
        for name in {str(n.target) for n in made.twin.graph.nodes if n.op == "call_module"}:
            made.twin.add_submodule(name, nn.Identity())
        unrounded, floats = made.twin(x), Residual().eval()(x)
    size = float(network.abs().max())
    assert (plain - exact).abs().max() < 0.02 * size  # codes at ties
    assert 0 < (exact - network).abs().mean() < 0.01 * size
    assert (unrounded - floats).abs().max() < 0.02 * size  # weights and biases alone


def test_the_calibration_data_set_the_ranges_of_edges(tmp_path):
    small, task = small_residual()
    dim = Data(task.calibration.x * 0.01 + 0.5, task.calibration.y)
    expected = small.model(task.test.x)
    near, far, mse = (
        onnx_int8.simulated(onnx_edges.edged(small, data, how), task.test.x)
        for data, how in ((task.calibration, "min-max"), (dim, "min-max"), (task.calibration, "mse"))
    )
    assert (far - expected).abs().max() > 3 * (near - expected).abs().max()  # branches are clipped
    assert 0 < (mse - near).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(ValueError, match="range='least'"):
        onnx_int8.export(small, tmp_path / "d.onnx", task.calibration, task.test.x, how="least")
    assert not (tmp_path / "d.onnx").exists()


def test_layers_without_integers_stay_as_they_are(tmp_path):
    model = tiny_model()
    layers = [name for name in weighted(model) if not isinstance(model.get_submodule(name), nn.Embedding)]
    change = rtn(model, tiny_task(), layers, RTN(8, symmetric=True, group=0))
    rounded = {name: StaticRounding.of(-2.0, 3.0) for name in layers}
    rounded[layers[-1]] = DynamicRounding(8)
    del rounded[layers[1]]
    small = assemble(model, dataclasses.replace(change, activations=rounded), Plan())
    made = onnx_int8.export(small, tmp_path / "net.onnx", tiny_task().calibration, tiny_task().test.x)
    assert made.same and made.integer_weights == len(layers) - 2 and made.packed_weights == len(layers)


@pytest.mark.parametrize(("bias", "low"), [(True, 0.0), (False, -0.1)])
def test_a_network_of_linear_layers(tmp_path, bias, low):
    """Where the grid behind the ReLU goes below 0, ONNX Runtime computes that layer in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16, bias=bias), nn.ReLU(), nn.Linear(16, 16, bias=bias), nn.Linear(16, 3)
    )
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    task = Task(Data(x[:100], None), Data(x[100:], None))
    change = rtn(model, task, ["0", "2", "3"], RTN(8, symmetric=True, group=-1))
    rounded = {
        "0": StaticRounding.of(0.0, 1.0),
        "2": StaticRounding.of(low, 1.5),
        "3": StaticRounding.of(-1.0, 1.0),
    }
    small = assemble(model.eval(), dataclasses.replace(change, activations=rounded), Plan())
    made = onnx_int8.export(small, tmp_path / "net.onnx", task.calibration, task.test.x)
    assert made.same and made.largest_difference <= 1e-5 and made.measured_edges == 0 and made.edges == 3
    kinds = optimized(tmp_path / "net.onnx", tmp_path)
    assert kinds.count("QGemm") == (3 if low == 0 else 2)


def test_what_has_no_integers_is_one_sentence(tmp_path):
    model = tiny_model()
    task = tiny_task()
    small = assemble(model, rtn(model, task, weighted(model), RTN(8)), Plan())
    with pytest.raises(DoesNotFit, match="no layer has weights of at most 8 bits.*hawq-v3") as caught:
        onnx_int8.export(small, tmp_path / "net.onnx", task.calibration, task.test.x)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if float(x.sum()) > 0 else x

    change = rtn(Odd(), task, ["linear"], RTN(8, symmetric=True))
    change = dataclasses.replace(change, activations={"linear": StaticRounding.of(0.0, 1.0)})
    with pytest.raises(DoesNotFit, match="Odd: it cannot be captured as one graph"):
        onnx_int8.export(
            assemble(Odd(), change, Plan()),
            tmp_path / "net.onnx",
            Data(torch.rand(8, 4), None),
            torch.rand(2, 4),
        )


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    small, task = small_residual()
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match="onnxscript is not installed"):
        onnx_int8.export(small, tmp_path / "net.onnx", task.calibration, task.test.x)


def test_it_is_a_form_of_export(tmp_path):
    small, task = small_residual()
    made = exports.export(small, task, "onnx-int8", tmp_path / exports.PLACES["onnx-int8"])
    assert (
        made["same"] and made["edges"] == 7 and made["bytes"] == (tmp_path / "model.int8.onnx").stat().st_size
    )


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([0, -1]),
    seed=st.integers(0, 2**16),
)
def test_codes_around_128_decode_to_the_same_weight(bits, symmetric, group, seed):
    weight = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed)) + 0.3
    form = Affine.nearest(weight, Grid(bits, symmetric, group))
    again = onnx_edges.as_int8(form)
    if again is None:
        assert bits == 8 and not symmetric
    else:
        assert again.bits_per_code == 8 and again.zero is None
        assert torch.equal(again.decode(), form.decode())


def test_groups_and_other_dtypes_are_no_int8():
    weight = torch.randn(4, 8)
    assert onnx_edges.as_int8(Affine.nearest(weight, Grid(4, True, 4))) is None
    assert onnx_edges.as_int8(Affine.nearest(weight.double(), Grid(4, True, 0))) is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), zeros=st.tuples(*[st.integers(0, 255)] * 3))
def test_a_sum_of_codes_is_the_one_of_onnx_runtime(seed, zeros):
    """All pairs of codes, so that ties are among them."""
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(3, generator=generator) * 0.1 + 0.01).float()
    scales[2] += scales[:2].sum() / 2
    a, b = (torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256))
    x = [(q - z).float() * s for q, z, s in zip((a, b), zeros, scales)]
    roundings = [StaticRounding(s, torch.tensor(float(z))) for s, z in zip(scales, zeros)]
    found = simulated_sum(x, roundings)
    np.testing.assert_array_equal(found, runtime_sum(a, b, roundings))


def simulated_sum(x, roundings):
    root = nn.Module()
    for name, rounding in zip("aby", roundings):
        root.add_module(name, rounding.module())
    graph = torch.fx.Graph()
    p, q = graph.placeholder("p"), graph.placeholder("q")
    a, b = graph.call_module("a", (p,)), graph.call_module("b", (q,))
    y = graph.call_module("y", (graph.call_function(torch.ops.aten.add.Tensor, (a, b)),))
    graph.output(y)
    twin = torch.fx.GraphModule(root, graph)
    made = onnx_edges.Edged(twin, {}, {a: "a", b: "b", y: "y"}, 3, 0)
    value = onnx_exact.Exact(made).run(*x)
    return (value / roundings[2].scale + roundings[2].zero).round().to(torch.uint8).numpy()


def runtime_sum(a, b, roundings):
    helper = onnx.helper
    tensors, inputs = [], []
    for name, rounding in zip("aby", roundings):
        tensors.append(numpy_helper.from_array(rounding.scale.numpy(), f"{name}.scale"))
        tensors.append(numpy_helper.from_array(rounding.zero.to(torch.uint8).numpy(), f"{name}.zero"))
        inputs += [name, f"{name}.scale", f"{name}.zero"]
    node = helper.make_node("QLinearAdd", inputs[:6] + inputs[7:], ["y"], domain="com.microsoft")
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, ["n"]) for name in "aby"]
    graph = helper.make_graph([node], "sum", ends[:2], ends[2:], tensors)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    content = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": a.to(torch.uint8).numpy(), "b": b.to(torch.uint8).numpy()})[0]


def test_tidying_changes_nothing_that_is_computed(tmp_path):
    small, task = small_residual()
    made = onnx_edges.edged(small, task.calibration)
    content = onnx_int8.written(small, made, task.test.x)
    before = {n.op_type for n in onnx.load_from_string(content).graph.node}
    assert {"GlobalAveragePool", "Pad", "Slice", "MaxPool"} <= before and "ReduceMean" not in before
    tidy, onnx_codes.tidy = onnx_codes.tidy, lambda proto: None
    try:
        plain = onnx_int8.written(small, made, task.test.x)
    finally:
        onnx_codes.tidy = tidy
    assert "ReduceMean" in {n.op_type for n in onnx.load_from_string(plain).graph.node}
    (tmp_path / "a.onnx").write_bytes(content)
    (tmp_path / "b.onnx").write_bytes(plain)
    torch.testing.assert_close(
        run(tmp_path / "a.onnx", task.test.x), run(tmp_path / "b.onnx", task.test.x), rtol=0, atol=0.05
    )
    widths = [numpy_helper.to_array(t).shape for t in onnx.load_from_string(content).graph.initializer]
    assert (8, 4, 3, 3) in widths  # two channels, filled up to four


@pytest.mark.parametrize(("axes", "left"), [((0, 1), 1), ((1, 1), 2)])
def test_slices_in_a_row_become_one_only_on_different_axes(axes, left):
    class Sliced(nn.Module):
        def forward(self, x):
            x = torch.ops.aten.slice.Tensor(x, axes[0], 1, 6, 2)
            return torch.ops.aten.slice.Tensor(x, axes[1], 1, 3)

    with torch.no_grad():
        proto = onnx_export.traced(Sliced(), (), torch.rand(6, 9))
    x = np.random.default_rng(0).random((6, 9), dtype=np.float32)
    onnx_codes.tidy(proto)
    assert [n.op_type for n in proto.graph.node].count("Slice") == left
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = x[1:6:2, 1:3] if axes[0] == 0 else x[:, 1:6:2][:, 1:3]
    np.testing.assert_array_equal(session.run(None, {"input": x})[0], wanted)
