"""SmoothQuant against its equation, its laws, planted outliers, and nonsense."""

import pytest
import torch
from torch import nn

from netweight.compression.quantize.smoothquant import SmoothQuant, scale_of, smoothquant
from netweight.core.compressed import assemble, weighted
from netweight.core.moments import moments
from netweight.core.plan import Plan
from netweight.core.plant import outliers
from netweight.core.rewrite import residual, rewritten
from netweight.core.sites import column_ranges, sites
from netweight.core.task import outputs
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.ranges import input_ranges
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def test_scale_by_hand():
    x, w = torch.tensor([16.0, 1.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 3.0, 0.0])
    assert scale_of(x, w, 0.5).tolist() == pytest.approx([2.0, 1.0, 1.0, 1.0])  # a dead channel stays
    assert scale_of(x, w, 1.0).tolist() == pytest.approx([16.0, 1.0, 1.0, 1.0])
    assert scale_of(x, w, 0.0).tolist() == pytest.approx([0.25, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "settings",
    [
        SmoothQuant(),
        SmoothQuant(alpha=None, group=0),
        SmoothQuant(6, 6, dynamic=True),
        SmoothQuant(8, 6, range="kl"),
    ],
    ids=repr,
)
def test_laws(settings):
    check_compressor(smoothquant, settings)
    language = tiny_language_model()
    check_compressor(smoothquant, settings, model=language, task=tiny_text_task())


def hard():
    model, task = tiny_language_model(), tiny_text_task()
    norms = [site for site in sites(model, task.calibration) if site.norm(model)]
    return rewritten(model, outliers(model, norms, factor=32, share=0.1)), task


def test_planted_outliers_are_recovered():
    model, task = hard()
    before = outputs(model, task.test)

    def error(settings: SmoothQuant) -> float:
        small = assemble(model, smoothquant(model, task, weighted(model), settings), Plan({}))
        return float((outputs(small.model, task.test) - before).pow(2).mean())

    assert error(SmoothQuant()) < 0.2 * error(SmoothQuant(alpha=None))
    assert error(SmoothQuant(activation_bits=16)) < error(SmoothQuant())


def test_ranges_are_those_of_the_smoothed_inputs():
    model, task = hard()
    layers = weighted(model)
    change = smoothquant(model, task, layers, SmoothQuant(range="moving average"))
    after = rewritten(model, change.rewrites)
    ranges = input_ranges(after, task.calibration, layers, "moving average")
    for layer, ends in ranges.items():
        expected = StaticRounding.of(*ends)
        found = change.activations[layer]
        assert found.scale == expected.scale and found.zero == expected.zero
    with pytest.raises(ValueError, match="range='entropy'"):
        SmoothQuant(range="entropy")


def test_half_of_the_outliers_moves_and_the_function_stays():
    model, task = hard()
    change = smoothquant(model, task, weighted(model), SmoothQuant(alpha=0.5))
    assert [rewrite.producer for rewrite in change.rewrites] == ["norm", "norm2"]
    assert residual(model, change.rewrites, task.test.x) <= 1e-9
    after = rewritten(model, change.rewrites)
    seen = moments(after, task.calibration, ["up"])["up"]
    assert torch.allclose(
        seen.largest.float(), column_ranges(after, "up"), rtol=1e-4
    )  # alpha = 1/2: equal sizes


def test_static_ranges_hold_all_that_was_seen():
    model, task = hard()
    change = smoothquant(model, task, weighted(model), SmoothQuant())
    after = rewritten(model, change.rewrites)
    for layer, seen in moments(after, task.calibration, weighted(model)).items():
        rounding = change.activations[layer]
        assert isinstance(rounding, StaticRounding)
        low, high = -rounding.zero * rounding.scale, (255 - rounding.zero) * rounding.scale
        slack = float(rounding.scale)
        assert low <= seen.low + slack and high >= seen.high - slack
        assert max(-low, high) <= 1.01 * max(-seen.low, seen.high) + slack
    dynamic = smoothquant(model, task, ["up"], SmoothQuant(dynamic=True, activation_bits=5))
    assert dynamic.activations["up"] == DynamicRounding(5)


def test_refuses_nonsense():
    for wrong in ({"alpha": 1.5}, {"activation_bits": 1}, {"bits": 9}):
        with pytest.raises(ValueError, match="need"):
            SmoothQuant(**wrong)
    model = tiny_model()
    nn.init.constant_(model[9].weight, float("nan"))
    change = smoothquant(model, tiny_task(), ["7", "9"], SmoothQuant())
    assert "NaN" in change.left["9"] and set(change.activations) == {"7"}
