"""Schedules against all there are, against the integer programme, in the simulator and on real bytes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, ImpossibleBudget
from netweight.core.graph import capture, evaluate
from netweight.deployment.scratchpad.cosma import _alone, apart, cosma, divided, windows
from netweight.deployment.scratchpad.exhaustive import cheapest, random_workload
from netweight.deployment.scratchpad.orders import belady, greedy, lru, topological
from netweight.deployment.scratchpad.place import by_programme, first_fit, repaired
from netweight.deployment.scratchpad.programme import solved
from netweight.deployment.scratchpad.replay import Impossible, execute, replay
from netweight.deployment.scratchpad.search import Machine, bits, members, search
from netweight.deployment.scratchpad.workload import (
    Schedule,
    Stay,
    Workload,
    relabelled,
    schedule_of,
    workload,
)
from netweight.models.branching import Dense, Encoder, Inception, Wired
from netweight.models.trained import seeded
from netweight.testing import tiny_model, tiny_task

SIZES = st.sampled_from([1.0, 1.1, 1.3, 1.7])
quick = settings(deadline=None, max_examples=25)


def room(work: Workload, share: float) -> int:
    return int(share * work.least)


@quick
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**20), SIZES)
def test_the_best_of_all_schedules(operators, back, seed, share):
    work = random_workload(operators, back, seed)
    memory = room(work, share)
    found = cosma(work, memory)
    best = cheapest(work, memory)
    assert found.bound <= best
    assert found.cut or found.traffic == best
    assert replay(work, found.schedule, memory).traffic == found.traffic


@pytest.mark.parametrize("seed", range(3))
def test_the_integer_programme_agrees(seed):
    work = random_workload(9, 4, seed)
    found, by_hand = cosma(work, work.least), cosma(work, work.least, method="milp")
    assert (found.traffic, found.proven) == (by_hand.traffic, by_hand.proven) == (by_hand.bound, True)
    replay(work, by_hand.schedule, work.least)


def test_the_integer_programme_on_its_own_and_with_the_order_fixed():
    work = random_workload(8, 5, 3)
    free, said = solved(work, work.least)
    assert said.status == "optimal" and free is not None
    assert free.traffic(work) == cheapest(work, work.least)
    assert said.value + sum(work.passing) == pytest.approx(free.traffic(work))
    fixed, _ = solved(work, work.least, order=topological(work))
    assert fixed is not None and fixed.order == topological(work)
    known = belady(work, topological(work), work.least).traffic(work)
    assert free.traffic(work) <= fixed.traffic(work) <= known


@quick
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 2**20), SIZES)
def test_laws_of_schedules(operators, back, seed, share):
    work = random_workload(operators, back, seed)
    memory = room(work, share)
    whole = cosma(work, memory, states=2000)
    parts = cosma(work, memory, method="divide", window=5)
    baselines = [rule(work, order(work), memory) for rule in (lru, belady) for order in (topological, greedy)]
    assert work.compulsory <= whole.bound <= whole.traffic
    assert parts.bound <= whole.traffic
    assert whole.bound <= parts.traffic
    for found in (whole, parts):
        played = replay(work, found.schedule, memory)
        assert (played.traffic, played.peak <= memory) == (found.traffic, True)
    assert whole.cut or all(whole.traffic <= one.traffic(work) for one in baselines)
    assert all(max(one.occupied(work)) <= memory for one in baselines)


@quick
@given(st.integers(2, 14), st.integers(0, 2**20))
def test_more_memory_never_costs_and_enough_costs_nothing(operators, seed):
    work = random_workload(operators, 5, seed)
    machines = [Machine(work, room(work, share)) for share in (1.0, 1.2, 1.5)] + [
        Machine(work, sum(work.sizes))
    ]
    costs = [search(m, m.start(), bits(range(work.n))).bound for m in machines]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0
    assert cosma(work, sum(work.sizes)).traffic == work.compulsory


@quick
@given(st.integers(2, 12), st.integers(0, 2**20))
def test_names_of_operators_and_operators_of_no_bytes_change_nothing(operators, seed):
    work = random_workload(operators, 4, seed)
    draw, done, order = random.Random(seed), set(), []
    while len(order) < work.n:
        order.append(draw.choice([i for i in range(work.n) if i not in done and work.before[i] <= done]))
        done.add(order[-1])
    costs = []
    nothing = Workload(
        (*work.names[: work.n], "nothing", *work.names[work.n :]),
        (*(tuple(t + (t >= work.n) for t in read) for read in work.reads), (0,)),
        (*work.sizes[: work.n], 0, *work.sizes[work.n :]),
        work.outputs | {work.n} if work.users[0] else work.outputs,
    )
    for other in (work, relabelled(work, order)):
        machine = Machine(other, work.least)
        costs.append(search(machine, machine.start(), bits(range(other.n))).bound)
    assert costs[0] == costs[1]
    if work.users[0]:
        memory = sum(work.sizes)
        assert cosma(nothing, memory).traffic == cosma(work, memory).traffic


def test_it_cannot_be_done_in_less_than_the_largest_step():
    work = random_workload(10, 4, 1)
    assert work.least == max(work.need(i) for i in range(work.n))
    cosma(work, work.least)
    for method in ("search", "milp", "divide"):
        with pytest.raises(ImpossibleBudget, match=f"the smallest possible memory is {work.least} bytes"):
            cosma(work, work.least - 1, method=method)
    with pytest.raises(BadInput, match="did you mean 'search'"):
        cosma(work, work.least, method="serach")


def by_hand() -> Workload:
    """x (4) -> a (4); a -> b (4), c (4); (b, c) -> e (2); (e, a) -> f (1): a waits."""
    return Workload(
        ("a", "b", "c", "e", "f", "x"),
        ((5,), (0,), (0,), (1, 2), (3, 0)),
        (4, 4, 4, 2, 1, 4),
        frozenset({4}),
    )


def test_by_hand():
    work = by_hand()
    assert (work.least, work.compulsory) == (10, 5)
    # while e is made, b + c + e fill ten bytes: a is written and loaded again, 4 + 4 bytes
    found = cosma(work, 12)
    assert (found.traffic, found.avoidable, found.proven) == (13, 8, True)
    # in ten bytes b has to go as well while c is made from a
    assert cosma(work, 10).avoidable == 16
    assert cosma(work, 14).avoidable == 0
    assert belady(work, topological(work), 12).traffic(work) == 13


def test_the_simulator_finds_what_is_wrong():
    work = by_hand()
    good = cosma(work, 14).schedule
    assert replay(work, good, 14).traffic == 5

    def changed(k: int, **fields: int) -> Schedule:
        stays = [Stay(**{**vars(s), **fields}) if j == k else s for j, s in enumerate(good.stays)]
        return Schedule(good.order, tuple(stays))

    first = next(k for k, s in enumerate(good.stays) if s.tensor == 0)
    other = next(s for s in good.stays if s.tensor == good.order[1])
    with pytest.raises(Impossible, match="are those of"):
        replay(work, changed(first, address=other.address), 14)
    with pytest.raises(Impossible, match=r"not resident: \['a'\]"):
        replay(work, changed(first, stop=2), 14)
    with pytest.raises(Impossible, match="bytes 12 to 16 of 14"):
        replay(work, changed(first, address=12), 14)
    with pytest.raises(Impossible):
        replay(work, Schedule(good.order[:-1], good.stays[:-1]), 14)
    never_made = Schedule((1, 0, 2, 3, 4), (Stay(0, 0, 5, 0), *good.stays[2:]))
    with pytest.raises(Impossible):
        replay(work, never_made, 14)


def test_addresses_by_first_fit_by_programme_and_by_cutting():
    sizes = (2, 1, 2, 1, 3)
    work = Workload(tuple("abcde"), ((), (0,), (1,), (2,), (3,)), sizes, frozenset({4}))
    stays = [Stay(0, 0, 2), Stay(1, 1, 3), Stay(2, 2, 4), Stay(3, 3, 5), Stay(4, 4, 5)]
    for found in (first_fit(work, stays, 4)[0], by_programme(work, stays, 4)):
        assert found is not None
        replay(work, Schedule((0, 1, 2, 3, 4), tuple(found)), 4)
    assert first_fit(work, stays, 2)[0] is None and by_programme(work, stays, 2) is None
    # b lies between what comes and goes: in 6 bytes the schedule has no addresses until something is cut
    for seed in range(40):
        work = random_workload(14, 6, seed)
        tight = belady(work, topological(work), work.least)
        mended = repaired(work, tight, work.least)
        assert replay(work, mended, work.least).traffic == mended.traffic(work) >= tight.traffic(work)


def test_windows_cover_the_order_and_bounds_hold():
    work = random_workload(30, 5, 8)
    order = greedy(work)
    parts = windows(work, order, 8, shift=3)
    assert [i for part in parts for i in part] == list(order)
    assert max(map(len, parts)) <= 8
    memory = room(work, 1.1)
    found = divided(work, memory, belady(work, order, memory), window=8)
    machine = Machine(work, memory)
    best = search(machine, machine.start(), bits(range(work.n)))
    assert best.proven
    low = apart(work, memory, order, window=8)
    assert 0 <= low <= best.bound <= found.traffic(work) - work.compulsory


def test_the_bound_of_windows_counts_nothing_twice():
    for seed in range(60):
        work = random_workload(12, 6, seed)
        machine = Machine(work, work.least)
        best = search(machine, machine.start(), bits(range(work.n))).bound
        for window in (3, 5):
            assert apart(work, work.least, topological(work), window) <= best


def test_a_window_alone_keeps_only_what_is_counted_there():
    work = random_workload(12, 6, 1)
    part = range(4, 9)
    counted = {4, 6}
    alone = _alone(work, part, counted)
    assert alone.n == 5 and [alone.need(k) for k in range(5)] == [work.need(i) for i in part]
    kept = {alone.names[t] for t in range(len(alone.sizes)) if alone.users[t] and not alone.private(t)}
    assert kept == {work.names[t] for t in counted if set(work.users[t]) & set(part)}


def test_a_search_that_stops_early_still_gives_a_bound():
    work = random_workload(16, 7, 50)
    machine = Machine(work, work.least)
    best = search(machine, machine.start(), bits(range(work.n)))
    for limit in (1, 5, 20):
        early = search(machine, machine.start(), bits(range(work.n)), limit=limit)
        assert early.bound <= best.bound
    assert not early.proven and early.moves is None


def test_what_keeps_the_states_few_loses_no_best_schedule(monkeypatch):
    def best(work: Workload) -> int:
        machine = Machine(work, work.least)
        return search(machine, machine.start(), bits(range(work.n))).bound

    works = [random_workload(9, back, seed) for seed in range(60) for back in (3, 6)]
    pruned = [best(work) for work in works]
    monkeypatch.setattr(Machine, "free_move", lambda self, state, among: None)
    monkeypatch.setattr(Machine, "ahead", lambda self, state, among: 0)
    monkeypatch.setattr(Machine, "dominates", lambda self, one, other: one == other)
    assert [best(work) for work in works] == pruned


@settings(deadline=None)
@given(st.sets(st.integers(0, 90)))
def test_sets_as_bits(numbers):
    assert set(members(bits(numbers))) == numbers


def test_stays_end_with_the_last_touch():
    work = by_hand()
    everything = [set(range(6))] * 5
    stays = {(s.tensor, s.start, s.stop) for s in schedule_of(work, range(5), everything).stays}
    assert (5, 0, 1) in stays and (0, 0, 5) in stays and (1, 1, 4) in stays
    without = [{0, 5}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {3, 0, 4}]
    stays = {(s.tensor, s.start, s.stop) for s in schedule_of(work, range(5), without).stays}
    assert {(0, 0, 3), (0, 4, 5)} <= stays


NETS = {
    "inception": lambda: Inception(1, 4),
    "dense": lambda: Dense(3, 4),
    "wired": lambda: Wired(nodes=6, width=4),
    "tiny": tiny_model,
}


@pytest.mark.parametrize("name", NETS)
def test_the_network_runs_inside_the_memory(name):
    with seeded(1):
        net = NETS[name]().eval()
    x = (
        tiny_task().test.x[:1]
        if name == "tiny"
        else torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    )
    graph = capture(net, x)
    work = workload(graph)
    for share in (1.0, 1.4):
        memory = room(work, share)
        found = cosma(work, memory)
        assert found.proven
        assert replay(work, found.schedule, memory).traffic == found.traffic
        assert torch.equal(execute(graph, work, found.schedule, memory, x), evaluate(graph, x))


def test_attention_runs_inside_the_memory():
    with seeded(2):
        net = Encoder(width=8).eval()
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = capture(net, x)
    work = workload(graph)
    found = cosma(work, work.least)
    out = execute(graph, work, found.schedule, work.least, x)
    torch.testing.assert_close(out, evaluate(graph, x), rtol=1e-5, atol=1e-6)


def test_a_workload_counts_what_lies_in_memory():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    graph = capture(net.eval(), torch.zeros(1, 1, 4, 4))
    work = workload(graph)
    assert work.n == 2  # norm and ReLU run with the convolution, the view is none
    assert work.sizes[:2] == (4 * 32, 4 * 3)
    assert work.compulsory == 4 * (16 + 18 + 2 + 4 * 2 + 32 * 3 + 3 + 3)
    assert workload(graph, fuse=False).n == 4


def test_bad_workloads_are_named():
    with pytest.raises(BadInput, match="no operator to schedule"):
        Workload(("x",), (), (1,), frozenset())
    with pytest.raises(BadInput, match="operator 0 reads"):
        Workload(("a", "b"), ((1,), ()), (1, 1), frozenset())
    with pytest.raises(BadInput, match="sizes are bytes"):
        Workload(("a",), ((),), (-1,), frozenset())
    with pytest.raises(BadInput, match="from no graph"):
        execute(capture(nn.Linear(2, 2), torch.zeros(1, 2)), by_hand(), Schedule((), ()), 1)
