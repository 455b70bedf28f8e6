"""Tables fit 80 columns and leave nothing out, whatever the names are."""

import math

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from netweight.core import catalogue
from netweight.core.plan import Option, Plan
from netweight.core.result import Evidence, Row
from netweight.report import table

NAN = math.nan
ROWS = [
    Row("cost", "file size", 120000, 17200, NAN, NAN, 0, "counted", "counted", "bytes"),
    Row("worst found", "accuracy under attack", 0.94, 0.93, 0.9, 0.95, 200, "pgd", "float32", "share"),
    Row("average", "accuracy", 0.9833, 0.9778, 0.9608, 0.9888, 540, "counted", "float32", "share"),
]


def drawn(thing) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(thing)
    console.file.close()
    return console.export_text()


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_evidence_is_grouped_with_intervals_and_units():
    text = drawn(table.evidence(Evidence(ROWS)))
    assert text.index("average") < text.index("worst found") < text.index("cost")
    assert "0.9608 to 0.9888" in text
    assert "file size (bytes)" in text
    assert "(share)" not in text
    assert "nan" not in text


@given(
    names=st.lists(
        st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1), max_size=5, unique=True
    ),
    bits=st.floats(1, 32),
)
def test_a_plan_names_every_layer_in_80_columns(names, bits):
    options = {
        n: Option(n, "rtn", {"bits": 4, "group": 128}, {"bits": 100 * bits, "weights": 100}, 0.5)
        for n in names
    }
    text = drawn(table.plan(Plan(options)))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("rtn(bits=4") >= len(names)
    if names:
        assert text.count(f"{bits:.3g}") >= len(names) + 1
    if len(names) == 1:
        assert squeezed(names[0])[:6] in squeezed(text)


def test_the_catalogue_shows_every_slug_in_one_piece():
    lines = [
        {
            "slug": s.slug,
            "title": s.title * 5,
            "venue": s.venue,
            "year": s.year,
            "room": s.room,
            "state": "not run yet",
        }
        for s in catalogue.SYSTEMS
    ]
    text = drawn(table.catalogue(lines))
    assert all(len(line) <= 80 for line in text.splitlines())
    for system in catalogue.SYSTEMS:
        assert system.slug in text.split()
    assert text.count("compression/") == 1


def test_bars_say_what_is_not_reached():
    bar = {"name": "ratio", "mean": None, "std": 0.25, "bar": 1.5, "direction": "at least", "passed": False}
    text = drawn(table.bars({"bars": [bar, {**bar, "mean": "inf", "passed": True}]}))
    assert text.count("at least 1.5") == 2
    assert "NO" in text
    assert "yes" in text
    assert "inf" in text
