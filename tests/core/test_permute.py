"""Neurons in another order: the function stays, the rows are where they should be, ties are respected."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.permute import Between, Permute, orderable
from netweight.core.rewrite import residual, rewritten
from netweight.core.task import Data
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task


def shuffled(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).int()


def convolutions() -> nn.Sequential:
    """Two convolutions with a norm as if trained, pooling between them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.Flatten()
    )
    for tensor in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return net.eval()


def test_by_hand():
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        net[0].bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    after = rewritten(net, [Permute(("0",), (), ("2",), torch.tensor([2, 0, 1]))])
    assert after[0].weight.flatten().tolist() == [3, 1, 2] and after[0].bias.tolist() == [30, 10, 20]
    assert after[2].weight.tolist() == [[3, 1, 2], [6, 4, 5]]


@given(seed=st.integers(0, 2**16))
def test_the_function_stays_through_norms_and_pools(seed):
    net, x = convolutions(), torch.rand(3, 2, 9, 9)
    order = shuffled(6, seed)
    assert residual(net, [Permute(("0",), ("1",), ("4",), order)], x) <= 1e-12
    after = rewritten(net, [Permute(("0",), ("1",), ("4",), order)])
    assert torch.equal(weight_of(after, "0"), weight_of(net, "0")[order.long()])
    assert torch.equal(after[1].running_var, net[1].running_var[order.long()])


def test_places_are_found_and_their_orders_compose():
    data = Data(torch.rand(4, 2, 9, 9))
    assert orderable(convolutions(), data) == [Between(("0",), ("1",), ("4",))]
    net = nn.Sequential(*[nn.Linear(5, 5) if n % 2 == 0 else nn.ReLU() for n in range(7)]).eval()
    x = torch.rand(8, 5)
    places = orderable(net, Data(x))
    assert [place.producers for place in places] == [("0",), ("2",), ("4",)]
    rewrites = [place.permuted(shuffled(5, n)) for n, place in enumerate(places)]
    assert residual(net, rewrites, x) <= 1e-12
    assert not torch.equal(weight_of(rewritten(net, rewrites), "2"), weight_of(net, "2"))


def test_channels_that_are_tied_are_left_alone():
    # tiny_model's second convolution has groups, and a Flatten lies before its first Linear
    assert orderable(tiny_model(), tiny_task().calibration) == [Between(("7",), (), ("9",))]
    found = orderable(tiny_language_model(), tiny_text_task().calibration)
    assert found == [Between(("up",), (), ("down",))]  # no norm that nothing is folded into, no attention


@pytest.mark.parametrize(
    ("kind", "more", "ends"),
    [
        ("Llama", {"intermediate_size": 12, "num_key_value_heads": 2}, ("mlp.gate_proj", "mlp.down_proj")),
        ("OPT", {"ffn_dim": 12, "word_embed_proj_dim": 8, "activation_function": "gelu"}, ("fc1", "fc2")),
    ],
)
def test_feed_forward_parts_of_decoder_blocks(kind, more, ends):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        pad_token_id=None, bos_token_id=None, eos_token_id=None, **shape, **more
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().double()
    tokens = torch.arange(8).reshape(2, 4)
    places = orderable(model, Data(tokens))
    assert len(places) == 2
    assert places[0].producers[0].endswith(ends[0]) and places[1].consumers[0].endswith(ends[1])
    rewrites = [place.permuted(shuffled(12, n)) for n, place in enumerate(places)]
    after = rewritten(model, rewrites)
    with torch.no_grad():
        assert float((after(tokens).logits - model(tokens).logits).abs().max()) <= 1e-12
    changed = weight_of(after, places[0].producers[-1])
    assert torch.equal(changed, weight_of(model, places[0].producers[-1])[shuffled(12).long()])


def test_refuses_what_does_not_fit():
    net = convolutions()
    with pytest.raises(DoesNotFit, match="^0: 6 channels cannot take an order of 5"):
        Permute(("0",), (), ("4",), shuffled(5)).apply(net)
    with pytest.raises(DoesNotFit, match="^3: the channels of a MaxPool2d"):
        Permute(("0",), (), ("3",), shuffled(6)).apply(net)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(DoesNotFit, match="^1: the channels of a Conv2d"):
        Permute(("0",), (), ("1",), shuffled(4)).apply(grouped)
    for wrong in ([0, 0, 1], [1, 2, 3], [0.0, 1.0]):
        with pytest.raises(ValueError, match="names every channel once"):
            Permute(("0",), (), ("1",), torch.tensor(wrong))
