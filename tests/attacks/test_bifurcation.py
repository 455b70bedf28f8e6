"""The bifurcation layer, grouped difference logits and their searches, against definitions; nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.attacks.bifurcation import (
    NEAR,
    Bifurcation,
    bifurcation,
    group,
    nearest,
    sensors,
    targeted,
    untargeted,
)
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Compressed, assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import L2, BitFlips, Linf
from netweight.core.plan import Plan
from netweight.core.task import Data, Task
from netweight.core.victim import margin
from netweight.models.battery_district import FEATURES, policy
from netweight.models.battery_district import sensors as measured
from netweight.verification.bounds import bounds

EPS = 0.1


def observations(count: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, FEATURES, generator=torch.Generator().manual_seed(seed))


def small(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    """A controller that holds all its actions about equally likely, so that small errors can tell."""
    model = policy(outputs, 16, seed=seed).requires_grad_(False)
    model[4].bias -= model(observations(200, 9)).mean(0)
    return model


def around(x: torch.Tensor, eps: float = EPS):
    return sensors(x, measured(), eps)


# The layer and the loss -----------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_layer_of_a_number_says_its_sign(values, kappa):
    u = torch.tensor(values)[:, None]
    logits = Bifurcation(kappa)(u)
    assert torch.equal(logits, torch.cat([kappa * u, -kappa * u], 1))
    for row, value in zip(logits, values):
        if value != 0:
            assert (1 if row.argmax() == 0 else -1) == (1 if value > 0 else -1)


def test_the_layer_of_bins_by_hand():
    logits = torch.tensor([[5.0, 1.0, 2.0, 4.0], [0.0, 1.0, 7.0, 4.0]])
    assert Bifurcation()(logits).tolist() == [[4.0, 5.0], [7.0, 1.0]]
    assert group(torch.tensor([0, 1, 2, 3]), 4).tolist() == [1, 1, 0, 0]
    assert group(torch.tensor([0, 1]), 1).tolist() == [0, 1]
    assert nearest(torch.tensor([-1.0, -0.3, 1.0]), 4).tolist() == [0, 1, 3]


def test_the_gradient_of_the_loss_is_twice_that_of_u_away_from_its_sign():
    model, x = small(), observations()
    of = Bifurcation()(model(x)).argmax(1)
    s = (x + 0.05).requires_grad_()
    loss = margin(Bifurcation()(model(s)), of)
    (slope,) = torch.autograd.grad(loss.sum(), s)
    (of_u,) = torch.autograd.grad(model(s).sum(), s)
    sign = model(x).sign()
    assert torch.allclose(loss[:, None], -sign * 2 * model(s))
    assert torch.allclose(slope, -2 * sign * of_u, atol=1e-6)


# The searches ---------------------------------------------------------------------------------------------


def searches(model: nn.Module, x: torch.Tensor, within, seed: int = 0) -> dict:
    return {
        "bifurcation": bifurcation(model, x, None, within, seed=seed),
        "untargeted": untargeted(model, x, within, seed=seed),
        "targeted": targeted(model, x, torch.ones(len(x)), within, seed=seed),
    }


@pytest.mark.parametrize("outputs", [1, 6])
def test_points_are_inside_to_the_last_bit_and_the_calendar_stays(outputs):
    model, x = small(outputs), observations()
    within = around(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, found in searches(model, x, within).items():
        assert within.contains(found.points, x).all() and Linf(EPS, 0.0, 1.0).contains(found.points, x).all()
        assert torch.equal(found.points[:, ~measured()], x[:, ~measured()]), name
        assert (found.points != x).any(1).all() and found.hit.shape == (len(x),)
        again = searches(model, x, within)[name]
        assert torch.equal(again.points, found.points) and torch.equal(again.hit, found.hit)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model.training  # its mode comes back


def test_eps_of_0_changes_nothing():
    model, x = small(), observations()
    for found in searches(model, x, around(x, 0.0)).values():
        assert torch.equal(found.points, x)
    assert not bifurcation(model, x, None, around(x, 0.0)).hit.any()


def test_of_a_linear_controller_the_corner_is_found():
    """u = <w, x>: the best point moves every sensor by eps against the sign, and goes on beyond 0."""
    w = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(FEATURES, 1, bias=False)
    model.weight.data[:] = w - w.mean()
    w = model.weight[0].detach()
    x = 0.3 + 0.4 * observations(64)
    found = bifurcation(model, x, None, around(x))
    sign = model(x).sign()
    wanted = torch.where(measured(), x - EPS * sign * w.sign(), x)
    assert torch.allclose(found.points, wanted, atol=1e-6)
    assert torch.equal(found.hit, (model(wanted).sign() != sign)[:, 0])
    assert found.hit.any() and not found.hit.all()


def test_each_search_is_best_at_what_it_looks_for():
    model, x = small(), observations(64)
    found = searches(model, x, around(x))
    found["untargeted"] = untargeted(model, x, around(x), restarts=8)  # a start decides its direction
    u, sign = {k: model(f.points)[:, 0].detach() for k, f in found.items()}, model(x).sign()[:, 0]
    clean = model(x)[:, 0].detach()
    against = {k: float((-sign * v).mean()) for k, v in u.items()}
    assert against["bifurcation"] > max(against["untargeted"], against["targeted"])
    moved = {k: float((v.tanh() - clean.tanh()).square().mean()) for k, v in u.items()}
    assert moved["untargeted"] >= 0.999 * max(moved.values()) > 10 * moved_by_chance(model, x)
    near = {k: float((v.tanh() - 1).abs().mean()) for k, v in u.items()}
    assert near["targeted"] <= 1.0001 * min(near.values())
    assert torch.equal(found["bifurcation"].hit, sign != u["bifurcation"].sign())
    assert torch.equal(found["untargeted"].hit, sign != u["untargeted"].sign())
    assert torch.equal(found["targeted"].hit, (u["targeted"].tanh() - 1).abs() <= NEAR)
    assert found["bifurcation"].hit.sum() >= found["untargeted"].hit.sum() > 0


def moved_by_chance(model: nn.Module, x: torch.Tensor) -> float:
    s = around(x).sample(x, torch.Generator().manual_seed(0))
    return float((model(s).tanh() - model(x).tanh()).square().mean())


def test_bins_leave_their_group_or_that_of_y():
    model, x = small(6), observations(64)
    found = bifurcation(model, x, None, around(x, 0.3))
    bins, told = model(x).argmax(1), model(found.points).argmax(1)
    assert torch.equal(found.hit, (bins >= 3) != (told >= 3)) and found.hit.any()
    for y in (0, 5):
        aimed = bifurcation(model, x, torch.full((64,), y), around(x, 0.3))
        left = model(aimed.points).argmax(1)
        assert torch.equal(aimed.hit, (left >= 3) if y == 0 else (left < 3)) and aimed.hit.any()
    goal = targeted(model, x, torch.full((64,), -1.0), around(x, 0.3))
    assert torch.equal(goal.hit, model(goal.points).argmax(1) == 0)
    away = untargeted(model, x, around(x, 0.3))
    own = [float(model(s).log_softmax(1).gather(1, bins[:, None]).mean()) for s in (x, away.points)]
    assert own[1] < own[0]


def test_nothing_found_where_bounds_prove_the_sign():
    model, x = small(), observations(32)
    for eps in (0.02, 0.2):
        limits = bounds(model, x, around(x, eps))
        constant = ((limits.lower > 0) | (limits.upper < 0)).flatten()
        found = bifurcation(model, x, None, around(x, eps), steps=30, restarts=2)
        u = model(found.points)
        assert not (constant & found.hit).any()
        assert (limits.lower <= u).all() and (u <= limits.upper).all()


def test_nonsense_is_refused():
    x = observations(4)
    with pytest.raises(DoesNotFit, match=r"one number or an even number of bins .* \(4, 3\)"):
        bifurcation(small(3), x, None, around(x))
    with pytest.raises(DoesNotFit, match=r"one number or an even number of bins .* \(4, 3\)"):
        untargeted(small(3), x, around(x))
    with pytest.raises(DoesNotFit, match="y holds 7; give whole numbers from 0 to 5"):
        bifurcation(small(6), x, torch.full((4,), 7), around(x))
    with pytest.raises(DoesNotFit, match="y holds 0.5; give whole numbers from 0 to 1"):
        bifurcation(small(), x, torch.full((4,), 0.5), around(x))
    with pytest.raises(DoesNotFit, match="whole numbers"):
        bifurcation(small(), torch.ones(4, FEATURES, dtype=torch.long), None, Linf(0.1))
    with pytest.raises(DoesNotFit, match="no set of inputs"):
        bifurcation(small(), x, None, BitFlips(3))
    with pytest.raises(BadInput, match="3 goals for 4 examples"):
        targeted(small(), x, torch.zeros(3), around(x))
    with pytest.raises(BadInput, match="goals for"):
        targeted(small(), x, torch.full((4,), 1.5), around(x))
    with pytest.raises(BadInput, match="give one for each"):
        sensors(x, torch.ones(3, dtype=torch.bool), 0.1)
    with pytest.raises(BadInput, match="outside its valid range"):
        sensors(x + 1, measured(), 0.1)
    with pytest.raises(BadInput, match="kappa=0"):
        Bifurcation(0.0)


def test_any_set_around_inputs_will_do():
    model, x = small(), observations()
    within = L2(0.5)
    found = bifurcation(model, x, None, within)
    assert within.contains(found.points, x).all() and found.hit.any()


# A controller is a network --------------------------------------------------------------------------------


def test_a_rounded_controller_flows_on_into_compare_bounds_and_export(tmp_path):
    from netweight.pipeline import compare

    model, x = small(6).eval(), observations(8)
    data = Data(x, model(x).argmax(1), low=0.0, high=1.0)
    task = Task(data, data)
    rounded = assemble(model, rtn(model, task, weighted(model), RTN(bits=8)), Plan({}))
    rounded.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=small(6))
    proof = compare(model, back, task, within=Linf(0.01))
    assert proof["accuracy under attack"].compressed >= proof["worst possible"].compressed
    found = bifurcation(back.plain(), x, None, Linf(0.01, 0.0, 1.0))
    limits = bounds(back, x, Linf(0.01, 0.0, 1.0))
    u = back.plain()(found.points)
    assert (limits.lower <= u + 1e-5).all() and (u <= limits.upper + 1e-5).all()
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from netweight.deployment.onnx import export

    export(back, tmp_path / "controller.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "controller.onnx")
    (told,) = session.run(None, {session.get_inputs()[0].name: found.points.numpy()})
    assert torch.allclose(torch.from_numpy(told), u, atol=1e-4)
