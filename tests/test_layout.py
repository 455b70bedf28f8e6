"""The catalogue against the code that it names, and the sizes that keep files readable."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import netweight
from netweight.core import catalogue
from netweight.core.catalogue import SYSTEMS, System
from netweight.core.compressed import weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.origin import named
from netweight.testing import tiny_model, tiny_task

PACKAGE = Path(netweight.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def by_slug(system: System) -> str:
    return system.slug


def test_slugs_are_unique_and_found():
    assert len({system.slug for system in SYSTEMS}) == len(SYSTEMS)
    for system in SYSTEMS:
        assert catalogue.find(system.slug) is system


def test_unknown_names_get_the_nearest_as_a_hint():
    with pytest.raises(BadInput, match="unknown method 'gtpq'; did you mean 'gptq'"):
        catalogue.find("gtpq")
    with pytest.raises(BadInput, match="did you mean 'attacks'"):
        catalogue.of_room("atacks")
    with pytest.raises(
        BadInput, match="'rtn' has no reproduction of its own; it is measured in 'quantization-survey'"
    ):
        catalogue.reproduction("rtn")
    with pytest.raises(
        BadInput, match="'pgd' has no reproduction of its own; reproductions are: gptq, awq, "
    ):
        catalogue.reproduction("pgd")
    with pytest.raises(BadInput, match="'pgd' has no settings to call"):
        catalogue.settings("pgd")


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.method], ids=by_slug)
def test_the_method_exists_and_its_file_names_where_it_is_from(system):
    function = catalogue.method(system.slug)
    assert callable(function)
    assert inspect.getdoc(function)
    assert function.__module__.startswith(f"netweight.{system.room}.")
    (path,) = (PACKAGE / system.room).rglob(f"{system.slug.replace('-', '_')}.py")
    module = ".".join(["netweight", *path.relative_to(PACKAGE).with_suffix("").parts])
    about = importlib.import_module(module).__doc__
    if system.venue != "netweight":
        assert str(system.year) in about or "arXiv" in about


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.settings], ids=by_slug)
def test_settings_are_frozen_plain_values_and_the_method_takes_them(system):
    settings = catalogue.settings(system.slug)
    plain = (int, float, bool, str, type(None), tuple)
    assert settings.__dataclass_params__.frozen
    assert all(isinstance(getattr(settings(), field.name), plain) for field in dataclasses.fields(settings))
    training = ["model", "task", "how", "settings", "keep"]
    wanted = training if system.room in ("training", "search") else ["model", "task", "layers", "settings"]
    assert [*inspect.signature(catalogue.method(system.slug)).parameters] == wanted


def test_a_method_that_changes_more_than_one_layer_says_so():
    task = tiny_task()
    for system in (s for s in SYSTEMS if s.settings and s.room == "compression"):
        model = tiny_model()
        kind = catalogue.settings(system.slug)
        names = {field.name for field in dataclasses.fields(kind)}
        settings = kind(steps=1) if "steps" in names else kind()
        try:
            change = catalogue.method(system.slug)(model, task.blind(), weighted(model), settings)
        except DoesNotFit:
            continue
        more = bool(change.rewrites or change.activations or getattr(change, "biases", None))
        assert not more or "whole network" in system.tags, system.slug


@pytest.mark.parametrize("module", sorted({s.reproduction for s in SYSTEMS if s.reproduction}))
def test_a_reproduction_takes_a_seed_and_has_a_quick_variant(module):
    found = named(f"{module}:reproduce")
    parameters = inspect.signature(found).parameters
    assert {"seed", "quick"} <= parameters.keys()
    assert importlib.import_module(module).__doc__


def test_every_reproduction_has_one_line_of_its_own():
    own = {system.reproduction for system in catalogue.reproductions()}
    assert own == {system.reproduction for system in SYSTEMS if system.reproduction}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            limit = 16 if path.parent.name == "cli" else 8  # a command's options are its parameters
            assert len([arg for arg in taken if arg.arg != "self"]) <= limit, node.name


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name != "cli"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_nothing_below_the_command_line_prints(path):
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
