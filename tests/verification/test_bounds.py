"""Bounds, certificates and equivalence: hand examples, laws, and nonsense."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.plan import Plan
from netweight.core.task import Data
from netweight.testing import tiny_language_model, tiny_model, tiny_task
from netweight.verification.bounds import Certificates, bounds, certify, equivalence, margins


@dataclass(frozen=True)
class Between:
    """A set of which only the corners are known."""

    lower: torch.Tensor
    upper: torch.Tensor

    def corners(self, x):
        return self.lower, self.upper


def two_layers():
    """relu(x0 - x1), relu(x0 + x1 - 1) -> (h0 - 2 h1, h1)."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    for layer, weight, bias in (
        (0, [[1.0, -1.0], [1.0, 1.0]], [0.0, -1.0]),
        (2, [[1.0, -2.0], [0.0, 1.0]], [0.0, 0.0]),
    ):
        model[layer].weight.data, model[layer].bias.data = torch.tensor(weight), torch.tensor(bias)
    return model


def test_intervals_by_hand():
    found = bounds(two_layers(), torch.tensor([[1.0, 0.0]]), Linf(0.5), method="ibp")
    assert (found.method, found.arithmetic) == ("ibp", "float32")
    torch.testing.assert_close(found.lower, torch.tensor([[-2.0, 0.0]]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.upper, torch.tensor([[2.0, 1.0]]).double(), rtol=0, atol=1e-5)
    assert (found.lower <= torch.tensor([[-2.0, 0.0]])).all() and (
        found.upper >= torch.tensor([[2.0, 1.0]])
    ).all()


def test_an_objective_is_multiplied_with_the_last_layer_first():
    """Of y1 - y0 = 3 h1 - h0 with 0 <= h0 <= 2, 0 <= h1 <= 1: from -2 to 3, not from -2 to 1 + 2 as apart."""
    x, objective = torch.tensor([[1.0, 0.0]]), torch.tensor([[[-1.0, 1.0], [1.0, 2.0]]])
    found = bounds(two_layers(), x, Linf(0.5), objective=objective, method="ibp")
    torch.testing.assert_close(found.lower, torch.tensor([[-2.0, 0.0]]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.upper, torch.tensor([[3.0, 2.0]]).double(), rtol=0, atol=5e-5)
    apart = bounds(
        nn.Sequential(two_layers(), nn.Identity(), nn.Hardtanh(-99, 99)),
        x,
        Linf(0.5),
        objective=objective,
        method="ibp",
    )
    torch.testing.assert_close(apart.upper, torch.tensor([[3.0, 4.0]]).double(), rtol=0, atol=5e-5)
    torch.testing.assert_close(apart.lower, torch.tensor([[-2.0, -2.0]]).double(), rtol=0, atol=5e-5)


def test_rows_of_an_objective_cover_float32():
    """In float32 1e8 + 1 - 1e8 is 0 or 1, in real numbers 1: in a product, and where a bias is added."""
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    for weight, bias in (
        ([[1e8, 1.0, -1e8], [0.0] * 3], [0.0, 0.0]),
        ([[0.0, 1.0, 0.0], [0.0] * 3], [1e8, 1e8]),
    ):
        model.weight.data, model.bias.data = torch.tensor(weight), torch.tensor(bias)
        found = bounds(model, x, Linf(0.0), objective=torch.tensor([[[1.0, -1.0]]]))
        assert found.lower.item() <= 0 and 1 <= found.upper.item() < 500


def test_rows_of_an_objective_hold_for_sampled_points():
    model, x = tiny_model(), tiny_task().test.x[:3]
    objective = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    within, generator = Linf(0.02, 0.0, 1.0), torch.Generator().manual_seed(1)
    found = bounds(model, x, within, objective=objective)
    for _ in range(50):
        y = torch.einsum(
            "bko,bo->bk", objective.double(), model(within.sample(x, generator)).detach().double()
        )
        assert (found.lower <= y).all() and (y <= found.upper).all()


def test_a_point_has_its_value_and_bounds_grow_with_the_set():
    model, x = tiny_model(), tiny_task().test.x[:4]
    point = bounds(model, x, Linf(0.0), arithmetic="float64")
    value = copy.deepcopy(model).double()(x.double()).detach()
    torch.testing.assert_close(point.lower, value, rtol=0, atol=1e-9)
    torch.testing.assert_close(point.upper, value, rtol=0, atol=1e-9)
    covered = bounds(model, x, Linf(0.0))
    assert (covered.lower < point.lower).all() and (covered.upper > point.upper).all()
    assert float((covered.upper - covered.lower).max()) < 1e-2
    inner = covered
    for eps in (1e-4, 1e-2, 0.1):
        outer = bounds(model, x, Linf(eps))
        assert (outer.lower <= inner.lower).all() and (inner.upper <= outer.upper).all()
        inner = outer


def test_models_in_training_mode_or_packed_are_bounded_as_they_run():
    model, x = tiny_model(), tiny_task().test.x[:2]
    small = assemble(model, rtn(model, tiny_task(), weighted(model), RTN(3)), Plan())
    plain, packed = bounds(small.plain(), x, Linf(0.01)), bounds(small, x, Linf(0.01))
    assert torch.equal(plain.lower, packed.lower)
    assert torch.equal(plain.upper, bounds(small.model.train(), x, Linf(0.01)).upper) and small.model.training


def test_words_are_bounded_where_nothing_changes():
    model, x = tiny_language_model(), torch.tensor([[1, 4, 2]])
    found = bounds(model, x, Between(x, x), arithmetic="float64")
    torch.testing.assert_close(found.lower.float(), model(x).detach(), rtol=0, atol=1e-5)
    with pytest.raises(DoesNotFit, match=r"indices of aten\.embedding are perturbed"):
        bounds(model, x, Between(x, x + 1))


@pytest.mark.parametrize("labelled", [True, False])
def test_certificates_say_verified_unknown_or_wrong(labelled):
    """Class 0 wins by 2 x0 - 1: at x0 = 1 by 1, which eps < 0.5 keeps."""
    model = nn.Linear(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[1.0], [-1.0]]), torch.tensor([-0.5, 0.5])
    x = torch.tensor([[1.0], [0.9], [0.0], [0.55], [3.0]])
    y = torch.tensor([0, 0, 0, 0, 0]) if labelled else None
    found = certify(model, Data(x, y, batch=2), Linf(0.25))
    verdicts = ["verified", "verified", "wrong" if labelled else "verified", "unknown", "verified"]
    assert found.verdicts == verdicts and len(found) == 5
    expected = torch.tensor([0.5, 0.3, -1.5 if labelled else 0.5, -0.4, 4.5]).double()
    torch.testing.assert_close(found.margin, expected, rtol=0, atol=1e-5)
    assert found.labels.tolist() == [0, 0, 0 if labelled else 1, 0, 0]
    wrong = int(labelled)
    assert found.summary() == {
        "examples": 5,
        "verified": 4 - wrong,
        "unknown": 1,
        "wrong": wrong,
        "verified share": (4 - wrong) / 5,
        "arithmetic": "float32",
    }


def test_a_wrong_prediction_is_never_verified():
    found = Certificates(
        torch.zeros(2).long(), torch.tensor([True, False]), torch.ones(2).double(), "ibp", "float64"
    )
    assert found.verified.tolist() == [True, False]


def test_nothing_verified_can_be_sampled_away():
    model, task = tiny_model(), tiny_task()
    within, generator = Linf(1e-4, 0.0, 1.0), torch.Generator().manual_seed(0)
    wrong = certify(model, task, within)
    assert torch.equal(wrong.correct, model(task.test.x).argmax(1) == task.test.y)
    found = certify(model, replace(task.test, y=None), within)
    assert len(found) == len(task.test) and int(found.verified.sum()) > len(found) // 2
    for _ in range(50):
        kept = model(within.sample(task.test.x, generator)).argmax(1) == found.labels
        assert kept[found.verified].all()


def test_margins_compare_a_class_with_every_other():
    assert margins(torch.tensor([1]), 3).tolist() == [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]


def test_equivalence_bounds_the_difference():
    model, x = tiny_model(), tiny_task().test.x[:3]
    small = assemble(model, rtn(model, tiny_task(), weighted(model), RTN(4)), Plan())
    within, generator = Linf(0.01, 0.0, 1.0), torch.Generator().manual_seed(0)
    found = equivalence(model, small, x, within)
    for _ in range(50):
        s = within.sample(x, generator)
        difference = (small.model(s).double() - model(s).double()).detach()
        assert (found.lower <= difference).all() and (difference <= found.upper).all()
    with pytest.raises(DoesNotFit, match=r"to \(1, 4\) and .* to \(1, 5\)"):
        equivalence(model, nn.Sequential(model, nn.Linear(4, 5)), x, within)


def test_nonsense_is_one_sentence():
    model, x = tiny_model(), tiny_task().test.x[:2]
    with pytest.raises(BadInput, match="unknown method of bounds 'crwn'"):
        bounds(model, x, Linf(0.1), method="crwn")
    with pytest.raises(BadInput, match="unknown arithmetic 'float16'"):
        bounds(model, x, Linf(0.1), arithmetic="float16")
    with pytest.raises(DoesNotFit, match=r"objective of \(2, 3, 5\).*\(2, rows, 4\)"):
        bounds(model, x, Linf(0.1), objective=torch.zeros(2, 3, 5))
    with pytest.raises(DoesNotFit, match="computes in bfloat16"):
        bounds(nn.Linear(2, 2).bfloat16(), torch.zeros(1, 2, dtype=torch.bfloat16), Linf(0.1))
    with pytest.raises(BadInput, match="labels are not classes 0 to 3"):
        certify(model, Data(x, torch.tensor([0, 4])), Linf(0.1))
    with pytest.raises(DoesNotFit, match=r"outputs of \(2, 1\)"):
        certify(nn.Sequential(model, nn.Linear(4, 1)), Data(x), Linf(0.1))
    with pytest.raises(DoesNotFit, match=r"the set is of \(1, 4, 7, 7\)"):
        bounds(model, x, Between(x[:1], x[:1]))
