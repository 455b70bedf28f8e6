"""Binary and ternary networks: what is rounded and how, the loss, resuming, and what comes after training."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.data.constructed import Language, encoded
from netweight.models.small_bart import small_bart
from netweight.models.trained import seeded
from netweight.nn.elastic import Elastic, ElasticRounding
from netweight.nn.fake import Dynamic, DynamicRounding
from netweight.nn.quantized import quantized
from netweight.nn.quantizer import FromMean
from netweight.nn.ternary_attention import RoundedAttention
from netweight.pipeline import compare
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training import loop
from netweight.training.checkpoint import Checkpoint
from netweight.training.settings import Training
from netweight.training.tbt import TBT, apart, fullest, inner_of, least, rounded, taught, tbt
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=8, rate=3e-3, optimizer="adamw")
WORDS, LONGEST = 6, 5


def bart():
    with seeded(0):
        return small_bart(
            Language.drawn(WORDS).vocabulary, LONGEST + 1, width=16, layers=1, heads=2, inner=24
        )


def phrases(count, seed):
    g = torch.Generator().manual_seed(seed)
    found = [(4 + torch.randint(WORDS, (2 + i % 4,), generator=g)).tolist() for i in range(count)]
    return encoded(found, Language.drawn(WORDS), LONGEST)


def task():
    train = phrases(24, 0)
    return Task(train, phrases(8, 1), "perplexity", train=train)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# Weights ----------------------------------------------------------------------------------------------------


def test_even_weights_make_three_even_levels_whose_outer_one_is_the_mean_of_its_third():
    w = torch.linspace(-0.75, 0.75, 9999)[None]
    q = FromMean.ternary()(w)
    s = float(q.max())
    assert s == pytest.approx(2 / 3 * 0.75, rel=1e-3)
    shares = [(q == level).float().mean().item() for level in (-s, 0.0, s)]
    assert shares == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert s == pytest.approx(float(w[w > 0.25].mean()), rel=1e-3)


@settings(deadline=None)
@given(st.integers(0, 2**16), st.floats(0.5, 1.5))
def test_the_binary_scale_is_that_of_least_squares(seed, other):
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    q = FromMean.binary()(w)
    assert torch.equal(q.sign(), w.sign()) and all(len(row.abs().unique()) == 1 for row in q)
    error = (w - q).square().sum()
    assert error <= (w - q * other).square().sum() + 1e-3
    q.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


# What is rounded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_which_parts_of_a_bart_are_rounded(head):
    model, x = bart(), phrases(8, 0).x
    net = rounded(model, x, TBT(1, 2, head=head))
    layers = quantized(net)
    expected = {"hf.model.shared"} | {
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and (head or "head" not in name)
    }
    assert layers.keys() == expected
    for name, layer in layers.items():
        assert isinstance(layer.weight_rounding, FromMean) and layer.weight_rounding.levels.half
        whole = "shared" in name or "head" in name
        assert (layer.input_rounding is None) == whole
        if not whole:
            assert isinstance(layer.input_rounding, Elastic) and layer.input_rounding.ready
            assert layer.input_rounding.signed == ("fc2" not in name)  # after GELU
    found = [m for m in net.modules() if isinstance(m, RoundedAttention)]
    assert len(found) == 3
    assert [m.query_rounding.signed and not m.weights_rounding.signed for m in found] == [True] * 3
    assert (
        type(net.get_submodule("hf.model.encoder.embed_positions")).__name__
        == "BartLearnedPositionalEmbedding"
    )


def test_eight_bits_and_none():
    model, x = bart(), phrases(8, 0).x
    dynamic = rounded(model, x, TBT(2, 8))
    inputs = [layer.input_rounding for layer in quantized(dynamic).values()]
    assert sum(isinstance(each, Dynamic) and each.bits == 8 for each in inputs) == len(inputs) - 1
    none = rounded(model, x, TBT(2, 32))
    assert all(layer.input_rounding is None for layer in quantized(none).values())
    assert not any(isinstance(m, RoundedAttention) for m in none.modules())


def test_inputs_of_other_networks_are_unsigned_where_nothing_is_below_gelu():
    model, data = tiny_model(), tiny_task().train
    layers = {
        name: layer.input_rounding for name, layer in quantized(rounded(model, data.x, TBT(2, 2))).items()
    }
    assert layers.keys() == {"0", "3", "7"}  # the last is left
    assert all(not rounding.signed for rounding in layers.values())
    assert quantized(rounded(model, data.x - 1, TBT(2, 2)))["0"].input_rounding.signed
    assert least(model, data.x - 1, ["0"]) == {"0": float((data.x - 1).min())}


def test_steps_begin_on_examples_without_padding_first():
    x = phrases(8, 0).x
    assert (fullest(bart(), x)[:, : LONGEST + 1] != 1).sum(1).tolist() == [6, 6, 5, 5, 4, 4, 3, 3]
    assert torch.equal(fullest(tiny_model(), x), x)


# The loss ---------------------------------------------------------------------------------------------------


def test_the_loss_is_its_parts():
    model, data = bart(), phrases(8, 0)
    student = rounded(model, data.x, TBT(2, 2)).eval()
    scores, said = student(data.x).detach(), model(data.x).detach()
    kept = data.y != -100
    hard = -scores.log_softmax(-1)[kept].gather(1, data.y[kept][:, None]).mean()
    soft = -(said.softmax(-1) * scores.log_softmax(-1)).sum(-1)[kept].mean()
    parts = {
        (0.0, 0.0): hard,
        (0.5, 0.0): hard + 0.5 * soft,
        (0.0, 2.0): hard + 2 * inner(student, model, data.x, kept),
    }
    for (soft_part, inner_part), wanted in parts.items():
        loss = taught(model, TBT(2, 2, soft=soft_part, inner=inner_part))
        assert float(loss(student, data.x, data.y, None).detach()) == pytest.approx(float(wanted), rel=1e-4)


def inner(student, model, x, kept):
    """From what transformers itself gives of hidden states and attentions, position by position."""
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    mask, total = model.mask(x), 0.0
    wanted = model.hf(input_ids=x[:, :6], attention_mask=mask, decoder_input_ids=x[:, 6:], **asked)
    hooked = record(student, x)
    pairs = [
        (hooked["encoder.layernorm_embedding"], wanted.encoder_hidden_states[0], mask),
        (hooked["encoder.layers.0"], wanted.encoder_hidden_states[1], mask),
        (hooked["encoder.layers.0"], wanted.encoder_last_hidden_state, mask),
        (hooked["decoder.layernorm_embedding"], wanted.decoder_hidden_states[0], kept),
        (hooked["decoder.layers.0"], wanted.decoder_hidden_states[1], kept),
        (hooked["encoder.layers.0.self_attn"], wanted.encoder_attentions[0], mask),
        (hooked["decoder.layers.0.self_attn"], wanted.decoder_attentions[0], kept),
        (hooked["decoder.layers.0.encoder_attn"], wanted.cross_attentions[0], kept),
    ]
    for own, his, where in pairs:
        squares = (own - his).detach().square()
        rows = squares.mean(-1) if squares.ndim == 3 else squares.mean((1, 3))
        total += float((rows * where).sum() / where.sum())
    return total


def record(student, x):
    found = {}
    names = [n for n, _ in student.named_modules() if n.endswith(("attn", "layernorm_embedding", "layers.0"))]
    for name in names:
        student.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: found.__setitem__(
                name.removeprefix("hf.model."), out if isinstance(out, torch.Tensor) else out[1]
            )
        )
    student(x)
    return found


def test_inner_parts_are_those_of_a_bart_alone():
    maps, states = inner_of(bart())
    assert len(maps) == 3 and len(states) == 5 and states[-1] == "hf.model.encoder.layers.0"
    assert inner_of(tiny_language_model()) == ((), ())
    own = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]])
    assert float(apart(own, torch.zeros_like(own), torch.tensor([[True, False]]))) == 2.5


# Training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(2, 8), (1, 8), (2, 2), (1, 1)], ids=repr)
def test_what_is_shipped_is_what_was_trained(bits, tmp_path):
    model, work = bart(), task()
    before = copy.deepcopy(model)
    small = tbt(model, work.blind(), replace(HOW, epochs=6), TBT(*bits, head=True))
    assert same(model, before)
    assert small.losses[-1] < small.losses[0]
    network = small.network()
    levels = 3 if bits[0] == 2 else 2
    for form in network.packed.values():
        assert all(len(row.unique()) <= levels for row in form.decode())
    assert small.notes["bits"] == network.bits() and len(small.notes["attentions"]) == 3
    kind = DynamicRounding if bits[1] == 8 else ElasticRounding
    assert all(isinstance(each, kind) for each in network.change.activations.values())
    assert len(network.change.activations) == 16
    out = outputs(network.model, work.test)
    assert torch.equal(outputs(network.plain(), work.test), out)
    assert torch.equal(outputs(network.model, work.test.batched(3)), out)  # no example changes another's
    network.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=bart())
    assert torch.equal(outputs(back.model, work.test), out)
    assert not torch.allclose(out, outputs(small.model, work.test), atol=1e-3)
    assert torch.equal(network.model.generate(work.test.x, 6), back.model.generate(work.test.x, 6))


def test_the_student_and_its_packed_form_agree():
    model, work = bart(), task()
    for settings_ in (TBT(2, 2), TBT(1, 1, head=True), TBT(2, 8)):
        student = rounded(model, work.train.x, settings_)
        how = Training(epochs=1, batch=8, rate=1e-3)
        loop.train(student, work.train, taught(model, settings_), how)
        from netweight.training.tbt import shipped
        from netweight.training.trained import Trained

        small = Trained(*shipped(student, model)).network()
        assert torch.allclose(outputs(small.model, work.test), outputs(student, work.test), atol=1e-5)


def test_stopped_and_resumed_gives_the_same(tmp_path, monkeypatch):
    model, work = bart(), task()
    whole = tbt(model, work, HOW, TBT(2, 2))
    real = loop.store

    def stops(path, what, run):
        real(path, what, run)
        if len(run.losses) == 2:
            raise KeyboardInterrupt

    keep = Checkpoint(tmp_path / "run.pt", resume=True)
    monkeypatch.setattr(loop, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        tbt(model, work, HOW, TBT(2, 2), keep=keep)
    monkeypatch.setattr(loop, "store", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        tbt(model, work, HOW, TBT(1, 2), keep=keep)
    small = tbt(model, work, HOW, TBT(2, 2), keep=keep)
    assert small.losses == whole.losses
    assert torch.equal(outputs(small.network().model, work.test), outputs(whole.network().model, work.test))


def layered(seed):
    with seeded(seed):
        inner = (nn.Linear(196, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        return nn.Sequential(nn.Flatten(), *inner).eval()


def test_the_network_flows_on(tmp_path):
    model, work = layered(0), tiny_task()
    work = Task(work.calibration, work.test.take(6), train=work.train)
    small = tbt(model, work.blind(), HOW, TBT(1, 2)).network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=layered(1))
    assert torch.equal(outputs(back.model, work.test), outputs(small.model, work.test))
    proof = compare(model, back, work, within=Linf(0.01))
    assert {row.question for row in proof.rows} >= {"average", "worst found", "worst possible"}
    x = work.test.x[:2]
    box = bounds(back.plain(), x, Linf(0.01))
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        y = back.model(x + 0.01 * (2 * torch.rand(x.shape, generator=g) - 1))
        assert (box.lower <= y + 1e-4).all() and (y <= box.upper + 1e-4).all()
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from netweight.deployment.onnx import export

    export(back, tmp_path / "net.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), back.model(x), atol=1e-3)


def test_a_translator_is_compared_by_perplexity_without_padding():
    model, work = bart(), task()
    proof = compare(model, tbt(model, work.blind(), HOW, TBT(2, 8)).network(), work)
    assert proof["average"].quantity == "perplexity"


def test_text_and_bad_input():
    model, work = tiny_language_model(), tiny_text_task()
    small = tbt(model, work.blind(), HOW, TBT(2, 2))
    assert "embedding" in small.notes["layers"] and "head" not in small.notes["layers"]
    for options, sentence in (
        ({"weights": 3}, "weights=3, activations=8: weights take 1 or 2 bits"),
        ({"activations": 4}, "activations 1, 2, 8 or 32"),
        ({"soft": -1.0}, "soft=-1.0"),
        ({"inner": float("nan")}, "inner=nan"),
    ):
        with pytest.raises(BadInput, match=sentence):
            TBT(**options)
    bare = Data(work.test.x)
    with pytest.raises(DoesNotFit, match="class numbers"):
        tbt(model, Task(bare, bare), HOW)
    one = Data(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(DoesNotFit, match="no layer to round but its last"):
        tbt(nn.Sequential(nn.Linear(3, 2)), Task(one, one), HOW)
