"""The layer that runs a packed weight does what the layer with the decoded weight does, for every kind."""

import copy

import pytest
import torch
from torch import nn

from netweight.compression.quantize.rtn import RTN, encode
from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.layers import PackedLayer, run, weights_to_pack
from netweight.nn.packed import Dense, Sparse

KINDS = {
    "linear": (nn.Linear(6, 4), torch.rand(3, 5, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), torch.rand(3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2, dilation=2), torch.rand(2, 4, 9)),
    "conv2d": (nn.Conv2d(2, 4, 3, stride=2, padding="valid"), torch.rand(2, 2, 7, 8)),
    "conv2d circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), torch.rand(2, 2, 5, 5)),
    "conv3d": (nn.Conv3d(2, 4, 3, padding="same"), torch.rand(1, 2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), torch.rand(2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1, dilation=2), torch.rand(2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, bias=False), torch.rand(1, 2, 3, 3, 2)),
    "embedding": (nn.Embedding(7, 6, padding_idx=2), torch.tensor([[0, 2, 6], [1, 1, 5]])),
}


def packed(layer: nn.Module, bits: int = 4):
    return encode(layer.weight.detach(), RTN(bits)).layer(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_with_the_decoded_weight(kind):
    layer, x = KINDS[kind]
    small = packed(layer)
    expected = copy.deepcopy(layer)
    expected.weight.data = encode(layer.weight.detach(), RTN(4)).decode()
    assert torch.equal(small(x), expected(x)) and torch.equal(small.plain()(x), expected(x))
    assert not torch.equal(small(x), layer(x))
    assert type(small.plain()) is type(layer) and isinstance(small.plain().weight, nn.Parameter)
    assert not {*map(id, small.plain().parameters())} & {*map(id, layer.parameters())}
    assert torch.equal(small.weight, expected.weight) and small.bias is getattr(layer, "bias", None)


def test_transposed_convolutions_take_an_output_size():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x, size = torch.rand(1, 2, 4, 4), [10, 10]
    assert torch.equal(packed(layer)(x, size), packed(layer).plain()(x, size))
    assert packed(layer)(x, size).shape == (1, 3, 10, 10)


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 3


def test_a_subclass_keeps_its_own_forward():
    layer, x = Scaled(5, 4), torch.arange(5)
    assert torch.equal(packed(layer)(x), encode(layer.weight.detach(), RTN()).decode() * 3)


def test_run_leaves_the_layer_alone():
    layer = nn.Linear(3, 2)
    before = layer.weight
    assert torch.equal(run(layer, torch.ones(1, 3), torch.zeros(2, 3)), layer.bias[None])
    assert layer.weight is before and "weight" not in vars(layer)


def test_state_holds_the_bias_and_no_codes_and_tensors_follow_the_device():
    layer = nn.Linear(6, 4)
    small = packed(layer)
    assert list(small.state_dict()) == ["like.bias"] and len(list(small.parameters())) == 1
    assert {name for name, _ in small.named_buffers()} == {"part_0", "part_1", "part_2"}
    twin = copy.deepcopy(small)
    twin.part_0.zero_()
    assert small.form.codes.any() and not twin.form.codes.any()
    assert small.form.bits() == encode(layer.weight.detach(), RTN()).bits()


def test_gradients_reach_input_and_bias():
    small = packed(nn.Linear(6, 4))
    x = torch.rand(2, 6, requires_grad=True)
    small(x).sum().backward()
    assert torch.allclose(x.grad, small.weight.sum(0).expand(2, 6)) and small.bias.grad.tolist() == [2.0] * 4
    assert not small.weight.requires_grad


def test_every_form_runs():
    layer, x = nn.Linear(6, 4), torch.rand(2, 6)
    for form in (Dense(layer.weight.detach().half()), Sparse.of(layer.weight.detach(), layer.weight > 0)):
        small = form.layer(layer)
        assert isinstance(small, PackedLayer) and torch.equal(small(x), small.plain()(x))
        assert torch.equal(small.weight, form.decode())


def test_what_does_not_fit_is_refused():
    form = encode(torch.rand(4, 6), RTN())
    with pytest.raises(DoesNotFit, match=r"packed weight of \(4, 6\) does not fit \(6, 4\)"):
        form.layer(nn.Linear(4, 6))
    with pytest.raises(DoesNotFit, match="^LayerNorm: no packed form runs"):
        form.layer(nn.LayerNorm(6))


def test_weights_to_pack():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(2, 2), nn.ReLU())
    model[1].weight.data[0, 0] = torch.inf
    weights, left = weights_to_pack(model, ["0", "1", "3"])
    assert list(weights) == ["0", "3"] and left == {"1": "its weight holds NaN or Inf"}
    assert not weights["0"].requires_grad
    with pytest.raises(DoesNotFit, match="^3: the method cannot treat a Embedding"):
        weights_to_pack(model, ["3"], (nn.Linear,))
    with pytest.raises(DoesNotFit, match="^2: the method cannot treat a BatchNorm1d"):
        weights_to_pack(model, ["2"])
    for wrong in ("4", "5"):
        with pytest.raises(BadInput, match=f"unknown layer '{wrong}'"):
            weights_to_pack(model, [wrong])
