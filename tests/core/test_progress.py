"""Bars: silent by default, never on stdout, no threads, the items untouched."""

import io
import threading

import pytest

from netweight.core.progress import doing, shown, steps


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_library_call_is_silent_and_gives_every_item(capfd):
    assert list(steps(range(5), "work")) == [0, 1, 2, 3, 4]
    with doing("work", 3) as advance:
        advance(2)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_shown_before_patience_is_over():
    for stream in (Terminal(), io.StringIO()):
        with shown(stream, patience=60):
            list(steps(range(100), "quick work"))
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_title_and_count_and_no_thread(capfd):
    stream, before = Terminal(), threading.active_count()
    with shown(stream, patience=0):
        for _ in steps(range(7), "rounding [bold]layers"):
            assert threading.active_count() == before
        assert "rounding [bold]layers" in stream.getvalue()
        assert "1/7" in stream.getvalue()
    assert threading.active_count() == before
    assert capfd.readouterr() == ("", "")


def test_a_log_gets_first_and_last_count_as_lines():
    stream = io.StringIO()
    with shown(stream, patience=0):
        list(steps((n for n in range(40)), "rounding", total=40))
    lines = stream.getvalue().splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["rounding: 1/40", "rounding: 40/40"]


def test_unknown_length_and_nesting_and_a_raise_inside():
    stream = Terminal()
    with shown(stream, patience=0):
        with pytest.raises(ZeroDivisionError):
            for _ in steps(iter([1, 2]), "outer"):
                for _ in steps([1, 2], "inner"):
                    1 / 0  # noqa: B018
        assert list(steps([1], "after")) == [1]
        with doing("by hand", 9) as advance:
            advance(4)
        assert "4/9" in stream.getvalue()
    assert list(steps([1], "outside")) == [1]
    assert "outside" not in stream.getvalue()
    assert "after" in stream.getvalue()


def test_stderr_is_the_stream_that_is_current(capsys):
    with shown(patience=0):
        list(steps([1], "on stderr"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "on stderr: 1/1" in err
