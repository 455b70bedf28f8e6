"""The bench of running: its rows, its ratios and its bars on tiny layers and a tiny network."""

import time

import pytest
import torch
from torch import nn

from netweight.bench import run, run_decode, run_int8, run_turns
from netweight.compression.quantize.rtn import RTN, encode
from netweight.core.task import Data, Task


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(96, 3, 8, 8, generator=generator)
    y = model.eval()(x).argmax(1)
    return model, Task(Data(x[:32], y[:32]), Data(x[32:], y[32:]))


def test_rows_and_bars_have_what_they_say(monkeypatch):
    monkeypatch.setattr(run_decode, "SPAN", 1 << 16)
    found = run.bench(
        sizes=((64, 32), (128, 64)),
        runs=4,
        threads=(1,),
        group=32,
        batches=(1, 4),
        buffer=1 << 16,
        network=network(),
    )
    first, second, accuracy, one, four = found["rows"]
    assert (first["layer"], second["layer"]) == ("64 x 32", "128 x 64")
    for row, weights in ((first, 64 * 32), (second, 128 * 64)):
        assert row["int4_ms"] >= row["int4_least_ms"] > 0 and row["decoded_each_call_ms"] > 0
        assert row["float32_bound_ms"] == pytest.approx(4e3 * weights / row["gigabytes_per_second"] / 1e9)
        share = row["int4_bound_ms"] / row["float32_bound_ms"]
        assert 1 / 8 < share < 1 / 4  # 4-bit codes, scales and zeros
        assert row["int4_over_bound"] == pytest.approx(row["int4_ms"] / row["int4_bound_ms"])
        assert (
            0 < row["int4_relative_difference"] < 0.02 and 0 < row["onnxruntime_relative_difference"] < 0.03
        )
        assert 0.05 < row["float32_over_int4"] < 50 and 0.05 < row["float32_over_onnxruntime"] < 50
    assert accuracy["images"] == 64 and accuracy["float32"] == 1.0 and accuracy["from_simulation"] < 1e-5
    assert min(accuracy["ours"], accuracy["onnxruntime_default"], accuracy["onnxruntime_unsigned"]) > 0.9
    assert accuracy["from_rounded_inputs_alone"] < 0.1
    assert (one["batch"], four["batch"], one["threads"]) == (1, 4, 1)
    held = {bar["name"]: bar for bar in found["bars"]}
    assert len(held) == 2  # layers that small have no bar
    fastest = min(four["onnxruntime_default_over_ours"], four["onnxruntime_unsigned_over_ours"])
    bar = held["ONNX Runtime's own int8 (the faster) / ours, batch 4"]
    assert bar["measured"] == fastest and bar["bar"] == 1.0 and bar["reached"] == (fastest >= 1)


def test_large_layers_on_one_thread_have_a_bar():
    row = {"layer": "2048 x 4096", "inputs": 2048, "outputs": 4096, "threads": 1, "float32_over_int4": 2.9}
    (bar,) = run_decode.bars([row, row | {"threads": 2}, row | {"inputs": 2047}])
    assert bar.measured == 2.9 and bar.bar == 3.0 and not bar.passed


def test_every_way_takes_every_turn_with_its_next_copy():
    calls = []
    ways = {
        name: [lambda what=what: calls.append(what) for what in (f"{name}0", f"{name}1")] for name in "ab"
    }
    seconds = run_turns.in_turns(ways, 5)
    assert [len(v) for v in seconds.values()] == [5, 5]
    turns = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert turns == [{f"a{t % 2}", f"b{t % 2}"} for t in range(5 + run_turns.WARM_UP)]
    assert len({calls[i][0] for i in range(0, len(calls), 2)}) == 2  # either is first at times


def test_a_ratio_is_taken_turn_by_turn():
    assert run_turns.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == 2.0
    with pytest.raises(ValueError, match="longer"):
        run_turns.ratio([1.0], [1.0, 2.0])
    slow, quick = {"slow": [lambda: time.sleep(0.004)]}, {"quick": [lambda: time.sleep(0.001)]}
    seconds = run_turns.in_turns(slow | quick, 5)
    assert 1.5 < run_turns.ratio(seconds["slow"], seconds["quick"]) < 6
    shown = run_turns.milliseconds(seconds)
    assert shown["slow_ms"] >= shown["slow_least_ms"] >= 4 > shown["quick_least_ms"] >= 1


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), run_turns.on_threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_product_of_onnx_runtime_is_the_layer():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    form = encode(weight, RTN(bits=4, group=32))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    (found,) = run_turns.session(run_decode.product(form), 1).run(None, {"x": x.numpy()})
    wanted = x @ form.decode().T
    assert 0 < (torch.from_numpy(found) - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_files_are_of_the_same_network():
    model, task = network()
    files, exported = run_int8.written(model, task)
    assert [*files] == ["float32", "ours", *run_int8.PEERS] and exported.same
    with torch.no_grad():
        wanted = model(task.test.x)
    for name, content in files.items():
        (found,) = run_turns.session(content, 1).run(None, {"input": task.test.x.numpy()})
        close = 1e-5 if name == "float32" else 0.05
        assert (torch.from_numpy(found) - wanted).abs().max() < close * max(1.0, float(wanted.abs().max())), (
            name
        )
