"""Untrained networks whose operators can run in many orders: what schedulers and cost models are tried on.

Sources of the shapes: Szegedy et al., "Going deeper with convolutions", CVPR 2015 (branches that are joined);
Huang et al., "Densely connected convolutional networks", CVPR 2017 (every layer reads all before it); Xie et
al., "Exploring randomly wired neural networks for image recognition", ICCV 2019 (a random graph as a cell).
All take images `b c h w` and give logits `b 10`.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from netweight.models.trained import seeded


def conv(before: int, after: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the image, batch norm, ReLU."""
    layer = nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


class Inception(nn.Module):
    """Blocks of four branches (1 x 1, 3 x 3, 5 x 5, pool) that are joined along the channels."""

    def __init__(self, blocks: int = 2, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, 4 * width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    conv(4 * width, width, 1),
                    nn.Sequential(conv(4 * width, width // 2, 1), conv(width // 2, width)),
                    nn.Sequential(conv(4 * width, width // 2, 1), conv(width // 2, width, 5)),
                    nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(4 * width, width, 1)),
                ]
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.stem(x)
        for branches in self.blocks:
            x = torch.cat([branch(x) for branch in branches], 1)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Layers of `growth` channels, each on all channels made before it."""

    def __init__(self, layers: int = 6, growth: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, growth)
        self.layers = nn.ModuleList(conv(growth * (i + 1), growth) for i in range(layers))
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return self.head(torch.cat(made, 1).mean((2, 3)))


class Encoder(nn.Module):
    """Transformer blocks on patches: attention with separate projections, a feed-forward part, two norms."""

    def __init__(self, blocks: int = 1, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.heads = heads
        parts = {"q": width, "k": width, "v": width, "o": width, "up": 4 * width}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, out) for name, out in parts.items()},
                    "down": nn.Linear(4 * width, width),
                    "norm1": nn.LayerNorm(width),
                    "norm2": nn.LayerNorm(width),
                }
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = block["norm1"](x)
            q, k, v = (block[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
            scores = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
            x = x + block["o"]((scores @ v).transpose(1, 2).flatten(2))
            x = x + block["down"](torch.relu(block["up"](block["norm2"](x))))
        return self.head(x.mean(1))


class Wired(nn.Module):
    """Cells of random wiring: node k adds up to three nodes among the `back` before it, then convolves.

    Nodes have one to three times `width` channels (brought to `width` where they are read).
    """

    def __init__(self, cells: int = 1, nodes: int = 8, width: int = 8, back: int = 5, seed: int = 0) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.stem = conv(3, width)
        self.reads: list[list[list[int]]] = []
        self.cells = nn.ModuleList()
        for _ in range(cells):
            reads = [
                sorted(draw.sample(range(max(0, k - back), k), min(k, draw.randint(1, 3))))
                for k in range(1, nodes)
            ]
            wide = [width] + [width * draw.randint(1, 3) for _ in reads]
            self.reads.append(reads)
            self.cells.append(
                nn.ModuleList(conv(sum(wide[r] for r in read), wide[k + 1]) for k, read in enumerate(reads))
            )
            loose = [k for k in range(nodes) if all(k not in read for read in reads)]
            self.reads[-1].append(loose)
            self.cells[-1].append(conv(sum(wide[k] for k in loose), width, 1))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.stem(x)
        for layers, reads in zip(self.cells, self.reads):
            made = [x]
            for layer, read in zip(layers, reads):
                made.append(layer(torch.cat([made[r] for r in read], 1) if len(read) > 1 else made[read[0]]))
            x = made[-1]
        return self.head(x.mean((2, 3)))


def branching(seed: int = 0) -> dict[str, nn.Module]:
    """One network of each kind by name, with random weights, in evaluation mode."""
    with seeded(seed):
        nets: dict[str, nn.Module] = {
            "inception": Inception(),
            "dense": Dense(),
            "transformer": Encoder(),
            **{f"wired {k}": Wired(seed=100 * seed + k) for k in range(4)},
        }
    return {name: net.eval() for name, net in nets.items()}
