"""STABLE: the quick reproduction, and bars that follow from accuracies."""

from netweight.data.graphs import sbm
from netweight.reproduce.stable import RATES, attacked, bars, budget, reproduce, share_of


def test_the_quick_reproduction_reaches_its_bar():
    claim = reproduce(seed=0, quick=True)
    assert claim.bars and all(bar.passed for bar in claim.bars), (claim.bars, claim.figures)


def test_bars_follow_from_accuracies():
    names = ["clean 0.0", "random 0.05", "random 0.2", "dice 0.2", *(f"metattack {r}" for r in RATES)]
    same = {name: {"gcn": 0.8, "jaccard": 0.8, "stable": 0.8} for name in names}
    assert [bar.passed for bar in bars(same)] == [True, False, False, False, True, True, False, True]
    good = {
        **same,
        "metattack 0.05": {"gcn": 0.73, "jaccard": 0.7, "stable": 0.7},
        "metattack 0.1": {"gcn": 0.68, "jaccard": 0.7, "stable": 0.74},
        "metattack 0.2": {"gcn": 0.5, "jaccard": 0.6, "stable": 0.65},
    }
    assert all(bar.passed for bar in bars(good))
    bad = {
        **good,
        "clean 0.0": {"gcn": 0.8, "jaccard": 0.8, "stable": 0.78},
        "random 0.05": {"gcn": 0.77, "jaccard": 0.8, "stable": 0.8},
        "random 0.2": {"gcn": 0.77, "jaccard": 0.8, "stable": 0.76},
        "dice 0.2": {"gcn": 0.77, "jaccard": 0.8, "stable": 0.76},
    }
    assert [bar.passed for bar in bars(bad)] == [False, True, True, True, False, False, True, False]


def test_every_graph_has_its_budget_and_smaller_ones_are_the_first_flips():
    graph = sbm(0, (3, 20, 48))
    found, before = attacked(graph, 0), {*map(tuple, graph.edges.T.tolist())}
    flips = {name: before ^ {*map(tuple, each.edges.T.tolist())} for name, each in found.items()}
    for name, each in flips.items():
        assert len(each) == 2 * budget(graph, share_of(name))
    assert flips["metattack 0.05"] < flips["metattack 0.1"] < flips["metattack 0.2"]
