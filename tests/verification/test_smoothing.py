"""Certificates by sampling: a linear network, whose radius is known, the paper's formulas, nonsense."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, norm
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.core.task import Data, Task
from netweight.nn.normalize import Normalize
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.verification.smoothing import (
    ABSTAINED,
    Smoothed,
    average_radius,
    curve,
    lower_limit,
    p_value,
    predict,
    radius,
    reach,
    report,
    smooth,
)

WEIGHT = (3.0, -4.0)


def half_plane(bias: float = 0.0) -> nn.Linear:
    """Class 1 iff 3 x_0 - 4 x_1 + bias > 0: for any noise, the exact radius is |3 x_0 - 4 x_1 + bias| / 5."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[0.0, 0.0], WEIGHT])
    model.bias.data = torch.tensor([0.0, bias])
    return model


class Scripted(nn.Module):
    """Its i-th vote is for class `script[i]`, later ones for the last; remembers what it was given."""

    def __init__(self, script: list[int], classes: int = 3) -> None:
        super().__init__()
        self.script, self.classes, self.seen, self.counting = script, classes, [], False

    def forward(self, x):
        if not self.counting:  # the first call asks for the classes
            self.counting = True
            return torch.zeros(len(x), self.classes)
        places = range(len(self.seen), len(self.seen) + len(x))
        self.seen += [*x]
        votes = [self.script[min(place, len(self.script) - 1)] for place in places]
        return torch.eye(self.classes + 1)[votes][:, : self.classes]


def of(points: list[list[float]], y: list[int] | None = None) -> Data:
    return Data(torch.tensor(points), None if y is None else torch.tensor(y), name="points")


def made(selected: list[int], votes: list[list[int]], sigma: float = 0.5, n: int = 100) -> Smoothed:
    top = torch.tensor(selected)
    counts = torch.tensor(votes)
    limit = lower_limit(counts.gather(1, top[:, None])[:, 0], n, 0.001)
    return Smoothed(top, counts, limit, sigma, 10, n, 0.001)


def test_a_linear_network_is_certified_up_to_its_exact_radius():
    points = [[0.5, 0.0], [0.0, 0.4], [0.3, -0.1]]
    found = smooth(half_plane(), of(points), sigma=0.3, n=20_000, alpha=0.001)
    exact = torch.tensor([1.5, 1.6, 1.3]).double() / 5
    assert found.classes.tolist() == [1, 0, 1]
    assert (found.radius <= exact).all() and (found.radius > exact - 0.02).all()
    assert found.votes.sum(1).tolist() == [20_000] * 3


def test_the_radius_is_above_the_exact_one_as_seldom_as_alpha_allows():
    alpha, exact = 0.05, 0.25 / 5
    found = smooth(half_plane(0.25), of([[0.0, 0.0]] * 1000), sigma=0.1, n0=20, n=200, alpha=alpha, batch=200)
    wrong = (found.classes == 0) | ((found.classes == 1) & (found.radius > exact))
    assert wrong.double().mean() <= 2 * alpha  # the bar
    assert 0.3 * alpha < wrong.double().mean() < 1.5 * alpha  # as tight as it can be, and one-sided


def test_on_the_boundary_it_abstains():
    found = smooth(half_plane(), of([[0.0, 0.0]] * 1000), sigma=0.2, n0=50, n=50, alpha=0.05, batch=50)
    sure = (found.classes != ABSTAINED).double().mean()
    # the same votes for selecting and estimating would be sure of either side: twice as often
    assert 0.01 < sure <= 0.05 and binomtest(32, 50, 0.5, "greater").pvalue < 0.05
    assert (found.radius[found.classes == ABSTAINED] == 0).all()


def test_votes_that_select_do_not_count_for_the_estimate():
    model = Scripted([0] * 10 + [1])
    found = smooth(model, of([[0.0]]), sigma=1.0, n0=10, n=40, batch=7)
    assert found.selected.tolist() == [0] and found.votes.tolist() == [[0, 40, 0]]
    assert found.classes.tolist() == [ABSTAINED] and found.p_lower.tolist() == [0.0]
    noise = torch.stack(model.seen)[:, 0]
    assert len(noise) == 50 and len(noise.unique()) == 50  # every vote has noise of its own


def test_noise_is_added_in_input_units_and_not_clipped():
    model = Scripted([0])
    smooth(model, Data(torch.full((1, 1, 1), 0.25), low=0.0, high=1.0), sigma=2.0, n=4000)
    seen = torch.stack(model.seen)[100:]
    assert seen.min() < -4 and seen.max() > 4
    assert seen.std().item() == pytest.approx(2.0, rel=0.04) and abs(seen.mean().item() - 0.25) < 0.1


def test_normalising_inside_the_network_changes_nothing():
    inside = nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(4, 2))
    folded = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    folded[1].weight.data = inside[2].weight.data / 0.25
    folded[1].bias.data = inside[2].bias.data - 0.5 * folded[1].weight.data.sum(1)
    data = Data(torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    a, b = (smooth(model, data, 0.25, n=2000) for model in (inside, folded))
    assert (a.votes - b.votes).abs().max() <= 2


@given(st.integers(1, 10**6), st.floats(1e-9, 0.5), st.floats(0.01, 10))
def test_all_votes_for_one_class_is_the_most_that_can_be_certified(n, alpha, sigma):
    limit = lower_limit(torch.tensor([n]), n, alpha)
    assert limit.item() == pytest.approx(alpha ** (1 / n), rel=1e-9) and limit.item() <= alpha ** (1 / n)
    most = sigma * norm.ppf(alpha ** (1 / n)) if alpha ** (1 / n) > 0.5 else 0.0
    assert reach(sigma, n, alpha) == pytest.approx(most, rel=1e-6, abs=1e-7 * sigma)


@given(st.integers(1, 3000), st.floats(1e-6, 0.4), st.data())
def test_the_limit_is_clopper_and_pearsons_from_below(n, alpha, draw):
    hits = draw.draw(st.integers(1, n))
    limit = lower_limit(torch.tensor([hits]), n, alpha).item()
    assert binomtest(hits, n, limit, "greater").pvalue <= alpha if limit > 0 else True
    assert limit == pytest.approx(binomtest(hits, n, 0.5, "greater").proportion_ci(1 - alpha).low, rel=1e-6)
    assert beta.cdf(limit, hits, n - hits + 1) <= alpha


@given(st.integers(2, 2000), st.floats(0.001, 0.2))
def test_more_votes_for_a_class_never_shrink_its_radius(n, alpha):
    limit = lower_limit(torch.arange(n + 1), n, alpha)
    radii = radius(limit, 0.5)
    assert limit[0] == 0 and (limit.diff() > 0).all() and (limit <= torch.arange(n + 1) / n).all()
    assert (radii.diff() >= 0).all() and (radii >= 0).all() and radii[-1] == reach(0.5, n, alpha)


def test_radius_by_hand():
    p = torch.tensor([0.3, 0.5, norm.cdf(1.0), norm.cdf(2.0)]).double()
    torch.testing.assert_close(
        radius(p, 0.25), torch.tensor([0.0, 0.0, 0.25, 0.5]).double(), rtol=0, atol=1e-9
    )


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_two_best_classes_are_told_apart_by_the_exact_binomial_test(a, b):
    first, second = max(a, b), min(a, b)
    wanted = binomtest(first, first + second).pvalue if first else 1.0
    assert p_value(torch.tensor([first]), torch.tensor([second])).item() == pytest.approx(wanted, rel=1e-9)


def test_predict_gives_the_class_or_abstains():
    found = predict(half_plane(), of([[0.5, 0.0], [0.0, 0.4], [0.0, 0.0]]), sigma=0.1, n=500)
    assert found.tolist() == [1, 0, ABSTAINED]
    # 19 to 1 has a p-value of 4.0e-5, 6 to 0 one of 0.031
    assert predict(Scripted([0] * 19 + [1]), of([[0.0]]), 1.0, n=20, alpha=4.1e-5).tolist() == [0]
    assert predict(Scripted([0] * 19 + [1]), of([[0.0]]), 1.0, n=20, alpha=3.9e-5).tolist() == [ABSTAINED]
    assert predict(Scripted([2]), of([[0.0]]), 1.0, n=6, alpha=0.032).tolist() == [2]
    assert predict(Scripted([2]), of([[0.0]]), 1.0, n=6, alpha=0.031).tolist() == [ABSTAINED]


def test_the_curve_and_the_mean_radius_count_right_certificates_alone():
    found = made([0, 1, 2, 1], [[100, 0, 0], [0, 90, 10], [0, 0, 100], [50, 50, 0]])
    labels = torch.tensor([0, 1, 0, 1])  # the third is certified as another class, the fourth abstains
    high, middle = found.radius[0].item(), found.radius[1].item()
    assert found.classes.tolist() == [0, 1, 2, ABSTAINED] and high > middle > 0
    radii = [0.0, middle, math.nextafter(middle, 9), high, math.nextafter(high, 9)]
    assert curve(found, labels, radii).tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert average_radius(found, labels) == pytest.approx((high + middle) / 4, rel=1e-12)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9))
def test_the_mean_radius_is_the_area_under_the_curve(rows):
    votes = [
        [hits if c == top else 100 - hits if c == (top + 1) % 3 else 0 for c in range(3)]
        for hits, top, _ in rows
    ]
    found = made([top for _, top, _ in rows], votes)
    labels = torch.tensor([label for _, _, label in rows])
    most = reach(0.5, 100, 0.001)
    shares = curve(found, labels, [most * (i + 0.5) / 400 for i in range(400)])
    assert (shares.diff() <= 0).all()
    assert shares.mean().item() * most == pytest.approx(average_radius(found, labels), abs=most / 400)


def test_the_report_is_json_and_counts_every_input():
    found = made([0, 1, 2, 1], [[100, 0, 0], [0, 90, 10], [0, 0, 100], [50, 50, 0]])
    told = json.loads(json.dumps(report(found, torch.tensor([0, 1, 0, 1]))))
    assert (told["certified"], told["wrong"], told["abstained"], told["examples"]) == (2, 1, 1, 4)
    assert [row["class"] for row in told["inputs"]] == [0, 1, 2, None]
    assert told["inputs"][1]["votes"] == [0, 90, 10]
    assert [point["radius"] for point in told["certified_accuracy"]] == [0.0, 0.25, 0.5, 0.75]
    assert told["certified_accuracy"][0]["share"] == 0.5
    assert told["certified_accuracy"][0]["low"] < 0.5 < told["certified_accuracy"][0]["high"]
    assert report(found, torch.tensor([0, 1, 0, 1]), [0.1])["certified_accuracy"][0]["radius"] == 0.1


def test_the_network_that_ships_is_the_one_that_is_certified():
    model, task = tiny_model(), tiny_task()
    small = assemble(model, rtn(model, task, weighted(model), RTN(bits=4)), Plan({}))
    data = task.test.take(6)
    packed, plain = smooth(small, task, 0.05, n=300), smooth(small.plain(), data, 0.05, n=300)
    assert len(packed) == len(task.test)  # of a task, the test data
    assert (smooth(small, data, 0.05, n=300).votes - plain.votes).abs().max() <= 2
    assert not torch.equal(plain.votes, smooth(model, data, 0.05, n=300).votes)
    assert (packed.classes != ABSTAINED).any() and packed.radius.max() > 0


def test_the_seed_decides_and_nothing_else_is_touched():
    model, data = tiny_model().train(), tiny_task().test.take(4)
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    first, again, other = (smooth(model, data, 0.3, n=500, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.votes, again.votes) and not torch.equal(first.votes, other.votes)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_votes_that_are_not_numbers_count_for_no_class():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], torch.where(x[:, 0] > 0, 1.0, torch.nan) * 9], 1)

    found = smooth(Broken(), of([[0.0]]), sigma=1.0, n=1000)
    assert found.votes[0, 0] == 0 and 400 < found.votes[0, 1] < 600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_votes_are_drawn_where_the_network_is():
    found = smooth(half_plane().cuda(), of([[0.5, 0.0], [0.0, 0.4]]), sigma=0.3, n=5000)
    assert found.votes.device.type == "cpu" and found.classes.tolist() == [1, 0]
    assert (found.radius <= torch.tensor([0.3, 0.32])).all() and (found.radius > 0.25).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sigma": 0.0}, "sigma=0.0: noise needs a finite standard deviation above 0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": math.inf}, "sigma=inf"),
        ({"n": 0}, "n=0: at least one noisy copy"),
        ({"n0": 0}, "n0=0"),
        ({"batch": 0}, "batch=0"),
        ({"alpha": 0.0}, "alpha=0.0: the probability of a wrong certificate lies between 0 and 1"),
        ({"alpha": 1.0}, "alpha=1.0"),
        ({"alpha": math.nan}, "alpha=nan"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(BadInput, match=said):
        smooth(half_plane(), of([[0.0, 0.0]]), **{"sigma": 1.0, **settings})
    if "n0" not in settings:
        with pytest.raises(BadInput, match=said):
            predict(half_plane(), of([[0.0, 0.0]]), **{"sigma": 1.0, **settings})


def test_what_has_no_classes_or_no_noise_is_refused():
    with pytest.raises(DoesNotFit, match="whole numbers"):
        smooth(tiny_language_model(), tiny_text_task(), 0.1)
    with pytest.raises(DoesNotFit, match=r"needs outputs `b classes`, not \(1, 1\)"):
        smooth(nn.Linear(2, 1), of([[0.0, 0.0]]), 0.1)
    with pytest.raises(DoesNotFit, match=r"not \(1, 2, 2\)"):
        smooth(nn.Unflatten(1, (2, 2)), of([[0.0] * 4]), 0.1)
    with pytest.raises(DoesNotFit, match="not tuple"):
        smooth(nn.LSTM(2, 2), of([[0.0, 0.0]]), 0.1)


def test_labels_that_do_not_fit():
    found = smooth(half_plane(), of([[1.0, 0.0]] * 2), 0.1, n=50)
    for labels in (None, torch.tensor([1]), torch.tensor([1.0, 1.0])):
        with pytest.raises(BadInput, match="the class number of each of the 2 inputs"):
            curve(found, labels, [0.0])
    with pytest.raises(BadInput, match="labels run from 0 to 2, but the network has classes 0 to 1"):
        average_radius(found, torch.tensor([0, 2]))
    with pytest.raises(BadInput, match="labels run from -1 to 1"):
        report(found, torch.tensor([-1, 1]))


def test_a_task_stands_for_its_test_data():
    data = of([[0.5, 0.0]])
    task = Task(replace(data, x=data.x + 1), data)
    assert torch.equal(predict(half_plane(), task, 0.1), predict(half_plane(), data, 0.1))
