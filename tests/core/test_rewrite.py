"""Exact rewrites: the function stays, the form is the one promised, and what does not fit is refused."""

import pytest
import torch
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.rewrite import FoldBatchNorm, Scale, residual, scale_inputs
from netweight.testing import tiny_language_model, tiny_model


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_folding_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)).eval()
    for tensor, value in zip(
        (
            model[0].weight,
            model[0].bias,
            model[1].weight,
            model[1].bias,
            model[1].running_mean,
            model[1].running_var,
        ),
        (3.0, 5.0, 2.0, 7.0, 1.0, 16.0),
    ):
        tensor.data.fill_(value)
    FoldBatchNorm("0", "1").apply(model)
    assert model[0].weight.item() == 1.5 and model[0].bias.item() == (5 - 1) / 2 + 7
    assert isinstance(model[1], nn.Identity)


def test_folding_keeps_the_function_and_removes_the_norms():
    model, x = tiny_model(), torch.rand(5, 4, 7, 7)
    folds = [FoldBatchNorm("0", "1"), FoldBatchNorm("3", "4")]
    assert residual(model, folds, x) <= 1e-9
    assert len(norms(model)) == 2  # residual works on a copy
    expected = model(x)
    for fold in folds:
        fold.apply(model)
    assert not norms(model) and torch.allclose(model(x), expected, atol=1e-5)
    assert model[3].bias is not None and model[3].weight.dtype == torch.float32


def test_folding_a_norm_without_gain_into_a_linear_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).eval()
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    assert residual(model, [FoldBatchNorm("0", "1")], torch.rand(6, 3)) <= 1e-9


def test_folding_refuses_what_has_no_exact_fold():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(3))
    with pytest.raises(DoesNotFit, match="^1: .*without running statistics"):
        FoldBatchNorm("0", "1").apply(model)
    with pytest.raises(DoesNotFit, match="^2: 3 channels, 0 has 2"):
        FoldBatchNorm("0", "2").apply(model)
    back = nn.Sequential(nn.ConvTranspose2d(2, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(DoesNotFit, match="^0: .*ConvTranspose2d"):
        FoldBatchNorm("0", "1").apply(back)


def scales(count: int) -> torch.Tensor:
    return torch.logspace(-1, 1, count)


@pytest.mark.parametrize(
    ("producer", "consumers"),
    [("norm", ("query", "key", "value")), ("norm2", ("up",)), ("up", ("down",)), ("value", ("output",))],
)
def test_scaling_keeps_the_function_of_a_language_model(producer, consumers):
    model = tiny_language_model()
    s = scales(model.get_submodule(consumers[0]).in_features)
    assert residual(model, [Scale(producer, consumers, s)], torch.arange(12).reshape(2, 6)) <= 1e-9
    before = model.get_submodule(consumers[0]).weight.clone()
    Scale(producer, consumers, s).apply(model)
    assert torch.allclose(model.get_submodule(consumers[0]).weight, before * s)


def test_scaling_between_convolutions_with_groups():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    rewrites = [Scale("0", ("2",), scales(4)), Scale("2", ("4",), scales(4))]
    assert residual(model, rewrites, torch.rand(2, 2, 8, 8)) <= 1e-9


def test_scaling_takes_the_last_rows_of_a_joint_projection():
    producer = nn.Linear(3, 6)
    model = nn.ModuleDict({"joint": producer, "next": nn.Linear(2, 2)})
    before = producer.weight.clone()
    Scale("joint", ("next",), torch.tensor([2.0, 4.0])).apply(model)
    factor = torch.tensor([1, 1, 1, 1, 2.0, 4.0])[:, None]
    assert torch.equal(model["joint"].weight, before / factor)


def test_scaling_refuses_what_does_not_fit():
    model = nn.Sequential(
        nn.Linear(2, 3), nn.Linear(4, 2), nn.ReLU(), nn.LayerNorm(3, elementwise_affine=False)
    )
    with pytest.raises(DoesNotFit, match="^1: 4 input channels cannot take 3 scales"):
        Scale("0", ("1",), scales(3)).apply(model)
    with pytest.raises(DoesNotFit, match="^0: 3 channels cannot take 4 scales"):
        Scale("0", ("1",), scales(4)).apply(model)
    with pytest.raises(DoesNotFit, match="^3: a LayerNorm without a weight"):
        Scale("3", ("1",), scales(3)).apply(model)
    with pytest.raises(DoesNotFit, match="^layer: 4 input"):
        scale_inputs(nn.Linear(4, 2), scales(3))
    for wrong in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="positive and finite"):
            Scale("0", ("1",), torch.tensor(wrong))
