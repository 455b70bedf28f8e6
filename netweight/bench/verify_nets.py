"""The networks that verifiers are compared on.

Nothing but torch is imported here, so that a peer can build the same modules in an environment of its own.

    network("kw_mnist"), network("resnet20"), network("random-7")      # with random weights
    trained("kw_mnist")                                                # with those of the data folder
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 10
KINDS = ("mlp", "conv", "residual", "norm")  # of random networks, in the turn of their seeds


@dataclass(frozen=True)
class Example:
    """A pretrained example network. file: in the data folder's `verif_nets`. shape: of one input."""

    file: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]


def network(name: str) -> nn.Module:
    """The network of that name in evaluation mode, not yet trained; KeyError for an unknown name."""
    if name.startswith("random-"):
        return random_network(int(name.removeprefix("random-")))[0]
    if name == "resnet20":
        from netweight.models.resnet_cifar import architecture

        return architecture(20).eval()
    return EXAMPLES[name].build().eval()


def trained(name: str) -> nn.Module:
    """A network with its weights; raises `BadInput` where the data folder is not there."""
    if name.startswith("random-"):
        return network(name)
    if name == "resnet20":
        from netweight.models.resnet_cifar import resnet20

        return resnet20()
    from netweight.data.shared import shared_file

    path = shared_file(f"verif_nets/{EXAMPLES[name].file}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = network(name)
    model.load_state_dict(
        dict(zip(model.state_dict(), state.values()))
    )  # their names differ, not their order
    return model


def mlp(*widths: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def two_convolutions(channels: int, widths: tuple[int, int], flat: int, hidden: int) -> nn.Sequential:
    """Two 4 x 4 convolutions of stride 2, then two fully connected layers."""
    first, second = widths
    return nn.Sequential(
        nn.Conv2d(channels, first, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def cifar_2c2f() -> nn.Sequential:
    """Two narrow 3 x 3 convolutions without padding, then two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 28 * 28, 32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


EXAMPLES = {
    "mnist_fc_3layer": Example(
        "autolirpa_mnist_fc_3layer.pth", (1, 28, 28), lambda: mlp(784, 128, 64, CLASSES)
    ),
    "mnist_a_adv": Example(
        "autolirpa_mnist_a_adv.pth", (1, 28, 28), lambda: two_convolutions(1, (16, 32), 1568, 100)
    ),
    "kw_mnist": Example(
        "autolirpa_kw_mnist.pth", (1, 28, 28), lambda: two_convolutions(1, (16, 32), 1568, 100)
    ),
    "mnist_cnn_small": Example(
        "autolirpa_mnist_cnn_small.pth", (1, 28, 28), lambda: two_convolutions(1, (8, 16), 784, 256)
    ),
    "cifar_2c2f": Example("autolirpa_cifar_2c2f.pth", (3, 32, 32), cifar_2c2f),
}


# Random networks -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        return x + self.body(x)


def random_network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """(network, shape of one input): small, of the kind whose turn it is, with random weights and norms.

    The same for the same seed. Ten outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    if kind == "mlp":
        inside = [_draw(generator, 8, 48) for _ in range(_draw(generator, 1, 4))]
        shape = (_draw(generator, 4, 24),)
        model: nn.Module = mlp(*shape, *inside, CLASSES)
    else:
        shape = (_draw(generator, 1, 3), *(2 * [_draw(generator, 6, 10)]))
        body = {"conv": _convolutions, "residual": _residual, "norm": _normed}[kind](shape, generator)
        features = body(torch.zeros(1, *shape)).shape[1]
        hidden = _draw(generator, 8, 32)
        model = nn.Sequential(body, nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
    fill(model, generator)
    return model.eval(), shape


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of variance 2 / inputs, small biases, and norms as if trained."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            deviation = math.sqrt(2 / layer.weight[0].numel())
            layer.weight.data.normal_(0, deviation, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.uniform_(-0.2, 0.2, generator=generator)


def _convolutions(shape: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """Two or three convolutions of random kernels, strides and paddings."""
    layers: list[nn.Module] = []
    before, side = shape[0], shape[1]
    for _ in range(_draw(generator, 2, 3)):
        width, kernel = _draw(generator, 2, 8), _draw(generator, 1, min(4, side))
        stride, padding = _draw(generator, 1, 2), _draw(generator, 0, kernel // 2)
        layers += [nn.Conv2d(before, width, kernel, stride, padding), nn.ReLU()]
        before, side = width, (side + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten())


def _residual(shape: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """A convolution, then one or two blocks whose input is added to their output."""
    width = _draw(generator, 2, 6)
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, _draw(generator, 1, 2), 1), nn.ReLU()]
    for _ in range(_draw(generator, 1, 2)):
        body = (nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        layers += [Residual(nn.Sequential(*body)), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())


def _normed(shape: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """Two convolutions, each with batch norm."""
    layers: list[nn.Module] = []
    before = shape[0]
    for _ in range(2):
        width = _draw(generator, 2, 8)
        layers += [nn.Conv2d(before, width, 3, _draw(generator, 1, 2), 1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Flatten())


def _draw(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
