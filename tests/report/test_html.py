"""The report: one file, nothing from outside, everything given escaped, every number there."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from torch import nn

from netweight.core.plan import Option, Plan
from netweight.core.result import Evidence, Row
from netweight.core.task import Data, Task
from netweight.report import html
from netweight.report.html import Example

NAN = math.nan
EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "br", "link", "input"}


def row(question: str, quantity: str, unit: str = "share") -> Row:
    return Row(question, quantity, 0.9833, 0.9778, 0.9608, 0.9888, 540, "counted", "float32", unit)


def page(**changes) -> str:
    option = Option(EVIL, "rtn", {"bits": 4}, {"bits": 400.0, "weights": 100.0}, 0.25)
    evidence = Evidence(
        rows=[row("average", EVIL), row("worst possible", "accuracy proven")],
        flipped=[3, 5],
        notes=[EVIL],
        context={"data": EVIL, "deep": {"x": 1}},
    )
    given = {"evidence": evidence, "plan": Plan({EVIL: option}), "options": [option]}
    given["examples"] = [Example("flipped", EVIL, EVIL, "8", EVIL, (), EVIL)]
    return html.render(**{**given, **changes})


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.found, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_is_whole_and_needs_nothing_from_outside():
    seen = Balance()
    text = page()
    seen.feed(text)
    assert seen.open == []
    assert not {"script", "link", "iframe", "object"} & set(seen.found)
    assert seen.found.count("svg") == 3
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_everything_given_is_escaped():
    text = page()
    assert "alert" in text
    assert "<script" not in text


def test_numbers_and_how_they_are_known_are_there():
    text = page()
    assert "98.33\N{NO-BREAK SPACE}%" in text
    assert "96.08\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}98.88\N{NO-BREAK SPACE}%" in text
    assert "counted, n = 540, float32" in text
    assert "proven: holds for every point of the set" in text
    assert "2 in all, the first 1 shown" in text
    assert "rtn(bits=4)" in text


def test_an_empty_comparison_still_is_a_page():
    text = html.render(Evidence([]), Plan(), [], [])
    assert "<svg" not in text
    assert "What it weighs" in text
    size = Row("cost", "file size", 120000, 17200, NAN, NAN, 0, "counted", "counted", "bytes")
    text = html.render(Evidence([size]), Plan(), [], [])
    assert "17\N{NARROW NO-BREAK SPACE}200" in text
    assert "file size (bytes)" in text
    assert "n = 0" not in text
    assert "nan" not in text
    latency = Row("cost", "latency", 0.0123, 0.5, NAN, NAN, 50, "timed", "measured", "seconds")
    assert "12.3\N{NO-BREAK SPACE}ms" in html.render(Evidence([latency]), Plan(), [], [])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_a_picture_is_the_image_to_the_nearest_level(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    uri = html.picture(image, -2.0, 2.0)
    back = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert back.size == (shape[2], shape[1])
    values = torch.tensor(list(back.tobytes())).reshape(shape[1], shape[2], shape[0]).permute(2, 0, 1)
    assert (values / 255 * 4 - 2 - image).abs().max() <= 4 / 255 / 2 + 1e-6


class Fixed(nn.Module):
    """Says class `said` for every input, of three."""

    def __init__(self, said: int, ndim: int = 1):
        super().__init__()
        self.said, self.ndim = said, ndim

    def forward(self, x):
        return nn.functional.one_hot(torch.full(x.shape[: self.ndim], self.said), 3).float()


def test_flipped_examples_are_shown_with_both_answers():
    x = torch.rand(20, 1, 4, 4)
    data = Data(x, torch.ones(20, dtype=torch.long), classes=("cat", "dog", "owl"), low=0.0, high=1.0)
    evidence = Evidence([], flipped=[7, 2, *range(8, 20)])
    shown = html.examples(Fixed(0), Fixed(2), Task(data, data), evidence)
    assert len(shown) == html.SHOWN
    first = shown[0]
    assert (first.title, first.before, first.after, first.truth) == ("test example 7", "cat", "owl", "dog")
    assert first.pictures == (html.picture(x[7]),)
    assert html.examples(Fixed(0), Fixed(2), Task(data, data), Evidence([])) == []


def test_inputs_that_are_no_images_are_shown_as_numbers():
    table = Data(torch.arange(12.0).reshape(3, 4))
    (shown,) = html.examples(Fixed(0), Fixed(1), Task(table, table), Evidence([], flipped=[1]))
    assert shown.text == "4 5 6 7"
    assert (shown.before, shown.after, shown.truth, shown.pictures) == ("0", "1", "", ())
    tokens = Data(torch.arange(24).reshape(2, 12), torch.arange(24).reshape(2, 12))
    (shown,) = html.examples(Fixed(0, 2), Fixed(1, 2), Task(tokens, tokens), Evidence([], flipped=[0]))
    assert shown.text == "0 1 2 3 4 5 6 7 …"
    assert shown.before == "0 0 0 0 0 0 0 0 …"


def test_inputs_found_by_attack_are_shown_beside_where_they_came_from():
    x = torch.rand(4, 1, 3, 3)
    data = Data(x, torch.ones(4, dtype=torch.long), classes=("cat", "dog", "owl"), low=0.0, high=1.0)
    item = {"example": 2, "original": 1, "compressed": 0, "moved": 0.25}
    whole = {**item, "input": x[2].tolist(), "point": (x[2] * 0.5).tolist()}
    evidence = Evidence([], context={"disagreements": [whole, item]})
    first, second = html.examples(Fixed(0), Fixed(0), Task(data, data), evidence)
    assert (first.kind, first.before, first.after, first.truth) == ("found", "dog", "cat", "dog")
    assert first.title == "test example 2, moved by at most 0.25"
    assert first.pictures == (html.picture(x[2]), html.picture(x[2] * 0.5))
    assert (second.pictures, second.text) == ((), "")
    page = html.render(evidence, Plan(), [], [first, second])
    assert "Inputs found on which the two networks part" in page
    assert "disagreements" not in page


def test_the_plans_that_were_tried_are_listed_the_kept_one_first():
    option = Option("0", "rtn", {}, {"bits": 8.0, "weights": 2.0}, 0.5)
    plan = Plan({"0": option}, tried={"gptq, after awq": 0.002, "<b>mixed": 0.001})
    page = html.render(Evidence([]), plan, [], [])
    assert "2 plans were carried out" in page
    assert page.index("gptq, after awq") < page.index("&lt;b&gt;mixed") and "<b>mixed" not in page
    assert "plans were carried out" not in html.render(Evidence([]), Plan({"0": option}), [], [])
