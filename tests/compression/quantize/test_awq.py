"""AWQ against its equations, hand examples, its invariants and nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.awq import AWQ, awq, clipped, group_errors, loss_of, scale_of, search
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, nearest
from netweight.core.moments import moments
from netweight.core.plan import Plan
from netweight.core.plant import outliers
from netweight.core.rewrite import residual, rewritten
from netweight.core.sites import sites
from netweight.core.task import Data, Task, outputs
from netweight.nn.packed import Affine
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def test_scale_by_hand():
    assert scale_of(torch.tensor([4.0, 1.0, 16.0]), 0.5).tolist() == pytest.approx([1.0, 0.5, 2.0])
    assert scale_of(torch.tensor([4.0, 1.0]), 0.0).tolist() == [1.0, 1.0]
    assert scale_of(torch.full((5,), 3.0), 0.7).tolist() == pytest.approx([1.0] * 5)  # constant activations
    assert scale_of(torch.tensor([0.0, 1.0]), 0.5).tolist() == pytest.approx(
        [0.01, 100.0]
    )  # the floor of 1e-4


@given(seed=st.integers(0, 2**16), factor=st.floats(0.1, 10), alpha=st.floats(0, 0.95))
def test_scale_ignores_a_common_factor(seed, factor, alpha):
    a = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    assert torch.allclose(scale_of(a, alpha), scale_of(factor * a, alpha), rtol=1e-5)


@given(seed=st.integers(0, 2**16), group=st.sampled_from([0, 4, 8]), parts=st.sampled_from([1, 2]))
def test_errors_of_groups_are_their_definition(seed, group, parts):
    g = torch.Generator().manual_seed(seed)
    x, change = torch.randn(20, parts, 8, generator=g).double(), torch.randn(6, 8, generator=g).double()
    gram = torch.einsum("npi,npj->pij", x, x) / 20
    found = group_errors(change.reshape(-1, group or 8), gram)
    rows_of = 6 // parts
    expected = [
        (x[:, row // rows_of, start : start + (group or 8)] @ change[row, start : start + (group or 8)])
        .pow(2)
        .mean()
        for row in range(6)
        for start in range(0, 8, group or 8)
    ]
    assert torch.allclose(found, torch.stack(expected))


@given(seed=st.integers(0, 2**16), bits=st.integers(2, 5))
def test_clipping_never_adds_error_and_keeps_the_best_of_all_ranges(seed, bits):
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(5, 16, generator=g), torch.randn(40, 16, generator=g).double()
    weight[:, 0] *= 6
    gram, grid = (x.T @ x)[None] / 40, Grid(bits, group=8)

    def error(w: torch.Tensor) -> torch.Tensor:
        return group_errors((nearest(w, grid) - weight).reshape(-1, 8), gram)

    groups = weight.reshape(-1, 8)
    tried = torch.stack(
        [
            error(groups.clamp(-m, m).reshape(5, 16))
            for i in range(10)
            for m in [groups.abs().amax(1, True) * (1 - i / 20)]
        ]
    )
    found = error(clipped(weight, gram, grid, 10))
    assert (found <= error(weight) + 1e-12).all()
    assert torch.allclose(found, tried.amin(0))
    assert torch.equal(clipped(weight, gram, grid, 1), weight)


def test_code_is_round_to_nearest_also_for_groups_on_one_side_of_zero():
    weight = torch.tensor([[5.0, 6.0, 5.5, 5.25], [-1.0, 2.0, 0.0, 0.5]])
    form = Affine.nearest(weight, Grid(4, group=4))
    assert torch.equal(form.decode(), nearest(weight, Grid(4, group=4)))
    assert (form.decode() - weight).abs().max() <= 0.5 * 6 / 15 + 1e-3


@pytest.mark.parametrize("settings", [AWQ(4, 8), AWQ(3, 0, clips=1), AWQ(2, 4, alphas=1)], ids=repr)
def test_laws_on_convolutions(settings):
    check_compressor(awq, settings)


def test_laws_on_a_language_model():
    model = tiny_language_model()
    layers = [layer for layer in weighted(model) if layer != "head"]
    check_compressor(awq, AWQ(4, 8), model=model, task=tiny_text_task(), layers=layers)


def hard_model() -> tuple[nn.Module, Task]:
    model, task = tiny_language_model(), tiny_text_task()
    norms = [site for site in sites(model, task.calibration) if site.norm(model)]
    return rewritten(model, outliers(model, norms, factor=16, share=0.1)), task


def test_planted_outliers_are_undone():
    model, task = hard_model()
    layers = [layer for layer in weighted(model) if layer != "head"]
    before = outputs(model, task.test)

    def error(settings: AWQ) -> float:
        small = assemble(model, awq(model, task, layers, settings), Plan({}))
        return float((outputs(small.model, task.test) - before).pow(2).mean())

    assert error(AWQ(3, 0)) < 0.5 * error(AWQ(3, 0, alphas=1, clips=1))
    assert error(AWQ(8, 0)) < 0.01 * error(AWQ(3, 0))


def test_the_rewrites_are_exact_and_the_packed_weights_are_those_after_them():
    model, task = hard_model()
    layers = weighted(model)
    change = awq(model, task, layers, AWQ(4, 0, clips=1))
    assert {r.producer for r in change.rewrites} == {"norm", "norm2", "up"}
    assert residual(model, change.rewrites, task.test.x) <= 1e-9
    after = rewritten(model, change.rewrites)
    for layer, form in change.packed.items():
        assert torch.equal(form.decode(), nearest(weight_of(after, layer), Grid(4, group=0)))
    assert any((r.scale != 1).any() for r in change.rewrites)


def test_the_scale_is_the_best_of_all_alphas_and_never_loses_to_plain_rounding():
    model, task = hard_model()
    settings = AWQ(3, 0)
    for site in sites(model, task.calibration):
        seen = moments(model, task.calibration, [site.consumers[0]])[site.consumers[0]]
        tried = [scale_of(seen.magnitude, i / 20) for i in range(20)]
        losses = [loss_of(model, site, seen, [], scale, settings.grid) for scale in tried]
        found = search(model, site, seen, [], settings)
        assert torch.equal(found, tried[losses.index(min(losses))])
        rounded = sum(
            seen.error(nearest(weight_of(model, reader), settings.grid) - weight_of(model, reader))
            for reader in site.consumers
        )
        assert losses[0] == pytest.approx(rounded) and min(losses) <= rounded


def test_a_site_is_scaled_only_if_all_its_readers_are_asked_for():
    model, task = hard_model()
    change = awq(model, task, ["query", "key"], AWQ(4, 8))
    assert not change.rewrites and set(change.packed) == {"query", "key"}
    assert len(awq(model, task, ["query", "key", "value"], AWQ(4, 8)).rewrites) == 1


def test_inspected_blocks_of_transformers_and_what_is_not_clipped():
    transformers = pytest.importorskip("transformers")
    from netweight.models.huggingface import LanguageModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LanguageModel(transformers.LlamaForCausalLM(config)).eval()
    x = torch.randint(20, (6, 8), generator=torch.Generator().manual_seed(0))
    task = Task(Data(x, batch=4), Data(x))
    layers = [layer for layer in weighted(model) if ".layers." in layer]
    change = awq(model, task, layers, AWQ(3, 8))
    producers = [r.producer.rpartition(".")[2] for r in change.rewrites]
    assert (
        producers == ["input_layernorm", "post_attention_layernorm", "up_proj"] * 2
    )  # grouped queries: no v to o
    assert residual(model, change.rewrites, x) <= 1e-9
    after = rewritten(model, change.rewrites)
    for layer, form in change.packed.items():
        plain = torch.equal(form.decode(), nearest(weight_of(after, layer), Grid(3, group=8)))
        assert plain == layer.endswith(("q_proj", "k_proj"))
    assert assemble(model, change, Plan({})).model(x).isfinite().all()


def test_dead_inputs_zero_weights_and_constant_data():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)  # every input of the second layer is 0
    data = Data(torch.ones(4, 8))
    small = assemble(model, awq(model, Task(data, data), ["0", "2"], AWQ(2, 8)), Plan({}))
    assert torch.equal(small.model(data.x), model(data.x))


def test_nan_weights_are_left_and_nonsense_is_refused():
    model, task = tiny_model(), tiny_task()
    with torch.no_grad():
        model[9].weight[0, 0] = float("nan")
    change = awq(model, task, ["7", "9"], AWQ(4, 8))
    assert set(change.packed) == {"7"} and "NaN" in change.left["9"]
    with pytest.raises(DoesNotFit, match="7: rows of 144 weights are not a multiple of group=128"):
        awq(tiny_model(), task, ["7"], AWQ())
    for wrong in ({"group": -1}, {"alphas": 0}, {"clips": 0}, {"clips": 21}, {"bits": 9}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AWQ(**wrong)
