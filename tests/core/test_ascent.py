"""What attacks share: the projection onto a set around many inputs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.ascent import adam, ascend, projection
from netweight.core.perturbation import L1, L2, Box, Linf

sets = st.one_of(
    st.builds(Linf, st.floats(0, 1), low=st.sampled_from([None, 0.0]), high=st.sampled_from([None, 1.0])),
    st.builds(L2, st.floats(0, 3), low=st.just(0.0), high=st.just(1.0)),
    st.builds(L1, st.floats(0, 3)),
    st.builds(lambda low, width: Box(low, low + width), st.floats(-1, 1), st.floats(0.01, 1)),
)


@given(within=sets, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_projection_around_many_is_that_of_the_set(within, seed, dtype):
    chance = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 2, 3, generator=chance, dtype=dtype)
    s = x + torch.randn(5, 2, 3, generator=chance, dtype=dtype)
    rows = torch.tensor([3, 0, 3])
    project = projection(within, x)
    assert torch.equal(project(s), within.project(s, x))
    assert torch.equal(project(s[:3], rows), within.project(s[:3], x[rows]))


def test_a_search_ends_where_every_example_has_reached_whatever_the_set():
    x = torch.zeros(4, 3)

    def score(s, rows):
        return s.sum(1), s[:, 0] != 0  # x itself has not reached, any other point has

    for within in (Linf(0.1), L2(0.1), L1(0.1), Box(-0.1, 0.1)):
        found = ascend(score, x, within, steps=3, restarts=2, seed=0)
        assert found.hit.all() and within.contains(found.points, x).all()


def test_adam_is_that_of_torch():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    other, moments = x.detach().clone(), (torch.zeros(2, 3), torch.zeros(2, 3))
    optimizer = torch.optim.Adam([x], lr=0.1)
    for step in range(1, 6):
        x.grad = (3 * x.detach()).sin() + step
        way, *moments = adam((3 * other).sin() + step, *moments, step)
        optimizer.step()
        other = other - 0.1 * way
        assert torch.allclose(x, other, rtol=0, atol=1e-12)
