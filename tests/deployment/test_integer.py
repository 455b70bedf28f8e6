"""A lowered network: integers alone, equal to its simulations and to ONNX Runtime bit for bit, bounded."""

import dataclasses
import functools
import json

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Change, assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.plan import Plan
from netweight.core.rewrite import FoldBatchNorm, rewritten
from netweight.core.sites import foldable
from netweight.core.task import Data
from netweight.data import files
from netweight.deployment import integer_onnx
from netweight.deployment.integer import lower, sizes
from netweight.models.digits_cnn import digits_cnn
from netweight.models.load import load
from netweight.models.resnet_cifar import resnet20
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.integer_network import IntegerNetwork, executed, read, write
from netweight.nn.integer_steps import Clip, Entrance, Join, Product, Rescale
from netweight.nn.integer_twin import simulation, twin
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.verification import bounds as proofs


def compressed(model, data, bits=8, activation_bits=8, symmetric=True, group=0):
    """Norms folded, weights rounded to nearest, inputs on fixed grids: unsigned where nothing is negative."""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    rewrites = [FoldBatchNorm(*pair) for pair in foldable(model, data)] if norms else []
    folded = rewritten(model, rewrites)
    layers, seen = weighted(folded), {}

    def watch(name):
        def hook(module, given):
            low, high = seen.get(name, (0.0, 0.0))
            seen[name] = (min(low, float(given[0].min())), max(high, float(given[0].max())))

        return folded.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [watch(name) for name in layers]
    with torch.no_grad():
        folded(data.x)
    for hook in hooks:
        hook.remove()
    grids, middle = {}, 2 ** (activation_bits - 1)
    for name, (low, high) in seen.items():
        step = max(-low, high) / (middle - 1) or 1.0
        signed = StaticRounding(torch.tensor(step), torch.tensor(float(middle)), activation_bits)
        grids[name] = signed if low < 0 else StaticRounding.of(0.0, high, activation_bits)
    change = rtn(folded, tiny_task(), layers, RTN(bits, symmetric=symmetric, group=group))
    return assemble(model, dataclasses.replace(change, rewrites=rewrites, activations=grids), Plan())


class Everything(nn.Module):
    """Residuals, a padded shortcut, concatenation, depthwise convolutions, pools, clips, movements."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.wide = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 4, (1, 3), padding=(0, 1))
        self.line = nn.Conv1d(10, 6, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.stem((x - 0.4) / 0.25))
        x = F.relu6(self.depth(x)) - 0.5 * x
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.max_pool2d(torch.relu(self.wide(x) + shortcut), 3, 1, 1)
        x = torch.cat([self.left(x), -self.right(x)], 1)
        first, second = F.avg_pool2d(x, 2).split([4, 6], 1)
        x = torch.cat([second, first], 1).flatten(2).permute(0, 2, 1).transpose(1, 2).flip(2)
        x = F.hardtanh(self.line(x), -1.5, 1.0)
        return self.head(x.reshape(len(x), -1)).clamp(min=-9.0)


def images(count=24, side=7, seed=0, channels=4):
    x = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return Data(x, None, 7, low=0.0, high=1.0)


def everything(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Everything().eval()


@functools.cache
def small_everything(**how):
    model, data = everything(), images()
    return compressed(model, data, **how), data


@functools.cache
def graph(**how):
    return proofs.captured(twin(lowered(**how)), images().x)


@functools.cache
def lowered(**how):
    return lower(*small_everything(**how))


def agree(network, x):
    """Integers, both simulations and ONNX Runtime give the same; returns the logits."""
    q = network(x)
    assert q.dtype == torch.int32
    wanted = q.double() * network.scale
    assert torch.equal(twin(network)(x), wanted) and torch.equal(simulation(network)(x), wanted)
    assert torch.equal(integer_onnx.run(integer_onnx.proto(network).SerializeToString(), x), q)
    return wanted


def near(found, wanted, share):
    """Apart by at most that share of the spread of the outputs."""
    return bool((found - wanted.detach()).abs().max() <= share * wanted.detach().std())


@pytest.mark.parametrize(
    "how",
    [
        {}, {"bits": 4, "activation_bits": 4}, {"symmetric": False}, {"group": -1}, {"activation_bits": 12},
        {"bits": 8, "activation_bits": 12, "symmetric": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_operator_agrees_bit_for_bit_and_follows_the_compressed_network(how):
    small, data = small_everything(**how)
    network, x = lowered(**how), images(9, seed=1).x
    fine = how.get("activation_bits", 8) >= 8
    assert near(agree(network, x), small(x), 0.05 if fine else 1.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_strides_and_folded_norms(seed):
    model, task = tiny_model(seed), tiny_task(seed)
    small = compressed(model, task.calibration)
    network, x = lower(small, task.calibration), task.test.x
    assert near(agree(network, x), small(x), 0.02)
    assert all(reach.dtype == torch.int8 for reach in (c.step.weight for c in products(network)))


def products(network):
    return [call for call in network.calls if isinstance(call.step, Product)]


@functools.cache
def digits():
    """(test data, the compressed network, the lowered one)."""
    model = digits_cnn(0)
    data = files.load("digits", model=model)
    small = compressed(model, data.calibration)
    return data.test, small, lower(small, data.calibration)


def test_the_digits_end_to_end():
    test, small, network = digits()
    wanted = agree(network, test.x)
    exact = (small(test.x).argmax(1) == test.y).float().mean()
    assert abs(float((wanted.argmax(1) == test.y).float().mean() - exact)) <= 0.005


def test_an_exported_folder_is_compared_and_read_back_for_proofs(tmp_path):
    small, data = small_everything()
    made = integer_onnx.export(small, tmp_path / "integer", data, data.x[:8])
    wanted = lowered()(data.x).double() * lowered().scale
    assert made.same and made.examples == 8 and made.operators > 100 and made.scale == lowered().scale
    apart = (wanted - small(data.x).detach())[:8].abs().max()
    assert made.largest_difference == pytest.approx(float(apart))
    assert {path.name for path in (tmp_path / "integer").iterdir()} == set(integer_onnx.FILES)
    assert torch.equal(load(str(tmp_path / "integer"))(data.x), wanted)
    kinds = {node.op_type for node in onnx.load(tmp_path / "integer" / "model.onnx").graph.node}
    assert {"ConvInteger", "MatMulInteger", "BitShift"} <= kinds and not kinds & {
        "Conv",
        "MatMul",
        "Gemm",
        "Div",
    }


def test_a_residual_network_joins_integers_and_not_real_numbers():
    model = resnet20()
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = Data(x, None, 3)
    small = compressed(model, data)
    network = lower(small, data)
    wanted = agree(network, x)
    assert near(wanted, small(x), 0.1)
    apart = (simulation(network, join_as_real=True)(x) != wanted).any(1)
    assert apart.sum() > 0  # bar 4 of hawq-v3
    joins = [call for call in network.calls if isinstance(call.step, Join)]
    assert len(joins) == 9
    made = {call.name: call.step for call in network.calls}
    for call in joins:  # every branch by its own dyadic number, of one size per row
        branches = [made[name] for name in call.inputs]
        assert all(isinstance(step, Rescale) for step in branches)
        assert all(step.high == 2**15 - 1 and step.low in (0, -(2**15)) for step in branches)
        assert network.scales[call.inputs[0]].item() == network.scales[call.inputs[1]].item()
    assert len(made["layer1.0.conv2.input"].factor.multiplier.flatten()) == 16  # per channel, 31 bits


def test_no_floating_tensor_behind_the_entrance():
    small, data = small_everything()
    network = lowered()
    seen = executed(network, data.x[:2])
    assert {dtype for _, dtype in seen} == {"int32", "int64"} and sum(seen.values()) > 100
    assert sum(isinstance(call.step, Entrance) for call in network.calls) == 1

    class Leak(Clip):
        def run(self, q):
            return (q.float() * 0.5).round().to(torch.int32)

    calls = [dataclasses.replace(c, step=Leak()) if isinstance(c.step, Clip) else c for c in network.calls]
    with pytest.raises(DoesNotFit, match="_to_copy.*a tensor of torch.float32 inside a network of integers"):
        executed(IntegerNetwork(calls, network.shape, network.scales, network.output), data.x[:2])


def test_the_order_of_examples_and_their_number_do_not_matter():
    small, data = small_everything()
    network = lowered()
    whole = network(data.x)
    assert torch.equal(torch.cat([network(data.x[:5]), network(data.x[5:])]), whole)
    assert torch.equal(lower(small, data)(data.x), whole)


def test_sizes_on_the_data_follow_the_rounded_network():
    small, data = small_everything(bits=4, activation_bits=4)
    graph_sizes = {}

    def spy(graph, layers, given):
        graph_sizes.update(sizes(graph, layers, given))
        return graph_sizes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("netweight.deployment.integer.sizes", spy)
        network = lower(small, data)
    wanted = small(data.x).detach().abs().max()
    last = list(graph_sizes)[-1]
    assert graph_sizes[last] == pytest.approx(float(wanted), rel=1e-5)
    joins = [call.name for call in network.calls if isinstance(call.step, Join)]
    assert len(joins) == 2 and all(network.scales[name] >= graph_sizes[name] / 32767 for name in joins)


@pytest.mark.parametrize("signed", [False, True])
def test_a_relu_is_left_to_the_next_quantizer_where_that_starts_at_zero(signed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data = Data(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    small = compressed(model, data)
    grid = StaticRounding.of(-2.0, 2.0) if signed else small.change.activations["2"]
    grids = {**small.change.activations, "2": grid}
    small = assemble(model, dataclasses.replace(small.change, activations=grids), Plan())
    network = lower(small, data)
    assert any(isinstance(call.step, Clip) for call in network.calls) == signed
    assert near(agree(network, data.x), small(data.x), 0.05)


def test_a_dead_channel_keeps_its_bias():
    model, data = everything(), images()
    with torch.no_grad():
        model.stem.weight[0] = 1e-9 * torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
        model.stem.bias[0] = 2.0
        model.depth.weight[1] = 0.0
        model.head.weight.fill_(0.25)
    small = compressed(model, data)
    network = lower(small, data)
    assert near(agree(network, data.x), small(data.x), 0.05)
    stem = next(call for call in products(network) if call.name == "stem")
    channel = stem.step.run(torch.zeros(1, 4, 3, 3, dtype=torch.int32))[0, 0] * network.scales["stem"][0, 0]
    torch.testing.assert_close(channel, torch.full_like(channel, 2.0))


def test_constant_data_give_a_network_that_runs():
    model = everything()
    data = Data(torch.zeros(3, 4, 7, 7), None, 2)
    small = compressed(model, images())
    agree(lower(small, data), images(3).x)


class Odd(nn.Module):
    def __init__(self, f, norm=None):
        super().__init__()
        self.first, self.last, self.f = nn.Linear(6, 8), nn.Linear(8, 3), f
        self.norm = norm

    def forward(self, x):
        h = self.first(x)
        return self.last(self.f(h if self.norm is None else self.norm(h)))


@pytest.mark.parametrize(
    ("f", "norm", "named"),
    [
        (lambda h: h.softmax(-1), None, "softmax"),
        (F.gelu, None, "gelu"),
        (torch.sigmoid, None, "sigmoid"),
        (lambda h: h, nn.LayerNorm(8), r"\(in layer norm\): the operator aten.layer_norm"),
        (lambda h: h * h, None, "aten.mul by a value"),
        (lambda h: h + torch.ones(8), None, "a constant that is added"),
        (lambda h: h.cumsum(1), None, "cumsum"),
        (lambda h: h - h.mean(0), None, "mixes examples"),
        (lambda h: h.reshape(2, -1).reshape(1, -1), None, "mixes examples"),
        (lambda h: h @ torch.ones(8, 8), None, "matmul"),
    ],
    ids=["softmax", "gelu", "sigmoid", "norm", "mul", "constant", "cumsum", "mean", "reshape", "matmul"],
)
def test_what_has_no_integer_form_is_refused_by_name(f, norm, named):
    model, x = Odd(f, norm), torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    small = compressed(model, Data(x))
    with pytest.raises(DoesNotFit, match=named) as caught:
        lower(small, Data(x))
    assert "\n" not in str(caught.value)


def test_refuses_layers_that_are_not_ready():
    model, data = tiny_model(), tiny_task().calibration
    small = compressed(model, data)

    def with_(**fields):
        return assemble(model, dataclasses.replace(small.change, **fields), Plan())

    with pytest.raises(DoesNotFit, match="no fixed grid"):
        lower(with_(activations={}), data)
    with pytest.raises(DoesNotFit, match="no fixed grid"):
        lower(with_(activations={**small.change.activations, "0": DynamicRounding()}), data)
    packed = {name: form for name, form in small.packed.items() if name != "9"}
    grids = {name: grid for name, grid in small.change.activations.items() if name != "9"}
    with pytest.raises(DoesNotFit, match="linear.*in layer 9.*not packed; compress that layer too"):
        lower(with_(packed=packed, activations=grids), data)
    with pytest.raises(DoesNotFit, match="batch_norm.*fold it into the layer before it"):
        lower(assemble(model, dataclasses.replace(small.change, rewrites=()), Plan()), data)
    with pytest.raises(DoesNotFit, match="stored in groups of 8"):
        lower(compressed(model, data, group=8), data)
    words = tiny_language_model()
    text = assemble(words, rtn(words, tiny_text_task(), weighted(words), RTN()), Plan())
    with pytest.raises(DoesNotFit, match="int64; integer networks read real inputs"):
        lower(text, tiny_text_task().calibration)
    with pytest.raises(DoesNotFit, match="nothing to lower"):
        lower(assemble(nn.Sequential(nn.Flatten()), Change({}), Plan()), data)
    with pytest.raises(DoesNotFit, match=r"inputs of torch.float32 \(3,\), the network takes"):
        lower(small, data)(torch.zeros(2, 3))


def test_a_sum_that_could_leave_int32_is_refused():
    model = nn.Sequential(nn.Linear(4096, 1))
    data = Data(torch.rand(2, 4096, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    agree(lower(compressed(model, data, activation_bits=12), data), data.x)
    with pytest.raises(DoesNotFit, match=r"0: a sum may reach 340.*int32 ends at.*use fewer bits"):
        lower(compressed(model, data, activation_bits=16), data)


# Proofs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_bounds_hold_on_sampled_points_and_are_of_float64(method):
    data, network = images(), lowered(bits=4, activation_bits=4)
    proof, x, within = graph(bits=4, activation_bits=4), data.x[:2], Linf(0.01)
    found = proofs.bounds(proof, x, within, method=method)
    assert found.arithmetic == "float64"
    generator = torch.Generator().manual_seed(0)
    moved = set()
    for _ in range(60):
        s = within.sample(x, generator)
        y = network(s).double() * network.scale
        assert ((found.lower <= y) & (y <= found.upper)).all()
        moved.update(y[0].tolist())
    assert len(moved) > 10  # the points do change the outputs
    point = proofs.bounds(proof, x, Linf(0.0), method="ibp")
    y = network(x).double() * network.scale
    assert ((point.lower <= y) & (y <= point.upper)).all()


def test_stairs_that_go_down_are_relaxed_as_one():
    ops = [node.op for node in graph(bits=4, activation_bits=4).nodes]
    assert ops.count("netweight.floored") >= 6 and "netweight.quantized" in ops
    x, network = images(1).x, lowered(bits=4, activation_bits=4)
    found = proofs.evaluate(graph(bits=4, activation_bits=4), x)
    assert torch.equal(found, network(x).double() * network.scale)


def test_digits_are_verified_about_as_often_as_the_network_with_rounded_activations():
    test, _, network = digits()
    sure = proofs.certify(twin(network), test.take(6), Linf(0.01))
    assert sure.arithmetic == "float64" and sure.summary()["verified"] >= 5


# Files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small, data = small_everything()
    network = lowered()
    place = tmp_path_factory.mktemp("integer")
    write(network, place)
    return place, network, data.x


def test_a_folder_gives_the_same_network(folder):
    place, network, x = folder
    again = read(place)
    assert torch.equal(again(x), network(x)) and again.scale == network.scale
    assert torch.equal(simulation(again)(x), twin(network)(x))
    assert again.to("cpu").calls[0].step.low == network.calls[0].step.low


def hostile(place, target, change, tensors=None):
    """A copy of the folder with a changed description (and tensors), its hash made good."""
    import hashlib

    stored, head = load_file(place / "integer.safetensors"), json.loads((place / "integer.json").read_text())
    if tensors:
        tensors(stored)
    save_file(stored, target / "integer.safetensors")
    change(head)
    head["sha256"] = hashlib.sha256((target / "integer.safetensors").read_bytes()).hexdigest()
    (target / "integer.json").write_text(json.dumps(head))


def of_kind(head, kind):
    return next(call for call in head["calls"] if call["step"]["is"] == kind)


HOSTILE = {
    "another class": lambda h: of_kind(h, "Clip")["step"].update({"is": "StaticRounding"}),
    "unknown class": lambda h: of_kind(h, "Clip")["step"].update({"is": "os.system"}),
    "an input that comes later": lambda h: h["calls"][1].update(inputs=["head"]),
    "no inputs": lambda h: h["calls"][1].update(inputs=[]),
    "two of one name": lambda h: h["calls"][1].update(name=h["calls"][2]["name"]),
    "integers as real": lambda h: h["calls"][1].update(inputs=["input"]),
    "a huge pad": lambda h: of_kind(h, "Move")["step"].update(how="pad", by={"pad": [2**30, 2**30]}),
    "a missing setting": lambda h: of_kind(h, "Move")["step"].update(by={}),
    "a range of its own": lambda h: of_kind(h, "Rescale")["step"].update(low=-(2**40)),
    "another output": lambda h: h.update(output="nothing"),
    "another shape": lambda h: h.update(shape=[4, 9, 9, 9]),
    "a shape of words": lambda h: h.update(shape=["a"]),
    "no calls": lambda h: h.update(calls=[]),
    "calls of words": lambda h: h.update(calls=["a"]),
    "another format": lambda h: h.update(format=2),
    "a list": lambda h: h.update(calls={"a": 1}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_descriptions_are_one_sentence(folder, tmp_path, change):
    hostile(folder[0], tmp_path, change)
    with pytest.raises(BadInput) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def large(stored):
    stored["stem|weight"] = stored["stem|weight"].to(torch.int16).fill_(32767)
    stored["stem|bias"].fill_(2**31 - 1)


HOSTILE_TENSORS = {
    "sums beyond int32": large,
    "weights of floats": lambda s: s.update({"stem|weight": s["stem|weight"].float()}),
    "an even shift": lambda s: next(t for n, t in s.items() if n.endswith("factor.shift")).fill_(99),
    "a negative scale": lambda s: s["|stem"].neg_(),
    "no scale": lambda s: s.pop("|stem"),
    "no weight": lambda s: s.pop("stem|weight"),
    "NaN": lambda s: next(t for n, t in s.items() if n.endswith("gain")).fill_(torch.nan),
}


@pytest.mark.parametrize("tensors", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS.keys())
def test_hostile_tensors_are_one_sentence(folder, tmp_path, tensors):
    hostile(folder[0], tmp_path, lambda head: None, tensors)
    with pytest.raises(BadInput) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path):
    for name in ("integer.json", "integer.safetensors"):
        (tmp_path / name).write_bytes((folder[0] / name).read_bytes())
    content = bytearray((tmp_path / "integer.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "integer.safetensors").write_bytes(bytes(content))
    with pytest.raises(BadInput, match="not the file that integer.json describes"):
        read(tmp_path)
    (tmp_path / "integer.json").unlink()
    with pytest.raises(BadInput, match="there is no such file"):
        read(tmp_path)
