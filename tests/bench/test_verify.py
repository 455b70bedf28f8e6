"""The comparison of verifiers: cases, sides, turns, ratios, bars, curves. The peer itself is not needed."""

import math
import sys

import pytest
import torch

from netweight.bench import verify, verify_curves
from netweight.bench.verify import Row
from netweight.bench.verify_nets import EXAMPLES, KINDS, network, random_network
from netweight.bench.verify_sides import LONG, in_turns, side
from netweight.bench.verify_worker import described, read_case, small_case
from netweight.core.errors import BadInput
from netweight.core.perturbation import Linf
from netweight.verification.bounds import bounds, margins


@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_a_random_network_follows_its_seed_and_gives_ten_outputs(seed):
    (model, shape), (again, _) = random_network(seed), random_network(seed)
    x = torch.rand(3, *shape)
    assert model(x).shape == (3, 10)
    assert torch.equal(model(x), again(x))
    assert sum(p.numel() for p in model.parameters()) != sum(
        p.numel() for p in random_network(seed + len(KINDS))[0].parameters()
    )
    kinds = {type(layer).__name__ for layer in model.modules()}
    expected = {"mlp": "Linear", "conv": "Conv2d", "residual": "Residual", "norm": "BatchNorm2d"}
    assert expected[KINDS[seed % len(KINDS)]] in kinds


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_takes_its_images(name):
    assert network(name)(torch.rand(2, *EXAMPLES[name].shape)).shape == (2, 10)


def test_a_case_comes_back_as_it_was_written(tmp_path):
    request = verify.random_case(3, tmp_path / "case.npz")
    case = read_case(request["case"], request["network"], request["eps"])
    model, _ = random_network(3)
    assert torch.equal(case.network(case.x), model(case.x))
    labels = model(case.x).argmax(1)
    assert torch.equal(case.objective.double(), margins(labels, 10))
    assert 0.01 <= case.eps <= 0.1
    assert small_case().objective.shape == (1, 9, 10)


def test_our_side_answers_what_bounds_says_and_goes_on_after_a_mistake(tmp_path):
    request = verify.random_case(1, tmp_path / "case.npz")
    case = read_case(request["case"], request["network"], request["eps"])
    with side(None) as (about, ask):
        assert about["name"].startswith("netweight")
        wrong = ask({**request, "method": "no", "do": "time"})
        found = ask({**request, "method": "ibp", "do": "time"})
        rigorous = ask({**request, "method": "ibp:float32", "do": "time"})
        grown = ask({**request, "method": "ibp", "do": "memory"})
    assert wrong["error"].startswith("BadInput: unknown method")
    assert found["seconds"] > 0
    expected = bounds(case.network, case.x, Linf(case.eps), objective=case.objective, method="ibp")
    assert torch.allclose(torch.tensor(rigorous["lower"]).double(), expected.lower, atol=1e-6)
    assert (torch.tensor(found["lower"]).double() >= expected.lower - 1e-6).all()
    assert 0 <= grown["bytes"] < 1 << 28


def test_a_peer_that_cannot_start_is_named_in_one_sentence():
    for python, words in [("/no/such/python", "No such file"), (sys.executable, "auto_LiRPA")]:
        with pytest.raises(BadInput, match=words) as caught, side(python):
            pass
        assert python in str(caught.value)


def test_data_that_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="autolirpa_mnist_fc_3layer.pth"):
        verify.bench(random=0)


def test_an_error_without_a_text_says_where_it_was():
    for error, words in [
        (AssertionError(), "AssertionError: in <genexpr> of test_verify.py"),
        (OSError("a\nb"), "OSError: a b"),
    ]:
        with pytest.raises(type(error)) as caught:
            (_ for _ in ()).throw(error)
        assert described(caught.value) == words


def ways(*seconds_of_each, calls):
    """One way for each list of seconds, which notes who was asked."""

    def way(index, seconds):
        def ask():
            calls.append(index)
            return {"seconds": next(seconds), "lower": [[0.0]]}

        return ask

    return {str(i): way(i, iter(values)) for i, values in enumerate(seconds_of_each)}


def test_turns_alternate_after_a_warm_up_and_give_the_median():
    calls = []
    found = in_turns(ways([9.0, 1.0, 2.0, 6.0], [9.0, 3.0, 3.0, 3.0], calls=calls), 3)
    assert calls == [0, 1] * 4
    assert (found["0"]["seconds"], found["0"]["runs"], found["1"]["seconds"]) == (2.0, 3, 3.0)


@pytest.mark.parametrize(("seconds", "runs"), [(LONG - 1, 7), (LONG + 1, 3), (3 * LONG + 1, 1)])
def test_long_runs_are_fewer_and_the_first_counts_then(seconds, runs):
    found = in_turns(ways([seconds] * 8, [0.1] * 8, calls=[]), 7)
    assert found["0"]["runs"] == found["1"]["runs"] == runs
    assert (found["0"]["seconds"], found["1"]["seconds"]) == (seconds, 0.1)


def test_a_side_that_fails_is_asked_once_and_the_other_goes_on():
    asked = []

    def fails():
        asked.append(1)
        return {"error": "AssertionError"}

    found = in_turns({"ours": lambda: {"seconds": 1.0, "lower": [[0.0]]}, "peer": fails}, 5)
    assert len(asked) == 1
    assert found["peer"] == {"error": "AssertionError"}
    assert found["ours"]["runs"] == 5


def test_a_row_holds_ratio_and_shortfalls(monkeypatch):
    monkeypatch.setattr(verify, "memory", lambda *args: {"bytes_ratio": 0.5})
    lower = {"ours": [[1.0, 3.0]], "peer": [[2.0, 2.5]]}
    seconds = {"ours": 0.2, "peer": 0.4}
    asks = {name: lambda request, n=name: {"seconds": seconds[n], "lower": lower[n]} for name in lower}
    row = verify.compared(Row("kw_mnist", 1, 0.1, {"crown": 50.0}), {}, "crown", asks, "python", 3)
    assert row["ratio"] == pytest.approx(0.5)
    assert row["shortfall"] == pytest.approx(0.25)
    assert row["shortfall_of_one"] == pytest.approx(1.0)
    assert (row["ours_ms"], row["brief_ms"], row["ours_least"]) == (200.0, 50.0, 1.0)
    assert "float64_ms" in row
    assert row["bytes_ratio"] == 0.5


def rows(*ratios, method="crown"):
    same = {"network": "kw_mnist", "method": method, "peer_ms": 1.0, "shortfall": 0.0, "bytes_ratio": 1.0}
    return [{**same, "ratio": ratio} for ratio in ratios]


def test_bars_tell_reached_from_not_reached():
    def held(table, agreement=None):
        return {bar.name: bar.passed for bar in verify.bars(table, agreement)}

    fast = held(rows(0.2, 0.9))
    assert all(fast.values())
    slow = held(rows(0.2, 1.1))
    assert slow["crown time / peer's, geometric mean"]
    assert not slow["crown time / peer's, worst row"]
    assert not held(rows(0.5, 0.6))["crown time / peer's, geometric mean"]
    assert not held(rows(0.41, method="alpha-crown"))["alpha-crown time / peer's, geometric mean"]
    loose = [{**rows(0.1)[0], "shortfall": 2e-3, "bytes_ratio": 1.01}]
    assert not held(loose)["lower bound below the peer's, worst row"]
    assert not any(passed for name, passed in held(loose).items() if name.startswith("peak memory"))
    only_peer = [{"network": "kw_mnist", "method": "crown", "peer_ms": 1.0, "ours_error": "..."}]
    assert not any(held(only_peer).values())
    net = {"network": "resnet20", "method": "crown"}
    assert all(held([{**net, "ours_ms": 119e3, "ours_lower": 7.95}]).values())
    assert not any(held([{**net, "ours_ms": 121e3, "ours_lower": 7.85}]).values())
    assert not any(held([{**net, "ours_error": "..."}]).values())
    partly = {"within 1e-4 or better": 199, "networks": 200}
    assert held([], partly) == {"random networks within 1e-4 or better": False}


def test_the_slope_is_the_exponent_of_the_larger_half():
    sizes = [2, 4, 8, 16]
    assert verify_curves.slope(sizes, [100.0, 1.0, 64.0 * 3, 256.0 * 3]) == pytest.approx(2.0)


def test_curves_are_measured_and_drawn(tmp_path):
    sweeps = {"width": (8, 16), "depth": (1, 2), "specifications": (2, 4)}
    found = verify_curves.curves(sweeps=sweeps, methods=("ibp", "crown"), runs=1)
    assert [(one["against"], one["method"]) for one in found] == [
        (a, m) for a in sweeps for m in ("ibp", "crown")
    ]
    assert all(value > 0 for one in found for value in one["ms"])
    assert all(math.isfinite(one["slope"]) for one in found)
    verify_curves.draw(found, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
