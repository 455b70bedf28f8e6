"""Wide residual networks: as many weights as the paper counts, and the same code at any width."""

import pytest
import torch
from torch import nn

from netweight.core.errors import BadInput
from netweight.models.wide_resnet import Block, wide_resnet


def test_sizes_are_those_of_the_paper():
    # 36.5 and 2.7 million in table 2; ours has no bias at the end and shortcuts as the paper's code
    assert sum(p.numel() for p in wide_resnet(28, 10).parameters()) == pytest.approx(36.5e6, rel=0.005)
    assert sum(p.numel() for p in wide_resnet(16, 4).parameters()) == pytest.approx(2.75e6, rel=0.01)
    convolutions = [
        m for m in wide_resnet(16, 1).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) == 1 + 12


def test_a_block_by_its_definition():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block, x = Block(4, 6, 2).eval(), torch.randn(2, 4, 8, 8)
    for norm in (block.bn1, block.bn2):
        norm.running_mean.add_(0.1)
    first = block.bn1(x).relu()
    wanted = block.conv2(block.bn2(block.conv1(first)).relu()) + block.shortcut(first)
    assert torch.equal(block(x), wanted) and wanted.shape == (2, 6, 4, 4)
    assert Block(4, 4, 1).shortcut is None


def test_same_seed_same_weights_and_logits_of_every_class():
    a, b, c = (wide_resnet(10, 1, classes=7, seed=seed) for seed in (0, 0, 1))
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), c(x)) and a(x).shape == (2, 7)


@pytest.mark.parametrize(("depth", "width"), [(4, 1), (20, 2), (28, 0)])
def test_depths_that_do_not_exist(depth, width):
    with pytest.raises(BadInput, match=f"depth={depth}, width={width}: give a depth of 10, 16, 22"):
        wide_resnet(depth, width)
