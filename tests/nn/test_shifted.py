"""Rounding per place: by its formula, as it is stored, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import DoesNotFit
from netweight.core.stored import put_together, take_apart
from netweight.nn.quantizer import Levels
from netweight.nn.shifted import PlacedRounding, Shifted


def by_definition(x, rounding, steps, before, after, levels):
    """Number by number, places in the order of `steps`."""
    y = torch.empty_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        at = tuple(place)
        s, a, b = steps[at[1:]], before[at[1:]], after[at[1:]]
        k = torch.round((x[at] + a) / s - levels.offset).clamp(levels.low, levels.high)
        y[at] = (k + levels.offset) * s + b
    return y


CASES = [((3,), -2, (4,), (2, 3, 4)), ((3, 2), -2, (2, 4), (2, 3, 2, 4)), ((4,), -1, (4,), (2, 3, 4)),
         ((3,), -2, None, (2, 5, 3, 3))]  # fmt: skip


@pytest.mark.parametrize(("steps", "axis", "features", "shape"), CASES)
@pytest.mark.parametrize("levels", [Levels.signed(2), Levels.unsigned(3), Levels.signed(1)], ids=str)
def test_each_place_has_its_step_and_the_stored_form_is_the_same(steps, axis, features, shape, levels):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=g)
    module = Shifted(levels, steps, axis, features)
    module(x)
    sizes = module.rounding.step.detach()
    assert len(sizes.unique()) == len(sizes)  # from what each place sees
    if features:
        with torch.no_grad():
            module.before.copy_(torch.randn(features, generator=g) / 3)
            module.after.copy_(torch.randn(features, generator=g) / 3)
    stored = module.stored()
    each = [part.expand(shape[1:]) for part in (stored.step, stored.before, stored.after)]
    wanted = by_definition(x, module, *each, levels)
    assert torch.equal(module(x), wanted) and torch.equal(stored.module()(x), wanted)
    by_rows = sizes.reshape(*steps, *[1] * (-1 - axis)).expand(shape[1:])
    assert torch.allclose(each[0], by_rows, rtol=1e-3)
    again = put_together(*take_apart(stored))
    assert torch.equal(again.module()(x), wanted) and again.bits == levels.bits


@given(seed=st.integers(0, 999))
def test_gradients_are_those_of_learnt_steps(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, generator=g)
    module = Shifted(Levels.signed(2), (3,), features=(4,))
    module(x)
    x.requires_grad_()
    module(x).sum().backward()
    u = x.detach() / module.stored().step
    inside = ((u >= -2) & (u <= 1)).float()
    assert torch.equal(x.grad, inside)
    assert torch.allclose(module.before.grad, inside.sum((0, 1)))
    assert torch.equal(module.after.grad, torch.full((4,), 6.0))
    by_step = torch.where(inside.bool(), u.round() - u, u.clamp(-2, 1)).sum((0, 2)) / 8**0.5
    assert torch.allclose(module.rounding.step.grad, by_step, atol=1e-5)
    stored = module.stored().module()
    again = x.detach().clone().requires_grad_()
    stored(again).sum().backward()
    assert torch.allclose(again.grad, inside)


def test_other_places_and_nonsense_are_refused():
    module = Shifted(Levels.signed(2), (3,), features=(4,))
    module(torch.randn(2, 3, 4))
    with pytest.raises(DoesNotFit, match=r"steps were learnt for \(3,\) places, here are \(5,\)"):
        module(torch.randn(2, 5, 4))
    one = torch.ones(1)
    for step, low in ((0 * one, -2), (one / 0, -2), (one, 1)):
        with pytest.raises(ValueError, match="steps"):
            PlacedRounding(step, one, one, low, 1)
