"""What is counted: files against files, memory and multiply-adds by hand, time in turns."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Compressed, assemble, weighted
from netweight.core.plan import Plan
from netweight.core.result import Evidence
from netweight.core.task import Data, Task
from netweight.evidence import cost


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def task() -> Task:
    data = Data(torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    return Task(data, data)


def packed(model: nn.Module, bits: int = 4) -> Compressed:
    change = rtn(model, task().blind(), weighted(model), RTN(bits=bits))
    return assemble(model, change, Plan({}))


def test_file_sizes_are_those_of_the_files(tmp_path):
    model = network()
    assert cost.float_file(model) == len(save(model.state_dict()))
    assert cost.float_file(network().double()) == cost.float_file(model)
    assert cost.disk(network().half(), None) == len(save(network().half().state_dict()))
    odd = {
        "é": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(2, 0),
        "a": torch.zeros((), dtype=torch.bool),
    }
    assert cost.file_bytes(odd) == len(save(odd))
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert cost.float_file(tied) == len(save({"0.weight": tied[0].weight.detach()}))
    small = packed(model)
    small.save(tmp_path / "small")
    written = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    assert cost.disk(small.model, small) == written


def test_bits_and_bit_operations_by_hand():
    model = network()
    small = packed(model)
    conv, linear = (small.packed[name].bits() for name in ("0", "4"))
    before, after = cost.stored_bits(model, small)
    assert before == 32 and after == pytest.approx((conv + linear) / (72 + 320))
    x = task().test.x[:1]
    assert cost.multiply_adds(model, x) == {"0": 4 * 16 * 18, "4": 320}
    macs, before, after = cost.bit_operations(model, small, x)
    assert macs == 1152 + 320 and before == macs * 32 * 32
    assert after == pytest.approx(1152 * 32 * conv / 72 + 320 * 32 * linear / 320)
    kept = Compressed(
        small.model, small.plan, type(small.change)({"4": small.packed["4"]}, activations={"4": Eight()})
    )
    assert cost.stored_bits(model, kept)[1] == pytest.approx((72 * 32 + linear) / 392)
    assert cost.bit_operations(model, kept, x)[2] == pytest.approx(1152 * 32 * 32 + 8 * linear)
    assert not model[0]._forward_hooks


class Eight:
    """An activation rounding as far as costs look at it."""

    bits = 8


class Chain(nn.Module):
    """Doublings; at most two results live at a time, unless all are held."""

    def __init__(self, hold: bool) -> None:
        super().__init__()
        self.hold = hold
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A multiple of x."""
        first = x * 2
        if self.hold:
            second = first * 2
            return second * 2 + 0 * first.sum()
        for _ in range(3):
            first = first * 2
        return first.view(-1).mul_(2)


def test_peak_memory_counts_what_lives_at_the_same_time():
    x = torch.ones(1, 1000)
    assert cost.peak_bytes(Chain(hold=False), x) == 40 + 2 * 4000
    assert cost.peak_bytes(Chain(hold=True), x) > 40 + 3 * 4000
    small = packed(network())
    resident = sum(t.nbytes for t in small.model.buffers()) + sum(t.nbytes for t in small.model.parameters())
    assert cost.peak_bytes(small.model, task().test.x[:1]) >= resident + 320 * 4  # the decoded weight


def test_networks_take_turns_and_the_clock_stops(monkeypatch):
    ran, first, second = [], nn.Identity(), nn.Identity()

    def timed(model, x):
        ran.append(model)
        return 0.1 if model is first else 0.3

    monkeypatch.setattr(cost, "seconds", timed)
    times = cost.in_turns(first, second, torch.zeros(1))
    assert ran == [first, second] * (cost.RUNS + cost.WARM_UP) and times.tolist() == [[0.1, 0.3]] * cost.RUNS
    clock = itertools.count(0, 100)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    assert len(cost.in_turns(first, second, torch.zeros(1))) == cost.LEAST


def test_rows_name_unit_method_and_interval(monkeypatch):
    monkeypatch.setattr(cost, "RUNS", 12)
    model = network()
    small = packed(model, bits=3)
    rows = cost.rows(model, small.model, task(), small)
    named = Evidence(rows)
    assert {row.question for row in rows} == {"cost"} and all(row.method and row.unit for row in rows)
    assert named["bytes on disk"].original == cost.float_file(model)
    assert named["stored bits per weight"].original == 32 > named["stored bits per weight"].compressed > 3
    assert named["bit operations"].compressed < named["bit operations"].original
    assert named["peak memory"].original == cost.peak_bytes(model, task().test.x[:1])
    row = named["latency, median"]
    assert row.n == 12 and 0 < row.low <= row.compressed <= row.high and "threads" in row.method
    assert row.compressed <= named["latency, 90th percentile"].compressed
    assert named["latency, 90th percentile"].high == math.inf  # twelve runs do not bound it
    plain = [row.quantity for row in cost.rows(model, small.plain(), task())]
    assert plain == ["bytes on disk", "peak memory", "latency, median", "latency, 90th percentile"]
    model.train()
    cost.rows(model, small.model, task(), small)
    assert model.training
