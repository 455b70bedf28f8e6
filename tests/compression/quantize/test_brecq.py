"""BRECQ: what it learns on, that blocks are learnt together, its invariants, the laws, and nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.brecq import BRECQ, brecq, fisher, normalised, of_likelihood, shuffled
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, nearest
from netweight.core.plan import Plan
from netweight.core.task import Data, Task, outputs
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task

FEW = {"steps": 3, "batch": 8, "activation_steps": 3}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.two(torch.relu(self.one(x))), None


class Net(nn.Module):
    """Blocks that give tuples, as those of transformers did."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleList(Residual(width) for _ in range(2)), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x, _ = part(x)
        return self.head(x)


def problem(seed: int = 0) -> tuple[nn.Module, Task]:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net().eval()
    x = torch.randn(128, 1, generator=g) + 0.5 * torch.randn(128, 16, generator=g)
    data = Data(x, batch=32)
    return model, Task(data, data)


@examples(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), factor=st.floats(1e-3, 1e3))
def test_weights_of_the_error_have_mean_one_and_ignore_a_common_factor(seed, factor):
    squares = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(seed)).double() + 1e-3
    F = normalised(squares)
    assert F.mean().item() == pytest.approx(1, abs=1e-5) and (F >= 0.5).all()
    assert torch.allclose(normalised(squares * factor), F, rtol=1e-4)
    assert torch.equal(normalised(squares * 0), torch.ones(1, 4, 3))


def test_drawn_labels_have_the_fisher_information_on_average():
    out = torch.tensor([[2.0, 0.0, -1.0]]).expand(40000, 3)
    g = of_likelihood(out, torch.Generator().manual_seed(0), real=False)
    p = out[0].softmax(0)
    assert torch.allclose(g.mean(0), torch.zeros(3), atol=0.01)
    assert torch.allclose(g.T @ g / len(g), torch.diag(p) - p[:, None] * p, atol=0.01)


def test_fisher_of_the_last_layer_is_that_of_the_logits_and_of_a_block_by_its_jacobian():
    model, task = problem()
    data = shuffled(task.calibration, BRECQ(batch=16))
    F = fisher(model, data, ["parts.0", "parts.1", "head"], BRECQ(), task)
    assert {name: tuple(value.shape) for name, value in F.items()} == {
        "parts.0": (1, 16), "parts.1": (1, 16), "head": (1, 3),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    g = torch.cat([of_likelihood(model(x).detach(), generator, False) for x, _ in data])
    assert torch.allclose(F["head"], normalised(g.double().pow(2).mean(0, keepdim=True)), rtol=1e-4)
    through = (g @ weight_of(model, "head")).double().pow(2).mean(0, keepdim=True)
    assert torch.allclose(F["parts.1"], normalised(through), rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def error(model: nn.Module, task: Task, change) -> float:
    small = assemble(model, change, Plan({})).model
    return float((outputs(small, task.calibration) - outputs(model, task.calibration)).pow(2).mean())


def test_learnt_rounding_is_far_better_than_nearest():
    ratios = []
    for seed in range(2):
        model, task = problem(seed)
        layers = [layer for layer in weighted(model) if layer != "head"]
        settings = BRECQ(2, group=0, steps=250, rate=0.02, fisher=False, seed=seed)
        blocks = brecq(model, task, layers, settings)
        for layer, form in blocks.packed.items():
            weight = weight_of(model, layer)
            step = form.scale.float()
            assert ((form.decode() - weight).abs() <= step * 1.01).all()  # up or down, nothing else
        near = {layer: nearest(weight_of(model, layer), Grid(2, True, 0)) for layer in layers}
        rounded = assemble(model, blocks, Plan({})).plain()
        for layer, weight in near.items():
            rounded.get_submodule(layer).weight = nn.Parameter(weight)
        before = outputs(model, task.calibration)
        nearest_error = float((outputs(rounded, task.calibration) - before).pow(2).mean())
        ratios.append(error(model, task, blocks) / nearest_error)
    assert sum(ratios) / 2 < 0.5


def test_layers_of_one_block_make_up_for_each_other():
    model, task = problem()
    settings = BRECQ(2, steps=120, rate=0.02)
    both = brecq(model, task, ["parts.0.one", "parts.0.two"], settings).packed
    first = brecq(model, task, ["parts.0.one"], settings).packed
    assert not torch.equal(both["parts.0.one"].decode(), first["parts.0.one"].decode())


def test_later_blocks_see_the_rounded_inputs_and_labels_count():
    model, task = problem()
    layers, settings = weighted(model), BRECQ(2, steps=60, rate=0.02)
    after = brecq(model, task, layers, settings).packed["head"].decode()
    alone = brecq(model, task, ["head"], settings).packed["head"].decode()
    plain = brecq(model, task, layers, BRECQ(2, steps=60, rate=0.02, fisher=False)).packed
    assert not torch.equal(after, alone)
    weighed = brecq(model, task, layers, settings).packed
    assert any(not torch.equal(plain[layer].decode(), weighed[layer].decode()) for layer in layers)


def test_steps_of_activations_are_learnt_and_never_lose_to_their_start():
    model, task = problem()
    layers = weighted(model)
    how = {"steps": 30, "activation_bits": 3, "examples": 128}
    few = brecq(model, task, layers, BRECQ(8, **how, activation_steps=1, activation_rate=1e-9))
    many = brecq(model, task, layers, BRECQ(8, **how, activation_steps=150, activation_rate=1e-2))
    assert set(many.activations) == set(layers)
    assert all(r.bits == 3 and r.scale > 0 for r in many.activations.values())
    assert any(many.activations[n].scale != few.activations[n].scale for n in layers)
    assert error(model, task, many) < error(model, task, few)
    worse = brecq(model, task, layers[:2], BRECQ(8, **how, activation_steps=2, activation_rate=50.0))
    start = brecq(model, task, layers[:2], BRECQ(8, **how, activation_steps=1, activation_rate=1e-9))
    for layer in layers[:2]:
        assert worse.activations[layer].scale == pytest.approx(float(start.activations[layer].scale))


def test_the_first_and_last_layer_may_have_more_bits():
    model, task = tiny_model(), tiny_task()
    change = brecq(model, task, weighted(model), BRECQ(3, ends=8, activation_bits=4, **FEW))
    assert [form.bits_per_code for form in change.packed.values()] == [8, 3, 3, 8]
    assert [change.activations[layer].bits for layer in weighted(model)] == [8, 4, 4, 8]
    part = brecq(model, task, weighted(model)[1:], BRECQ(3, ends=8, **FEW))
    assert [form.bits_per_code for form in part.packed.values()] == [3, 3, 8]


@pytest.mark.parametrize(
    "settings",
    [BRECQ(4, **FEW), BRECQ(3, symmetric=False, group=8, ends=8, activation_bits=8, **FEW)],
    ids=repr,
)
def test_laws(settings):
    check_compressor(brecq, settings)
    check_compressor(brecq, settings, model=tiny_language_model(), task=tiny_text_task())


def test_decoder_blocks_of_transformers():
    pytest.importorskip("transformers")
    from netweight.models.llama import architecture

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture(quick=True).eval()
    x = torch.randint(100, (6, 8), generator=torch.Generator().manual_seed(0))
    task = Task(Data(x, batch=4), Data(x), "loss")
    layers = [layer for layer in weighted(model) if ".layers.0." in layer]
    change = brecq(
        model, task, layers, BRECQ(3, steps=20, batch=2, rate=0.05, activation_bits=8, activation_steps=5)
    )
    assert set(change.packed) == set(change.activations) == set(layers)
    assert assemble(model, change, Plan({})).model(x).isfinite().all()
    assert any(
        not torch.equal(form.decode(), nearest(weight_of(model, layer), Grid(3, True, 0)))
        for layer, form in change.packed.items()
    )


def test_dead_inputs_zero_weights_nan_and_layers_that_are_never_called():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)  # every input of the second layer is 0
        model[3].weight[0, 0] = torch.nan
    data = Data(torch.ones(4, 8))
    change = brecq(model, Task(data, data), ["0", "2", "3"], BRECQ(2, fisher=False, **FEW))
    assert set(change.packed) == {"0", "2"} and "NaN" in change.left["3"]
    model, task = problem()
    model.aside = nn.Linear(2, 2)
    change = brecq(model, task, ["head", "aside"], BRECQ(4, **FEW))
    assert set(change.packed) == {"head"} and "never called" in change.left["aside"]


def test_refuses_what_does_not_fit_and_nonsense():
    with pytest.raises(DoesNotFit, match="7: rows of 144 weights are not a multiple of group=7"):
        brecq(tiny_model(), tiny_task(), ["7"], BRECQ(group=7))
    with pytest.raises(DoesNotFit, match="^embedding: "):
        brecq(tiny_language_model(), tiny_text_task(), ["embedding"], BRECQ())
    nonsense = [{"steps": 0}, {"rate": 0}, {"batch": 0}, {"examples": 0}, {"weight": -1}, {"bits": 1}]
    nonsense += [{"ends": 9}, {"activation_bits": 1}, {"activation_steps": 0}, {"activation_rate": 0}]
    for wrong in nonsense:
        with pytest.raises(ValueError, match="need"):
            BRECQ(**wrong)
