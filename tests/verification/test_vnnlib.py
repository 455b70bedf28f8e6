"""VNN-LIB: what a text says against its own formula, the published files, and hostile ones."""

import contextlib
import gzip

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.data.shared import shared_data
from netweight.verification import vnnlib
from netweight.verification.vnnlib import parse, read

FAMILIES = shared_data() / "vnncomp" if shared_data() else None
DECLARED = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "Y_0", "Y_1"))
BOX = "(assert (>= X_0 -4)) (assert (<= X_0 4)) (assert (>= X_1 -4)) (assert (<= X_1 4))"


def prop(body):
    return parse(f"{DECLARED} {BOX} {body}")


def unsafe(found, x, y):
    """Whether the property calls (x, y) unsafe, by its definition."""
    x, y = torch.tensor(x).double(), torch.tensor([y]).double()
    return any(
        bool((case.lower <= x).all() and (x <= case.upper).all() and case.excess(y) <= 0)
        for case in found.cases
    )


# What a formula means ------------------------------------------------------------------------------------


def whole(low, high):
    return st.integers(low, high)


VARIABLE = st.tuples(st.sampled_from("XY"), whole(0, 1))
ATOM = st.one_of(
    st.tuples(st.just("bound"), st.sampled_from(["<=", ">="]), VARIABLE, whole(-3, 3), st.booleans()),
    st.tuples(st.just("linear"), st.sampled_from(["<=", ">="]), whole(-2, 2), whole(1, 2), whole(-3, 3)),
)
FORMULA = st.recursive(
    ATOM, lambda inner: st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3))
)


def spelled(formula):
    match formula:
        case ("bound", relation, (kind, i), c, True):
            return f"({relation} {kind}_{i} {c})"
        case ("bound", relation, (kind, i), c, False):
            return f"({relation} {c}.0 {kind}_{i})"
        case ("linear", relation, a, b, c):
            return f"({relation} (+ (* {a} Y_0) (- (* {b} Y_1)) {c}) (- Y_0 (- 1) 0.5))"
        case (word, parts):
            return f"({word} {' '.join(map(spelled, parts))})"


def holds(formula, x, y):
    match formula:
        case ("bound", relation, (kind, i), c, first):
            value = (x if kind == "X" else y)[i]
            return value <= c if (relation == "<=") == first else value >= c
        case ("linear", relation, a, b, c):
            left, right = a * y[0] - b * y[1] + c, y[0] + 1 - 0.5
            return left <= right if relation == "<=" else left >= right
        case ("and", parts):
            return all(holds(part, x, y) for part in parts)
        case (_, parts):
            return any(holds(part, x, y) for part in parts)


@settings(max_examples=150, deadline=None)
@given(
    formulas=st.lists(FORMULA, min_size=1, max_size=3),
    points=st.lists(st.lists(whole(-4, 4), min_size=4, max_size=4), min_size=8, max_size=8),
)
def test_a_property_is_unsafe_exactly_where_all_of_its_assertions_hold(formulas, points):
    body = " ".join(f"(assert {spelled(formula)})" for formula in formulas)
    try:
        found = prop(body)
    except BadInput as error:
        said = str(error)
        assert "empty" in said or "says nothing about the outputs" in said or "depends on no variable" in said
        if "empty" in said:
            assert not any(all(holds(f, p[:2], p[2:]) for f in formulas) for p in points)
        return
    for point in points:
        x, y = point[:2], point[2:]
        assert unsafe(found, x, y) == all(holds(formula, x, y) for formula in formulas)


def test_numbers_are_the_nearest_float64_and_boxes_the_narrowest():
    found = prop("(assert (<= X_0 0.1)) (assert (<= X_0 0.2)) (assert (>= X_1 -1e-3)) (assert (<= Y_0 .25))")
    (case,) = found.cases
    assert case.lower.tolist() == [-4.0, -1e-3] and case.upper.tolist() == [0.1, 4.0]
    assert (found.inputs, found.outputs) == (2, 2)
    assert case.unsafe[0].rows.tolist() == [[1.0, 0.0]] and case.unsafe[0].limits.tolist() == [0.25]


def test_disjuncts_of_one_box_are_one_case_and_boxes_are_apart():
    one = prop("(assert (or (and (>= Y_0 1)) (and (<= Y_0 -1) (>= Y_1 0))))")
    assert [len(each.limits) for each in one.cases[0].unsafe] == [1, 2] and len(one.cases) == 1
    two = prop("(assert (or (and (<= X_0 0) (>= Y_0 1)) (and (>= X_0 0) (>= Y_0 2)))) ; boxes side by side")
    assert [case.upper[0].item() for case in two.cases] == [0.0, 4.0]
    assert [case.unsafe[0].limits.tolist() for case in two.cases] == [[-1.0], [-2.0]]


# Files ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(FAMILIES is None, reason="the data folder is not here")
def test_files_of_every_published_family_are_read():
    families = sorted(folder for folder in FAMILIES.iterdir() if folder.is_dir())
    assert len(families) == 25
    for family in families:
        files = sorted(family.rglob("*.vnnlib.gz"), key=lambda file: (file.stat().st_size, file.name))
        for file in {files[0], files[len(files) // 2]}:
            found = read(file)
            assert all((case.lower <= case.upper).all() for case in found.cases)
            assert {len(case.lower) for case in found.cases} == {found.inputs}
            assert all(u.rows.shape[1] == found.outputs for case in found.cases for u in case.unsafe)


@pytest.mark.skipif(FAMILIES is None, reason="the data folder is not here")
def test_a_published_property_by_hand():
    """ACAS Xu 3: clear-of-conflict, the first of five scores, must not be the least."""
    (case,) = read(FAMILIES / "2022_acasxu/vnnlib/prop_3.vnnlib.gz").cases
    assert case.lower.tolist() == [-0.303531156, -0.009549297, 0.493380324, 0.3, 0.3]
    worst, fine = torch.tensor([[0.0, 1, 1, 1, 1]]).double(), torch.tensor([[2.0, 1, 3, 3, 3]]).double()
    assert float(case.excess(worst)) == -1.0 and float(case.excess(fine)) == 1.0


def test_plain_and_packed_files_are_the_same(tmp_path):
    text = f"{DECLARED}{BOX}(assert (<= Y_0 1))"
    (tmp_path / "a.vnnlib").write_text(text)
    (tmp_path / "a.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = read(tmp_path / "a.vnnlib"), read(tmp_path / "a.vnnlib.gz")
    assert plain.cases[0].unsafe[0].limits.tolist() == packed.cases[0].unsafe[0].limits.tolist() == [1.0]


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="there is no such file"):
        read(tmp_path / "none.vnnlib")
    whole = gzip.compress(f"{DECLARED}{BOX}(assert (<= Y_0 1))".encode())
    for content in (whole[:-9], b"not packed", gzip.compress(b"\xff\xfe\x00")):
        (tmp_path / "a.vnnlib.gz").write_bytes(content)
        with pytest.raises(BadInput, match="a.vnnlib.gz: not a whole VNN-LIB text"):
            read(tmp_path / "a.vnnlib.gz")
    monkeypatch.setattr(vnnlib, "LARGEST", 100)
    (tmp_path / "a.vnnlib.gz").write_bytes(gzip.compress(b" " * 10_000))
    with pytest.raises(BadInput, match="unpacks to more than the 100 bytes"):
        read(tmp_path / "a.vnnlib.gz")


WRONG = [
    ("(assert (<= Y_7 1))", "Y_7 is not declared"),
    ("(assert (<= Z_0 1))", "'?Z_0'? is neither a number nor a variable"),
    ("(assert (<= (* Y_0 Y_1) 1))", r"\(\* Y_0 Y_1\) multiplies variables"),
    ("(assert (<= (/ 1 Y_1) 1))", r"\(/ 1 Y_1\) is no linear term"),
    ("(assert (<= Y_0 X_0))", "relates inputs to outputs"),
    ("(assert (<= X_0 X_1)) (assert (<= Y_0 1))", "relates X_0 and X_1"),
    ("(assert (< Y_0 1))", "'<' is not known"),
    ("(assert (not (<= Y_0 1)))", "'not' is not known"),
    ("(assert (<= Y_0 1e999))", "leaves the range of float64"),
    ("(assert (<= Y_0 nan))", "neither a number nor a variable"),
    ("(assert (<= Y_0 __import__))", "neither a number nor a variable"),
    ("(assert (<= Y_0))", "<= compares two terms"),
    ("(assert (<= Y_0 1) (<= Y_1 1))", "an assertion holds one formula"),
    ("(assert (<= 1 2))", "depends on no variable"),
    ("(assert Y_0)", "is no formula"),
    ("(assert (<= () 1))", "is no linear term"),
    ("(assert (<= X_0 -9)) (assert (<= Y_0 1))", "the range of X_0 is empty"),
    ("(assert (or (and (<= X_0 -9) (<= Y_0 1)) (and (>= X_1 9) (<= Y_0 2))))", "all of its boxes are empty"),
    ("(assert (<= X_0 1))", "says nothing about the outputs"),
    ("(assert (<= Y_0 1)", "1 parentheses are never closed"),
    ("(assert (<= Y_0 1)))", "was never opened"),
    ("(maximize Y_0)", "'maximize' is no command"),
    ("(declare-const Y_1 Real)", "Y_1 is declared twice"),
    ("(declare-const Y_3 Real)", "Y_2 is not declared, but Y_3 is"),
    ("(declare-const X_2 Real) (assert (<= Y_0 1))", "X_2 has no lower bound"),
    ("(declare-const W_0 Real)", "expected .declare-const X_0 Real"),
    ("(declare-const X_2 Int)", "expected .declare-const X_0 Real"),
    ("words", "words is no command"),
    ("(assert " + "(and " * 50_000, "more than 64 parentheses lie inside each other"),
    ("(assert (<= Y_0 " + "(- " * 50_000, "more than 64 parentheses lie inside each other"),
    ("(assert (or (<= Y_0 1) (>= Y_0 2)))" * 30, "multiplied out it has 1073741824 cases"),
    ("(assert (and" + " (or (<= Y_0 1) (>= Y_0 2))" * 30 + "))", "multiplied out it has 1073741824 cases"),
]


@pytest.mark.parametrize(("body", "said"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_understood_is_one_sentence(body, said):
    with pytest.raises(BadInput, match=said) as error:
        prop(body)
    assert str(error.value).startswith("the property: ") and len(str(error.value)) < 250


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="()assertXY_01<=>-+*; \nor and", max_size=80))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(BadInput):
        prop(text)
