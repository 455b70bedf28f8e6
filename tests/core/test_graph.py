"""The graph computes what the model computes, is typed, and counts what hooks count."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.graph import Ref, call, capture, evaluate, layer_macs, macs, run
from netweight.core.plan import Plan
from netweight.models.resnet_cifar import architecture
from netweight.nn.fake import fake_round
from netweight.testing import tiny_language_model, tiny_model, tiny_task


class Mixed(nn.Module):
    """Attention, norms, pools, branches, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, groups=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.twice = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.ln = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        x = F.max_pool2d(self.norm(F.silu(self.up(self.conv(x)))), 4)
        x = self.drop(self.twice(F.gelu(self.twice(x.flatten(2)))))
        x = self.ln(x + F.scaled_dot_product_attention(x, x, x, is_causal=True))
        left, right = x.chunk(2, 1)
        return self.head(torch.where(left > 0, left, right).mean(1))


def examples():
    torch.manual_seed(0)
    resnet = architecture(20)
    return {
        "tiny": (tiny_model(), tiny_task().test.x[:3]),
        "language model": (tiny_language_model(), torch.randint(0, 12, (2, 5))),
        "mixed": (Mixed(), torch.randn(2, 3, 8, 8)),
        "resnet": (resnet, torch.rand(1, 3, 32, 32)),
    }


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_computes_what_the_model_computes_and_leaves_it_alone(name):
    model, x = EXAMPLES[name]
    model = copy.deepcopy(model).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = capture(model, x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(evaluate(graph, x), model.eval()(x), rtol=0, atol=1e-6)
    assert graph.batch == len(x)


@pytest.mark.parametrize("name", EXAMPLES)
def test_nodes_are_typed_and_in_order_and_depend_on_the_input(name):
    model, x = EXAMPLES[name]
    graph = capture(model, x)
    ready = {node.name for node in graph.inputs} | graph.constants.keys()
    for node in graph.nodes:
        assert node.inputs and ready.issuperset(node.inputs)
        assert not set(node.inputs) <= graph.constants.keys()
        assert node.op not in ("aten.clone", "aten.detach", "aten.dropout", "aten.alias")
        ready.add(node.name)

    def checked(node, params):
        value = call(node, params)
        first = value[0] if isinstance(value, tuple | list) else value
        assert tuple(first.shape) == node.shape and first.dtype == node.dtype
        return value

    run(graph, [x], checked)
    layers = {name for name, _ in model.named_modules()}
    assert {node.layer for node in graph.nodes} <= layers


def test_macs_of_a_convolution_and_a_linear_layer_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(54, 5))
    x = torch.zeros(4, 2, 6, 6)
    assert layer_macs(capture(model, x)) == {"0": 6 * 3 * 3 * 1 * 9, "2": 54 * 5}
    assert macs(model, x) == 486 + 270


def test_macs_are_those_that_hooks_count():
    model, x = EXAMPLES["mixed"]
    counted = {}

    def hook(name, layer, inputs, output):
        if isinstance(layer, nn.ConvTranspose2d):
            count = inputs[0].numel() * layer.weight[0].numel()
        else:
            count = output.numel() * layer.weight[0].numel()
        counted[name] = counted.get(name, 0) + count // len(x)

    handles = [
        layer.register_forward_hook(lambda layer, i, o, name=name: hook(name, layer, i, o))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    counted[""] = 2 * 4 * 4 * 16  # q k^T and its product with v
    assert layer_macs(capture(model, x)) == counted


def test_a_packed_network_appears_with_its_decoded_weights():
    model, x = tiny_model(), tiny_task().test.x[:2]
    small = assemble(model, rtn(model, tiny_task(), weighted(model), RTN(4)), Plan())
    for network in (small, small.model):
        graph = capture(network, x)
        torch.testing.assert_close(evaluate(graph, x), small.model(x), rtol=0, atol=1e-6)
        assert layer_macs(graph) == layer_macs(capture(model, x))


def test_a_straight_through_estimator_is_what_it_computes():
    class Rounded(nn.Module):
        def forward(self, x):
            return fake_round(x, torch.tensor(0.1), torch.tensor(8.0), 4)

    x = torch.randn(2, 5)
    graph = capture(Rounded(), x)
    torch.testing.assert_close(evaluate(graph, x), Rounded()(x), rtol=0, atol=1e-6)
    rounded = next(node.name for node in graph.nodes if node.op == "aten.round")
    used = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    assert rounded in used
    assert [node.op for node in graph.nodes if node.name == graph.outputs[0]] == ["aten.mul"]


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y, (x * 2).split([1, 2], 1)[1]

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    both, part = evaluate(capture(Two(), x, y), x, y)
    assert torch.equal(both, x + y) and torch.equal(part, (x * 2)[:, 1:])


def test_params_have_the_names_and_defaults_of_the_schema():
    graph = capture(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 5, 5))
    (node,) = graph.nodes
    assert node.op == "aten.convolution" and node.params["stride"] == [1, 1]
    assert isinstance(node.params["input"], Ref) and node.params["transposed"] is False
    assert node.inputs[0] == graph.inputs[0].name and len(node.inputs) == 3


def test_control_flow_on_values_and_inputs_that_do_not_fit_are_one_sentence():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(DoesNotFit, match="Branches: it cannot be captured") as caught:
        capture(Branches(), torch.ones(2, 3))
    assert "\n" not in str(caught.value)
    with pytest.raises(DoesNotFit, match=r"\[\(2, 4\)\]"):
        capture(nn.Linear(3, 2), torch.ones(2, 4))
