"""AdaRound against its equations, an exhaustive search, the laws of its room, and nonsense."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.adaround import AdaRound, adaround
from netweight.core.compressed import weight_of
from netweight.core.grid import Grid, extent, in_groups, nearest, scale_and_zero
from netweight.core.task import Data, Task
from netweight.nn.soft import encode, share, start, undecided
from netweight.testing import check_compressor, tiny_model, tiny_task


@given(fraction=st.floats(0, 1))
def test_the_start_reproduces_the_weight(fraction):
    assert share(start(torch.tensor(fraction, dtype=torch.float64))).item() == pytest.approx(
        fraction, abs=1e-9
    )


def test_the_second_term_by_hand():
    h = torch.tensor([0.0, 1.0, 0.5, 0.75])
    assert undecided(h, 0.19).item() == 0
    assert undecided(h, 1.0).item() == pytest.approx(1 + 1 - 0.25)  # beta = 2
    assert undecided(h, 0.2).item() == pytest.approx(1 + 1 - 0.5**20)
    assert undecided(h, 0.6).item() == pytest.approx(1 + 1 - 0.5**11)


@given(seed=st.integers(0, 2**16), symmetric=st.booleans())
def test_up_where_the_fraction_is_over_a_half_is_round_to_nearest(seed, symmetric):
    weight, grid = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)), Grid(3, symmetric, 4)
    groups = in_groups(weight, 4)
    scale, zero = scale_and_zero(*extent(groups, symmetric), grid)
    ratio = groups / scale.float()[:, None]
    form = encode(weight, scale, zero, ratio - ratio.floor() > 0.5, grid)
    assert torch.equal(form.decode(), nearest(weight, grid))


def test_finds_what_exhaustive_search_finds():
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).eval()
    common = torch.randn(200, 1, generator=g)
    x = common + 0.2 * torch.randn(200, 6, generator=g)  # inputs that move together: errors should cancel
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.45, 0.43, 0.12, 0.47, 0.44]]))
    task, grid, weight = Task(Data(x), Data(x)), Grid(2, True, 0), weight_of(model, "0")
    scale, zero = scale_and_zero(*extent(in_groups(weight, 0), True), grid)

    def error(decoded: torch.Tensor) -> float:
        return (x @ (decoded - weight).T).pow(2).mean().item()

    corners = itertools.product((False, True), repeat=6)
    best = min(error(encode(weight, scale, zero, torch.tensor([up]), grid).decode()) for up in corners)
    found = error(
        adaround(model, task, ["0"], AdaRound(2, steps=400, rate=0.02, weight=0.1)).packed["0"].decode()
    )
    assert best <= found <= 1.3 * best < 0.1 * error(nearest(weight, grid))


def test_later_layers_see_the_rounded_inputs():
    model, task = tiny_model(), tiny_task()
    settings = AdaRound(2, steps=60, rate=0.05)
    alone = adaround(model, task, ["9"], settings).packed["9"].decode()
    after = adaround(model, task, ["0", "3", "7", "9"], settings).packed["9"].decode()
    assert not torch.equal(alone, after)


@pytest.mark.parametrize(
    "settings", [AdaRound(4, steps=3), AdaRound(3, symmetric=False, group=8, steps=3)], ids=repr
)
def test_laws(settings):
    check_compressor(adaround, settings)


def test_refuses_nonsense():
    for wrong in ({"steps": 0}, {"rate": 0}, {"batch": 0}, {"examples": 0}, {"weight": -1}, {"bits": 1}):
        with pytest.raises(ValueError, match="need"):
            AdaRound(**wrong)
