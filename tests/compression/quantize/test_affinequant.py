"""AffineQuant against its equations, its invariants, the laws of its room, and nonsense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.affinequant import (
    AffineQuant,
    Ready,
    Walk,
    affinequant,
    clipped,
    encode,
    learn,
)
from netweight.core.affine import Facing, Mixing, Shift, Turn
from netweight.core.calls import first, recorded
from netweight.core.compressed import Compressed, assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, nearest
from netweight.core.plan import Plan
from netweight.core.plant import mixing
from netweight.core.rewrite import Scale, residual, rewritten
from netweight.core.task import Data, Task, outputs
from netweight.nn.fake import DynamicRounding
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task

FAST = {"epochs": 2, "batch": 6}


def silent(count: int = 1) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def opt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from netweight.models.huggingface import LanguageModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.OPTConfig(
            vocab_size=20, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, pad_token_id=None, bos_token_id=None,
            eos_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip
        model = LanguageModel(transformers.OPTForCausalLM(config)).eval()
        for parameter in model.parameters():  # as if trained: biases, and weights that are not tiny
            parameter.data += 0.15 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def task() -> Task:
    x = torch.randint(20, (12, 8), generator=torch.Generator().manual_seed(0))
    return Task(Data(x, batch=4), Data(x[:4]))


def inner(model: nn.Module) -> list[str]:
    return [layer for layer in weighted(model) if ".layers." in layer]


def the_walk(model: nn.Module, task: Task, how: AffineQuant) -> Walk:
    return Walk.start(model, task.calibration.batched(how.batch), inner(model))


def test_laws_on_convolutions():
    check_compressor(affinequant, AffineQuant(4, 8, epochs=2, batch=12))


def test_laws_on_a_language_model_of_unknown_blocks():
    layers = [layer for layer in weighted(tiny_language_model()) if layer != "head"]
    how = AffineQuant(4, 8, activation_bits=8, **FAST)
    check_compressor(affinequant, how, model=tiny_language_model(), task=tiny_text_task(), layers=layers)


@pytest.mark.parametrize(
    "how", [AffineQuant(3, activation_bits=6, norm_matrix=True, **FAST), AffineQuant(3, 8, **FAST)], ids=repr
)
def test_laws_on_decoder_blocks(opt, task, how):
    check_compressor(affinequant, how, model=opt, task=task, layers=[*inner(opt), "hf.lm_head"])


def test_the_rewrites_are_exact_at_every_epoch_and_whole_in_the_end(opt, task):
    how = AffineQuant(3, epochs=3, batch=3, norm_matrix=True)
    walk = the_walk(opt, task, how)
    block = walk.block("hf.model.decoder.layers.0")
    at = walk.places(block, how)
    learn(block, at, how, silent)
    x = task.calibration.x
    for epoch in range(3):
        made = [rewrite for place in at for rewrite in place.rewrites(how.band(epoch))]
        kinds = [type(rewrite) for rewrite in made]
        assert kinds == [Shift, Turn, Shift, Turn, Shift, Mixing, Facing]
        with torch.no_grad():
            assert residual(opt, made, x) <= 1e-8
        for rewrite in made:
            if not isinstance(rewrite, Shift):
                A = rewrite.matrix.detach()
                i = torch.arange(A.shape[-1])
                apart = (i[:, None] - i).abs()
                width = (1, (A.shape[-1] - 1) // 2 + 1, A.shape[-1])[epoch]
                assert bool((A[..., apart >= how.band(epoch).width(len(i))] == 0).all())
                assert how.band(epoch).width(len(i)) == width
    assert bool((made[-1].matrix != 0).all()) and bool((made[-2].matrix != 0).all())


def test_a_mask_of_the_diagonal_is_omniquant_step_for_step(opt, task):
    name, losses, sizes = "hf.model.decoder.layers.1", [], []
    for how in (
        AffineQuant(3, batch=3, epochs=4, matrix=False),
        AffineQuant(3, batch=3, epochs=4, stability=0.0),
    ):
        walk = the_walk(opt, task, how)
        block = walk.block(name)
        at = walk.places(block, how)
        losses.append(learn(block, at, how, silent).losses)
        sizes.append([rewrite for place in at for rewrite in place.rewrites(how.band(3))])
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    mixed = sizes[0][-2].matrix
    assert torch.equal(mixed, torch.diag_embed(mixed.diagonal(dim1=1, dim2=2)))
    first_epochs = [
        learn(block, walk.places(block, how), how, silent).losses[0]
        for how in (AffineQuant(3, batch=3, epochs=4), AffineQuant(3, batch=3, epochs=4, matrix=False))
    ]
    assert first_epochs[0] == first_epochs[1]


@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), group=st.sampled_from([0, 4]))
@settings(max_examples=25, deadline=None)
def test_wide_open_clipping_is_min_max_and_codes_are_what_was_learnt(seed, bits, group):
    g = torch.Generator().manual_seed(seed)
    weight, grid = torch.randn(3, 8, generator=g), Grid(bits, group=group)
    rows = 24 // (group or 8)
    wide = torch.full((rows, 1), 40.0)
    assert torch.equal(encode(weight, wide, wide, grid).decode(), nearest(weight, grid))
    u, v = torch.randn(rows, 1, generator=g), torch.randn(rows, 1, generator=g)
    learnt = clipped(weight, u, v, grid)
    stored = encode(weight, u, v, grid).decode()
    step = (weight.amax() - weight.amin()) / (2**bits - 1)
    assert float((learnt - stored).abs().max()) <= float(step) * 1.01  # scales are stored in float16
    lo, hi = (weight.reshape(rows, -1).clamp(max=0).amin(1), weight.reshape(rows, -1).clamp(min=0).amax(1))
    inside = learnt.reshape(rows, -1)
    assert bool((inside.amax(1) <= hi * u[:, 0].sigmoid() + step).all())
    assert bool((inside.amin(1) >= lo * v[:, 0].sigmoid() - step).all())


def test_many_bits_give_the_float_output_and_few_do_not(opt, task):
    def error(how: AffineQuant) -> float:
        small = assemble(opt, affinequant(opt, task, inner(opt), how), Plan({})).model
        return float((outputs(small, task.test) - outputs(opt, task.test)).pow(2).mean())

    many = error(AffineQuant(8, activation_bits=16, rate=1e-6, clip_rate=1e-6, **FAST))
    few = error(AffineQuant(2, activation_bits=16, rate=1e-6, clip_rate=1e-6, **FAST))
    assert many < 0.005 * few


def test_what_is_trained_is_what_is_stored(opt, task):
    how = AffineQuant(4, activation_bits=8, norm_matrix=True, **FAST)
    walk = the_walk(opt, task, how)
    block = walk.block("hf.model.decoder.layers.0")
    at = walk.places(block, how)
    learnt = learn(block, at, how, silent)
    ready = Ready.of(block, at, how.activation_bits)
    args, extra, _ = block.calls[0]
    with torch.no_grad():
        values = ready.values(how.band(how.epochs - 1), learnt.clips, how.grid)
        trained = first(torch.func.functional_call(ready.module, values, args, dict(extra)))
    walk.settle(learnt, {layer: weight_of(opt, layer) for layer in block.layers}, how)
    _, _, stored = walk.block("hf.model.decoder.layers.0").calls[0]
    rounding = (block.float_calls[0][2] - stored).pow(2).mean()
    assert float((trained - stored).pow(2).mean()) < 0.05 * float(rounding)


def test_blocks_learn_on_what_the_rounded_ones_before_give(opt, task):
    how = AffineQuant(2, **FAST)
    walk = the_walk(opt, task, how)
    one, two = (f"hf.model.decoder.layers.{i}" for i in range(2))
    block = walk.block(one)
    assert torch.equal(block.calls[0][0][0], block.float_calls[0][0][0])
    walk.settle(
        learn(block, walk.places(block, how), how, silent),
        {layer: weight_of(opt, layer) for layer in inner(opt)},
        how,
    )
    after = walk.block(two)
    assert not torch.equal(after.calls[0][0][0], after.float_calls[0][0][0])
    assert torch.equal(after.float_calls[0][0][0], block.float_calls[0][2])
    small = assemble(opt, affinequant(opt, task, inner(opt), how), Plan({})).model
    (_, _, output), *_ = recorded(small, one, task.calibration.batched(how.batch))
    assert torch.allclose(after.calls[0][0][0], output, atol=1e-5)


def test_learning_undoes_a_planted_mixing_that_scales_cannot(opt, task):
    plants = []
    for i in range(2):
        home = f"hf.model.decoder.layers.{i}.self_attn"
        plants.append(mixing(f"{home}.v_proj", f"{home}.out_proj", heads=2, width=8, condition=30, seed=i))
    hard = rewritten(opt, plants)

    def error(change) -> float:
        small = assemble(hard, change, Plan({})).model
        return float((outputs(small, task.test) - outputs(hard, task.test)).pow(2).mean())

    how = {"epochs": 12, "batch": 1, "stability": 0.5, "rate": 1e-2}
    layers = [layer for layer in inner(hard) if layer.endswith(("v_proj", "out_proj"))]
    affine = affinequant(hard, task, layers, AffineQuant(3, **how))
    diagonal = affinequant(hard, task, layers, AffineQuant(3, matrix=False, **how))
    assert {type(r) for r in affine.rewrites} == {Shift, Mixing}  # query and key are not asked for
    assert error(affine) < 0.8 * error(diagonal)


def test_rotary_blocks_with_grouped_queries_and_without_biases(task, tmp_path):
    transformers = pytest.importorskip("transformers")
    from netweight.models.huggingface import LanguageModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LanguageModel(transformers.LlamaForCausalLM(config)).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    change = affinequant(model, task, inner(model), AffineQuant(4, epochs=4, batch=2, rate=0.02))
    assert [type(r) for r in change.rewrites] == [Scale, Scale, Mixing, Facing] * 2
    facing = change.rewrites[3]
    assert bool((facing.matrix[:, :2, 2:].diagonal(dim1=1, dim2=2) != 0).all())  # R has been learnt
    assert residual(model, change.rewrites, task.test.x) <= 1e-8
    small = assemble(model, change, Plan({}))
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(back.model(task.test.x), small.model(task.test.x))


def test_only_what_is_asked_for_is_rewritten(opt, task):
    query = "hf.model.decoder.layers.0.self_attn.q_proj"
    change = affinequant(opt, task, [query], AffineQuant(4, **FAST))
    assert not change.rewrites and list(change.packed) == [query]
    head = affinequant(opt, task, ["hf.lm_head"], AffineQuant(4, **FAST))
    assert torch.equal(
        head.packed["hf.lm_head"].decode(), nearest(weight_of(opt, "hf.lm_head"), Grid(4, group=0))
    )


def test_inputs_are_rounded_per_token(opt, task):
    change = affinequant(opt, task, inner(opt), AffineQuant(4, activation_bits=5, **FAST))
    assert dict(change.activations) == {layer: DynamicRounding(5) for layer in inner(opt)}
    assert not affinequant(opt, task, inner(opt), AffineQuant(4, **FAST)).activations


def test_the_augmented_loss_counts_the_blocks_own_inputs(opt, task):
    name = "hf.model.decoder.layers.0"
    losses = []
    for augmented in (False, True):
        how = AffineQuant(2, augmented=augmented, rate=1e-6, clip_rate=1e-6, **FAST)
        walk = the_walk(opt, task, how)
        block = walk.block(name)
        losses.append(learn(block, walk.places(block, how), how, silent).losses)
    # in the first block both terms are the same
    assert losses[1] == pytest.approx([2 * loss for loss in losses[0]], rel=1e-3)


def test_dead_inputs_zero_weights_and_constant_data():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)  # every input of the second layer is 0
    data = Data(torch.ones(4, 8))
    small = assemble(model, affinequant(model, Task(data, data), ["0", "2"], AffineQuant(2, 8)), Plan({}))
    assert torch.allclose(small.model(data.x), model(data.x), atol=1e-5)


def test_half_precision_and_one_example():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval().half()
    data = Data(torch.rand(1, 8))
    change = affinequant(model, Task(data, data), ["0", "2"], AffineQuant(4, **FAST))
    assert all(form.decode().dtype == torch.float16 for form in change.packed.values())


def test_nan_weights_and_their_block_are_left():
    model, task = tiny_model(), tiny_task()
    with torch.no_grad():
        model[9].weight[0, 0] = float("nan")
    change = affinequant(model, task, ["7", "9"], AffineQuant(4, 8, **FAST))
    assert not change.packed and "NaN" in change.left["9"] and "gives NaN" in change.left["7"]


def test_refuses_what_does_not_fit_and_nonsense():
    model, task = tiny_model(), tiny_task()
    with pytest.raises(DoesNotFit, match="7: rows of 144 weights are not a multiple of group=128"):
        affinequant(model, task, ["7"], AffineQuant(group=128))
    with pytest.raises(DoesNotFit, match="0: its inputs are no tokens"):
        affinequant(model, task, ["0"], AffineQuant(activation_bits=8))
    with pytest.raises(
        DoesNotFit,
        match="the network: what affinequant learns became NaN or Inf in epoch 1; use a smaller rate",
    ):
        affinequant(model, task, ["7", "9"], AffineQuant(2, 8, rate=1e30, clip_rate=1e30, epochs=3))
    for wrong in (
        {"bits": 9}, {"activation_bits": 1}, {"stability": 1.5}, {"alpha": -0.1}, {"epochs": 0}, {"batch": 0},
        {"rate": 0.0}, {"clip_rate": 0.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AffineQuant(**wrong)
