"""Sites on small networks whose answer is known by looking at them."""

import pytest
import torch
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.sites import Site, column_ranges, foldable, sites
from netweight.core.task import Data
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task

ROWS = Data(torch.rand(4, 8))


def chain(*layers: nn.Module) -> list[Site]:
    return sites(nn.Sequential(*layers).eval(), ROWS)


def test_relu_and_dropout_join_and_everything_else_parts():
    ends = nn.Linear(8, 6), nn.Linear(6, 3)
    assert chain(ends[0], nn.ReLU(), nn.Dropout(), ends[1]) == [Site("0", ("3",))]
    assert chain(ends[0], ends[1]) == [Site("0", ("1",))]
    parting = [nn.GELU(), nn.SiLU(), nn.ReLU6(), nn.Softmax(-1), nn.Sigmoid()]
    assert (
        chain(*[layer for between in parting for layer in (nn.Linear(8, 8), between)], nn.Linear(8, 8)) == []
    )


def test_convolutions_with_norms_and_pools():
    assert sites(tiny_model(), tiny_task().calibration) == [Site("1", ("3",)), Site("7", ("9",))]
    assert foldable(tiny_model(), tiny_task().calibration) == [("0", "1"), ("3", "4")]
    images = Data(torch.rand(2, 3, 8, 8))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=4))
    assert sites(net, images) == [Site("0", ("3",))]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.other, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = torch.relu(self.first(h)) + self.other(h)
        return y + self.second(y)


def test_all_readers_count_and_a_residual_stream_is_no_site():
    assert sites(Residual().eval(), ROWS) == [Site("norm", ("first", "other"))]
    found = sites(tiny_language_model(), tiny_text_task().calibration)
    assert Site("norm", ("query", "key", "value")) in found and Site("up", ("down",)) in found
    assert len(found) == 3  # and norm2 before up; not value to output: attention lies between


def test_a_layer_called_twice_is_no_site():
    shared = nn.Linear(8, 8)
    assert chain(shared, nn.ReLU(), shared) == []


def blocks(kind: str, **config: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=None,
            **config,
        )
    )


def test_blocks_by_name():
    llama = blocks("Llama", intermediate_size=12, num_key_value_heads=2)
    before = "model.layers.0."
    found = {site.producer.removeprefix(before): site for site in sites(llama, ROWS)}
    assert [*found] == ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
    assert found["post_attention_layernorm"].inspected == f"{before}mlp"
    assert found["input_layernorm"].norm(llama) and not found["mlp.up_proj"].norm(llama)


def test_grouped_queries_late_norms_and_gelu_are_no_sites():
    grouped = sites(blocks("Llama", intermediate_size=12, num_key_value_heads=1), ROWS)
    assert not [site for site in grouped if site.producer.endswith("v_proj")]
    late = blocks(
        "OPT", ffn_dim=12, word_embed_proj_dim=8, do_layer_norm_before=False, activation_function="gelu"
    )
    assert [site.producer.rpartition(".")[2] for site in sites(late, ROWS)] == ["v_proj"]


def test_column_ranges_of_a_grouped_convolution():
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2], [3, 0], [-4, 5], [0, 6]]).reshape(4, 2, 1, 1))
    assert column_ranges(net, "0").tolist() == [3, 2, 4, 6]


def test_refuses_what_cannot_be_captured():
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(DoesNotFit, match="Branch"):
        sites(Branch(), ROWS)
