"""The map of methods: typed, whole, and what it says of grids and data is what the methods do."""

import dataclasses

import pytest

from netweight.core import catalogue, taxonomy
from netweight.core.catalogue import SYSTEMS
from netweight.core.compressed import weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.taxonomy import TRAITS, Traits, allowed, fits, parse, traits
from netweight.testing import tiny_model, tiny_task

METHODS = [s.slug for s in SYSTEMS if s.room == "compression" and s.settings]


def test_every_method_of_compression_is_on_the_map():
    assert set(METHODS) <= TRAITS.keys()
    assert traits("pgd") is None and not fits("pgd", "arithmetic", "simulated")


@pytest.mark.parametrize("slug", TRAITS)
def test_only_values_that_there_are(slug):
    known = allowed()
    assert set(known) == {field.name for field in dataclasses.fields(Traits)}
    for name, values in traits(slug).items():
        assert set(values) <= set(known[name]), name
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("slug", METHODS)
def test_the_map_says_what_the_settings_and_tags_say(slug):
    found, tags = TRAITS[slug], catalogue.find(slug).tags
    names = {field.name for field in dataclasses.fields(catalogue.settings(slug))}
    if "no data" in tags:
        assert found.when == "data-free" and "calibration" not in found.needs
    if "calibration" in tags and "whole network" not in tags:
        assert found.when != "data-free" and "calibration" in found.needs
    if "activation_bits" in names:
        assert "activations" in found.what
    if "pruning" in tags:
        assert found.grid == "pruned"


def test_methods_that_need_no_data_look_at_none():
    task = tiny_task()
    blank = dataclasses.replace(
        task, calibration=dataclasses.replace(task.calibration, x=task.calibration.x * 0)
    )
    for slug in METHODS:
        if TRAITS[slug].when != "data-free":
            continue
        kind = catalogue.settings(slug)
        settings = kind(steps=1) if "steps" in {f.name for f in dataclasses.fields(kind)} else kind()
        try:
            one, other = (
                catalogue.method(slug)(tiny_model(), t.blind(), weighted(tiny_model()), settings)
                for t in (task, blank)
            )
        except DoesNotFit:
            continue
        for layer, form in one.packed.items():
            assert form.decode().equal(other.packed[layer].decode()), slug


def test_conditions():
    assert parse(" arithmetic = dyadic ") == ("arithmetic", "dyadic")
    assert fits("hawq-v3", "arithmetic", "dyadic") and not fits("rtn", "arithmetic", "dyadic")
    assert fits("smoothquant", "range", "dynamic") and fits("smoothquant", "range", "static")
    with pytest.raises(BadInput, match="did you mean 'arithmetic'"):
        parse("aritmetic=dyadic")
    with pytest.raises(BadInput, match="did you mean 'dyadic'"):
        parse("arithmetic=dyadc")
    with pytest.raises(BadInput, match="write for example"):
        parse("dyadic")
    assert taxonomy.allowed()["needs"] == ("calibration", "labels", "batch norms", "training")
