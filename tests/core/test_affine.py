"""Affine rewrites: exact at every mask, of the form they promise, and refused where they do not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.affine import (
    Band,
    Facing,
    Mixing,
    Shift,
    Turn,
    dominance,
    rotary,
    rows_by_head,
    with_product,
)
from netweight.core.attention import attention, decoder_blocks
from netweight.core.errors import DoesNotFit
from netweight.core.rewrite import Scale, residual, rewritten
from netweight.core.stored import put_together, take_apart
from netweight.testing import tiny_language_model

X = torch.arange(14).reshape(2, 7) % 12


class Rotated(nn.Module):
    """Attention of 4 query heads that share 2 key and value heads of 4 channels, with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.output = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        query, key, value = (
            f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3], dtype=x.dtype)
        query, key = turned(query, angles), turned(key, angles)
        mix = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.output(mix.transpose(1, 2).flatten(2))


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def matrices(seed: int, *shape: int) -> torch.Tensor:
    """Random, with dominant diagonals that may be negative."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*shape, generator=g, dtype=torch.float64) * 5
    sign = torch.where(torch.randn(*shape[:-1], generator=g) < 0, -1.0, 1.0).double()
    return A + torch.diag_embed(sign * (A.abs().sum(-1) + 1))


def model(seed: int = 0) -> Rotated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Rotated().eval()


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 2**16), share=st.floats(0, 1), stability=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_every_rewrite_is_exact_at_every_mask(seed, share, stability):
    band, readers = Band(share, stability), ("query", "key", "value")
    g = torch.Generator().manual_seed(seed)
    rewrites = [
        Shift("norm", readers, torch.randn(8, generator=g)),
        Turn("norm", readers, band.of(matrices(seed, 8, 8))),
        Mixing("value", "output", band.of(matrices(seed + 1, 2, 4, 4))),
        Facing("query", "key", rotary(torch.rand(2, 2, generator=g) + 0.1, torch.randn(2, 2, generator=g))),
    ]
    net, x = model(seed), inputs(seed)
    for rewrite in rewrites:
        assert residual(net, [rewrite], x) <= 1e-9, rewrite
    assert residual(net, rewrites, x) <= 1e-8


@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_a_shift_of_the_values_passes_through_attention(seed):
    net = nn.Sequential(tiny_language_model())
    net[0].value, net[0].output = nn.Linear(16, 16), nn.Linear(16, 16)
    shift = torch.randn(16, generator=torch.Generator().manual_seed(seed)) * 3
    assert residual(net, [Shift("0.value", ("0.output",), shift)], X) <= 1e-9


def test_without_rotation_any_matrix_may_face_query_and_key_and_with_it_only_the_commuting_form():
    net = tiny_language_model()
    assert residual(net, [Facing("query", "key", matrices(0, 2, 8, 8)[:1].repeat(2, 1, 1))], X) > 0.0
    assert residual(net, [Facing("query", "key", matrices(0, 1, 16, 16))], X) <= 1e-9
    assert residual(model(), [Facing("query", "key", matrices(0, 2, 4, 4))], inputs(0)) > 1e-3
    full = torch.cat([torch.cat([matrices(1, 2, 2, 2), -matrices(2, 2, 2, 2)], -1)] * 2, -2)
    full[:, 2:, :2], full[:, 2:, 2:] = -full[:, :2, 2:], full[:, :2, :2]  # paired halves that mix pairs
    assert residual(model(), [Facing("query", "key", full)], inputs(0)) > 1e-3


@given(seed=st.integers(0, 2**16))
def test_what_commutes_with_rotations(seed):
    g = torch.Generator().manual_seed(seed)
    p, r, angles = (torch.randn(1, 3, generator=g, dtype=torch.float64) for _ in range(3))
    A, R = rotary(p, r)[0], rotary(angles.cos(), angles.sin())[0]
    assert torch.allclose(A @ R, R @ A)
    x = torch.randn(1, 6, generator=g, dtype=torch.float64)
    assert torch.allclose(x @ R.T, turned(x, angles))


def test_bands_by_hand():
    A = torch.full((1, 5, 5), 2.0)
    assert torch.equal(Band(0.0, 0.5).of(A)[0], 2 * torch.eye(5))
    assert torch.equal(Band(1.0, 0.5).of(A)[0], torch.eye(5) + 1)
    half = Band(0.5, 0.25).of(A)[0]  # floor(4 / 2) + 1 = 3
    assert half[0].tolist() == [2.0, 0.5, 0.5, 0.0, 0.0] and half[4].tolist() == [0.0, 0.0, 0.5, 0.5, 2.0]
    assert [Band(e / 3, 0.1).width(32) for e in range(4)] == [1, 11, 21, 32]


def test_forms_by_hand():
    A = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    values = {"v.weight": torch.eye(2), "v.bias": torch.tensor([4.0, 8.0]), "o.weight": torch.eye(2)}
    mixed = Mixing("v", "o", A[None]).changed(values)
    assert torch.allclose(mixed["v.weight"], torch.linalg.inv(A).T) and torch.equal(mixed["o.weight"], A.T)
    assert torch.allclose(mixed["v.bias"], torch.tensor([4.0, 8.0]) @ torch.linalg.inv(A))
    faced = Facing("v", "o", A[None]).changed(values)
    assert torch.allclose(faced["v.weight"], torch.linalg.inv(A).T) and torch.equal(faced["o.weight"], A)
    turned_ = Turn("n", ("v", "o"), A).changed(values)
    assert torch.equal(turned_["v.weight"], A.T) and torch.allclose(
        turned_["n.1.weight"], torch.linalg.inv(A).T
    )
    shifted = Shift("v", ("w",), torch.tensor([1.0, 2.0])).changed(
        {"v.bias": torch.zeros(2), "w.bias": torch.ones(1), "w.weight": torch.tensor([[3.0, 4.0]])}
    )
    assert shifted["v.bias"].tolist() == [-1.0, -2.0] and shifted["w.bias"].tolist() == [12.0]
    assert rows_by_head(torch.ones(4), A[None]).tolist() == [3.0, 4.0, 3.0, 4.0]  # two heads share A


def test_equations_are_what_apply_does():
    net = model()
    for rewrite in (
        Shift("norm", ("query", "key", "value"), torch.randn(8)),
        Scale("norm", ("query", "key", "value"), torch.rand(8) + 0.5),
        Mixing("value", "output", matrices(0, 2, 4, 4).float()),
        Facing("query", "key", matrices(1, 2, 4, 4).float()),
    ):
        after = dict(rewritten(net, [rewrite]).named_parameters())
        changed = rewrite.changed(dict(net.named_parameters()))
        assert changed and all(
            torch.allclose(after[name], value, atol=1e-4) for name, value in changed.items()
        )
        untouched = after.keys() - changed.keys()
        assert all(torch.equal(after[name], dict(net.named_parameters())[name]) for name in untouched)


def test_scaling_of_grouped_convolutions_and_joint_projections_as_an_equation():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
    joint = nn.ModuleDict({"joint": nn.Linear(3, 6), "next": nn.Linear(2, 2)})
    for where, rewrite in (
        (net, Scale("0", ("2",), torch.rand(4) + 0.5)),
        (joint, Scale("joint", ("next",), torch.rand(2) + 1)),
    ):
        after = dict(rewritten(where, [rewrite]).named_parameters())
        for name, value in rewrite.changed(dict(where.named_parameters())).items():
            assert torch.allclose(after[name], value)


def test_gradients_reach_the_matrix():
    A = matrices(0, 1, 2, 2).requires_grad_()
    values = {"v.weight": torch.eye(2).double(), "o.weight": torch.eye(2).double()}
    sum(v.square().sum() for v in Mixing("v", "o", A).changed(values).values()).backward()
    assert A.grad is not None and bool((A.grad != 0).all())


def test_dominance_by_hand():
    assert dominance(torch.tensor([[3.0, -1.0], [0.5, 2.0]])) == 1.5
    assert dominance(torch.tensor([[1.0, 4.0], [0.0, 2.0]])) == -3.0


def test_the_product_stands_behind_the_norm_and_is_stored():
    net, A = model(), matrices(0, 8, 8).float()
    turn = Turn("norm", ("query", "key", "value"), A)
    after = rewritten(net, [turn])
    assert [type(part) for part in after.norm] == [nn.LayerNorm, nn.Linear]
    x = inputs(0).float()
    assert torch.allclose(after.norm(x) @ A, net.norm(x), atol=1e-4)
    assert isinstance(net.norm, nn.LayerNorm)
    with_product(net, "norm", net.query.weight)
    assert torch.equal(net.norm(x), net.norm[0](x))


@pytest.mark.parametrize(
    "rewrite",
    [
        Shift("norm", ("query",), torch.ones(8)),
        Turn("norm", ("query",), torch.eye(8)),
        Mixing("value", "output", torch.eye(4).repeat(2, 1, 1)),
        Facing("query", "key", torch.eye(4).repeat(2, 1, 1)),
    ],
    ids=lambda r: type(r).__name__,
)
def test_stored_and_back(rewrite):
    back = put_together(*take_apart(rewrite))
    assert type(back) is type(rewrite) and take_apart(back)[1] == take_apart(rewrite)[1]
    assert all(
        torch.equal(a, b) for a, b in zip(take_apart(back)[0].values(), take_apart(rewrite)[0].values())
    )


def test_refuses_what_does_not_fit():
    net = model()
    for wrong, message in (
        (Shift("norm", ("query",), torch.ones(7)), "query: not a Linear layer of 7 input channels"),
        (Turn("norm", ("query",), torch.eye(9)), "query: not a Linear layer of 9 input channels"),
        (Mixing("value", "output", torch.eye(4).repeat(3, 1, 1)), "value: 8 rows are not the 3 x 4 channels"),
        (Facing("query", "key", torch.eye(3)[None]), "key: 8 rows are not the 1 x 3 channels"),
    ):
        with pytest.raises(DoesNotFit, match=message):
            wrong.apply(model())
    net.query = nn.Linear(8, 16, bias=False)
    with pytest.raises(DoesNotFit, match="query: a layer without a bias takes no shift"):
        Shift("norm", ("query",), torch.ones(8)).apply(net)


def test_attention_is_found_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    net = transformers.Qwen3ForCausalLM(config)
    names = decoder_blocks(net)
    assert names == ["model.layers.0", "model.layers.1"]
    found = attention(net, names[1])
    assert (found.value, found.width, found.rotary) == ("model.layers.1.self_attn.v_proj", 4, True)
    assert not found.bilinear  # a norm lies between query, key and their product
    assert decoder_blocks(tiny_language_model()) == [""] and attention(tiny_language_model(), "") is None
