"""A prepared graph computes what the model does, in operators that are relaxed; what is split is covered."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.graph import capture
from netweight.core.graph import evaluate as as_captured
from netweight.nn.fake import StaticRounding, fake_round
from netweight.verification.lines import SCALAR
from netweight.verification.prepare import INTERVALS, call, evaluate, prepared
from netweight.verification.relax import Interval
from netweight.verification.rules import rule_of
from netweight.verification.split import rounding

RELAXED = SCALAR | {f"aten.{n}" for n in ("mul", "div", "matmul", "amax", "amin", "bmm")}


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def images(x):
    return x.reshape(len(x), 4, 3, 2)


WEIGHT, SHIFT = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).unbind(0)


CASES = {
    "softmax": lambda x: (3 * x).softmax(1),
    "softmax, middle axis": lambda x: images(x).softmax(-2),
    "softmin": lambda x: F.softmin(x, 1),
    "log softmax": lambda x: F.log_softmax(x, 1),
    "causal attention": lambda x: F.scaled_dot_product_attention(
        *[x.reshape(-1, 1, 6, 4)] * 3, is_causal=True
    ),
    "logsumexp": lambda x: x.logsumexp(1),
    "logsumexp of planes": lambda x: images(x).logsumexp((2, 3), keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, (24,)),
    "layer norm, affine": lambda x: F.layer_norm(
        images(x), (3, 2), WEIGHT[:6].reshape(3, 2).to(x), SHIFT[:6].reshape(3, 2).to(x)
    ),
    "rms norm": lambda x: F.rms_norm(x, (24,), WEIGHT.to(x)),
    "group norm": lambda x: F.group_norm(images(x), 2, WEIGHT[:4].to(x), SHIFT[:4].to(x)),
    "instance norm": lambda x: F.instance_norm(images(x)),
    "variance": lambda x: images(x).var((2, 3)),
    "standard deviation": lambda x: x.std(1, correction=0),
    "2-norm": lambda x: x.norm(dim=1),
    "1-norm": lambda x: images(x).norm(1, dim=(1, 2)),
    "infinity-norm": lambda x: x.norm(math.inf, dim=1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "einsum": lambda x: torch.einsum("bij,bjk->bik", x.reshape(-1, 4, 6), x.reshape(-1, 6, 4)),
    "max over an axis": lambda x: images(x).max(1).values + images(x).min(1).values,
    "prelu": lambda x: F.prelu(images(x), torch.tensor([0.2, -0.3, 1.5, 0.0])),
    "celu": lambda x: F.celu(2 * x, 1.3),
    "log sigmoid": lambda x: F.logsigmoid(5 * x),
    "fake rounding": lambda x: fake_round(x, torch.tensor(0.2), torch.tensor(7.0), 4),
    "clamp of rounds": lambda x: (4 * x).round().clamp(-3, 2),
    "fake quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -8, 7),
    "fake quantize, channels": lambda x: torch.fake_quantize_per_channel_affine(
        images(x),
        torch.tensor([0.1, 0.2, 0.3, 0.05]),
        torch.tensor([0, 1, -2, 3], dtype=torch.int32),
        1,
        -8,
        7,
    ),
}
GRAPHS = {}


def graphs(name):
    """(captured, prepared, inputs), made once."""
    if name not in GRAPHS:
        x = 1.3 * torch.randn(1, 24, generator=torch.Generator().manual_seed(3))
        graph = capture(Function(CASES[name]), x)
        GRAPHS[name] = (graph, prepared(graph), x)
    return GRAPHS[name]


def draws(count=20):
    return 1.5 * torch.randn(count, 1, 24, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", CASES)
def test_computes_the_same(name):
    graph, found, x = graphs(name)
    for sample in (x, *draws()):
        torch.testing.assert_close(evaluate(found, sample), as_captured(graph, sample), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_nodes_are_typed_in_order_and_named_once(name):
    graph, found, x = graphs(name)
    names = [node.name for node in found.nodes]
    assert len(set(names)) == len(names) and found.outputs == graph.outputs
    ready = {node.name for node in found.inputs} | found.constants.keys()
    values = {**found.constants, found.inputs[0].name: x}
    for node in found.nodes:
        assert ready.issuperset(node.inputs)
        p = {k: values[v.name] if hasattr(v, "name") else v for k, v in node.params.items()}
        values[node.name] = call(node, p)
        value = values[node.name][0] if isinstance(values[node.name], tuple) else values[node.name]
        assert tuple(value.shape) == node.shape and value.dtype == node.dtype
        ready.add(node.name)
    read = {name for node in found.nodes for name in node.inputs} | set(found.outputs)
    assert set(names) <= read and found.constants.keys() <= read | {n for f in found.folded for n in f.inputs}


@pytest.mark.parametrize(
    ("name", "op", "gone"),
    [
        ("softmax", "netweight.rounded", "aten.softmax"),
        ("log softmax", "netweight.rounded", "aten.log_softmax"),
        ("causal attention", "netweight.rounded", "aten.softmax"),
        ("logsumexp", "aten.mean", "aten.amax"),
        ("layer norm, affine", "aten.rsqrt", "aten.layer_norm"),
        ("group norm", "aten.rsqrt", "aten.group_norm"),
        ("instance norm", "aten.rsqrt", "aten.instance_norm"),
        ("rms norm", "aten.rsqrt", "aten.rms_norm"),
        ("variance", "aten.square", "aten.var"),
        ("normalize", "aten.sqrt", "aten.linalg_vector_norm"),
        ("infinity-norm", "aten.amax", "aten.linalg_vector_norm"),
        ("max over an axis", "aten.amin", "getitem"),
        ("prelu", "aten._prelu_kernel", "aten.where"),
        ("celu", "aten.elu", "aten.where"),
        ("log sigmoid", "aten.softplus", "aten.log1p"),
        ("fake rounding", "netweight.quantized", "aten.maximum"),
        ("clamp of rounds", "netweight.quantized", "aten.round"),
        ("fake quantize", "netweight.quantized", "getitem"),
        ("fake quantize, channels", "netweight.quantized", "getitem"),
    ],
)
def test_what_is_hard_to_relax_is_gone(name, op, gone):
    ops = [node.op for node in graphs(name)[1].nodes]
    assert op in ops and gone not in ops
    assert "aten.eq" not in ops


def test_masked_scores_leave_by_a_factor_and_not_by_an_infinity():
    found = graphs("causal attention")[1]
    readers = {
        name: [n.op for n in found.nodes if name in n.inputs] for name in (n.name for n in found.nodes)
    }
    (masked,) = (node.name for node in found.nodes if node.op == "aten.where")
    assert readers[masked] == ["netweight.rounded"]  # for the size of its rounding alone
    assert set(found.constants["softmax.others"].unique().tolist()) == {0.0, 1.0}


def test_a_softmax_over_too_many_entries_stays_whole():
    graph = capture(Function(lambda x: x.softmax(1)), torch.randn(1, 300))
    assert [node.op for node in prepared(graph).nodes] == ["aten.softmax"]


def boxes_of(found, lower, upper, unit):
    """The interval of every node of a prepared graph, float64, for one box."""
    values = {n: t.double() if t.is_floating_point() else t for n, t in found.constants.items()}
    values[found.inputs[0].name] = Interval(lower.double(), upper.double())
    params = {}
    for node in found.nodes:
        p = {k: values[v.name] if hasattr(v, "name") else v for k, v in node.params.items()}
        rule = INTERVALS[node.op] if node.op in INTERVALS else rule_of(node)
        values[node.name], params[node.name] = rule(node, p, unit), p
    return values, params


@pytest.mark.parametrize("name", CASES)
def test_no_point_leaves_the_intervals_and_the_split_ones_are_no_looser_than_the_whole(name):
    graph, found, x = graphs(name)
    for eps in (0.0, 0.02, 0.3):
        values, _ = boxes_of(found, x - eps, x + eps, 2.0**-24)
        box = values[found.outputs[0]]
        share = torch.rand(60, 1, 24, generator=torch.Generator().manual_seed(5))
        for s in torch.minimum(torch.maximum(x - eps + share * 2 * eps, x - eps), x + eps):
            y = as_captured(graph, s).double()
            assert (box.lower <= y).all() and (y <= box.upper).all()
        last = found.nodes[-1]
        if last.op == "netweight.rounded" and last.params["like"] != "logsumexp":
            whole, _ = boxes_of(graph, x - eps, x + eps, 2.0**-24)
            whole = whole[graph.outputs[0]]
            assert (box.lower >= whole.lower).all() and (box.upper <= whole.upper).all()


ROUNDED = ["softmax", "log softmax", "logsumexp", "layer norm, affine", "rms norm", "group norm",
           "instance norm",            "variance", "2-norm", "1-norm"]  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_the_slack_covers_what_the_operator_loses_and_not_much_more(name):
    """The operator in float32 against the chain in float64, at points of a box; batches go at once."""
    graph, found, x = graphs(name)
    eps = 0.05
    values, params = boxes_of(found, x - eps, x + eps, 2.0**-24)
    node = next(node for node in found.nodes if node.op == "netweight.rounded")
    slack = rounding(node, params[node.name], 2.0**-24)
    assert slack.shape == node.shape and (slack > 0).all() and (slack < 3e-3).all()
    lifted = {k: Interval(v.lower[None], v.upper[None]) if isinstance(v, Interval) else v
              for k, v in params[node.name].items()}  # fmt: skip
    torch.testing.assert_close(rounding(node, lifted, 2.0**-24)[0], slack)
    wide = replace(
        found, constants={n: t.double() if t.is_floating_point() else t for n, t in found.constants.items()}
    )
    share = torch.rand(40, 1, 24, generator=torch.Generator().manual_seed(6))
    for s in x + eps * (2 * share - 1):
        real, computed = evaluate(wide, s.double()), as_captured(graph, s)
        assert ((real - computed.double()).abs().reshape(node.shape) <= slack).all()


def test_the_slack_of_a_norm_grows_with_what_the_mean_cancels():
    """Far off 0 the operator loses the low bits of x - mean; x + 32 itself is exact at these points."""
    x = (1.3 * torch.randn(1, 24, generator=torch.Generator().manual_seed(3)) * 2**16).round() / 2**16
    graph = capture(Function(lambda x: F.layer_norm(x + 32, (24,))), x)
    found = prepared(graph)
    _, params = boxes_of(found, x, x, 2.0**-24)
    node = found.nodes[-1]
    slack = rounding(node, params[node.name], 2.0**-24)
    off = (evaluate(found, x.double()) - as_captured(graph, x).double()).abs()
    summed = 24 * 2.0**-24 * 32 / float(x.std())  # what a mean summed in float32 may be off by, scaled
    assert (off <= slack).all() and summed < float(slack.min()) and float(slack.max()) < 0.1


def norm(channels, seed):
    layer = nn.BatchNorm2d(channels)
    g = torch.Generator().manual_seed(seed)
    for tensor in (layer.weight.data, layer.running_var):
        tensor.copy_(0.5 + torch.rand(channels, generator=g))
    layer.bias.data.normal_(generator=g)
    layer.running_mean.normal_(generator=g)
    layer.weight.data[0] *= -1
    return layer


def convolutions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False, groups=2), norm(6, 0), nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, stride=2), norm(4, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * 64, 5), nn.BatchNorm1d(5).eval(), Function(lambda x: x * 0.5 / 3.0),
        ).eval()  # fmt: skip


def test_a_batch_norm_stays_unless_it_is_asked_to_be_folded():
    model, x = convolutions(), torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = capture(model, x)
    assert [n.op for n in prepared(graph).nodes] == [n.op for n in graph.nodes]
    folded = prepared(graph, fold=True)
    layers = ["convolution", "relu", "convolution", "relu", "reshape", "linear"]
    assert [n.op for n in folded.nodes] == [f"aten.{name}" for name in layers]
    torch.testing.assert_close(evaluate(folded, x), model(x), rtol=1e-5, atol=1e-5)
    assert all(t.dtype == torch.float32 for t in folded.constants.values())
    precise = capture(convolutions().double(), x.double())
    torch.testing.assert_close(
        evaluate(prepared(precise, fold=True), x.double()),
        as_captured(precise, x.double()),
        rtol=1e-13,
        atol=1e-13,
    )


def test_a_value_that_others_read_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), norm(3, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model, x = Twice().eval(), torch.randn(1, 2, 3, 3)
    folded = prepared(capture(model, x), fold=True)
    assert len(folded.nodes) == 3
    torch.testing.assert_close(evaluate(folded, x), model(x))


def test_clamps_that_cut_before_the_stairs_end_stay():
    def narrow(x):
        return (torch.maximum(x, torch.tensor(-1.3)) / torch.tensor(0.2)).round().clamp(-8, 7)

    x = torch.linspace(-3, 3, 41).reshape(1, 41)
    graph = capture(Function(narrow), x)
    found = prepared(graph)
    assert "aten.maximum" in [n.op for n in found.nodes] and torch.equal(evaluate(found, x), narrow(x))


def test_a_rounding_that_is_read_twice_or_not_clamped_to_whole_numbers_stays():
    x = torch.linspace(-3, 3, 41).reshape(1, 41)
    for function in (
        lambda x: x.round().clamp(-1.5, 2),
        lambda x: (x.round() + 0.5).clamp(-1, 2),
        lambda x: x.round() + x.round().clamp(-1, 1),
    ):
        graph = capture(Function(function), x)
        found = prepared(graph)
        assert "aten.round" in [n.op for n in found.nodes]
        assert torch.equal(evaluate(found, x), as_captured(graph, x))


def test_float_values_of_a_rounding_module_are_the_same_bits():
    module = StaticRounding.of(-1.0, 1.5, 3).module()
    x = torch.linspace(-3, 3, 4001).reshape(1, -1)
    graph = capture(module, x)
    found = prepared(graph)
    assert torch.equal(evaluate(found, x), module(x))
    assert [n.op for n in found.nodes].count("netweight.quantized") == 1


def test_every_relaxed_operator_has_lines_or_planes():
    affine = {
        "aten." + n for n in ("sub", "add", "unsqueeze", "sum", "mean", "reshape", "neg", "expand", "permute")
    }
    for name in CASES:
        for node in graphs(name)[1].nodes:
            assert node.op in RELAXED | affine | {"netweight.rounded", "aten.where"}, (name, node.op)
