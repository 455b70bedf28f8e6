"""Rounding to nearest against a hand example, its definition, the laws of its room, and nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.compression.quantize.rtn import RTN, encode, rtn
from netweight.core.errors import BadInput, DoesNotFit
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def by_definition(group: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> list[float]:
    """One group in plain Python; the scale is rounded as it is stored."""
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        s = torch.tensor(max(map(abs, group)) / largest).to(dtype).item() or 1.0
        return [max(-largest, min(largest, round(w / s))) * s for w in group]
    lo, hi = min(0.0, *group), max(0.0, *group)
    s = torch.tensor((hi - lo) / (2**bits - 1)).to(dtype).item() or 1.0
    z = round(-lo / s)
    return [(max(0, min(2**bits - 1, round(w / s) + z)) - z) * s for w in group]


def test_defaults_by_hand():
    weight = torch.tensor([[-0.5, 0.0, 3.25, 0.6, 0.65], [-3.75, -3.6, 0.0, -1.9, -0.1]])  # steps of 0.25
    code = encode(weight, RTN())
    assert code.decode().tolist() == [[-0.5, 0.0, 3.25, 0.5, 0.75], [-3.75, -3.5, 0.0, -2.0, 0.0]]
    assert code.zeros().tolist() == [[2], [15]] and code.scale.tolist() == [[0.25], [0.25]]
    assert code.bits_per_code == 4 and code.group == 0
    assert code.bits() == 10 * 4 + 2 * 16 + 8  # codes, two scales, two zeros in one byte


def test_half_goes_to_even():
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]])
    assert encode(weight, RTN(4, symmetric=True)).decode().tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]]


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([-1, 0, 2, 4]),
    seed=st.integers(0, 2**16),
)
def test_code_is_the_definition(bits, symmetric, group, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, 4, generator=g) * 2.0 ** torch.randint(-6, 3, (1,), generator=g)
    if seed % 3 == 0:
        weight[0] = weight[0].abs() + 1  # a range that has to be widened to hold 0
    code = encode(weight, RTN(bits, symmetric, group))
    groups = weight.reshape({-1: 1, 0: 3}.get(group, 24 // max(group, 1)), -1)
    expected = torch.tensor(
        [by_definition(row.tolist(), bits, symmetric, code.scale.dtype) for row in groups]
    )
    assert torch.allclose(
        code.decode(), expected.reshape(weight.shape), rtol=0, atol=1e-6 * float(weight.abs().max())
    )


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 2**16))
def test_error_is_half_a_step_at_most_and_zero_stays(bits, symmetric, seed):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    weight[:, 3] = 0
    code = encode(weight, RTN(bits, symmetric))
    step = code.scale.float()
    assert (
        (code.decode() - weight).abs() <= step * (0.5 + 2.0**-11 * 2**bits)
    ).all()  # float16 scale: the range's end
    assert (code.decode()[:, 3] == 0).all()


@given(bits=st.integers(2, 8), symmetric=st.booleans(), power=st.integers(-3, 3), seed=st.integers(0, 2**16))
def test_steps_scale_with_the_weight(bits, symmetric, power, seed):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    one, other = (encode(w, RTN(bits, symmetric)) for w in (weight, weight * 2.0**power))
    assert torch.equal(other.scale, one.scale * 2.0**power) and torch.equal(other.codes, one.codes)
    assert torch.equal(other.decode(), one.decode() * 2.0**power)


def test_rows_are_never_worse_than_the_tensor():
    weight = (
        torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 8)[:, None]
    )
    rows, tensor = (encode(weight, RTN(4, group=group)).decode() for group in (0, -1))
    assert (rows - weight).square().mean() < 0.5 * (tensor - weight).square().mean()


@pytest.mark.parametrize("settings", [RTN(), RTN(3, True, 8), RTN(8, False, -1), RTN(2, True, -1)], ids=repr)
def test_laws(settings):
    check_compressor(rtn, settings)
    check_compressor(
        rtn,
        settings,
        model=tiny_language_model(),
        task=tiny_text_task(),
        layers=["embedding", "query", "down"],
    )


def test_all_kinds_of_layers_and_settings_reach_the_code():
    model = torch.nn.ModuleDict(
        {
            "line": torch.nn.Conv1d(4, 6, 3, groups=2),
            "volume": torch.nn.Conv3d(2, 3, 2),
            "back": torch.nn.ConvTranspose2d(3, 4, 2, stride=2),
            "table": torch.nn.Embedding(5, 6),
        }
    )
    change = rtn(model, tiny_task(), list(model), RTN(5, True, 2))
    for layer, form in change.packed.items():
        assert torch.equal(form.decode(), encode(model[layer].weight.detach(), RTN(5, True, 2)).decode())
        assert (form.bits_per_code, form.zero, form.group) == (5, None, 2)


def test_a_weight_that_is_not_finite_is_left():
    model = tiny_model()
    model[9].weight.data[0, 0] = torch.nan
    change = rtn(model, tiny_task(), ["7", "9"], RTN())
    assert set(change.packed) == {"7"} and "NaN" in change.left["9"]


def test_refuses_what_does_not_fit_and_nonsense():
    model = tiny_model()
    with pytest.raises(DoesNotFit, match="^7: rows of 144 weights are not a multiple of group=7$"):
        rtn(model, tiny_task(), ["7"], RTN(group=7))
    with pytest.raises(DoesNotFit, match="^1: the method cannot treat a BatchNorm2d"):
        rtn(model, tiny_task(), ["1"], RTN())
    with pytest.raises(BadInput, match="unknown layer '77'"):
        rtn(model, tiny_task(), ["77"], RTN())
    for settings in ({"bits": 1}, {"bits": 9}, {"group": -2}):
        with pytest.raises(ValueError, match=repr(*settings.values())):
            RTN(**settings)
