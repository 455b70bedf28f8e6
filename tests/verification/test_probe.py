"""31 networks of one operator between two linear layers: each builds, no point leaves the bounds, and rows
are never looser than intervals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.perturbation import Linf
from netweight.verification.bounds import bounds, captured

FEATURES, EPS, SAMPLES = 24, 0.1, 10_000
SCALES = torch.linspace(-1, 1, FEATURES)


def images(x):
    return x.reshape(len(x), 2, 4, 3)


def heads(x):
    return x.reshape(len(x), 2, 3, 4)


def written_out_rounding(x):
    return ((x / 0.25).round() + 3).clamp(0, 15).sub(3).mul(0.25)


OPERATORS = {
    "relu": F.relu,
    "leaky relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3]).to(x)),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "clamp": lambda x: x.clamp(-0.3, 0.6),
    "round": lambda x: (4 * x).round(),
    "fake quantization, written out": written_out_rounding,
    "fake quantization, native": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.25, 3, 0, 15),
    "where on a condition": lambda x: torch.where(x > 0.1, x, 0.2 * x),
    "strided slice": lambda x: images(x)[:, :, ::2, 1::2],
    "cumsum": lambda x: x.cumsum(1),
    "einsum of two": lambda x: torch.einsum("bchd,bched->bche", heads(x), heads(x).unsqueeze(3) + 0.5),
    "max over a dim": lambda x: images(x).max(2).values,
    "topk": lambda x: x.topk(5, 1).values,
    "sort": lambda x: x.sort(1).values,
    "logsumexp": lambda x: images(x).logsumexp(2),
    "softmax": lambda x: x.softmax(1),
    "attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x).flip(2), heads(x)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "layer norm": lambda x: F.layer_norm(x, (FEATURES,), SCALES.to(x), SCALES.to(x)),
    "batch norm": lambda x: F.batch_norm(
        images(x), torch.tensor([0.1, -0.2]).to(x), torch.tensor([0.5, 2.0]).to(x)
    ),
    "max pool": lambda x: F.max_pool2d(images(x), 3, stride=2, padding=1),
    "average pool": lambda x: F.avg_pool2d(images(x), 2, stride=1, padding=1),
    "transposed convolution": lambda x: F.conv_transpose2d(
        images(x), SCALES[:12].reshape(2, 1, 3, 2).to(x), stride=2, padding=1
    ),
}


class Between(nn.Module):
    """The operator between two linear layers; `before` gives its own values."""

    def __init__(self, operator, generator):
        super().__init__()
        self.operator = operator
        self.first = nn.Linear(12, FEATURES)
        self.last = nn.Linear(operator(torch.zeros(1, FEATURES)).numel(), 6)
        for layer in (self.first, self.last):
            layer.weight.data.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.data.normal_(0, 0.3, generator=generator)

    def forward(self, x):
        return self.last(self.operator(self.first(x)).flatten(1))


def points(x, generator):
    """`SAMPLES` points of the set, half of them corners: `b n *in`."""
    spread = 2 * torch.rand(len(x), SAMPLES // len(x), *x.shape[1:], generator=generator, dtype=x.dtype) - 1
    spread[:, ::2] = spread[:, ::2].sign()
    return x.unsqueeze(1) + EPS * spread


def test_there_are_31():
    assert len(OPERATORS) == 31


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_builds_is_sound_and_no_looser_than_intervals(name):
    generator = torch.Generator().manual_seed(len(name))
    model = Between(OPERATORS[name], generator).double().eval().requires_grad_(False)
    x = torch.randn(2, 12, generator=generator).double()
    graph = captured(model, x)
    found = {how: bounds(graph, x, Linf(EPS), method=how) for how in ("ibp", "crown")}
    values = model(points(x, generator).flatten(0, 1)).reshape(2, -1, 6)
    low, high = values.amin(1), values.amax(1)
    for bound in found.values():
        assert (bound.lower <= low + 1e-12).all() and (bound.upper >= high - 1e-12).all()
    wide = found["ibp"].upper - found["ibp"].lower
    assert wide.isfinite().all()
    assert (found["crown"].lower >= found["ibp"].lower - 1e-9 * wide).all()
    assert (found["crown"].upper <= found["ibp"].upper + 1e-9 * wide).all()
