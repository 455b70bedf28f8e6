"""BDWP: what each arm makes N:M, the counts, what is shipped, and the network that goes on from here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed, weight_of
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import capture, layer_macs
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.nn.nm_cpu import BlockLinear
from netweight.nn.nm_sparse import INPUTS, Pattern, SparseLayer, mask, masked
from netweight.reproduce import bdwp as reproduction
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training.bdwp import ARMS, BDWP, attached, bdwp, training_macs, treated
from netweight.training.checkpoint import Checkpoint
from netweight.training.gradients import Diverged
from netweight.training.loop import Training, train
from netweight.training.trained import loss
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=16, rate=0.05, optimizer="sgd", decay=1e-3)
SETTINGS = BDWP(2, 4)


def test_which_layers_are_treated_and_why_the_others_are_not():
    layers, left = treated(tiny_model(), BDWP())
    assert layers == ["3", "7"]  # in groups of 8 inputs; 16 x 9 inputs, 32 outputs
    assert left == {
        "0": "its 4 inputs are not a multiple of 8",
        "9": "its 4 outputs are not a multiple of 8",
    }
    assert treated(tiny_model(), BDWP(arm="sr-ste"))[0] == ["3", "7", "9"]
    assert treated(tiny_model(), BDWP(arm="sdwp"))[0] == ["0", "3", "7"]
    found, left = treated(tiny_model(), BDWP(layers=("7",)))
    assert found == ["7"] and left["3"] == "not asked for"
    assert treated(tiny_model(), BDWP(arm="dense")) == ([], {})


def test_the_dense_arm_is_plain_training_and_all_of_all_too():
    model, task = tiny_model(), tiny_task()
    plain = copy.deepcopy(model)
    losses = train(plain, task.train, loss, HOW)
    for settings in (BDWP(arm="dense"), BDWP(4, 4)):
        found = bdwp(model, task.blind(), HOW, settings)
        assert found.losses == pytest.approx(losses, rel=1e-5)
        for name, tensor in plain.state_dict().items():
            assert torch.allclose(
                found.network().plain().state_dict()[name].double(), tensor.double(), atol=1e-5
            )
    assert found.notes["macs"]["ratio"] == 1.0 and found.notes["kept"] == 1.0


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_shipped_is_w_f_where_the_forward_pass_was_sparse(arm):
    model, task = tiny_model(), tiny_task()
    before = copy.deepcopy(model.state_dict())
    found = bdwp(model, task.blind(), HOW, BDWP(2, 4, arm=arm))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(m) for m in found.model.modules()] == [type(m) for m in model.modules()]
    sparse = ["0", "3", "7", "9"] if arm in ("bdwp", "sr-ste") else []
    assert sorted(found.change.packed) == found.notes["sparse"] == sparse
    for name, form in found.change.packed.items():
        weight = weight_of(found.model, name)
        assert torch.equal(form.decode(), weight)
        counts = (weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1)
        assert counts.max() == 2
    assert found.notes["kept"] == (0.5 if sparse else 1.0)
    x = task.test.x
    assert torch.allclose(found.network()(x), found.model(x))
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())


def test_one_step_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    x, y = torch.randn(6, 8), torch.randint(4, (6,))
    how = Training(1, 6, 0.1, optimizer="sgd")
    pattern = Pattern(1, 4)
    w, v = (layer.weight.detach().clone().requires_grad_() for layer in model)
    kept = [masked(each, mask(each, pattern, INPUTS)).detach() for each in (w, v)]
    back = masked(v, mask(v, pattern, 0)).detach()
    hidden = x @ kept[0].t()
    scores = (hidden @ kept[1].t()).requires_grad_()
    (dy,) = torch.autograd.grad(F.cross_entropy(scores, y), scores)
    wanted = [w - 0.1 * (dy @ back).t() @ x, v - 0.1 * dy.t() @ hidden]
    task = Task(Data(x, y), Data(x, y))
    network = attached(model, ["0", "1"], BDWP(1, 4))
    train(network, task.calibration, loss, how)
    for layer, weight in zip(network, wanted):
        assert torch.allclose(layer.like.weight, weight, atol=1e-6)
    refined = bdwp(model, task, how, BDWP(1, 4, refined=0.5))
    pulled = wanted[0] - 0.1 * 0.5 * (w - kept[0])
    assert torch.allclose(
        weight_of(refined.model, "0"), masked(pulled, mask(pulled, pattern, INPUTS)), atol=1e-6
    )


def test_sr_ste_pulls_pruned_weights_to_zero_by_default():
    assert BDWP(arm="sr-ste").pull == 2e-4 and BDWP().pull == 0.0 and BDWP(refined=0.1).pull == 0.1
    model, task = tiny_model(), tiny_task()
    found = bdwp(model, task, HOW, BDWP(2, 4, arm="sr-ste"))
    without = bdwp(model, task, HOW, BDWP(2, 4, arm="sr-ste", refined=0.0))
    assert found.losses != without.losses and found.losses == pytest.approx(without.losses, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "share"),
    [(BDWP(2, 4), 2.0), (BDWP(2, 4, arm="sdgp"), 2.5), (BDWP(2, 4, arm="sr-ste"), 2.5), (BDWP(1, 4), 1.5)],
)
def test_macs_are_counted_layer_by_layer(settings, share):
    model, x = tiny_model(), torch.zeros(1, 4, 7, 7)
    counts = layer_macs(capture(model, x))
    found = training_macs(model, x, ["3", "7"], settings)
    assert found["dense"] == 3 * sum(counts.values())
    assert found["sparse"] == 3 * (counts["0"] + counts["9"]) + share * (counts["3"] + counts["7"])
    assert found["ratio"] == found["sparse"] / found["dense"]


def test_blocks_run_by_their_kernels_and_ship_what_they_ran():
    model, task = tiny_model(), tiny_task()
    settings = BDWP(2, 4, block=4, refresh=4)
    inside = attached(model, treated(model, settings)[0], settings)
    assert isinstance(inside[3], SparseLayer) and isinstance(inside[7], BlockLinear)
    assert isinstance(attached(model, ["7"], BDWP(2, 4, arm="sdwp", block=4))[7], SparseLayer)
    found = bdwp(model, task, HOW, settings)
    for name, form in found.change.packed.items():
        rows = (form.decode() != 0).unflatten(0, (-1, 4))
        assert (rows == rows[:, :1]).all(), name


@pytest.mark.parametrize(
    "settings", [SETTINGS, BDWP(2, 4, arm="sr-ste"), BDWP(2, 4, block=4, refresh=3)], ids=repr
)
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, settings):
    place, how = tmp_path / "run.pt", Training(4, 16, 0.05, optimizer="sgd")
    whole = bdwp(tiny_model(), tiny_task(), how, settings)
    real, calls = F.cross_entropy, iter(range(100))

    def stops(z, y):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(z, y)

    monkeypatch.setattr(F, "cross_entropy", stops)
    with pytest.raises(KeyboardInterrupt):
        bdwp(tiny_model(), tiny_task(), how, settings, keep=Checkpoint(place))
    monkeypatch.setattr(F, "cross_entropy", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        bdwp(tiny_model(), tiny_task(), how, BDWP(1, 4), keep=Checkpoint(place, True))
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        bdwp(tiny_model(1), tiny_task(), how, settings, keep=Checkpoint(place, True))
    again = bdwp(tiny_model(), tiny_task(), how, settings, keep=Checkpoint(place, True))
    assert again.losses == whole.losses
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_the_network_flows_on(tmp_path):
    task = tiny_task()
    small = bdwp(tiny_model(), task, HOW, SETTINGS).network()
    small.save(tmp_path / "small")
    loaded, x = Compressed.load(tmp_path / "small", like=tiny_model()), task.test.x
    assert torch.equal(loaded(x), small(x)) and torch.allclose(small.plain()(x), small(x), atol=1e-6)
    rows = pipeline.compare(tiny_model(), loaded, task, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, task, "onnx", tmp_path / "model.onnx")["same"]


def test_attention_and_text_are_trained():
    found = bdwp(tiny_language_model(), tiny_text_task(), Training(2, 4, 0.05), BDWP())
    assert found.notes["sparse"] == ["down", "key", "output", "query", "up", "value"]
    assert found.losses[-1] < found.losses[0]


def test_mistakes_are_said():
    task, blank = tiny_task(), Data(torch.rand(4, 4, 7, 7))
    cases = [
        (lambda: BDWP(3, 2), BadInput, "keep=3, of=2"),
        (lambda: BDWP(arm="bdpw"), BadInput, "unknown arm 'bdpw'; did you mean 'bdwp'"),
        (lambda: BDWP(refined=-1.0), BadInput, "refined=-1.0"),
        (lambda: BDWP(refresh=0), BadInput, "refresh=0"),
        (lambda: bdwp(tiny_model(), task, HOW, BDWP(layers=("0",))), DoesNotFit, "0: its 4 inputs are not"),
        (
            lambda: bdwp(tiny_model(), task, HOW, BDWP(layers=("1",))),
            DoesNotFit,
            "1: it is no Linear or Conv",
        ),
        (lambda: bdwp(tiny_model(), task, HOW, BDWP(layers=("up",))), BadInput, "unknown layer 'up'"),
        (lambda: bdwp(tiny_model(), task, HOW, BDWP(5, 25)), DoesNotFit, "5:25 divides no layer of this Seq"),
        (
            lambda: bdwp(tiny_model(), Task(blank, blank), HOW),
            DoesNotFit,
            "needs examples with class numbers",
        ),
        (lambda: bdwp(tiny_model(), task, Training(3, 16, 1e30, "sgd")), Diverged, "training diverged in"),
        (lambda: bdwp(flat(), task, Training(1, batch=1)), BadInput, "batch norm has no variance of one"),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4))


def test_the_quick_reproduction_reaches_its_bars():
    claim = reproduction.reproduce(quick=True)
    assert len(claim.bars) == 6
    for bar in claim.bars:
        if "SDGP" not in bar.name:  # one seed of a few epochs says nothing of that
            assert bar.passed, bar
