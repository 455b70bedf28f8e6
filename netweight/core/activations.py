"""The activations of a network: what each nonlinearity gives for what a layer handed it.

    energy(model, x)[i] = |l_i(x)|^2 / 2,    l_i  the value behind the i-th nonlinearity after a convolution

Values are followed as the model runs, whether it calls modules or functions: what a convolution gives is
marked, everything computed from it is (norms, sums with a shortcut, pools), and the first nonlinearity takes
the mark away. In a network without such places the linear layers count instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from netweight.core.errors import DoesNotFit

CONVOLUTIONS = frozenset(
    ["convolution", "conv1d", "conv2d", "conv3d"] + [f"conv_transpose{n}d" for n in (1, 2, 3)]
)
LINEAR = frozenset(["linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "scaled_dot_product_attention"])
NONLINEAR = frozenset([
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid",
    "tanh", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "clamp", "clamp_min",
])  # fmt: skip


def energy(model: nn.Module, x: Float[Tensor, "b ..."]) -> Float[Tensor, " layers"]:
    """Half the squared length of each layer's activations, of the whole batch; carries the gradient.

    Raises `DoesNotFit` where no nonlinearity follows a convolution or a linear layer.
    """
    found: dict[str, list[Tensor]] = {"convolution": [], "linear": []}
    with _Watch(lambda kind, value: found[kind].append(0.5 * value.square().sum())):
        model(x)
    energies = found["convolution"] or found["linear"]
    if not energies:
        raise DoesNotFit(
            f"{type(model).__name__}: no nonlinearity follows a convolution or a linear layer, so it has no "
            "activations to look at; give a network with ReLU or the like"
        )
    return torch.stack(energies)


class _Watch(TorchFunctionMode):
    """Follows values while a model runs; `see(kind, value)` for the value behind each nonlinearity."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.marked: dict[int, tuple[Tensor, str]] = {}  # tensors are held, so that no id comes twice

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0].strip("_")
        inputs = _tensors((args, kwargs))
        kinds = [self.marked[id(t)][1] for t in inputs if id(t) in self.marked]
        output = func(*args, **kwargs)
        values = _tensors(output)
        if name in CONVOLUTIONS or name in LINEAR:
            self._mark(values, "convolution" if name in CONVOLUTIONS else "linear")
        elif name in NONLINEAR:
            for value in values:
                self.marked.pop(id(value), None)  # a nonlinearity may work in place
                if kinds:
                    self.see(kinds[0], value)
        elif kinds:
            self._mark(values, kinds[0])
        return output

    def _mark(self, values: list[Tensor], kind: str) -> None:
        for value in values:
            if value.is_floating_point():
                self.marked[id(value)] = (value, kind)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
