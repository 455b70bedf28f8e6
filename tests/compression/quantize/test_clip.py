"""Chosen ranges against a hand example, an exhaustive search, order statistics, the laws, and nonsense."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.compression.quantize.clip import Clip, clip, encode, percentile
from netweight.compression.quantize.rtn import RTN
from netweight.compression.quantize.rtn import encode as round_to_nearest
from netweight.core.errors import DoesNotFit
from netweight.testing import check_compressor, tiny_model, tiny_task


def error(code, weight, norm=2.0):
    return (code.decode() - weight).abs().double().pow(norm).reshape(len(weight), -1).sum(1)


def test_an_outlier_is_clipped_by_hand():
    weight = torch.tensor(
        [[1.0, -1.0] * 50 + [1.5]]
    )  # 2 bits, symmetric: values -c, 0, c, so c near 1 is best
    code = encode(weight, Clip(2, symmetric=True))
    assert abs(float(code.scale) - 1.0) <= 0.01
    assert encode(weight, Clip(2, symmetric=True, norm=20.0)).scale > 1.2  # a high power minds the outlier
    assert encode(weight, Clip(2, symmetric=True, range="percentile", percentile=0.99)).scale == 1.0
    assert encode(weight, Clip(2, symmetric=True, range="percentile")).scale == 1.5  # 0.9999 of 101 is all


def test_defaults():
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    code = encode(weight, Clip())
    assert (code.bits_per_code, code.group, code.zero is None) == (4, 0, False)
    assert torch.equal(code.decode(), encode(weight, Clip(range="mse", norm=2.0)).decode())


@given(
    bits=st.integers(2, 5),
    symmetric=st.booleans(),
    norm=st.sampled_from([1.0, 2.0, 2.4]),
    seed=st.integers(0, 2**16),
)
def test_no_ratio_is_better_than_the_one_found(bits, symmetric, norm, seed):
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(seed)) ** 3
    found = error(encode(weight, Clip(bits, symmetric, norm=norm)), weight, norm)
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    for percent in range(21, 101):
        hi = weight.abs().amax(1) if symmetric else weight.amax(1).clamp(min=0)
        lo = -hi if symmetric else weight.amin(1).clamp(max=0)
        s = ((hi if symmetric else hi - lo) * (percent / 100) / levels).half().float()[:, None]
        z = 0 if symmetric else ((-lo * (percent / 100))[:, None] / s).round()
        rounded = ((weight / s).round() + z).clamp(-levels if symmetric else 0, levels) - z
        other = (rounded * s - weight).abs().double().pow(norm).sum(1)
        assert (found <= other * (1 + 1e-3) + 1e-9).all()  # a ratio's last bit moves the float16 scale
    assert (found <= error(round_to_nearest(weight, RTN(bits, symmetric)), weight, norm) * (1 + 1e-6)).all()


def test_kl_clips_a_thin_tail_and_keeps_what_it_holds_exactly():
    g = torch.Generator().manual_seed(0)
    bulk = torch.cat([torch.randn(40000, generator=g), torch.tensor([40.0])])[None]
    found = encode(bulk, Clip(4, symmetric=True, group=-1, range="kl"))
    assert 2 < 7 * float(found.scale) < 20  # the range ends far below the outlier at 40
    assert float(error(found, bulk)) < float(error(round_to_nearest(bulk, RTN(4, True, -1)), bulk))
    few = torch.tensor([[0.0, 1.0, -2.0, 4.0]])  # each in a bin of its own: nothing to gain
    for symmetric in (True, False):
        code = encode(few, Clip(4, symmetric, range="kl"))
        assert torch.equal(code.decode(), round_to_nearest(few, RTN(4, symmetric)).decode())


@given(share=st.floats(0.51, 1.0), count=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_percentile_is_the_smallest_value_with_that_share_inside(share, count, seed):
    values = torch.randn(1, count, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    needed = math.ceil(share * count - 1e-9)
    lo, hi = percentile(values, share, symmetric=True)
    assert -lo == hi and (values.abs() <= hi).sum() >= needed and (values.abs() < hi).sum() < needed
    lo, hi = percentile(values, share, symmetric=False)
    assert lo <= 0 <= hi and (values <= hi).sum() >= needed and (values >= lo).sum() >= needed
    assert hi == 0 or (values < hi).sum() < needed
    assert lo == 0 or (values > lo).sum() < needed


def test_a_group_of_zeros_and_tiny_weights_round_to_themselves():
    weight = torch.tensor([[0.0, 0, 0, 0], [1e-6, -1e-6, 0, 1e-6]])
    code = encode(weight, Clip(2, symmetric=True))
    assert (code.decode()[0] == 0).all() and torch.allclose(code.decode()[1], weight[1], rtol=0.01)
    assert code.scale.dtype == torch.float32  # the ratio that fits is below float16's range


@pytest.mark.parametrize(
    "settings",
    [
        Clip(),
        Clip(3, True, 8),
        Clip(3, False, -1, "percentile", 0.99),
        Clip(2, True, 0, "percentile", 0.9),
        Clip(4, False, 8, "kl"),
    ],
    ids=repr,
)
def test_laws(settings):
    check_compressor(clip, settings)
    for layer, form in clip(tiny_model(), tiny_task(), ["3", "7"], settings).packed.items():
        weight = tiny_model().get_submodule(layer).weight.detach()
        assert torch.equal(form.decode(), encode(weight, settings).decode())


def test_left_and_nonsense():
    model = tiny_model()
    model[9].weight.data[0, 0] = torch.inf
    assert "Inf" in clip(model, tiny_task(), ["9"], Clip()).left["9"]
    with pytest.raises(DoesNotFit, match="^7: rows of 144"):
        clip(tiny_model(), tiny_task(), ["7"], Clip(group=7))
    with pytest.raises(DoesNotFit, match="^1: .*BatchNorm2d"):
        clip(tiny_model(), tiny_task(), ["1"], Clip())
    nonsense = [{"bits": 1}, {"group": -2}, {"range": "entropy"}, {"percentile": 0.5}, {"percentile": 1.1}]
    for settings in [*nonsense, {"norm": 0.0}, {"norm": math.inf}]:
        with pytest.raises(ValueError, match=repr(*settings.values())):
            Clip(**settings)
