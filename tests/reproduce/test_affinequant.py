"""The quick reproduction of AffineQuant reaches its bar; its parts are what they say."""

import pytest
import torch

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.affine import Facing, Mixing, Turn
from netweight.core.compressed import Change, weighted
from netweight.data.shared import shared_data
from netweight.reproduce import affinequant
from netweight.testing import tiny_language_model, tiny_text_task

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here")


@needs_data
def test_quick():
    pytest.importorskip("transformers")
    (bar,) = affinequant.reproduce(quick=True).bars
    assert bar.bar == 0.9 and bar.passed


def test_health_by_hand():
    A = torch.tensor([[[4.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 9.0]]])
    singular = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    state = affinequant.health(Change({}, [Mixing("v", "o", A)]))
    assert state["least |det|^(1/n)"] == pytest.approx(2.0)
    assert state["largest condition number"] == pytest.approx(9.0)
    assert state["least dominance margin"] == 1.0 and state["singular"] == 0.0
    assert (
        affinequant.health(Change({}, [Mixing("v", "o", A), Facing("q", "k", singular)]))["singular"] == 1.0
    )


def test_bits_count_the_products_behind_norms():
    model, task = tiny_language_model(), tiny_text_task()
    layers = [layer for layer in weighted(model) if layer != "head"]
    change = rtn(model, task, layers, RTN(3, symmetric=False, group=0))
    plain = affinequant.bits_per_weight(change)
    turned = Change(change.packed, [Turn("norm", ("query",), torch.eye(16))])
    weights = sum(form.decode().numel() for form in change.packed.values())
    assert plain == sum(form.bits() for form in change.packed.values()) / weights > 3
    assert affinequant.bits_per_weight(turned) == pytest.approx(plain + 32 * 256 / weights)


def test_likelihood_does_not_depend_on_the_parts():
    model, task = tiny_language_model(), tiny_text_task()
    assert affinequant.nll(model, task.test, 3) == pytest.approx(
        affinequant.nll(model, task.test, 100), rel=1e-6
    )


def test_errors_of_the_last_block_and_gaps():
    model, task = tiny_language_model(), tiny_text_task()
    subject = affinequant.Subject(model, task)
    assert subject.error(Change({})) == 0.0 and subject.gap(Change({})) == 0.0
    layers = [layer for layer in weighted(model) if layer != "head"]
    few, many = (rtn(model, task, layers, RTN(bits, symmetric=False, group=0)) for bits in (2, 6))
    assert 0 < subject.error(many) < 0.1 * subject.error(few)
    both = affinequant.measured(subject, {"few": few, "many": many})
    assert both[0]["few"] == subject.error(few) and both[1]["many"] == subject.gap(many)


def test_without_data_one_sentence(monkeypatch, tmp_path):
    from netweight.core.errors import BadInput

    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(affinequant, "small_opt", lambda seed, quick: tiny_language_model())
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        affinequant.reproduce(quick=True)
