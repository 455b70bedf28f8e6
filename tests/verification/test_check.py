"""Certificates and the checker: a second prover, the engine and sampled points; tampering; nonsense."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core import io
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import capture
from netweight.core.perturbation import L1, L2, Box, Linf
from netweight.core.task import Data
from netweight.testing import tiny_model
from netweight.verification.bounds import bounds, certify
from netweight.verification.bounds import margins as engine_objective
from netweight.verification.certificate import (
    Reference,
    beside,
    data_hash,
    model_hash,
    read,
    save,
    slopes_hash,
    written,
)
from netweight.verification.check import (
    CONFIRMED,
    CONTRADICTED,
    NO_CLAIM,
    OPEN,
    objective,
    recheck,
    share_confirmed,
)
from netweight.verification.check_bounds import Region, margins, network
from netweight.verification.check_operators import lines

PROVEN = [  # method, arithmetic, an eps at which it proves something
    ("ibp", "float32", 0.001),
    ("forward", "float32", 0.0003),
    ("crown-ibp", "real", 0.005),
    ("crown", "float32", 0.01),
    ("crown", "real", 0.01),
    ("alpha-crown", "real", 0.01),
    ("alpha-crown", "float32", 0.01),
]


class Residual(nn.Module):
    """A sum of two paths, both pools, constants, a view that moves axes, and activations of every kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.again = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.out = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.conv((x - 0.3) / 0.4))
        h = nn.functional.leaky_relu(self.again(h) * 0.5 + h, 0.1)
        h = nn.functional.max_pool2d(nn.functional.avg_pool2d(h, 2), 2).permute(0, 2, 3, 1).flatten(1)
        h = torch.cat([h, -h.mean(1, keepdim=True).expand(-1, 4)], 1)[:, -16:]
        return self.out(torch.tanh(self.last(torch.sigmoid(h))))


def mlp(seed=0, width=12, outputs=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )


def residual(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Residual().eval()


def points(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@functools.cache
def tiny():
    """`tiny_model`, and the images of 300 that it is surest about."""
    model, x = tiny_model(), points(300, 4, 7, 7)
    top = model(x).sort(1).values
    return model, predicted(model, x[(top[:, -1] - top[:, -2]).argsort(descending=True)[:3]])


@functools.cache
def captured(build, seed, double):
    """(the network, as the checker reads it, the shape of an input)."""
    model, shape = build(seed), {mlp: (1, 5), residual: (1, 1, 8, 8), tiny_model: (1, 4, 7, 7)}[build]
    model = model.double() if double else model
    x = torch.zeros(shape, dtype=torch.float64 if double else torch.float32)
    return model, network(capture(model, x)), shape


@functools.cache
def activation(layer):
    """The node of an activation."""
    return capture(nn.Sequential(layer), torch.zeros(1, 1)).nodes[0]


def predicted(model, x):
    """Data whose labels are what the model says."""
    return Data(x, model(x).argmax(1), low=0.0, high=1.0)


def certified(path, model, data, within, method="crown", arithmetic=None):
    """A certificate on disk."""
    found = certify(model, data, within, method=method, arithmetic=arithmetic, slopes=True)
    names = Reference("net", model_hash(capture(model, data.x[:1]))), Reference("points", data_hash(data))
    save(path, found, written(found, *names, within))
    return found


def edited(path, change, *, hide=False):
    """The certificate after a change; `hide` repairs its own sha256, as who forges it would."""
    from netweight.verification.certificate import _digest

    content = json.loads(path.read_text())
    change(content)
    if hide:
        content["sha256"] = _digest(content)
    path.write_text(json.dumps(content))
    return read(path)


def own_margins(model, x, label, within, arithmetic="float64", slopes=(), net=None):
    net = net or network(capture(model, x))
    rows = objective(label, net.shapes[net.graph.outputs[0]][-1])
    return margins(net, Region.of(x, within), rows, arithmetic, slopes)


# The second prover ---------------------------------------------------------------------------------------


def test_margin_by_hand():
    """y0 - y1 = relu(x0 - x1) + relu(x1 - x0) - 1 on [0.9, 1.1] x [0.4, 0.6]: x0 - x1 - 1, least -0.7."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    model[0].weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    model[2].weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double()
    model[0].bias.data, model[2].bias.data = torch.zeros(2).double(), torch.tensor([0.0, 1.0]).double()
    found, point = own_margins(model, torch.tensor([[1.0, 0.5]]).double(), 0, Linf(0.1))
    assert found.item() == pytest.approx(-0.7, abs=1e-9) and found.item() <= -0.7
    torch.testing.assert_close(point, torch.tensor([[0.9, 0.6]], dtype=torch.float64), rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    layer=st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.9), nn.Sigmoid(), nn.Tanh()]),
    ends=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    choice=st.none() | st.floats(0, 1),
)
def test_lines_lie_below_and_above(layer, ends, choice):
    node = activation(layer)
    low, high = (torch.tensor([end], dtype=torch.float64) for end in sorted(ends))
    under, floor, over, ceiling = lines(
        node, low, high, None if choice is None else torch.tensor([choice]).double()
    )
    x = low + (high - low) * torch.linspace(0, 1, 101, dtype=torch.float64)
    x = torch.cat([x.clamp(low, high), torch.zeros(1).clamp(low, high).double()])
    exact = 1e-15 * (1 + x.abs())
    assert (under * x + floor <= layer(x) + exact).all() and (layer(x) - exact <= over * x + ceiling).all()


@settings(max_examples=40, deadline=None)
@given(
    build=st.sampled_from([mlp, residual, tiny_model]),
    net_seed=st.integers(0, 1),
    seed=st.integers(0, 2**16),
    eps=st.sampled_from([0.0, 0.003, 0.03, 0.3]),
    kind=st.sampled_from([Linf, L2, L1]),
    arithmetic=st.sampled_from(["float32", "float64", "real"]),
)
def test_no_sampled_point_lies_below_the_checkers_margin(build, net_seed, seed, eps, kind, arithmetic):
    model, net, shape = captured(build, net_seed, arithmetic != "float32")
    dtype = torch.float32 if arithmetic == "float32" else torch.float64
    x, within = points(*shape, seed=seed, dtype=dtype), kind(eps, 0.0, 1.0)
    label = int(model(x).argmax())
    found, worst = own_margins(model, x, label, within, arithmetic, net=net)
    generator = torch.Generator().manual_seed(seed)
    tried = [within.sample(x, generator) for _ in range(20)]
    tried += [within.project(worst.to(dtype), x), within.project(2 * x - worst.to(dtype), x), x]
    outputs = model(torch.cat(tried)).detach().double()
    true = (outputs @ objective(label, outputs.shape[1]).T).amin(0)
    lost = 0.0 if arithmetic == "float32" else 1e-12  # of the sum of the outputs here
    assert (found <= true + lost).all()
    if eps == 0:
        assert (found >= true - 1e-3).all()


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_margins_of_relu_networks_are_those_of_crown(kind):
    for build, eps in ((mlp, 0.1), (tiny_model, 0.02)):
        model, net, shape = captured(build, 0, True)
        x, within = points(3, *shape[1:], dtype=torch.float64), kind(eps, 0.0, 1.0)
        labels = model(x).argmax(1)
        rows = engine_objective(labels, model(x).shape[1])
        engine = bounds(net.graph, x, within, objective=rows, arithmetic="float64", upper=False).lower
        for i, label in enumerate(labels.tolist()):
            found, _ = own_margins(model, x[i : i + 1], label, within, net=net)
            torch.testing.assert_close(found, engine[i], rtol=0, atol=1e-6)


def test_any_slopes_are_sound_and_the_best_count():
    model, net, shape = captured(mlp, 0, True)
    x, within = points(*shape, dtype=torch.float64), Linf(0.3)
    label = int(model(x).argmax())
    plain, _ = own_margins(model, x, label, within, net=net)
    sampled = torch.cat([within.sample(x, torch.Generator().manual_seed(i)) for i in range(200)])
    true = (model(sampled).detach() @ objective(label, 3).T).amin(0)
    better = 0
    for seed in range(5):
        places = enumerate(name for name, each in net.steps.items() if each.node.op == "aten.relu")
        chosen = {name: points(2, 1, 12, seed=seed + 9 * i).double() for i, name in places}
        found, _ = own_margins(model, x, label, within, slopes=[chosen], net=net)
        assert (plain <= found).all() and (found <= true).all()
        better += int((found > plain).sum())
    assert better > 0


def test_stored_slopes_are_used_where_they_prove_more(tmp_path):
    model, data = tiny()
    found = certified(tmp_path / "c.json", model, data, Linf(0.03, 0.0, 1.0), "alpha-crown", "float64")
    certificate = read(tmp_path / "c.json")
    with_slopes = recheck(certificate, model, data)
    without = recheck(replace(certificate, slopes={}), model, data)
    assert found.verified.all()
    gained = [a.margin - b.margin for a, b in zip(with_slopes, without)]
    assert min(gained) >= 0 and max(gained) > 1e-5
    for result, bound in zip(with_slopes, found.margin.tolist()):
        assert result.margin == pytest.approx(bound, abs=1e-6)


def test_float32_costs_more_than_real_numbers():
    model, net, shape = captured(tiny_model, 0, False)
    x = points(*shape)
    label = int(model(x).argmax())
    real, single, double = (
        own_margins(model, x, label, Linf(0.01), name, net=net)[0] for name in ("real", "float32", "float64")
    )
    assert (single < double).all() and (double <= real).all() and (real - single).max() < 0.01


def test_an_operator_that_it_does_not_know_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))
    with pytest.raises(DoesNotFit, match=r"cannot be re-checked: aten\.gelu in gelu"):
        network(capture(model, torch.rand(1, 3)))


# Certificates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, arithmetic, eps", PROVEN)
def test_what_the_engine_proves_is_confirmed(method, arithmetic, eps, tmp_path):
    (model, data), path = tiny(), tmp_path / "c.json"
    within = Linf(eps, 0.0, 1.0)
    found = certified(path, model, data.batched(2), within, method, arithmetic)
    certificate = read(path)
    assert [entry.verdict for entry in certificate.inputs] == found.verdicts == ["verified"] * 3
    assert [entry.bound for entry in certificate.inputs] == found.margin.tolist()
    assert (certificate.method, certificate.arithmetic) == (method, arithmetic)
    results = recheck(certificate, model, data)
    assert [result.status for result in results] == [CONFIRMED] * 3 and share_confirmed(results) == 1.0
    assert all(result.margin > result.bound - 1e-5 for result in results)
    assert beside(path).exists() == (method == "alpha-crown")


def test_only_what_is_verified_is_a_claim(tmp_path):
    model, data = tiny()
    assert data.y is not None
    data = replace(data, y=(data.y + torch.tensor([0, 1, 0])) % 4)
    certified(tmp_path / "c.json", model, data, Linf(0.5, 0.0, 1.0), "ibp")
    results = recheck(read(tmp_path / "c.json"), model, data)
    assert [result.stored for result in results] == ["unknown", "wrong", "unknown"]
    assert {result.status for result in results} == {NO_CLAIM} and share_confirmed(results) == 1.0


def test_the_digits_network_is_confirmed(tmp_path):
    from netweight.data import digits
    from netweight.models.digits_cnn import digits_cnn

    model, data = digits_cnn(), digits.test().take(3)
    found = certified(tmp_path / "c.json", model, data, Linf(0.01, 0.0, 1.0), "alpha-crown")
    results = recheck(read(tmp_path / "c.json"), model, data)
    assert int(found.verified.sum()) == 3 and share_confirmed(results) == 1.0


def test_networks_of_every_operator_are_confirmed(tmp_path):
    model = residual()
    data = predicted(model, points(3, 1, 8, 8))
    found = certified(tmp_path / "c.json", model, data, L2(0.02, 0.0, 1.0), "alpha-crown")
    results = recheck(read(tmp_path / "c.json"), model, data)
    assert int(found.verified.sum()) >= 2 and share_confirmed(results) == 1.0


def test_a_certificate_holds_the_set_to_the_last_bit_and_its_hashes(tmp_path):
    model, data = mlp(), predicted(mlp(), points(3, 5))
    within = Linf(2 / 255, 0.0, 1.0)
    crown = certified(tmp_path / "a.json", model, data, within)
    certified(tmp_path / "b.json", model, data, within)
    certificate = read(tmp_path / "a.json")
    assert certificate.within == within and certificate.whole
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    hashes = [entry.slopes for entry in certificate.inputs]
    assert hashes == [slopes_hash(crown.slopes, i) for i in range(3)] and None not in hashes
    certified(tmp_path / "c.json", model, data, within, "ibp")
    assert {entry.slopes for entry in read(tmp_path / "c.json").inputs} == {None}


def test_slopes_are_kept_only_where_they_are_asked_for_and_across_batches():
    model, data = mlp(), predicted(mlp(), points(5, 5))
    assert not certify(model, data, Linf(0.2), method="alpha-crown").slopes
    once = certify(model, data, Linf(0.2), method="alpha-crown", slopes=True)
    parts = certify(model, data.batched(2), Linf(0.2), method="alpha-crown", slopes=True)
    assert once.slopes.keys() == parts.slopes.keys() and len(once.slopes) >= 2
    for name, slope in once.slopes.items():
        assert len(slope) == 5 and ((slope >= 0) & (slope <= 1)).all()
        assert parts.slopes[name].shape == slope.shape
    bare = certify(model, data, Linf(0.001), method="alpha-crown")
    with pytest.raises(DoesNotFit, match="slopes=True"):
        written(bare, Reference("", ""), Reference("", ""), Linf(0.001))
    with pytest.raises(DoesNotFit, match="linf, l2 or l1"):
        written(once, Reference("", ""), Reference("", ""), Box(0.0, 1.0))


# Tampering -----------------------------------------------------------------------------------------------


@functools.cache
def proven():
    """A network, examples of which everything is verified, and that proof."""
    model, x = mlp(10), points(200, 5, seed=1)
    top = model(x).sort(1).values
    data = predicted(model, x[(top[:, -1] - top[:, -2]).argsort(descending=True)[:4]])
    found = certify(model, data, Linf(0.05, 0.0, 1.0), method="alpha-crown", slopes=True)
    names = Reference("net", model_hash(capture(model, data.x[:1]))), Reference("points", data_hash(data))
    return model, data, found, written(found, *names, Linf(0.05, 0.0, 1.0))


@pytest.fixture
def sure(tmp_path):
    """(certificate in which everything is verified, network, examples)."""
    model, data, found, content = proven()
    save(tmp_path / "c.json", found, content)
    return tmp_path / "c.json", model, data


def test_the_certificate_that_the_tests_below_change_is_confirmed(sure):
    path, model, data = sure
    assert share_confirmed(recheck(read(path), model, data)) == 1.0
    assert {entry.verdict for entry in read(path).inputs} == {"verified"}


def change_set(content):
    content["within"]["set"] = "linf=1"


def change_label(content):
    for entry in content["inputs"]:
        entry["label"] = (entry["label"] + 1) % 3


def change_bound(content):
    for entry in content["inputs"]:
        entry["bound"] += 10


@pytest.mark.parametrize("change", [change_set, change_label, change_bound])
def test_a_changed_claim_is_seen_and_one_that_is_forged_whole_is_contradicted(change, sure):
    path, model, data = sure
    assert not edited(path, change).whole
    results = recheck(edited(path, lambda content: None, hide=True), model, data)
    assert {result.status for result in results} <= {CONTRADICTED, OPEN}
    assert share_confirmed(results) == 0 and all(result.reason for result in results)
    if change is not change_set:
        assert {result.status for result in results} == {CONTRADICTED}
        word = "another class" if change is change_label else "below the stored bound"
        assert all(word in result.reason for result in results)


def test_a_small_change_of_the_file_leaves_nothing_confirmed(sure):
    path, model, data = sure

    def nudge(content):
        content["inputs"][0]["bound"] += 1e-9

    results = recheck(edited(path, nudge), model, data)
    assert {result.status for result in results} == {OPEN}
    assert {result.reason for result in results} == {"the certificate was changed after it was written"}


def test_a_set_that_is_too_large_is_not_confirmed(sure):
    """Between what the checker can prove and what a point refutes lies what stays open."""
    path, model, data = sure
    certificate = read(path)
    claims = tuple(replace(entry, bound=1e-4) for entry in certificate.inputs)
    seen = {}
    for eps in (0.05, 0.17, 0.2, 0.25, 0.3, 0.5, 1.0):
        forged = replace(certificate, inputs=claims, within=Linf(eps, 0.0, 1.0))
        for result in recheck(forged, model, data):
            seen.setdefault(result.status, []).append(result)
    assert seen.keys() == {CONFIRMED, OPEN, CONTRADICTED}
    assert all(result.margin > 0 for result in seen[CONFIRMED])
    assert all(result.margin <= 0 for result in seen[OPEN] + seen[CONTRADICTED])
    assert all("the checker proves a margin of" in result.reason for result in seen[OPEN])
    assert all("a point of the set has" in result.reason for result in seen[CONTRADICTED])


def test_other_weights_other_data_and_other_labels_show(sure):
    path, model, data = sure
    certificate = read(path)
    nudged = copy.deepcopy(model)
    nudged[4].bias.data[0] += 1e-6
    for other, examples, word in (
        (nudged, data, "the network is not"),
        (model, replace(data, x=data.x + 1e-6), "the examples are not"),
        (model, replace(data, y=(data.y + 1) % 3), "in the data"),
    ):
        results = recheck(certificate, other, examples)
        assert {result.status for result in results} == {OPEN}
        assert all(word in result.reason for result in results)
    broken = copy.deepcopy(model)
    broken[4].weight.data.neg_(), broken[4].bias.data.neg_()
    assert {result.status for result in recheck(certificate, broken, data)} == {CONTRADICTED}


def test_other_slopes_show_for_the_inputs_they_belong_to(sure):
    path, model, data = sure
    slopes = io.read_tensors(beside(path))
    name = next(iter(slopes))
    slopes[name][1].fill_(0.123)
    io.write_tensors(beside(path), slopes)
    results = recheck(read(path), model, data)
    assert [result.status for result in results] == [CONFIRMED, OPEN, CONFIRMED, CONFIRMED]
    assert "slopes" in results[1].reason


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_slopes_outside_0_to_1_are_refused(value, sure):
    path, _, _ = sure
    slopes = io.read_tensors(beside(path))
    next(iter(slopes.values())).reshape(-1)[3] = value
    io.write_tensors(beside(path), slopes)
    with pytest.raises(BadInput, match="numbers from 0 to 1 for each of 4 inputs"):
        read(path)


def test_slopes_of_another_shape_or_node_are_refused(sure):
    path, model, data = sure
    slopes = io.read_tensors(beside(path))
    io.write_tensors(beside(path), {"nothing/lower": next(iter(slopes.values()))})
    assert {result.status for result in recheck(read(path), model, data)} == {OPEN}
    io.write_tensors(beside(path), {name: slope[..., :-1].contiguous() for name, slope in slopes.items()})
    with pytest.raises(BadInput, match="do not fit the node of that name"):
        recheck(read(path), model, data)
    beside(path).write_bytes(beside(path).read_bytes()[:-10])
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        read(path)
    beside(path).unlink()
    with pytest.raises(BadInput, match="there is no such file"):
        read(path)


# Nonsense ------------------------------------------------------------------------------------------------


def test_what_is_no_certificate_is_one_sentence(tmp_path, sure):
    path, _, _ = sure
    whole = path.read_text()
    bad = tmp_path / "bad.json"
    for text, words in (
        (whole[: len(whole) // 2], "not valid JSON"),
        ("", "empty"),
        ("\x00\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "not a certificate"),
        ('{"format": "something"}', "not a certificate"),
    ):
        bad.write_text(text)
        with pytest.raises(BadInput, match=words):
            read(bad)
    with bad.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(BadInput, match="more than the"):
        read(bad)


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("version",), 2, "version 2"),
        (("model",), "net", "'model' is not of type dict"),
        (("model", "sha256"), 7, "'sha256' is not of type str"),
        (("inputs",), [], "about no input"),
        (("inputs",), {}, "'inputs' is not of type list"),
        (("inputs", 0), 3, "input 0 has no fields"),
        (("inputs", 0, "index"), -1, "index -1"),
        (("inputs", 0, "index"), 1.0, "'index' is not of type int"),
        (("inputs", 0, "label"), True, "'label' is not of type int"),
        (("inputs", 0, "verdict"), "sure", "'verdict' is 'sure'"),
        (("inputs", 0, "bound"), "1", "'bound' is not a finite number"),
        (("inputs", 0, "bound"), float("nan"), "'bound' is not a finite number"),
        (("inputs", 0, "slopes"), 5, "'slopes' is not of type str"),
        (("within", "set"), "ball=3", "unknown set"),
        (("within", "set"), "linf=-1", "radius"),
        (("within", "set"), "bitflips=3", "not linf, l2 or l1"),
        (("within", "low"), 10**400, "'low' is not a finite number"),
        (("arithmetic",), "bfloat16", "'arithmetic' is 'bfloat16'"),
        (("stored slopes",), 1, "not of type bool"),
    ],
)
def test_a_field_that_is_wrong_is_named(where, value, words, sure):
    path, _, _ = sure

    def change(content):
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = value

    with pytest.raises(BadInput, match=words) as caught:
        edited(path, change)
    assert "\n" not in str(caught.value)


def test_indices_and_labels_that_do_not_exist_are_refused(sure):
    path, model, data = sure
    certificate = read(path)
    with pytest.raises(BadInput, match=r"example 3, the data have 2"):
        recheck(certificate, model, data.take(2))
    entries = tuple(replace(entry, label=3) for entry in certificate.inputs)
    with pytest.raises(BadInput, match=r"label 3, the network 3 outputs"):
        recheck(replace(certificate, inputs=entries, slopes={}), model, data)


def test_indices_choose_the_examples(sure):
    path, model, data = sure
    certificate = read(path)
    turned = data.rows(torch.tensor([3, 2, 1, 0]))
    entries = tuple(replace(entry, index=3 - entry.index) for entry in certificate.inputs)
    results = recheck(replace(certificate, inputs=entries), model, turned)
    assert share_confirmed(results) == 1.0 and [result.index for result in results] == [3, 2, 1, 0]


def test_the_command_line_writes_and_checks(tmp_path, monkeypatch):
    from netweight.cli import certificate as command
    from netweight.data import digits
    from netweight.models.digits_cnn import digits_cnn

    model, data, within = digits_cnn(), digits.test().take(2), Linf(0.005, 0.0, 1.0)
    path = tmp_path / "c.json"
    found = certify(model, data, within, method="crown-ibp", slopes=True)
    command.write(path, found, within, ("digits-cnn", model), ("digits", data))
    content, kept = command.checked(path)
    assert (
        kept and content["share_confirmed"] == 1.0 and content["confirmed"] == int(found.verified.sum()) > 0
    )
    assert json.dumps(content["results"][0])

    def elsewhere(content):
        content["model"]["name"] = "os:getcwd"

    edited(path, elsewhere, hide=True)
    with pytest.raises(BadInput, match="code that a file names is not run"):
        command.checked(path)
    content, kept = command.checked(path, "digits-cnn", "digits")
    assert kept

    def relabel(content):
        content["inputs"][0]["verdict"] = "verified"
        content["inputs"][0]["label"] = 0 if content["inputs"][0]["label"] else 1

    edited(path, relabel, hide=True)
    content, kept = command.checked(path, "digits-cnn", "digits")
    assert not kept and content["contradicted"] == 1
