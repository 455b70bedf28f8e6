"""The layer that runs a packed weight, decoded on each call; `nn/kernels.py` swaps in torch's low-bit
products.

`PackedLayer` stands in for any Linear, Conv1d to 3d, ConvTranspose1d to 3d or Embedding. The packed tensors
are buffers (they follow `.to(device)`) that state_dict leaves out; bias and settings stay those of the layer
it stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Packed, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.stored import put_together, take_apart

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (*WEIGHTED, *TRANSPOSED, nn.Embedding)


def weights_to_pack(
    model: nn.Module, layers: Sequence[str], kinds: tuple[type[nn.Module], ...] = KINDS
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of those layers, detached, and what is left with the reason: a weight that holds NaN or
    Inf.

    Raises `BadInput` for a name that is not there, `DoesNotFit` for a layer that is none of `kinds`.
    """
    weights: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for layer in layers:
        weight, kind = weight_of(model, layer), type(model.get_submodule(layer))
        if not issubclass(kind, kinds):
            raise DoesNotFit(f"{layer}: the method cannot treat a {kind.__name__}; leave the layer out")
        if weight.isfinite().all():
            weights[layer] = weight
        else:
            left[layer] = "its weight holds NaN or Inf"
    return weights, left


class PackedLayer(nn.Module):
    """`like` with its weight in a stored form."""

    def __init__(self, like: nn.Module, form: Packed) -> None:
        super().__init__()
        if not isinstance(like, KINDS):
            raise DoesNotFit(f"{type(like).__name__}: no packed form runs this kind of layer; leave it out")
        weight = like.weight
        if tuple(form.decode().shape) != tuple(weight.shape):
            raise DoesNotFit(
                f"a packed weight of {tuple(form.decode().shape)} does not fit {tuple(weight.shape)}"
            )
        bare = copy.copy(like)  # shares bias, holds no weight
        bare._parameters = {name: p for name, p in like._parameters.items() if name != "weight"}
        self.like = bare
        tensors, self.settings = take_apart(form)
        self.parts = {name: f"part_{index}" for index, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            self.register_buffer(self.parts[name], tensor.to(weight.device), persistent=False)

    @property
    def form(self) -> Packed:
        """The stored form, on the device of the layer."""
        return put_together({name: getattr(self, part) for name, part in self.parts.items()}, self.settings)

    @property
    def weight(self) -> Tensor:
        """The decoded weight."""
        return self.form.decode()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer it stands for."""
        return getattr(self.like, "bias", None)

    def plain(self) -> nn.Module:
        """The float layer with the decoded weight."""
        layer = copy.deepcopy(self.like)
        layer.weight = nn.Parameter(self.weight.clone())
        return layer

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """What the layer gives for x, computed with the decoded weight."""
        return run(self.like, x, self.weight, *rest)


def run(like: nn.Module, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The layer's own forward pass with another weight."""
    shell = copy.copy(like)
    vars(shell)["weight"] = weight  # found before parameters are looked up, and no parameter itself
    return shell.forward(x, *rest)
