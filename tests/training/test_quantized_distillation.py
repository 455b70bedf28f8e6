"""Quantized distillation and trained points: what is stepped, what is learnt from, and where it ends."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.deployment import exports
from netweight.nn.buckets import Buckets
from netweight.pipeline import compare
from netweight.testing import (
    check_settings,
    tiny_language_model,
    tiny_model,
    tiny_task,
    tiny_text_task,
)
from netweight.training import differentiable_quantization as second
from netweight.training import quantized_distillation as first
from netweight.training.checkpoint import Checkpoint
from netweight.training.differentiable_quantization import (
    DifferentiableQuantization,
    differentiable_quantization,
    importance,
    spread,
    trained_points,
)
from netweight.training.loop import Moment, Training
from netweight.training.quantized_distillation import (
    QuantizedDistillation,
    quantized_distillation,
    quantized_once,
    quantized_student,
)
from netweight.training.student import distilled, layers_of, taught
from netweight.verification.bounds import bounds

HOW = Training(2, batch=8, rate=0.05, optimizer="sgd", seed=3)
SLOW = Training(2, batch=8, rate=1e-4, optimizer="sgd", seed=3)
BOTH = [
    (quantized_student, QuantizedDistillation(3, bucket=100), HOW),
    (trained_points, DifferentiableQuantization(6, bucket=100), SLOW),
]


def test_the_loss_by_hand():
    scores, teacher, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([0])
    p = [1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))]  # softmax(t / 2)
    q = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    wanted = 0.7 * 4 * kl + 0.3 * math.log(1 + math.exp(-1))
    known = torch.cat([y[:, None].float(), teacher], 1)
    at = Moment(0, 0, 1, torch.Generator())
    assert distilled(0.7, 2.0)(lambda x: scores, scores, known, at).item() == pytest.approx(wanted, rel=1e-5)


def test_the_teacher_is_asked_for_every_example_and_labels_stay():
    data, teacher = tiny_task().train, tiny_model(1)
    known = taught(data, teacher, tiny_model())
    assert torch.equal(known.y[:, 0].long(), data.y) and torch.equal(known.y[:, 1:], outputs(teacher, data))
    text = tiny_text_task().calibration
    known = taught(text, tiny_language_model(1), tiny_language_model())
    assert known.y.shape == (12, 6, 13) and torch.equal(known.y[..., 0].long(), text.y)


def test_a_step_moves_the_floating_point_weights_by_the_gradient_at_the_rounded_ones():
    model, task = tiny_model(), tiny_task()
    one = Training(1, batch=32, rate=0.1, optimizer="sgd", seed=0)
    settings = QuantizedDistillation(2, bucket=64)
    found = quantized_student(model, task, one, settings, teacher=tiny_model(1))
    at = quantized_once(model, settings).network().plain().train()
    known = taught(task.train, tiny_model(1), model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for p in at.parameters():
        p.requires_grad_(True)
    distilled(0.7, 2.0)(at, known.x[order], known.y[order], None).backward()
    for name in ("0", "3", "7", "9"):
        w, g = model.get_submodule(name).weight, at.get_submodule(name).weight.grad
        assert torch.allclose(found.model.get_submodule(name).weight, w - 0.1 * g, atol=1e-5), name
        form = found.change.packed[name]
        again = Buckets.nearest(found.model.get_submodule(name).weight, 2, 64)
        assert torch.equal(form.decode(), again.decode())
    assert torch.allclose(found.model[1].weight, model[1].weight - 0.1 * at[1].weight.grad, atol=1e-5)


def test_points_are_trained_and_weights_are_not():
    model, task = tiny_model(), tiny_task()
    found = differentiable_quantization(model, task, SLOW, DifferentiableQuantization(6, bucket=100))
    still = differentiable_quantization(
        model,
        task,
        Training(2, batch=8, rate=1e-30, optimizer="sgd"),
        DifferentiableQuantization(6, bucket=100),
    )
    for name, form in found.change.packed.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(found.model.get_submodule(name).weight, weight)
        assert (form.points.diff() >= 0).all() and len(form.points) == 6
        assert not torch.equal(form.points, still.change.packed[name].points)
        assert torch.equal(form.decode(), Buckets.nearest(weight, 0, 100, form.points).decode())
    for place in (1, 4):
        assert torch.equal(found.model[place].weight, model[place].weight)
        assert not torch.equal(found.model[place].running_mean, model[place].running_mean)


def test_points_that_pass_each_other_are_put_in_order():
    wild = Training(3, batch=8, rate=0.3, optimizer="sgd")
    found = differentiable_quantization(tiny_model(), tiny_task(), wild, DifferentiableQuantization(8))
    assert all((form.points.diff() >= 0).all() for form in found.change.packed.values())


def test_where_points_begin_and_random_rounding_are_settings():
    still = Training(1, batch=8, rate=1e-30, optimizer="sgd")
    settings = DifferentiableQuantization(5, quantiles=False)
    form = differentiable_quantization(tiny_model(), tiny_task(), still, settings).change.packed["9"]
    assert form.points.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    losses = [
        quantized_distillation(
            tiny_model(), tiny_task(), HOW, QuantizedDistillation(2, stochastic=how)
        ).losses
        for how in (False, True, True)
    ]
    assert losses[0] != losses[1] == losses[2]


def test_training_the_points_lowers_the_loss():
    settings = DifferentiableQuantization(3, bucket=0, soft=1.0)  # 0 where the points lose nothing
    trained, still = (
        differentiable_quantization(
            tiny_model(), tiny_task(), Training(30, batch=8, rate=rate, optimizer="sgd"), settings
        ).losses[-1]
        for rate in (3e-3, 1e-30)
    )
    assert trained < 0.8 * still


@pytest.mark.parametrize(("run", "settings", "how"), BOTH)
def test_nothing_given_is_changed_and_the_same_comes_twice(run, settings, how):
    model, task = tiny_model(), tiny_task()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    a, b = (run(model, task.blind(), how, settings, teacher=tiny_model(1)) for _ in range(2))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert a.losses == b.losses
    assert torch.equal(outputs(a.network().model, task.test), outputs(b.network().model, task.test))
    other = run(model, task, how, settings, teacher=tiny_model(2))
    assert other.losses != a.losses


@pytest.mark.parametrize(("run", "settings", "how"), BOTH)
def test_stopped_and_resumed_gives_the_same_numbers(run, settings, how, tmp_path, monkeypatch):
    place, task, whole = tmp_path / "run.pt", tiny_task(), distilled
    wanted = run(tiny_model(), task, how, settings, teacher=tiny_model())

    def stops(soft, temperature):
        def loss(model, x, y, at):
            if at.step == 6:
                raise KeyboardInterrupt
            return whole(soft, temperature)(model, x, y, at)

        return loss

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first, "distilled", stops)
        patch.setattr(second, "distilled", stops)
        run(tiny_model(), task, how, settings, teacher=tiny_model(), keep=Checkpoint(place))
    found = run(tiny_model(), task, how, settings, teacher=tiny_model(), keep=Checkpoint(place, resume=True))
    assert found.losses == wanted.losses
    assert torch.equal(outputs(found.network().model, task.test), outputs(wanted.network().model, task.test))
    for name, form in wanted.change.packed.items():
        assert torch.equal(found.change.packed[name].decode(), form.decode())
    with pytest.raises(BadInput, match="other weights, data or settings"):
        run(tiny_model(1), task, how, settings, teacher=tiny_model(), keep=Checkpoint(place, resume=True))
    with pytest.raises(BadInput, match="other weights, data or settings"):
        run(tiny_model(), task, how, settings, teacher=tiny_model(1), keep=Checkpoint(place, resume=True))


@pytest.mark.parametrize(("run", "settings", "how"), BOTH)
def test_flows_on_into_compare_bounds_and_export(run, settings, how, tmp_path):
    model, task = tiny_model(), tiny_task()
    found = run(model, task, how, settings, teacher=model)
    small = found.network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(outputs(back.model, task.test), outputs(small.model, task.test))
    assert small.bits() == found.notes["bits"] >= found.notes["Huffman bits"] > 0
    evidence = compare(model, small, task, within=Linf(0.01))
    assert evidence["accuracy"].n == 16 and evidence["worst possible"]
    x = task.test.x[:2]
    proven = bounds(small.plain(), x, Linf(0.01))
    assert (proven.lower <= small.model(x)).all() and (small.model(x) <= proven.upper).all()
    assert exports.export(small, task, "onnx", tmp_path / "model.onnx")["same"]


@pytest.mark.parametrize("backward", ["truncated", "exact"])
def test_other_backward_passes_train_otherwise(backward):
    model = tiny_model()
    model[0].weight.data *= 8  # some are larger than 1
    losses = [
        quantized_student(
            model, tiny_task(), HOW, QuantizedDistillation(2, backward=how), teacher=tiny_model(1)
        ).losses
        for how in ("straight", backward)
    ]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses[1]))


def test_without_a_teachers_part_only_labels_count():
    runs = [
        quantized_student(
            tiny_model(), tiny_task(), HOW, QuantizedDistillation(4, soft=0.0), teacher=tiny_model(seed)
        ).losses
        for seed in (1, 2)
    ]
    assert runs[0] == runs[1]


def test_ends_may_stay_and_embeddings_are_layers():
    assert layers_of(tiny_model(), True) == ["0", "3", "7", "9"]
    assert layers_of(tiny_model(), False) == ["3", "7"]
    task = tiny_text_task()
    found = quantized_distillation(tiny_language_model(), task, HOW, QuantizedDistillation(4))
    assert {"embedding", "query", "head"} <= found.change.packed.keys()
    assert torch.isfinite(outputs(found.network().model, task.test)).all()


# Points by sensitivity -----------------------------------------------------------------------------------


def test_importance_is_the_norm_of_the_mean_gradient_of_five_batches():
    model, data = tiny_model(), tiny_task().train.batched(4)
    found = importance(model, data, ["0", "9"])
    model.requires_grad_(True)
    (F.cross_entropy(model(data.x[:20]), data.y[:20])).backward()
    assert found["0"] == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-4)
    assert found["9"] == pytest.approx(model[9].weight.grad.norm().item(), rel=1e-4)


def test_spread_by_hand():
    assert spread({"a": 3.0, "b": 1.0}, 8) == {"a": 10, "b": 6}
    assert spread({"a": 0.0, "b": 0.0}, 8) == {"a": 8, "b": 8}
    assert spread({"a": 1.0, "b": 0.0}, 2) == {"a": 2, "b": 2}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(2, 256))
def test_points_are_so_many_on_average_and_more_where_it_matters(norms, points):
    norms = {str(place): norm for place, norm in enumerate(norms)}
    found = spread(norms, points)
    assert sum(found.values()) == points * len(norms)
    assert all(2 <= k <= 256 for k in found.values())
    ordered = sorted(norms, key=norms.__getitem__)
    assert all(found[a] <= found[b] + len(norms) for a, b in zip(ordered, ordered[1:]))


def test_points_follow_the_gradient():
    settings = DifferentiableQuantization(8, by_gradient=True)
    found = differentiable_quantization(tiny_model(), tiny_task(), SLOW, settings)
    shares = found.notes["points"]
    assert sum(shares.values()) == 32 and len(set(shares.values())) > 1
    assert all(len(form.points) == shares[name] for name, form in found.change.packed.items())


# Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: QuantizedDistillation(bits=0), "bits=0: a weight takes from 1 to 8 bits"),
        (lambda: QuantizedDistillation(backward="exat"), "did you mean 'exact'"),
        (lambda: QuantizedDistillation(soft=1.5), "soft is a share from 0 to 1"),
        (lambda: DifferentiableQuantization(temperature=0.0), "the temperature above 0"),
        (lambda: DifferentiableQuantization(points=1), "points=1: a tensor takes from 2 to 256 points"),
        (lambda: QuantizedDistillation(bucket=-3), "bucket=-3"),
    ],
)
def test_settings_that_make_no_sense(make, sentence):
    check_settings(QuantizedDistillation())
    check_settings(DifferentiableQuantization())
    with pytest.raises(BadInput, match=sentence):
        make()


@pytest.mark.parametrize(("run", "settings", "how"), BOTH)
def test_data_teachers_and_models_that_do_not_fit(run, settings, how):
    task = tiny_task()
    blank = Data(task.train.x, None, 10, "no labels")
    with pytest.raises(DoesNotFit, match="no labels: training needs examples with class numbers"):
        run(tiny_model(), Task(blank, task.test), how, settings, teacher=tiny_model())
    other = nn.Sequential(nn.Flatten(), nn.Linear(4 * 49, 5))
    with pytest.raises(DoesNotFit, match=r"the teacher gives \(5,\) scores an example, the student \(4,\)"):
        run(tiny_model(), task, how, settings, teacher=other)
    with pytest.raises(DoesNotFit, match="no Linear, Conv or Embedding layer to quantize"):
        run(nn.Flatten(), task, how, settings, teacher=tiny_model())


@pytest.mark.parametrize(
    ("run", "general", "settings", "how"),
    [
        (quantized_distillation, quantized_student, QuantizedDistillation, HOW),
        (differentiable_quantization, trained_points, DifferentiableQuantization, SLOW),
    ],
)
def test_the_teacher_is_the_model_itself_or_the_network_of_a_name(run, general, settings, how, monkeypatch):
    monkeypatch.setattr("netweight.training.student.load", {"other": tiny_model(1)}.__getitem__)
    for name, teacher in (("", tiny_model()), ("other", tiny_model(1))):
        found = run(tiny_model(), tiny_task(), how, settings(teacher=name))
        assert found.losses == general(tiny_model(), tiny_task(), how, settings(), teacher=teacher).losses
