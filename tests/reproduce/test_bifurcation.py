"""The quick variant of the reproduction reaches its bar; split, shortest errors and worst actions."""

import pytest
import torch
from torch import nn

from netweight.data.district import synthetic
from netweight.models.battery_district import CLOCK, FEATURES, district, run
from netweight.reproduce.bifurcation import (
    FIRST,
    RISE,
    attacked,
    by_bifurcation,
    closed,
    own_range,
    reproduce,
    shortest,
    split,
    worst,
)


def test_the_quick_variant_reaches_its_bar():
    claim = reproduce(seed=0, quick=True)
    assert claim.bars and all(bar.passed for bar in claim.bars)
    assert {"untargeted", "bifurcation"} <= claim.figures.keys()


def test_no_hour_is_trained_and_judged_on():
    seen, weeks = split(8760)
    trained = {int(t) + k for t in seen for k in range(50)}
    judged = {int(t) + k for t in weeks for k in range(168)}
    assert not trained & judged and len(weeks) == 12 and max(trained | judged) < 8760
    assert len(seen) > 5000


def linear() -> nn.Linear:
    model = nn.Linear(FEATURES, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, [0, CLOCK, CLOCK + 1]] = torch.tensor([100.0, 3.0, 4.0])  # the clock does not move
        model.bias.fill_(-50 - 3.5 + 1.0)
    return model


def test_the_shortest_error_of_a_line_is_its_distance():
    x = torch.full((3, FEATURES), 0.5)
    x[1, CLOCK] = 0.7
    model = linear()
    u = model(x)[:, 0].detach()  # 1, 1.6, 1: |u| / 5 away

    def below(output, rows):
        return -output[:, 0], output[:, 0] < 0

    found = shortest(model, x, below, seed=0)
    assert found.tolist() == pytest.approx((u / 5).tolist(), rel=0.08)
    assert (found >= u / 5 * 0.999).all() and (found > FIRST * RISE).all()
    assert torch.isinf(shortest(model, x, lambda out, rows: (out[:, 0], out[:, 0] > 99), seed=0)).all()
    assert shortest(model, x, lambda out, rows: (out[:, 0], out[:, 0] > 0), seed=0).tolist() == [0, 0, 0]


def test_the_worst_action_and_a_closed_loop_that_knows_what_was_told():
    where = district(synthetic(400, 2, 1))
    model, starts = linear(), torch.tensor([3, 50])
    clean = closed(model, where, starts, 30)
    soc = torch.full((2, 2), 0.5)
    at = torch.tensor([20, 60])
    grid = torch.tensor([-0.5, 0.0, 0.5])
    found = worst(model, where, grid, at, soc).reshape(2, 2)

    def drawn(action: torch.Tensor) -> torch.Tensor:
        left = [torch.full((4,), float(action))]
        course = run(where, lambda s: left.pop() if left else model(s)[:, 0].tanh(), at, 12, soc=soc)
        return course.net.detach().clamp(min=0).sum(0)

    assert torch.equal(found, grid[torch.stack([*map(drawn, grid)]).argmax(0)])
    assert own_range(clean).min() >= clean.action.min() and own_range(clean).max() <= clean.action.max()
    nothing = attacked(model, clean, where, lambda net, x, eps, hour: x, 0.1)
    assert nothing.extra == 0 and nothing.steered.flips == nothing.steered.l2 == 0
    under = attacked(model, clean, where, by_bifurcation, 0.1)
    assert under.steered.l2 > 0.1 and (under.course.s - under.course.x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(under.course.s[..., :CLOCK], under.course.x[..., :CLOCK])
