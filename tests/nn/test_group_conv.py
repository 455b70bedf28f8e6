"""Group convolution: dense and depthwise at its ends, blocks between them, constant size through a net."""

import pytest
import torch
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.graph import macs
from netweight.nn.group_conv import GroupConv, groups_for, mobile


@pytest.mark.parametrize(("size", "groups"), [(1, 8), (2, 4), (8, 1)])
def test_it_is_a_dense_convolution_with_blocks_on_the_diagonal(size, groups):
    torch.manual_seed(size)
    layer = GroupConv(8, 6, size, stride=2).eval()
    dense = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
    dense.weight.data.zero_()
    for g in range(groups):
        block = slice(g * size, (g + 1) * size)
        dense.weight.data[block, block] = layer.group.weight.data[block]
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(layer.group(x), dense(x), rtol=1e-5, atol=1e-5)
    assert layer.group.groups == groups and layer(x).shape == (2, 6, 4, 4)
    layer.norm.running_var.fill_(2.0)
    layer.norm2.bias.data.fill_(0.3)
    inner = layer.norm(dense(x)).clamp(min=0)
    expected = layer.norm2(layer.point(inner)).clamp(min=0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_size_is_kept_through_the_network():
    net = mobile((8, 16, 32), lambda m: 4).eval()
    blocks = [m for m in net if isinstance(m, GroupConv)]
    assert [m.group.weight.shape[1] for m in blocks] == [4, 4, 4]
    assert [m.group.groups for m in blocks] == [2, 4, 8]
    assert net[0][0].groups == 1 if isinstance(net[0], nn.Sequential) else net[0].groups == 1
    x = torch.zeros(1, 3, 16, 16)
    assert net(x).shape == (1, 10)
    counted = (
        27 * 8 * 64 + 9 * 4 * (8 * 64 + 16 * 16 + 32 * 4) + 8 * 16 * 64 + 16 * 32 * 16 + 32 * 64 * 4 + 640
    )
    assert macs(net, x) == counted


def test_sizes_that_do_not_divide_are_named():
    assert groups_for(12, 3) == 4
    for size in (5, 0):
        with pytest.raises(DoesNotFit, match=f"12 channels do not divide into groups of {size}"):
            groups_for(12, size)
    with pytest.raises(DoesNotFit, match="8 channels"):
        GroupConv(8, 8, 3)
