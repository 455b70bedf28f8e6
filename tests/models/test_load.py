import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from netweight.core.errors import BadInput
from netweight.core.origin import origin_of
from netweight.models import load as loading
from netweight.models.load import ARCHITECTURE, BUILT_IN, fill, load, skeleton

SOURCE = """
from torch import nn
def build():
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
def wrong():
    return 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "netweight_test_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "netweight_test_nets"


def test_factory_with_weights(mine, tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    weights = str(tmp_path / "w.safetensors")
    save_file(net.state_dict(), weights)
    model = load(f"{mine}:build@{weights}")
    x = torch.rand(4, 3)
    assert torch.equal(model(x), net(x))
    assert not model.training
    assert origin_of(model).kind == "factory"
    assert origin_of(load(f"{mine}:build")).target == f"{mine}:build"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"0.weight": torch.zeros(2, 4)}, r"'0\.weight' has shape \(2, 4\), the network has \(2, 3\)"),
        ({"3.weight": torch.zeros(1)}, r"'3\.weight' \(1,\) has no place"),
        ({"0.bias": None}, r"'0\.bias' \(2,\) is missing"),
        ({"2.bias": torch.tensor([0.0, torch.nan])}, r"'2\.bias' holds NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit_are_named(mine, tmp_path, change, sentence):
    state = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).state_dict() | change
    weights = str(tmp_path / "w.safetensors")
    save_file({n: t for n, t in state.items() if t is not None}, weights)
    with pytest.raises(BadInput, match=sentence):
        load(f"{mine}:build@{weights}")


def test_a_tied_weight_may_be_stored_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    fill(model, {"0.weight": torch.eye(2)}, "w")
    assert torch.equal(model[1].weight, torch.eye(2))


def test_names_that_are_none(mine, tmp_path):
    for name, sentence in {
        "digit-cnn": "did you mean 'digits-cnn'",
        "nets/model.tflite": "no such file or folder",
        f"{mine}:biuld": "did you mean 'build'",
        f"{mine}:wrong": "returned a int",
        "no_such_module_of_mine:build": "cannot be imported",
        ":build": "cannot be imported",
        f"{mine}:build@none.safetensors": "no such file",
        str(tmp_path / "none.onnx"): "no such file",
        str(tmp_path / "none.pt2"): "no such file",
        str(tmp_path): r"no config\.json",
    }.items():
        with pytest.raises(BadInput, match=sentence):
            load(name)


@pytest.mark.parametrize("ending", ["pt", "pth", "th", "bin", "pkl", "ckpt", "safetensors"])
def test_weights_alone_are_never_unpickled(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    path = tmp_path / f"net.{ending}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BadInput, match="no architecture, and pickles are never loaded"):
        load(str(path))


def test_a_compressed_folder_is_told_apart(tmp_path):
    (tmp_path / "netweight.json").write_text("{}")
    with pytest.raises(BadInput, match="compressed network"):
        load(str(tmp_path))


def test_every_built_in_network_has_its_architecture():
    hugging_face = {"bert-tiny"}  # a folder holds its config.json, which says all
    assert BUILT_IN.keys() - hugging_face == ARCHITECTURE.keys()
    for name in ("digits-cnn", "resnet20"):
        model = skeleton(name, {})
        assert origin_of(model).target == name
        assert not model.training
    with pytest.raises(BadInput, match="did you mean 'resnet44'"):
        skeleton("resnet444", {})
    assert loading.named(BUILT_IN["digits-cnn"]).__name__ == "digits_cnn"
