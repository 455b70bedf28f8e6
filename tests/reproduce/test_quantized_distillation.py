"""The quick reproduction of quantized distillation reaches its bar; its parts are what they say."""

import torch
from torch import nn

from netweight.core.task import Data, outputs
from netweight.reproduce import quantized_distillation as reproduction


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [0.05] and all(bar.passed for bar in claim.bars)


def test_the_student_has_a_hundredth_of_the_teachers_parameters():
    student, teacher = (reproduction.stack(w, 0) for w in (reproduction.SMALL, reproduction.LARGE))
    assert sum(p.numel() for p in student.parameters()) == 678
    assert sum(p.numel() for p in teacher.parameters()) > 100 * 678
    layers = [sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net) for net in (student, teacher)]
    assert layers[0] / layers[1] == reproduction.DEPTH


def test_scores_are_looked_up_in_order_as_often_as_asked():
    net = nn.Linear(3, 2)
    data = Data(torch.rand(7, 3), torch.zeros(7, dtype=torch.long), 3)
    known = reproduction.Known.of(net, data)
    for _ in range(2):
        assert torch.equal(outputs(known, data), outputs(net, data))


def test_students_begin_alike_for_a_seed():
    a, b, c = (reproduction.coloured(seed) for seed in (0, 0, 1))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), c(x))
