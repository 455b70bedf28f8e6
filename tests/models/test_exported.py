"""Networks of torch.export: the same function, real layers, and nothing that a hostile file asks for."""

import json
import zipfile

import pytest
import torch
from torch import nn

from netweight.core.compressed import weighted
from netweight.core.errors import BadInput
from netweight.models import resnet_cifar
from netweight.models.load import load


class Mixed(nn.Module):
    """Tied weights, attention, a chunk into several outputs, shapes computed from shapes."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.batch_norm, self.conv = nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids):
        h = self.norm(self.table(ids))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.conv(self.batch_norm(h.transpose(1, 2))).transpose(1, 2)
        left, right = h.chunk(2, -1)
        h = nn.functional.gelu(torch.cat([right, left], -1), approximate="tanh")
        return self.out(h.reshape(ids.shape[0] * ids.shape[1], 8)).reshape(ids.shape[0], -1, 10)


def exported(model, x, path):
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.export.save(program, path)
    return str(path)


@pytest.mark.parametrize("case", ["resnet", "mixed"])
def test_same_function_for_other_batches(case, tmp_path):
    torch.manual_seed(0)
    model, x = {
        "resnet": lambda: (resnet_cifar.ResNet(1), torch.rand(2, 3, 16, 16)),
        "mixed": lambda: (Mixed(), torch.randint(10, (2, 5))),
    }[case]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean)
    again = load(exported(model.eval(), x, tmp_path / "net.pt2"))
    more = torch.cat([x, x.flip(0), x])
    with torch.no_grad():
        torch.testing.assert_close(again(more), model(more), atol=1e-5, rtol=1e-5)
    assert not again.training
    if case == "resnet":
        assert weighted(again) == weighted(model)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert isinstance(again.get_submodule("layer1.0.bn1"), nn.BatchNorm2d)
    else:
        assert {"attention.out_proj", "conv"} <= set(weighted(again))


@pytest.fixture
def simple(tmp_path):
    return exported(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.rand(2, 3), tmp_path / "net.pt2")


def rewritten(path, ending, change):
    """The archive with one of its JSON members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    (name,) = (n for n in members if n.endswith(ending))
    content = json.loads(members[name])
    change(content)
    members[name] = json.dumps(content).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


@pytest.mark.parametrize(
    "target",
    ["torch.load", "torch.hub.load", "torch.ops.aten.from_file.default", "os.system",
     "_operator.methodcaller", "torch.ops.aten.__class__.x", "#mine:op", "math.sqrt",
     "torch.ops.higher_order.cond"],
)  # fmt: skip
def test_only_operators_of_networks_are_called(simple, target):
    rewritten(simple, "model.json", lambda c: c["graph_module"]["graph"]["nodes"][0].update(target=target))
    with pytest.raises(BadInput):
        load(simple)


def test_a_file_name_is_no_argument(simple):
    def change(content):
        content["graph_module"]["graph"]["nodes"][1]["inputs"][0]["arg"] = {"as_string": "/etc/passwd"}

    rewritten(simple, "model.json", change)
    with pytest.raises(BadInput, match="as_string cannot be read"):
        load(simple)


def test_pickled_tensors_and_views_that_leave_their_bytes(simple):
    def larger(content):
        content["config"]["0.weight"]["tensor_meta"]["sizes"][0]["as_int"] = 1 << 40

    def pickled(content):
        content["config"]["0.weight"]["use_pickle"] = True

    rewritten(simple, "model_weights_config.json", larger)
    with pytest.raises(BadInput, match="not a whole"):
        load(simple)
    rewritten(simple, "model_weights_config.json", pickled)
    with pytest.raises(BadInput, match="pickles are never loaded"):
        load(simple)


def test_truncated_and_foreign_files(simple, tmp_path):
    with open(simple, "rb") as file:
        whole = file.read()
    path = tmp_path / "cut.pt2"
    for content in (whole[:100], whole[: len(whole) // 2], b"PK\x03\x04", b"{}"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="not a whole"):
            load(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(BadInput, match="expected one"):
        load(str(path))


def test_several_inputs_are_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Two(), (torch.rand(2), torch.rand(2))), path)
    with pytest.raises(BadInput, match="several inputs"):
        load(str(path))
