"""Networks of ONNX files give what ONNX Runtime gives; hostile files give one sentence."""

import csv
import gzip

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Compressed, assemble, weighted
from netweight.core.errors import BadInput
from netweight.core.graph import capture, evaluate
from netweight.core.origin import origin_of
from netweight.core.plan import Plan
from netweight.data.shared import shared_data
from netweight.models import onnx_reader
from netweight.models.onnx_reader import read, skeleton
from netweight.testing import tiny_task

FAMILIES = shared_data() / "vnncomp" if shared_data() else None


def session(content):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def check_same(model, content, seed=0):
    """Equal to ONNX Runtime on random inputs, and a batch gives what its examples give one by one."""
    runtime = session(content)
    (value,) = runtime.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.rand(shape, generator=generator) * scale - shift for scale, shift in ((1, 0), (2, 1))]
    for x in xs:
        wanted = torch.from_numpy(runtime.run(None, {value.name: x.numpy()})[0]).double()
        with torch.no_grad():
            found = model(x).double()
        difference = (found.flatten() - wanted.flatten()).abs().max() / wanted.abs().max().clamp(min=1)
        assert float(difference) <= 1e-4
    if shape[0] == 1:
        with torch.no_grad():
            alone = torch.cat([model(x) for x in xs])
            assert torch.allclose(model(torch.cat(xs)), alone, 1e-3, 1e-4 * float(alone.abs().max()))


def families():
    if FAMILIES is None:
        return [pytest.param("none", marks=pytest.mark.skip(reason="the data folder is not here"))]
    with (FAMILIES / "families.csv").open() as file:
        return [row["family"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("family", families())
def test_every_network_of_a_family_gives_what_onnx_runtime_gives(family):
    files = sorted((FAMILIES / family).rglob("*.onnx.gz"))
    assert files
    for file in files:
        check_same(read(file), gzip.decompress(file.read_bytes()))


# Small networks made here ----------------------------------------------------------------------------------


def tensor(name, *shape, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed + len(name)).uniform(-1, 1, shape).astype(dtype)
    return numpy_helper.from_array(values, name)


def numbers(name, *values):
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def network(nodes, shape, *tensors, opset=21):
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        list(tensors),
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto)
    if not proto.graph.output[0].type.tensor_type.HasField("shape"):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "n"
    return proto.SerializeToString()


def op(kind, *inputs, output="y", **settings):
    name = f"the {kind}" if output == "y" or kind != "Cast" else f"Cast to {output}"
    return helper.make_node(kind, list(inputs), [output], name=name, **settings)


def written(folder, content, name="net.onnx"):
    (folder / name).write_bytes(content)
    return folder / name


IMAGE = [1, 4, 6, 5]
SINGLE = {
    "Relu Sigmoid Tanh Exp Abs Neg Sign Floor Ceil Round Sin Cos Erf": {},
    "Softplus Identity HardSwish Mish Not": {},
    "LeakyRelu Elu": {"alpha": 0.3},
    "Selu HardSigmoid LogSoftmax Softmax Flatten Transpose GlobalAveragePool GlobalMaxPool Gelu": {},
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare": {"keepdims": 0},
    "AveragePool": {"kernel_shape": [2, 3], "pads": [1, 1, 1, 1], "strides": [2, 1], "ceil_mode": 1},
    "MaxPool": {"kernel_shape": [2, 3], "pads": [0, 1, 1, 0], "dilations": [2, 1]},
    "Softmax LogSoftmax": {"axis": 1},
    "Flatten": {"axis": 2},
    "ArgMax ArgMin": {"axis": 2},
}
CASES = {
    "Clip": (
        [op("Clip", "x", "low", "high")],
        [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", -0.2), ("high", 0.4))],
    ),
    "Clip without low": ([op("Clip", "x", "", "high")], [numpy_helper.from_array(np.float32(0.4), "high")]),
    "PRelu": ([op("PRelu", "x", "slope")], [tensor("slope", 4, 1, 1)]),
    "Pow": ([op("Pow", "x", "e")], [numpy_helper.from_array(np.float32(2.0), "e")]),
    "Pow by entries": ([op("Pow", "x", "e")], [numbers("e", 1, 2, 3, 2, 1)]),
    "Where": ([op("Greater", "x", "t", output="g"), op("Where", "g", "x", "t")], [tensor("t", 5)]),
    "Not": (
        [op("Less", "x", "t", output="l"), op("Not", "l", output="n"), op("Cast", "n", to=1)],
        [tensor("t", 5)],
    ),
    "Min Max Sum": (
        [
            op("Min", "x", "t", "u", output="a"),
            op("Max", "a", "x", "u", output="b"),
            op("Sum", "a", "b", "x"),
        ],
        [tensor("t", 5), tensor("u", 6, 1)],
    ),
    "Split": (
        [helper.make_node("Split", ["x", "s"], ["a", "b"], axis=1), op("Concat", "b", "a", axis=1)],
        [numbers("s", 1, 3)],
    ),
    "Split evenly": (
        [helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), op("Sub", "b", "a")],
        [],
    ),
    "Slice backwards": (
        [op("Slice", "x", "s", "e", "a", "t")],
        [numbers("s", -1, 0), numbers("e", -99, 4), numbers("a", 3, 2), numbers("t", -2, 3)],
    ),
    "Gather": ([op("Gather", "x", "i", axis=2)], [numpy_helper.from_array(np.array([[0, -1], [2, 2]]), "i")]),
    "Squeeze": (
        [
            op("Gather", "x", "i", axis=1, output="g"),
            op("Squeeze", "g", "a", output="s"),
            op("Unsqueeze", "s", "b"),
        ],
        [numbers("i", 2), numbers("a", 1), numbers("b", -1, 1)],
    ),
    "Expand and Tile": (
        [op("Expand", "x", "s", output="e"), op("Tile", "e", "r")],
        [numbers("s", 4, 1, 1), numbers("r", 1, 1, 2, 3)],
    ),
    "Pad": (
        [op("Pad", "x", "p", "v")],
        [numbers("p", 0, 0, 1, 2, 0, 1, 0, 3), numpy_helper.from_array(np.float32(0.5), "v")],
    ),
    "Pad by reflection": ([op("Pad", "x", "p", mode="reflect")], [numbers("p", 0, 0, 1, 2, 0, 0, 2, 1)]),
    "OneHot": (
        [op("ArgMax", "x", axis=1, keepdims=0, output="i"), op("OneHot", "i", "d", "v", axis=1)],
        [numbers("d", 4), numpy_helper.from_array(np.float32([-1, 2]), "v")],
    ),
    "ReduceSum": ([op("ReduceSum", "x", "a", keepdims=0)], [numbers("a", 1, -1)]),
    "Trilu": ([op("Trilu", "x", "k", upper=0)], [numpy_helper.from_array(np.int64(1), "k")]),
    "LayerNormalization": (
        [op("LayerNormalization", "x", "w", "b", axis=-2)],
        [tensor("w", 6, 5), tensor("b", 6, 5)],
    ),
    "InstanceNormalization": (
        [op("InstanceNormalization", "x", "w", "b")],
        [tensor("w", 4), tensor("b", 4, seed=2)],
    ),
    "Conv, uneven padding": (
        [op("Conv", "x", "w", "b", pads=[1, 0, 2, 1], strides=[2, 1], group=2)],
        [tensor("w", 6, 2, 3, 2), tensor("b", 6)],
    ),
    "ConvTranspose": (
        [op("ConvTranspose", "x", "w", pads=[1, 0, 1, 0], strides=[2, 3], output_padding=[1, 2], group=2)],
        [tensor("w", 4, 3, 3, 3)],
    ),
    "MatMul and Add": (
        [op("MatMul", "x", "w", output="m"), op("Add", "b", "m")],
        [tensor("w", 5, 7), tensor("b", 7)],
    ),
    "MatMul on the left": ([op("MatMul", "w", "x", output="m"), op("Mul", "m", "m")], [tensor("w", 3, 6)]),
    "Gemm": (
        [op("Flatten", "x", output="f"), op("Gemm", "f", "w", "b", alpha=0.5, beta=2.0)],
        [tensor("w", 120, 3), tensor("b", 1, 3)],
    ),
    "shapes of shapes": (
        [
            op("Shape", "x", output="s"),
            op("Gather", "s", "i", output="n"),
            op("Concat", "n", "m", axis=0, output="t"),
            op("Reshape", "x", "t"),
        ],
        [numbers("i", 0), numbers("m", -1)],
    ),
    "a class token": (
        [op("ConstantOfShape", "s", output="z"), op("Concat", "z", "x", axis=1)],
        [numbers("s", 1, 1, 6, 5)],
    ),
    "per row codes": (
        [op("DequantizeLinear", "c", "s", "z", axis=0, output="w"), op("MatMul", "x", "w")],
        [tensor("c", 5, 3, dtype=np.uint8), tensor("s", 5), tensor("z", 5, dtype=np.uint8)],
    ),
    "activations on a grid": (
        [op("QuantizeLinear", "x", "s", "z", output="q"), op("DequantizeLinear", "q", "s", "z")],
        [numpy_helper.from_array(np.float32(0.02), "s"), numpy_helper.from_array(np.uint8(120), "z")],
    ),
    "activations on a grid for each channel": (
        [
            op("QuantizeLinear", "x", "s", "z", axis=1, output="q"),
            op("DequantizeLinear", "q", "s", "z", axis=1),
        ],
        [
            numpy_helper.from_array(np.float32([0.02, 0.1, 0.01, 1.0]), "s"),
            numpy_helper.from_array(np.int8([3, -100, 0, 127]), "z"),
        ],
    ),
}


@pytest.mark.parametrize("names", SINGLE)
def test_operators_of_one_tensor(tmp_path, names):
    for name in names.split():
        nodes = [op(name, "x", **SINGLE[names])]
        if name == "Not":
            nodes = [op("Cast", "x", to=9, output="t"), op("Not", "t", output="n"), op("Cast", "n", to=1)]
        elif name.startswith("Arg"):
            nodes = [op(name, "x", **SINGLE[names], output="i"), op("Cast", "i", to=1)]
        for opset in (11, 21) if "max" in name and "Reduce" not in name else (21,):
            content = network(nodes, IMAGE, opset=opset)
            check_same(read(written(tmp_path, content)), content)


@pytest.mark.parametrize("case", CASES)
def test_operators_of_several_tensors(tmp_path, case):
    nodes, tensors = CASES[case]
    content = network(nodes, IMAGE, *tensors)
    model = read(written(tmp_path, content))
    check_same(model, content)
    x = torch.rand(2, *IMAGE[1:])
    torch.testing.assert_close(evaluate(capture(model, x), x), model(x), rtol=0, atol=1e-5)


def test_stored_weights_become_layers_with_their_names(tmp_path):
    nodes = [
        op("Conv", "x", "stage.0.weight", output="c"),
        op("BatchNormalization", "c", "g", "h", "m", "v", output="n"),
        op("Flatten", "n", output="f"),
        op("MatMul", "f", "w", output="a"),
        op("Add", "a", "b", output="s"),
        op("Gemm", "s", "last.weight", "last.bias", transB=1),
    ]
    positive = numpy_helper.from_array(np.array([0.5, 2.0], np.float32), "v")
    tensors = [
        tensor("stage.0.weight", 2, 4, 3, 3),
        *(tensor(n, 2) for n in "ghm"),
        positive,
        tensor("w", 24, 6),
    ]
    tensors += [tensor("b", 6), tensor("last.weight", 3, 6), tensor("last.bias", 3)]
    model = read(written(tmp_path, network(nodes, IMAGE, *tensors)))
    kinds = {name: type(layer) for name, layer in model.layers.named_children()}
    assert kinds == {
        "stage_0": nn.Conv2d,
        "the_BatchNormalization": nn.BatchNorm2d,
        "the_MatMul": nn.Linear,
        "last": nn.Linear,
    }
    assert weighted(model) == ["layers.stage_0", "layers.the_MatMul", "layers.last"]
    torch.testing.assert_close(
        model.layers.the_MatMul.bias, torch.from_numpy(numpy_helper.to_array(tensors[6]).copy())
    )
    assert not model.training and model.whole and not model.buffer_of


def test_a_sum_that_is_read_twice_stays_a_sum(tmp_path):
    nodes = [op("MatMul", "x", "w", output="m"), op("Add", "m", "b", output="s"), op("Mul", "s", "m")]
    content = network(nodes, [1, 5], tensor("w", 5, 5), tensor("b", 5))
    model = read(written(tmp_path, content))
    assert model.layers.the_MatMul.bias is None
    check_same(model, content)


def test_a_network_for_one_example_runs_on_many(tmp_path):
    fixed = network(
        [op("Reshape", "x", "s", output="r"), op("MatMul", "r", "w")],
        IMAGE,
        numbers("s", 1, 120),
        tensor("w", 120, 2),
    )
    assert read(written(tmp_path, fixed)).whole
    flat = network(
        [op("Reshape", "x", "s", output="r"), op("MatMul", "r", "w")],
        IMAGE,
        numbers("s", 120),
        tensor("w", 120, 2),
    )
    summed = network([op("ReduceSum", "x", keepdims=0)], [1, 5])
    for content, shape in ((flat, (3, 2)), (summed, (3,))):
        model = read(written(tmp_path, content))
        assert not model.whole
        x = torch.rand(3, *([4, 6, 5] if content is flat else [5]))
        assert model(x).shape == shape
        check_same(model, content)


def test_a_folder_of_a_compressed_network_builds_it_again(tmp_path):
    nodes = [
        op("Conv", "x", "c.weight", output="h"),
        op("Relu", "h", output="r"),
        op("Add", "r", "t", output="s"),
    ]
    nodes += [op("Reshape", "s", "n", output="f"), op("Gemm", "f", "l.weight", "l.bias", transB=1)]
    tensors = [
        tensor("c.weight", 8, 4, 3, 3),
        tensor("t", 8, 4, 3),
        numbers("n", 1, -1),
        tensor("l.weight", 3, 96),
        tensor("l.bias", 3),
    ]
    model = read(written(tmp_path, network(nodes, IMAGE, *tensors)))
    origin = origin_of(model)
    assert (origin.kind, origin.target) == ("onnx", "net.onnx")
    large = max(len(numpy_helper.to_array(t).tobytes()) for t in tensors)
    assert len(origin.files["architecture.onnx"]) < large
    small = assemble(model, rtn(model, tiny_task(), weighted(model), RTN(4)), Plan())
    small.save(tmp_path / "small")
    x = torch.rand(2, *IMAGE[1:])
    again = Compressed.load(tmp_path / "small")
    assert torch.equal(again.model(x), small.model(x)) and again.model.whole
    with pytest.raises(BadInput, match=r"no architecture\.onnx"):
        skeleton("net.onnx", {})


# Hostile files ---------------------------------------------------------------------------------------------


PLAIN = network([op("Gemm", "x", "w", output="h"), op("Relu", "h")], [1, 5], tensor("w", 5, 3))


def test_an_unknown_operator_is_named_with_its_node(tmp_path):
    for nodes, named in (
        ([op("NonMaxSuppression", "x", "x")], "'NonMaxSuppression' of node 'the NonMaxSuppression'"),
        ([op("Conv", "x", "x")], "the Conv"),
        ([op("Reshape", "x", "s")], "'s' decides a shape|not a valid ONNX|the Reshape"),
    ):
        with pytest.raises(BadInput, match=named) as caught:
            read(written(tmp_path, network(nodes, [1, 5])))
        assert "\n" not in str(caught.value)
    proto = onnx.load_model_from_string(PLAIN)
    proto.graph.node[1].domain = "com.elsewhere"
    with pytest.raises(BadInput, match="'Relu' of node 'the Relu' is not known"):
        read(written(tmp_path, proto.SerializeToString()))


def test_external_data_may_only_lie_beside_the_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    values = np.arange(15, dtype=np.float32)
    for place in (folder, tmp_path):
        (place / "w.bin").write_bytes(values.tobytes())

    def outside(location, **place):
        proto = onnx.load_model_from_string(PLAIN)
        (weight,) = proto.graph.initializer
        onnx.external_data_helper.set_external_data(weight, location, **place)
        weight.ClearField("raw_data")
        return written(folder, proto.SerializeToString())

    model = read(outside("w.bin"))
    assert torch.equal(model.layers.the_Gemm.weight, torch.from_numpy(values).reshape(5, 3).T)
    for location in ("../w.bin", str(tmp_path / "w.bin"), "sub/../../w.bin"):
        with pytest.raises(BadInput, match="leaves the folder"):
            read(outside(location))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(BadInput, match="leaves the folder"):
        read(outside("link.bin"))
    with pytest.raises(BadInput, match="no such file"):
        read(outside("v.bin"))
    for place in ({"offset": 4}, {"length": 1 << 40}, {"offset": -8, "length": 60}):
        with pytest.raises(BadInput, match="past the end|not a valid ONNX"):
            read(outside("w.bin", **place))


def test_wrong_sizes_and_shapes(tmp_path):
    def changed(change):
        proto = onnx.load_model_from_string(PLAIN)
        change(proto.graph)
        return written(tmp_path, proto.SerializeToString())

    def text(graph):
        graph.initializer[0].data_type = TensorProto.STRING

    changes = {
        "size|valid": lambda g: g.initializer[0].dims.__setitem__(0, 1 << 40),
        "valid": lambda g: g.initializer[0].dims.__setitem__(0, -5),
        "fixed": lambda g: g.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value"),
        "2 outputs": lambda g: g.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 3])),
        "0 inputs|valid": lambda g: g.input.pop(),
        "Gemm": lambda g: g.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 7),
        "valid|text": text,
    }
    for said, change in changes.items():
        with pytest.raises(BadInput, match=said) as caught:
            read(changed(change))
        assert "\n" not in str(caught.value)
    nodes = [op("ConstantOfShape", "s", output="z"), op("Add", "z", "x")]
    with pytest.raises(BadInput, match="ConstantOfShape.*more than"):
        read(written(tmp_path, network(nodes, [1, 5], numbers("s", 1 << 40, 5))))
    with pytest.raises(BadInput, match="does not depend on its input"):
        read(written(tmp_path, network([op("Relu", "w")], [1, 5], tensor("w", 5))))


@given(
    content=st.one_of(
        st.binary(min_size=1, max_size=300), st.integers(1, len(PLAIN) - 1).map(lambda n: PLAIN[:n])
    )
)
@settings(max_examples=60, deadline=None)
def test_truncated_files_and_noise_are_one_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("noise")
    for name, data in (
        ("net.onnx", content),
        ("net.onnx.gz", content),
        ("cut.onnx.gz", gzip.compress(content)),
    ):
        with pytest.raises(BadInput) as caught:
            read(written(folder, data, name))
        assert "\n" not in str(caught.value)


def test_a_gzip_file_may_not_unpack_to_more_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_reader, "LARGEST", 1000)
    with pytest.raises(BadInput, match="unpacks to more than the 1000 bytes"):
        read(written(tmp_path, gzip.compress(bytes(5000)), "net.onnx.gz"))
    with pytest.raises(BadInput, match="no such file"):
        read(tmp_path / "absent.onnx")
