"""Closed forms of distilled kernel regression against recursion, direct solves and the paper's theorems."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import BadInput, DoesNotFit
from netweight.training.kernel_self_distillation import (
    best_weight,
    clipped,
    closed_form,
    fitted,
    gaussian,
    guided,
    limit,
    mixed,
    predicted,
    shrinkages,
    spectrum,
)

weights = st.floats(0, 1)
seeds = st.integers(0, 2**16)


def posed(seed: int, n: int = 9, ridge: float = 0.3, outputs: int | None = None):
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, 2, generator=g), torch.randn(5, 2, generator=g)
    y = torch.randn(n, generator=g) if outputs is None else torch.randn(n, outputs, generator=g)
    kernel = gaussian(x, x, 0.7)
    return kernel, gaussian(z, x, 0.7), y.double(), spectrum(kernel, y, ridge)


def by_solving(kernel, cross, y, ridge, alphas):
    """Step after step by definition: y^t and f^t at new points."""
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=torch.float64))
    taught, found = y, []
    for alpha in alphas:
        targets = alpha * y + (1 - alpha) * taught
        taught = kernel @ inverse @ targets
        found.append((taught, cross @ inverse @ targets))
    return found


@given(seed=seeds, alphas=st.lists(weights, min_size=1, max_size=5), outputs=st.sampled_from([None, 3]))
def test_recursion_is_the_direct_solve(seed, alphas, outputs):
    kernel, cross, y, spec = posed(seed, outputs=outputs)
    b = shrinkages(spec.shrinkage, alphas)
    for step, (taught, new) in enumerate(by_solving(kernel, cross, y, spec.ridge, alphas)):
        assert torch.allclose(fitted(spec, b[step + 1]), taught, atol=1e-10)
        assert torch.allclose(predicted(spec, cross, mixed(b[step], alphas[step])), new, atol=1e-10)


@given(seed=seeds, weight=weights, step=st.integers(0, 12))
def test_closed_form_is_the_recursion_and_keeps_the_rate(seed, weight, step):
    _, _, y, spec = posed(seed)
    a = spec.shrinkage
    b = shrinkages(a, [weight] * step)[step]
    assert torch.allclose(closed_form(a, weight, step), b, atol=1e-10)
    end = fitted(spec, limit(a, weight))
    rate = ((1 - weight) * a.max()) ** step
    assert (fitted(spec, b) - end).norm() <= rate * (y - end).norm() + 1e-10


@given(seed=seeds, weight=st.floats(0.01, 1))
def test_the_limit_is_ridge_regression_with_a_larger_penalty(seed, weight):
    kernel, cross, y, spec = posed(seed)
    b = limit(spec.shrinkage, weight)
    larger = kernel + spec.ridge / weight * torch.eye(len(y), dtype=torch.float64)
    assert torch.allclose(fitted(spec, b), kernel @ torch.linalg.solve(larger, y), atol=1e-9)
    assert torch.allclose(
        predicted(spec, cross, mixed(b, weight)), cross @ torch.linalg.solve(larger, y), atol=1e-9
    )


def test_without_labels_everything_is_forgotten_and_small_components_first():
    a = posed(0)[3].shrinkage
    b = shrinkages(a, [0.0] * 8)
    assert all((after <= before).all() for before, after in zip(b, b[1:]))
    assert (limit(a, 0.0) == 0).all()
    ratios = [(step[1:] / step[:-1]) for step in b[1:]]
    assert all((after >= before).all() for before, after in zip(ratios, ratios[1:]))
    assert (ratios[-1] > ratios[0] * 1.001).any()


def test_labels_alone_repeat_the_first_fit():
    a = posed(1)[3].shrinkage
    assert all(torch.allclose(b, a) for b in shrinkages(a, [1.0] * 4)[1:])


@given(seed=seeds)
def test_the_best_weight_is_the_minimum_of_a_fine_grid(seed):
    g = torch.Generator().manual_seed(seed)
    truth, u, v = (torch.randn(6, 2, generator=g).double() for _ in range(3))
    raw = best_weight(truth, u, v)

    def error(weight: float) -> float:
        return float((weight * u + (1 - weight) * v - truth).square().sum())

    assert error(raw) <= min(error(raw + 0.01), error(raw - 0.01))
    grid = [i / 1000 for i in range(1001)]
    assert abs(clipped(raw) - min(grid, key=error)) <= 0.00051
    assert best_weight(truth, u, u) == 1.0


def test_guided_steps_never_raise_the_error_on_what_guides_them():
    _, cross, _, spec = posed(3, ridge=1e-3)
    truth = torch.randn(5, generator=torch.Generator().manual_seed(9)).double()
    chain = guided(spec, cross, truth, 5)
    assert chain.weights[0] == 1.0
    assert chain.weights == tuple(clipped(raw) for raw in chain.raw)
    pairs = zip(chain.shrinkages, chain.weights)
    errors = [float((predicted(spec, cross, mixed(b, w)) - truth).square().sum()) for b, w in pairs]
    assert all(errors[0] >= later - 1e-12 for later in errors)
    assert errors[1] < errors[0]
    u = predicted(spec, cross, torch.ones(9).double())
    for raw, before in zip(chain.raw[1:], chain.shrinkages[1:]):
        assert raw == pytest.approx(best_weight(truth, u, predicted(spec, cross, before)), rel=1e-9)
    b = shrinkages(spec.shrinkage, chain.weights)
    assert all(torch.allclose(x, y) for x, y in zip(b, chain.shrinkages, strict=True))


def test_a_kernel_without_an_inverse_is_no_trouble():
    x = torch.zeros(4, 1)
    spec = spectrum(gaussian(x, x, 1.0), torch.ones(4), 0.5)
    assert torch.allclose(fitted(spec, spec.shrinkage), torch.full((4,), 4 / 4.5).double())
    assert (spec.values >= 0).all()  # rounding makes some of them negative


def test_bad_input():
    kernel, cross, y, spec = posed(0)
    with pytest.raises(BadInput, match="ridge=0: the penalty"):
        spectrum(kernel, y, 0)
    with pytest.raises(DoesNotFit, match="does not fit 3 labels"):
        spectrum(kernel, y[:3], 1.0)
    with pytest.raises(DoesNotFit, match="not symmetric"):
        spectrum(kernel + torch.ones(9, 9).triu(1), y, 1.0)
    with pytest.raises(DoesNotFit, match="an eigenvalue of -"):
        spectrum(-kernel, y, 1.0)
    for call in (lambda: shrinkages(y, [1.5]), lambda: limit(y, -0.1), lambda: closed_form(y, 2.0, 1)):
        with pytest.raises(BadInput, match="the labels weigh between 0 and 1"):
            call()
    with pytest.raises(BadInput, match="steps=0"):
        guided(spec, cross, y[:5], 0)
