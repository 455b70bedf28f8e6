"""The quick reproduction of double rounding reaches its bars, and a switch of ResNet-20 its time."""

from netweight.reproduce.double_rounding import reproduce, switching


def test_quick():
    claim = reproduce(quick=True)
    assert [bar.name for bar in claim.bars] == ["points lost at 2 bits", "mean |ds|, 2 bits / 8 bits"]
    assert all(bar.passed for bar in claim.bars), claim.bars
    assert claim.figures["accuracy"]["float"] > 0.97


def test_the_switch_of_a_folder():
    (bar,) = switching().bars
    assert (bar.bar, bar.direction) == (0.05, "at most")
    assert bar.measured < 0.5  # the time itself is measured where nothing else runs
