"""Group convolution with a constant group size, and a small network of it.

Paper: Jha et al., "E2GC: Energy-efficient Group Convolution in Deep Neural Networks", VLSID 2020,
arXiv:2006.15100.

A convolution of M channels in g groups joins G = M/g of them at a time. The usual choice keeps g, so that G
is small in early layers and large in late ones; here G is kept, and g_l = M_l / G. G = 1 is a depthwise
convolution, G = M a dense one. As in MobileNet-V1 (Howard et al., 2017, arXiv:1704.04861) a 1 x 1
convolution follows, which joins all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit


def groups_for(channels: int, size: int) -> int:
    """The number of groups of `size` channels; raises `DoesNotFit` where they do not divide."""
    if size < 1 or channels % size:
        raise DoesNotFit(
            f"{channels} channels do not divide into groups of {size}; give a size that divides {channels}"
        )
    return channels // size


class GroupConv(nn.Module):
    """k x k convolution in groups of `size` channels, norm, ReLU; then 1 x 1 convolution, norm, ReLU.

    `b before h w` to `b after h/stride w/stride` (rounded up). Raises `DoesNotFit` for a size that does not
    divide `before`.
    """

    def __init__(self, before: int, after: int, size: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        groups = groups_for(before, size)
        self.group = nn.Conv2d(before, before, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(before)
        self.point = nn.Conv2d(before, after, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """relu(norm(point(relu(norm(group(x))))))."""
        x = self.norm(self.group(x)).relu()
        return self.norm2(self.point(x)).relu()


def mobile(
    widths: Sequence[int], size_of: Callable[[int], int], classes: int = 10, colours: int = 3
) -> nn.Sequential:
    """A dense 3 x 3 convolution of stride 2 (few colours do not divide), one `GroupConv` a width, the mean,
    a Linear.

    widths: channels that each block reads; the next block's is what it gives, the last gives twice its own.
    size_of: the group size for a number of channels (lambda m: 8 keeps the size, lambda m: m // 8 the
    groups). Every block but the first halves the image.
    """
    stem = nn.Sequential(
        nn.Conv2d(colours, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    )
    after = [*widths[1:], 2 * widths[-1]]
    blocks = [
        GroupConv(m, n, size_of(m), stride=1 if place == 0 else 2)
        for place, (m, n) in enumerate(zip(widths, after))
    ]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(after[-1], classes)]
    return nn.Sequential(stem, *blocks, *end)
