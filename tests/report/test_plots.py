"""Pictures: well-formed, of their own ids, escaped, without a network, the same each time."""

import xml.etree.ElementTree as ET

import pytest

from netweight.core.plan import Budget, Option, allocate
from netweight.core.result import Row
from netweight.report import plots

NASTY = 'a<b>&"$x_1$'


def options(layers: int = 3) -> list[Option]:
    found = []
    for layer in range(layers):
        for bits in (2, 3, 4, 8):
            cost = {"bits": 100.0 * bits, "weights": 100.0}
            found.append(Option(f"{NASTY}{layer}", "rtn", {"bits": bits}, cost, 4.0**-bits * (layer + 1)))
        found.append(Option(f"{NASTY}{layer}", "keep", {}, {"bits": 3200.0, "weights": 100.0}, 0.0))
    return found


def layers(count: int) -> list[dict]:
    return [
        {"layer": f"{NASTY}{i}", "method": "rtn" if i % 2 else "keep", "bits_per_weight": 4.25 + i}
        for i in range(count)
    ]


def pictures() -> dict[str, str]:
    every = options()
    row = Row("average", NASTY, 0.9, 0.8, 0.7, 0.85, 10, "counted", "float32", "share")
    return {
        "bits": plots.bits_per_layer(layers(4)),
        "distortion": plots.distortion_against_cost(allocate(every, Budget(bits=4)), every),
        "answers": plots.answers([row]),
        "certified": plots.certified_accuracy({NASTY: certified([0.4, 0.1, 0.2]), "other": certified([0.3])}),
    }


def certified(radii: list[float], wrong: int = 1) -> dict:
    """What smoothing reports: right at these radii, and some that are wrong, however large their radius."""
    inputs = [{"label": 1, "class": 1, "radius": r} for r in radii]
    inputs += [{"label": 1, "class": 0, "radius": 0.5}] * wrong
    return {"examples": len(inputs), "inputs": inputs}


def texts(svg: str) -> list[str]:
    return [
        "".join(node.itertext()).strip()
        for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


@pytest.mark.parametrize("name", ["bits", "distortion", "answers", "certified"])
def test_each_is_one_element_that_needs_nothing_from_outside(name):
    svg = pictures()[name]
    assert svg.startswith("<svg role")
    root = ET.fromstring(plots.standalone(svg))
    assert root.get("viewBox")
    assert root.get("width") is None
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith(f"{name}-") for one in ids)
    links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert "http" not in svg
    assert "<style" not in svg
    assert plots.INK not in svg
    assert "currentColor" in svg
    assert svg == pictures()[name]


def test_names_stand_in_them_as_given():
    svg = pictures()["bits"]
    assert NASTY not in svg
    assert [t for t in texts(plots.standalone(svg)) if t.startswith("a<b>")] == [
        f"{NASTY}{i}" for i in range(4)
    ]
    assert NASTY in texts(plots.standalone(pictures()["answers"]))


def test_bars_are_as_long_as_the_bits():
    shown = texts(plots.standalone(pictures()["bits"]))
    assert [t for t in shown if "." in t] == ["4.25", "5.25", "6.25", "7.25"]
    assert {"rtn", "keep"} <= set(shown)


def test_a_file_of_its_own_is_well_formed():
    with pytest.raises(ET.ParseError):  # as one element of a page
        ET.fromstring(pictures()["distortion"])
    assert ET.fromstring(plots.standalone(pictures()["distortion"])).tag == "{http://www.w3.org/2000/svg}svg"


def test_every_option_is_a_point_and_every_choice_a_ring():
    svg = plots.standalone(pictures()["distortion"])
    uses = [
        n for n in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}use") if "clip" not in str(n.attrib)
    ]
    rings = [
        n for n in uses if "stroke: currentColor" in n.get("style", "") and "fill: none" in n.get("style", "")
    ]
    assert len(rings) == 3
    assert len([n for n in uses if "fill-opacity: 0.55" in n.get("style", "")]) == len(options())


def test_certified_accuracy_falls_at_every_radius(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Axes, "step", lambda axes, x, y, where, **style: drawn.append((x, y, where)))
    plots.certified_accuracy({"a": certified([0.4, 0.1, 0.2]), "none": certified([])})
    # the value at a radius holds up to it: "pre" draws y[i] between x[i - 1] and x[i]
    assert drawn[0] == ([0.0, 0.1, 0.2, 0.4, 0.4], [0.75, 0.75, 0.5, 0.25, 0.0], "pre")
    assert drawn[1] == ([0.0, 0.0], [0.0, 0.0], "pre")


def test_many_layers_and_many_options_stay_small():
    every = options(400)
    assert len(every) > plots.POINTS
    svg = plots.distortion_against_cost(allocate(every, Budget()), every)
    assert "data:image/png;base64" in svg
    assert len(svg) < 200_000
    tall = plots.bits_per_layer(layers(plots.NAMED + 1))
    assert "81 layers" in tall
    assert NASTY[:1] + "&lt;" not in tall


def test_long_names_keep_their_end_and_colours_do_not_depend_on_keep():
    assert plots.shortened("model.decoder.layers.11.self_attn.q_proj").endswith("self_attn.q_proj")
    assert len(plots.shortened("x" * 100)) == 26
    assert plots.colours_of(["keep", "rtn"])["rtn"] == plots.colours_of(["rtn", "keep"])["rtn"]
