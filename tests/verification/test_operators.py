"""No point of a box leaves the bounds, by operator and for random networks; what is exact is tight."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import Box, Linf
from netweight.nn.fake import DynamicRounding, StaticRounding, fake_round
from netweight.verification.bounds import bounds, captured
from netweight.verification.relax import Interval, log_softmax, softmax

TABLE = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def images(x):
    return x.reshape(len(x), 2, 4, 3)


def attention(x):
    x = x.reshape(len(x), 1, 6, 4)
    return F.scaled_dot_product_attention(x, x.flip(2), x, is_causal=True)


FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "leaky relu that falls": lambda x: F.leaky_relu(x, -0.3),
    "prelu": lambda x: F.prelu(x, torch.tensor([-0.5]).to(x)),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "clamp": lambda x: x.clamp(-0.3, 0.6),
    "exp": torch.exp,
    "log": lambda x: (x.abs() + 0.5).log(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: (x.square() + 0.1).rsqrt(),
    "reciprocal": lambda x: (x * x + 0.5).reciprocal(),
    "square": lambda x: x * x,
    "cube": lambda x: x**3,
    "power": lambda x: (x.abs() + 0.2) ** 1.5,
    "negative power": lambda x: (x.abs() + 0.2) ** -2,
    "abs": torch.abs,
    "neg": torch.neg,
    "sign": torch.sign,
    "round": lambda x: (3 * x).round(),
    "floor": lambda x: (3 * x).floor(),
    "sin": lambda x: (4 * x).sin(),
    "cos": lambda x: (4 * x).cos(),
    "add and sub": lambda x: torch.sub(x + x.flip(1), x.roll(1, 1), alpha=0.5),
    "number minus": lambda x: 1.5 - x,
    "mul": lambda x: x * x.flip(1),
    "div": lambda x: x / (x.flip(1).abs() + 0.3),
    "div by a number": lambda x: x / -3.0,
    "matmul of two": lambda x: x.reshape(len(x), 4, 6) @ x.reshape(len(x), 6, 4),
    "matmul with a constant": lambda x: TABLE.to(x) @ x.reshape(len(x), 6, 4),
    "matvec": lambda x: x.reshape(len(x), 4, 6) @ TABLE[0].to(x),
    "addmm": lambda x: torch.addmm(TABLE[:1].to(x), x[:, :4], TABLE.to(x), beta=0.5, alpha=-2.0),
    "einsum": lambda x: torch.einsum("bij,kj->bik", x.reshape(len(x), 4, 6), TABLE.to(x)),
    "where on the input": lambda x: torch.where(x > 0.1, x * 2, 1 - x),
    "where equal": lambda x: torch.where(x.round() == 0, x, -x),
    "and": lambda x: torch.where((x > -0.5) & ~(x >= 0.5), x, x * x),
    "max of two": lambda x: torch.maximum(x, x.flip(1)) + torch.minimum(x, -x),
    "cat and split": lambda x: torch.cat([part * i for i, part in enumerate(x.split(8, 1))][::-1], 1),
    "slice, pad, permute": lambda x: F.pad(images(x)[:, :, ::2, 1:], (1, 0, 0, 0, 1, 2)).permute(0, 2, 3, 1),
    "constant pad": lambda x: F.pad(x, (2, 3), value=0.7),
    "gather": lambda x: x[:, [3, 1, 1]].index_select(1, torch.tensor([2, 0])),
    "sort": lambda x: x.sort(1).values,
    "max over an axis": lambda x: images(x).max(1).values + images(x).amin(1),
    "sum and mean": lambda x: images(x).sum((1, 2)) + images(x).mean((1, 2)),
    "cumsum": lambda x: x.cumsum(1),
    "variance": lambda x: images(x).var((2, 3)),
    "norms": lambda x: torch.stack([x.norm(dim=1), x.norm(1, dim=1), x.norm(math.inf, dim=1)], 1),
    "normalize": lambda x: F.normalize(x + 0.5, dim=1),
    "max pool": lambda x: F.max_pool2d(images(x), 2, stride=1, padding=1),
    "average pool": lambda x: F.avg_pool2d(images(x), (2, 3), stride=1, padding=(1, 1)),
    "average pool without padding": lambda x: F.avg_pool2d(images(x), 2, 1, 1, count_include_pad=False),
    "adaptive pools": lambda x: (
        F.adaptive_avg_pool2d(images(x), (3, 2)) + F.adaptive_max_pool2d(images(x), (3, 2))
    ),
    "pool of sequences": lambda x: F.max_pool1d(x[:, None], 3) + F.avg_pool1d(x[:, None], 3),
    "nearest": lambda x: F.interpolate(images(x), scale_factor=2),
    "bilinear": lambda x: F.interpolate(images(x), scale_factor=2, mode="bilinear"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.reshape(len(x), 4, 3, 2), 2),
    "unfold": lambda x: F.unfold(images(x), 2),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: (3 * x).log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "attention": attention,
    "layer norm": lambda x: F.layer_norm(x, (24,), torch.linspace(-1, 1, 24).to(x), torch.ones(24).to(x)),
    "rms norm": lambda x: F.rms_norm(x, (24,), torch.linspace(-1, 1, 24).to(x)),
    "group norm": lambda x: F.group_norm(
        images(x), 2, torch.tensor([1.0, -2.0]).to(x), torch.tensor([0.0, 1.0]).to(x)
    ),
    "instance norm": lambda x: F.instance_norm(images(x)),
    "static rounding": lambda x: fake_round(x, torch.tensor(0.2), torch.tensor(7.0), 4),
}
LAYERS = {
    "linear": lambda: nn.Linear(24, 5),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 4, 3)), nn.Conv2d(2, 4, 3, 2, 1, groups=2)),
    "convolution 1d, dilated": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 12)), nn.Conv1d(2, 3, 3, dilation=2)
    ),
    "transposed convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 3)), nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1)
    ),
    "batch norm": lambda: nn.Sequential(nn.Unflatten(1, (2, 4, 3)), shaken(nn.BatchNorm2d(2))),
    "embedding and linear": lambda: nn.Sequential(nn.Linear(24, 4), nn.Tanh(), nn.Dropout(0.5)),
    "dynamic rounding": lambda: DynamicRounding(4).module(),
    "rounding module": lambda: StaticRounding.of(-1.0, 1.5, 3).module(),
}


def shaken(norm):
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.weight.data[0] *= -1
    norm.running_mean.uniform_(-1, 1)
    return norm


def points(lower, upper, count, generator):
    """`count` corners, faces and inner points of each box, one after the other."""
    share = torch.rand(count, *lower.shape, generator=generator)
    edge = torch.rand(count, *lower.shape[:1], 1, generator=generator) < 0.5
    share = torch.where(edge & (torch.rand(share.shape, generator=generator) < 0.8), share.round(), share)
    s = lower + share * (upper - lower)
    return torch.minimum(torch.maximum(s, lower), upper)


def check(model, radii, seed, count=100):
    """Points of boxes around random inputs, evaluated in float32 and float64, lie within the bounds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 24, generator=generator)
    model.eval()
    graph = captured(model, x)
    precise = copy.deepcopy(model).double()
    for eps in radii:
        lower, upper = Linf(eps).corners(x)
        s = points(lower, upper, count, generator).flatten(0, 1)
        with torch.no_grad():
            outputs = [y.double().reshape(count, 2, *y.shape[1:]) for y in (model(s), precise(s.double()))]
        for method in ("ibp", "crown"):
            found = bounds(graph, x, Linf(eps), method=method)
            assert (found.lower <= found.upper).all() and found.lower.dtype == torch.float64
            assert found.lower.isfinite().all() and found.upper.isfinite().all()
            for y in outputs:
                assert (found.lower <= y).all() and (y <= found.upper).all(), method


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_point_leaves_the_bounds_of_an_operator(name):
    check(Function(FUNCTIONS[name]), (0.0, 0.01, 0.7), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_no_point_leaves_the_bounds_of_a_layer(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        check(LAYERS[name](), (0.0, 0.01, 0.7), 0)


BOWLS = (
    "silu",
    "mish",
    "hardswish",
    "gelu",
    "gelu tanh",
    "sin",
    "cos",
    "abs",
    "square",
    "leaky relu that falls",
)
MONOTONE = ("relu", "tanh", "sigmoid", "elu", "exp", "round", "hardsigmoid", "softplus", "cube")


@pytest.mark.parametrize("name", BOWLS + MONOTONE)
def test_a_function_of_one_number_is_bounded_by_its_range(name):
    ends = torch.tensor([[-3.0, -1.0], [-1.0, 0.25], [0.1, 2.0], [-2.5, 3.0]], dtype=torch.float64)
    low, high = ends.split(1, 1)
    found = bounds(Function(FUNCTIONS[name]), (low + high) / 2, Box(low, high))
    values = FUNCTIONS[name](low + (high - low) * torch.linspace(0, 1, 100_001, dtype=torch.float64))
    torch.testing.assert_close(found.lower[:, 0], values.amin(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.upper[:, 0], values.amax(1), rtol=0, atol=1e-4)


def test_softmax_is_bounded_by_its_extreme_corners():
    low, high = torch.tensor([[-1.0, 0.0, 2.0]]).double(), torch.tensor([[0.5, 0.25, 2.5]]).double()
    found, logs = (f(Interval(low, high), 1, 2.0**-53) for f in (softmax, log_softmax))
    for i in range(3):
        worst, best = high.clone(), low.clone()
        worst[0, i], best[0, i] = low[0, i], high[0, i]
        assert float(found.lower[0, i]) == pytest.approx(float(worst.softmax(1)[0, i]), abs=1e-12)
        assert float(found.upper[0, i]) == pytest.approx(float(best.softmax(1)[0, i]), abs=1e-12)
        assert float(logs.lower[0, i]) == pytest.approx(float(worst.log_softmax(1)[0, i]), abs=1e-12)
        assert float(logs.upper[0, i]) == pytest.approx(float(best.log_softmax(1)[0, i]), abs=1e-12)


def test_a_norm_never_exceeds_what_any_input_can_give():
    x = torch.zeros(1, 9, dtype=torch.float64)
    found = bounds(Function(lambda x: F.layer_norm(x, (9,))), x, Linf(100.0))
    assert float(found.upper.max()) == pytest.approx(math.sqrt(9), rel=1e-3)
    assert float(found.lower.min()) == pytest.approx(-math.sqrt(9), rel=1e-3)


def test_float32_rounding_is_inside_and_real_arithmetic_is_not_enough():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1e8, 1.0, -1e8]])
    x = torch.ones(1, 3)
    y = model(x).item()  # 0 or 1, in whichever order it is summed
    found = bounds(model, x, Linf(0.0))
    assert found.arithmetic == "float32" and float(found.lower) <= min(y, 0) <= max(y, 1) <= float(
        found.upper
    )
    exact = bounds(model, x, Linf(0.0), arithmetic="float64")
    assert (
        float(exact.lower) <= 1 <= float(exact.upper)
        and float(exact.upper) < 1.001
        and float(exact.lower) > 0.999
    )


def test_numbers_are_compared_in_the_precision_of_the_network():
    x = torch.tensor([[0.1, 0.2]])  # 0.1 in float32 lies above 0.1
    for function in (lambda x: torch.where(x > 0.1, 1.0, 0.0), lambda x: torch.where(x == 0.1, 1.0, 0.0)):
        found = bounds(Function(function), x, Linf(0.0))
        y = function(x)
        assert (found.lower <= y).all() and (y <= found.upper).all()
        assert found.lower[0, 1] == found.upper[0, 1] == y[0, 1]


@given(seed=st.integers(0, 2**20), depth=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_no_point_leaves_the_bounds_of_a_random_network(seed, depth):
    generator = torch.Generator().manual_seed(seed)
    names = [
        n for n in (*MONOTONE, *BOWLS, "layer norm", "softmax", "mul", "add and sub", "clamp") if n != "exp"
    ]

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(24, 24) for _ in range(depth))
            self.picks = torch.randint(len(names), (depth,), generator=generator).tolist()
            self.skips = torch.randint(2, (depth,), generator=generator).tolist()

        def forward(self, x):
            for linear, pick, skip in zip(self.linears, self.picks, self.skips):
                y = FUNCTIONS[names[pick]](linear(x))
                x = x + y if skip else y
            return x

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        check(Random(), (0.0, 1e-4, 0.03, 0.5), seed)


def test_operators_without_bounds_are_named():
    x = torch.randn(1, 4)
    with pytest.raises(DoesNotFit, match=r"^digamma: no bounds are known for the operator aten\.digamma"):
        bounds(Function(torch.digamma), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match=r"\(in layer 1\)"):
        bounds(nn.Sequential(nn.Linear(4, 4), Function(torch.digamma)), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match="power that is not one fixed number"):
        bounds(Function(lambda x: x.exp() ** x), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match="norm of order 3"):
        bounds(Function(lambda x: x.norm(3, dim=1)), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match="division that rounds"):
        bounds(Function(lambda x: torch.div(x, 2, rounding_mode="floor")), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match="places of extremes"):
        bounds(Function(lambda x: x.gather(1, x.max(1, keepdim=True).indices)), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match="of numbers; compare"):
        bounds(Function(lambda x: torch.where(x.logical_not(), x, -x)), x, Linf(0.1))
    with pytest.raises(DoesNotFit, match="conversion to torch.int64"):
        bounds(Function(lambda x: x.long().float()), x, Linf(0.1))


def test_division_by_what_may_be_zero_is_infinite_and_never_nan():
    found = bounds(Function(lambda x: (x / x.flip(1)) * 0.0 + x), torch.tensor([[0.01, 2.0]]), Linf(0.1))
    assert not found.lower.isnan().any() and not found.upper.isnan().any()
    assert float(found.lower[0, 1]) == -math.inf and float(found.upper[0, 1]) == math.inf
