"""SAM and SAGM: the definition, what they are at their limits, and that nothing is left moved."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput
from netweight.testing import tiny_model, tiny_task
from netweight.training.loop import Hooks, Training, train
from netweight.training.sam import both, put_back, sagm, sam

ONE = Training(1, batch=32, rate=0.1, optimizer="sgd")


def loss(model, x, y, at):
    return F.cross_entropy(model(x), y)


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 4)).double()


def stepped(model: nn.Module, passes, how: Training = ONE) -> dict[str, torch.Tensor]:
    """The weights after training a copy on the tiny data."""
    model, data = copy.deepcopy(model), tiny_task().train
    if next(model.parameters()).dtype == torch.float64:
        data = type(data)(data.x.double(), data.y)
    train(model, data, loss, how, hooks=Hooks(passes=passes))
    return model.state_dict()


def by_definition(model: nn.Module, rho: float, alpha: float, own: bool) -> dict[str, torch.Tensor]:
    """One step of SGD with g' (and g) by hand; momentum plays no part in the first step."""
    model, data = copy.deepcopy(model), tiny_task().train
    weights, y = list(model.parameters()), data.y
    g = torch.autograd.grad(F.cross_entropy(model(data.x.double()), y), weights)
    size = math.sqrt(sum(float((part**2).sum()) for part in g))
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, part in zip(weights, g):
            w += (rho / size - alpha) * part
    there = torch.autograd.grad(F.cross_entropy(model(data.x.double()), y), weights)
    with torch.no_grad():
        for w, old, a, b in zip(weights, before, g, there):
            w.copy_(old - ONE.rate * (b + a if own else b))
    return model.state_dict()


@settings(max_examples=15, deadline=None)
@given(rho=st.floats(0, 2), alpha=st.floats(0, 0.5))
def test_one_step_is_the_definition(rho, alpha):
    model = linear()
    for passes, wanted in (
        (sagm(rho, alpha), by_definition(model, rho, alpha, True)),
        (sam(rho), by_definition(model, rho, 0.0, False)),
    ):
        found = stepped(model, passes)
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-12)


def test_without_a_move_sam_is_plain_training_and_sagm_twice_its_gradient():
    model = tiny_model()
    plain, still = stepped(model, None), stepped(model, sam(0.0))
    assert all(torch.equal(plain[name], still[name]) for name in plain)  # batch norms see one pass alone
    twice = stepped(model, sagm(0.0, 0.0))
    half = Training(1, batch=32, rate=0.2, optimizer="sgd")
    doubled = stepped(model, None, half)
    assert all(torch.equal(twice[name], doubled[name]) for name in plain)
    assert not torch.equal(stepped(model, sam(0.5))["0.weight"], plain["0.weight"])


def test_weights_and_buffers_come_back_bit_for_bit_from_a_pass_that_fails_too():
    model = tiny_model().train()
    before = copy.deepcopy(model.state_dict())
    moved = [model[0].weight, model[9].bias]
    with pytest.raises(KeyboardInterrupt), put_back(model, moved):
        with torch.no_grad():
            for w in moved:
                w += 1e9
        model(tiny_task().train.x)
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_running_statistics_are_those_of_the_first_pass():
    model, data = tiny_model(), tiny_task().train
    once = copy.deepcopy(model).train()
    once(data.x[torch.randperm(32, generator=torch.Generator().manual_seed(0))])
    found = stepped(model, sagm(5.0))
    for name, buffer in once.named_buffers():
        assert torch.equal(found[name], buffer), name
    assert found["1.num_batches_tracked"] == 1


def test_the_norm_is_over_what_is_moved_and_nothing_else_moves():
    model, data, seen = linear(), tiny_task().train, []

    def watched(network, x, y, at):
        seen.append(copy.deepcopy(network.state_dict()))
        return loss(network, x, y, at)

    train(
        model,
        type(data)(data.x.double(), data.y),
        watched,
        ONE,
        hooks=Hooks(passes=sam(0.3, lambda m: [m[1].weight])),
    )
    here, there = seen
    assert torch.equal(here["1.bias"], there["1.bias"])
    assert (there["1.weight"] - here["1.weight"]).norm().item() == pytest.approx(0.3, rel=1e-9)


def test_no_gradient_moves_nothing():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x.flatten(1)[:, :4] + 0 * self.w

    assert torch.equal(stepped(Flat(), sagm(0.5))["w"], torch.ones(4))


def test_with_a_scaled_loss_the_move_has_the_same_length():
    model = tiny_model()
    weights, seen = list(model.parameters()), []

    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    class Run:
        scaler = Scaler()

    run = Run()
    run.model = model

    def once():
        seen.append([w.detach().clone() for w in weights])
        value = 1024 * F.cross_entropy(model(tiny_task().train.x), tiny_task().train.y)
        value.backward()
        return value.detach()

    both(run, once, weights, 0.25, 0.0)
    apart = math.sqrt(sum(float(((a - b).double() ** 2).sum()) for a, b in zip(*seen)))
    assert apart == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("values", [(-0.1, 0.0), (0.1, -1.0), (math.nan, 0.0), (math.inf, 0.0)])
def test_mistakes_are_said(values):
    with pytest.raises(BadInput, match="both are numbers from 0 on"):
        sagm(*values)
