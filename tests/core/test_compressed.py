"""From a Change to a network, to a folder, and back; a folder that is wrong is one sentence."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

from netweight.compression.prune.magnitude import Magnitude, magnitude
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import Change, Compressed, Packed, assemble, replace, weight_of, weighted
from netweight.core.errors import BadInput, NetweightError
from netweight.core.io import read_tensors, write_tensors
from netweight.core.plan import Option, Plan
from netweight.core.rewrite import FoldBatchNorm, Scale
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.layers import PackedLayer
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task

X = torch.rand(6, 4, 7, 7, generator=torch.Generator().manual_seed(3))


def everything() -> Compressed:
    """All that a Change may hold: a rewrite, two kinds of codes, activation rounding, a layer left."""
    model, folded = tiny_model(), tiny_model()
    rewrites = [FoldBatchNorm("0", "1"), Scale("7", ("9",), torch.rand(32) + 0.5)]
    for rewrite in rewrites:
        rewrite.apply(folded)
    packed = {
        **rtn(folded, tiny_task(), ["0", "7"], RTN()).packed,
        **magnitude(folded, tiny_task(), ["9"], Magnitude()).packed,
    }
    activations = {"7": StaticRounding.of(0.0, 1.0, 6), "9": DynamicRounding(), "3": DynamicRounding(4)}
    plan = Plan({"0": Option("0", "rtn", {"bits": 4}, {"bits": 1.0, "weights": 2.0}, 0.5)}, 7.0)
    return assemble(model, Change(packed, rewrites, activations, {"3": "a reason"}), plan)


def test_weighted_names_layers_with_a_weight_of_their_own():
    assert weighted(tiny_model()) == ["0", "3", "7", "9"]
    model = tiny_language_model()
    assert weighted(model) == ["query", "key", "value", "output", "up", "down", "head"]
    assert weighted(model, embeddings=True)[0] == "embedding"
    model.head.weight = model.embedding.weight  # tied: packing one would untie it
    assert "head" not in weighted(model, embeddings=True) and "embedding" not in weighted(
        model, embeddings=True
    )
    assert weighted(nn.Linear(2, 2)) == []  # a network that is one layer has no name to replace


def test_weight_of_is_detached_and_names_what_there_is():
    assert not weight_of(tiny_model(), "7").requires_grad
    for wrong in ("70", "8", "7.weight"):
        with pytest.raises(BadInput, match=f"unknown layer '{wrong}'"):
            weight_of(tiny_model(), wrong)


def test_assembling_leaves_the_model_and_runs_packed_layers():
    model = tiny_model().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    change = Change(rtn(model, tiny_task(), ["3", "7"], RTN()).packed)
    small = assemble(model, change, Plan())
    assert model.training and not small.model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert isinstance(small.model[3], PackedLayer) and isinstance(small.model[0], nn.Conv2d)
    assert isinstance(model[3], nn.Conv2d)
    assert small.packed is change.packed and small.bits() == sum(f.bits() for f in change.packed.values())
    assert torch.equal(small(X), small.model(X)) and torch.equal(small.plain()(X), small(X))
    expected = tiny_model()
    for layer in ("3", "7"):
        expected.get_submodule(layer).weight.data = change.packed[layer].decode()
    assert torch.equal(small(X), expected(X))


def test_rewrites_come_first_and_activations_are_rounded():
    small = everything()
    folded = tiny_model()
    for rewrite in small.change.rewrites:
        rewrite.apply(folded)
    for layer, form in small.packed.items():
        folded.get_submodule(layer).weight.data = form.decode()
    x = folded[:3](X)
    x = folded[4:7](folded[3](DynamicRounding(4).module()(x)))
    x = folded[7](StaticRounding.of(0.0, 1.0, 6).module()(x)).relu()
    assert torch.equal(small(X), folded[9](DynamicRounding().module()(x)))
    assert torch.equal(small.plain()(X), small(X))
    assert not any(isinstance(m, PackedLayer) for m in small.plain().modules())


def test_a_layer_that_is_used_twice_is_replaced_in_both_places():
    line = nn.Linear(4, 4)
    model = nn.Sequential(line, nn.ReLU(), nn.Sequential(line))
    assert weighted(model) == ["0"]
    small = assemble(model, rtn(model, tiny_task(), ["0"], RTN(2)), Plan())
    assert small.model[0] is small.model[2][0]
    twin = nn.Linear(4, 4)
    twin.load_state_dict(line.state_dict())
    twin.weight.data = small.packed["0"].decode()
    x = torch.rand(3, 4)
    assert torch.equal(small(x), twin(twin(x).relu())) and torch.equal(small.plain()(x), small(x))
    replace(model, "2.0", nn.Identity())
    assert isinstance(model[0], nn.Identity)


def test_biases_of_a_change_take_the_place_of_the_old(tmp_path):
    model = tiny_model()
    packed = rtn(model, tiny_task(), ["3", "7"], RTN()).packed
    biases = {"3": torch.arange(16.0), "7": torch.ones(32, dtype=torch.float64)}
    small = assemble(model, Change(packed, biases=biases), Plan())
    assert model[3].bias is None and torch.equal(small.model[3].bias, biases["3"])
    assert small.model[7].bias.dtype == torch.float32 and torch.equal(small.plain()(X), small(X))
    small.save(tmp_path / "small")
    assert torch.equal(Compressed.load(tmp_path / "small", like=model)(X), small(X))


def test_forms_may_share_tensors(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    form = rtn(model, tiny_task(), ["0"], RTN()).packed["0"]
    shared = StaticRounding.of(-1.0, 1.0)
    small = assemble(model, Change({"0": form, "1": form}, activations={"0": shared, "1": shared}), Plan())
    small.save(tmp_path / "small")
    x = torch.rand(2, 8)
    assert torch.equal(Compressed.load(tmp_path / "small", like=model)(x), small(x))


def test_a_folder_holds_everything_bit_for_bit(tmp_path):
    small = everything()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=tiny_model(5))
    assert torch.equal(back(X), small(X)) and torch.equal(back.plain()(X), small(X))
    assert back.plan == small.plan and back.bits() == small.bits() and back.change.left == {"3": "a reason"}
    assert [type(r) for r in back.change.rewrites] == [FoldBatchNorm, Scale]
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == [
        "netweight.json",
        "plan.json",
        "weights.safetensors",
    ]
    back.save(tmp_path / "again")
    one, other = (read_tensors(tmp_path / name / "weights.safetensors") for name in ("small", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    small.save(tmp_path / "small")  # ours may be written again


def test_the_file_is_small(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256))
    small = assemble(model, rtn(model, tiny_task(), ["0"], RTN()), Plan())
    small.save(tmp_path / "small")
    size = (tmp_path / "small" / "weights.safetensors").stat().st_size
    assert small.bits() == 256 * (256 * 4 + 16 + 4)
    assert small.bits() / 8 + 4 * 256 <= size <= small.bits() / 8 + 4 * 256 + 1000


def test_tied_weights_stay_tied(tmp_path):
    model = tiny_language_model()
    model.head.weight = model.embedding.weight
    small = assemble(model, rtn(model, tiny_text_task(), ["up"], RTN()), Plan())
    small.save(tmp_path / "small")
    like = tiny_language_model(1)
    like.head.weight = like.embedding.weight
    back = Compressed.load(tmp_path / "small", like=like)
    assert back.model.head.weight is back.model.embedding.weight
    tokens = tiny_text_task().test.x
    assert torch.equal(back(tokens), small(tokens))


def test_a_folder_that_cannot_say_how_to_build_the_network_asks_for_it(tmp_path):
    everything().save(tmp_path / "small")
    with pytest.raises(BadInput, match="--like MODEL"):
        Compressed.load(tmp_path / "small")
    with pytest.raises(BadInput, match="not a folder that netweight wrote whole"):
        Compressed.load(tmp_path / "nothing")


def broken_folders(folder):
    """Folders with one thing wrong each, and the way it was made wrong."""

    def edit(name, change):
        def do(place):
            content = json.loads((place / name).read_text())
            (place / name).write_text(json.dumps(change(content)))

        return do

    def tensors(change):
        def do(place):
            write_tensors(place / "weights.safetensors", change(read_tensors(place / "weights.safetensors")))

        return do

    head = json.loads((folder / "netweight.json").read_text())
    codes = "packed|7|codes"
    wrong = {
        "format": edit("netweight.json", lambda h: {**h, "format": 99}),
        "a list": edit("netweight.json", lambda h: [h]),
        "packed is a list": edit("netweight.json", lambda h: {**h, "packed": [1]}),
        "rewrites is a number": edit("netweight.json", lambda h: {**h, "rewrites": 3}),
        "a rewrite is a number": edit("netweight.json", lambda h: {**h, "rewrites": [3]}),
        "activations is a string": edit("netweight.json", lambda h: {**h, "activations": "x"}),
        "another class": edit("netweight.json", lambda h: {**h, "packed": {"7": {"is": "Popen"}}}),
        "a layer that is not there": edit(
            "netweight.json", lambda h: {**h, "packed": {**h["packed"], "77": h["packed"]["7"]}}
        ),
        "a rewrite of nothing": edit(
            "netweight.json",
            lambda h: {**h, "rewrites": [{"is": "FoldBatchNorm", "layer": "x", "norm": "y"}]},
        ),
        "activation of nothing": edit(
            "netweight.json", lambda h: {**h, "activations": {"77": {"is": "DynamicRounding", "bits": 8}}}
        ),
        "a plan": edit("plan.json", lambda p: {"choices": 3}),
        "not JSON": lambda place: (place / "netweight.json").write_text("{"),
        "no weights": lambda place: (place / "weights.safetensors").unlink(),
        "half the weights": lambda place: (place / "weights.safetensors").write_bytes(
            (place / "weights.safetensors").read_bytes()[:-100]
        ),
        "codes missing": tensors(lambda t: {k: v for k, v in t.items() if k != codes}),
        "codes short": tensors(lambda t: {**t, codes: t[codes][:-1]}),
        "a float codes": tensors(lambda t: {**t, codes: t[codes].float()}),
        "a bias missing": tensors(lambda t: {k: v for k, v in t.items() if k != "4.bias"}),
        "a bias too long": tensors(lambda t: {**t, "4.bias": torch.zeros(17)}),
        "one tensor too many": tensors(lambda t: {**t, "99.bias": torch.zeros(2)}),
        "packed for another shape": tensors(lambda t: {**t, "packed|0|scale": t["packed|7|scale"].clone()}),
    }
    assert head["format"] == 1
    return wrong


def test_whatever_is_wrong_with_a_folder_is_said_in_one_sentence(tmp_path):
    everything().save(tmp_path / "small")
    for name, spoil in broken_folders(tmp_path / "small").items():
        place = tmp_path / "spoilt"
        shutil.copytree(tmp_path / "small", place)
        spoil(place)
        with pytest.raises(NetweightError) as error:
            Compressed.load(place, like=tiny_model())
            pytest.fail(name)
        assert str(error.value) and "\n" not in str(error.value), name
        shutil.rmtree(place)


def test_forms_and_changes_meet_their_protocols():
    form = rtn(tiny_model(), tiny_task(), ["7"], RTN()).packed["7"]
    assert isinstance(form, Packed) and not isinstance(Plan(), Packed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Change({}).packed = {}
