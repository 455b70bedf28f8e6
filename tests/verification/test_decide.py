"""Verdicts: never against a sample, counterexamples to the last bit, published properties, and nonsense."""

import math
import re
import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.bench import vnncomp
from netweight.core.errors import BadInput, DoesNotFit
from netweight.data.shared import shared_data
from netweight.models.onnx_reader import input_shape, read
from netweight.verification import decide as module
from netweight.verification.counterexample import Search, onnx_runtime, search, twin
from netweight.verification.decide import decide, decided
from netweight.verification.vnnlib import Case, Property, Unsafe

FAMILIES = shared_data() / "vnncomp" if shared_data() else None
DATA = pytest.mark.skipif(FAMILIES is None, reason="the data folder is not here")


@cache
def network(inputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def prop(limit, lower=(-1.0, -1.0), upper=(1.0, 1.0), row=1.0):
    """y <= limit is unsafe."""
    rows, limits, *ends = (torch.tensor(v, dtype=torch.float64) for v in ([[row]], [limit], lower, upper))
    case = Case(*ends, (Unsafe(rows, limits),))
    return Property((case,), len(lower), 1)


def sampled(model, found, count=20_000):
    generator = torch.Generator().manual_seed(1)
    (case,) = found.cases
    share = torch.rand(count, found.inputs, generator=generator).double()
    return twin(model, (1, found.inputs)).outputs(case.lower + (case.upper - case.lower) * share)


# Verdicts against samples --------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 3), share=st.sampled_from([-0.2, -0.01, 0.01, 0.5]), split=st.sampled_from([0, 20])
)
def test_what_is_verified_no_sample_refutes_and_what_is_refuted_is_unsafe(seed, share, split):
    """The limit lies beside the least of many samples, by a share of their range."""
    model = network(2, seed)
    y = sampled(model, prop(0.0))
    limit = float(y.min() + share * (y.max() - y.min()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEW", split)
        verdict = decide(model, prop(limit), shape=(1, 2), timeout=60)
    assert verdict.answer == ("refuted" if share > 0 else "verified") and not verdict.late
    if verdict.answer == "verified":
        assert verdict.bound > 0 and verdict.left == 0 and verdict.x is None and verdict.word == "unsat"
        assert (y[:, 0] - limit).min() >= verdict.bound
    else:
        assert (verdict.x.abs() <= 1).all() and verdict.y <= limit and verdict.word == "sat"
        assert torch.equal(twin(model, (1, 2)).outputs(verdict.x[None])[0], verdict.y)


def test_a_counterexample_lies_in_the_box_to_the_last_bit():
    """A box of which no float32 number is a point: the least value is at its ends."""
    lower, upper = 0.1, math.nextafter(math.nextafter(0.1, 1), 1)
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    model[0].weight.data, model[0].bias.data = torch.ones(1, 1), torch.zeros(1)
    verdict = decide(model, prop(-upper, (lower,), (upper,), row=-1.0), shape=(1, 1), timeout=20)
    assert verdict.answer == "refuted" and verdict.x.tolist() == [upper] == verdict.y.tolist()
    assert verdict.arithmetic == "float64"
    verdict = decide(model, prop(-upper - 1e-3, (lower,), (upper,), row=-1.0), shape=(1, 1), timeout=20)
    assert verdict.answer == "verified"


def test_what_another_implementation_denies_is_not_refuted():
    model = network()
    limit = float(sampled(model, prop(0.0)).mean())
    found = prop(limit, (-1e-3, -1e-3), (1e-3, 1e-3))
    limit = float(sampled(model, found).max()) + 1e-4
    found = prop(limit, (-1e-3, -1e-3), (1e-3, 1e-3))  # every point of the box is a counterexample
    agreeing = decide(model, found, shape=(1, 2), timeout=20, runtime=lambda x: model(x[None].float())[0])
    denying = decide(model, found, shape=(1, 2), timeout=2, runtime=lambda x: torch.tensor([limit + 1.0]))
    broken = decide(model, found, shape=(1, 2), timeout=2, runtime=lambda x: torch.tensor([math.nan]))
    assert agreeing.answer == "refuted"
    assert denying.answer == broken.answer == "unknown" and denying.x is None


def test_values_that_are_no_numbers_are_no_counterexample():
    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x)

    net = twin(Root(), (1, 1))
    case = prop(5.0, (-2.0,), (-1.0,)).cases[0]
    assert search(net, case) is None and net.confirmed(case, torch.tensor([-1.5]).double()) is None
    assert net.confirmed(prop(5.0, (1.0,), (4.0,)).cases[0], torch.tensor([5.0]).double()) is None  # outside


def test_searches_take_at_most_a_tenth_of_the_time():
    looking = Search(twin(network(), (1, 2)))
    case = prop(-100.0).cases[0]
    looking.begun -= 10
    assert looking.more(case) is None and looking.seed == 1 and looking.spent > 0
    looking.spent = 5.0
    assert looking.more(case) is None and looking.seed == 1


def test_time_that_is_up_leaves_what_is_known():
    """A sum of ReLUs minus the same sum, 0: a little below, nothing is provable in time or refuted."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    eye, signs = torch.eye(8), torch.ones(1, 16)
    signs[:, 8:] = -1
    model[0].weight.data, model[0].bias.data = torch.cat([eye, eye]), torch.full((16,), 0.1)
    model[2].weight.data, model[2].bias.data = signs, torch.zeros(1)
    found = prop(-1e-9, (-1.0,) * 8, (1.0,) * 8)
    begun = time.monotonic()
    verdict = decide(model, found, shape=(1, 8), timeout=2.0, arithmetic="real")
    assert (verdict.answer, verdict.word, verdict.late) == ("unknown", "timeout", True)
    assert 2.0 <= time.monotonic() - begun < 6 and verdict.left > 0 and verdict.domains > 0
    assert -math.inf < verdict.bound <= 0


def test_one_long_bound_is_interrupted(monkeypatch):
    monkeypatch.setattr(module, "split_inputs", lambda *args: time.sleep(30))
    begun = time.monotonic()
    verdict = decide(network(), prop(-100.0), shape=(1, 2), timeout=1.0)
    assert verdict.word == "timeout" and verdict.bound == -math.inf and verdict.left == 1
    assert time.monotonic() - begun < 10


# What is printed -----------------------------------------------------------------------------------------


def test_the_result_file_names_every_input_and_output():
    model = network()
    limit = float(sampled(model, prop(0.0)).max())
    verdict = decide(model, prop(limit), shape=(1, 2), timeout=20)
    word, rest = verdict.text().split("\n", 1)
    assert word == "sat" and rest[0] == "(" and rest[-1] == ")"
    said = {name: float(value) for name, value in re.findall(r"\(([XY]_\d+) ([^()]+)\)", rest)}
    assert list(said) == ["X_0", "X_1", "Y_0"]
    assert [said["X_0"], said["X_1"]] == verdict.x.tolist() and [said["Y_0"]] == verdict.y.tolist()
    safe = decide(model, prop(limit - 1e3), shape=(1, 2), timeout=20)
    assert safe.text() == "unsat" and safe.summary()["result"] == "unsat" and safe.summary()["x"] is None


# Published properties ------------------------------------------------------------------------------------


@DATA
def test_the_smoke_family_and_a_few_of_acas_xu_are_decided_as_published():
    measured = vnncomp.bench(family="2022_test", limit=9, timeout=60)
    assert measured["instances"] == measured["decided"] == 5 and measured["contradictions"] == []
    assert measured["rows"][0]["unsat"] == 4 and measured["rows"][0]["against_disputed"] == 0
    folder = FAMILIES / "2022_acasxu"
    for net, spec, word in [("1_1", 3, "unsat"), ("5_3", 4, "unsat"), ("3_1", 2, "sat")]:
        onnx = folder / f"onnx/ACASXU_run2a_{net}_batch_2000.onnx.gz"
        verdict = decided(str(onnx), folder / f"vnnlib/prop_{spec}.vnnlib.gz", timeout=60)
        assert verdict.word == word
        if word == "sat":
            shape = input_shape(read(onnx))
            runtime = onnx_runtime(onnx, shape)(verdict.x)
            assert shape == (1, 1, 1, 5)
            assert torch.allclose(runtime, verdict.y, atol=1e-4) and len(verdict.x) == 5


# Nonsense ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence(tmp_path):
    model = network()
    for seconds in (0, -1, math.nan, math.inf):
        with pytest.raises(BadInput, match="a timeout of .* cannot be kept"):
            decide(model, prop(0.0), shape=(1, 2), timeout=seconds)
    with pytest.raises(DoesNotFit, match="speaks of 3 inputs, the network has 2"):
        decide(model, prop(0.0, (0.0,) * 3, (1.0,) * 3), shape=(1, 2))
    with pytest.raises(DoesNotFit, match="speaks of 2 outputs, the network has 1"):
        decide(model, Property(prop(0.0).cases, 2, 2), shape=(1, 2))
    with pytest.raises(BadInput, match="unknown arithmetic 'float16'"):
        decide(model, prop(0.0), shape=(1, 2), arithmetic="float16")
    (tmp_path / "a.vnnlib").write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)"
        "(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= Y_0 1))"
    )
    with pytest.raises(BadInput, match="digits-cnn: .* give a .onnx or .onnx.gz file"):
        decided("digits-cnn", tmp_path / "a.vnnlib")
    with pytest.raises(BadInput, match="there is no such file"):
        decided("digits-cnn", tmp_path / "none.vnnlib")


@DATA
def test_families_that_are_none_are_named():
    with pytest.raises(BadInput, match="unknown family '2022_acas'; did you mean '2022_acasxu'"):
        vnncomp.bench(family="2022_acas")
    with pytest.raises(BadInput, match="a limit of 0"):
        vnncomp.bench(family="2022_test", limit=0)
