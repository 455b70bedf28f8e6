"""A network while it is trained at several bit widths at once, and the switch once it is stored.

net, norms = switchable(model, layers, (8, 6, 4, 2), x)     layers that round, norms with a set per width
use(net, norms, {layer: 4 for layer in layers})             ... train ...
plain, change = finished(net, norms)                        the float network, and what is stored
switched(assemble(plain, change, plan), {layer: 2, ...})    the same codes at another width
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.compressed import Change, Compressed, Packed, RoundedInput, weight_of
from netweight.core.compressed import replace as put
from netweight.core.errors import DoesNotFit
from netweight.nn.double_rounding import DoubleRounded, WidthRounding, check_widths, double_rounded, size_of
from netweight.nn.layers import run
from netweight.nn.quantized import TREATED
from netweight.nn.quantizer import LEAST, Levels, rounded
from netweight.nn.switch_norm import SwitchNorms


@dataclass(frozen=True)
class Seen:
    """What one batch shows of the layers: names in the order they ran, mean |input| and whether any is below
    0 (None where inputs are whole numbers), and the layers in front of each batch norm."""

    order: tuple[str, ...]
    inputs: Mapping[str, tuple[float, bool] | None]
    norms: Mapping[str, tuple[str, str]]


class Switchable(nn.Module):
    """`like` with its weight, and with `inputs` its input, rounded at `width` bits; steps are learnt.

    The weight has one step for all widths, its input one for each. They begin as LSQ's at the lowest width,
    s = 2 mean |W| / sqrt(2^(b-1) - 1) / 2^(h - b): from that of the highest all weights round to 0 at 2.
    """

    def __init__(
        self, like: nn.Module, widths: Sequence[int], seen: tuple[float, bool] | None, floor: bool = False
    ) -> None:
        super().__init__()
        self.like, self.widths, self.width, self.floor = like, tuple(widths), widths[0], floor
        mean, low = float(like.weight.detach().abs().mean()), widths[-1]
        first = 2 * mean / math.sqrt(Levels.signed(low).high) / 2 ** (widths[0] - low)
        self.step = nn.Parameter(like.weight.new_tensor(max(first, LEAST)))
        self.signed = seen is not None and seen[1]
        starts = [] if seen is None else [2 * seen[0] / math.sqrt(self.levels(b).high) for b in widths]
        self.steps = nn.ParameterList(like.weight.new_tensor(max(start, LEAST)) for start in starts)

    def levels(self, bits: int) -> Levels:
        """Levels of the input at that width."""
        return Levels.signed(bits) if self.signed else Levels.unsigned(bits)

    @property
    def weight(self) -> Tensor:
        """The weight at the width in use."""
        factor = 1 / math.sqrt(self.like.weight.numel() * Levels.signed(self.widths[0]).high)
        return double_rounded(
            self.like.weight, size_of(self.step), self.widths[0], self.width, self.floor, factor
        )

    def forward(self, x: Tensor) -> Tensor:
        """What the rounded layer gives for x."""
        if len(self.steps):
            levels = self.levels(self.width)
            step = size_of(self.steps[self.widths.index(self.width)])
            x = rounded(x, step, levels, 1 / math.sqrt(x.numel() * levels.high))
        return run(self.like, x, self.weight)


def switchable(
    model: nn.Module,
    layers: Sequence[str],
    widths: Sequence[int],
    x: Tensor,
    *,
    inputs: bool = True,
    pairs: bool = False,
    floor: bool = False,
) -> tuple[nn.Module, SwitchNorms]:
    """A copy of the model whose `layers` are `Switchable` and whose batch norms behind them have a set for
    each width, and those norms.

    x: one batch, from which the steps of the inputs begin. Raises `DoesNotFit` for a layer that cannot be
    treated, `BadInput` for a name that is not there.
    """
    check_widths(widths, widths[0])
    model = copy.deepcopy(model)
    seen = look(model, layers, x)
    for name in layers:
        layer = model.get_submodule(name)
        put(model, name, Switchable(layer, widths, seen.inputs[name] if inputs else None, floor))
    norms = SwitchNorms.of(seen.norms, widths, widths[0], pairs=pairs)
    norms.apply(model)
    return model, norms


@torch.no_grad()
def look(model: nn.Module, layers: Sequence[str], x: Tensor) -> Seen:
    """Run one batch through the float network in evaluation mode and note what `Seen` holds.

    A norm belongs to the last of `layers` that ran before it; one before all of them sees the same at every
    width and stays as it is.
    """
    order: list[str] = []
    inputs: dict[str, tuple[float, bool] | None] = {}
    norms: dict[str, tuple[str, str]] = {}

    def at_layer(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            order.append(name)
            value = args[0]
            real = value.is_floating_point()
            inputs[name] = (float(value.abs().mean()), bool((value < 0).any())) if real else None

        return hook

    def at_norm(name: str) -> Any:
        def hook(*_: Any) -> None:
            if order:
                norms[name] = (order[-1], order[-2] if len(order) > 1 else "")

        return hook

    hooks = []
    for name in layers:
        weight_of(model, name)  # names the nearest layer where there is none
        layer = model.get_submodule(name)
        if not isinstance(layer, TREATED):
            raise DoesNotFit(
                f"{name}: a {type(layer).__name__} is not trained at several widths; leave it out"
            )
        hooks.append(layer.register_forward_pre_hook(at_layer(name)))
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(at_norm(name)))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    idle = [name for name in layers if name not in inputs]
    if idle:
        raise DoesNotFit(f"{idle[0]}: the layer does not run; leave it out")
    return Seen(tuple(dict.fromkeys(order)), inputs, norms)


def layers_of(model: nn.Module) -> dict[str, Switchable]:
    """The switchable layers by the name they have in the float network."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Switchable)}


def use(model: nn.Module, norms: SwitchNorms, widths: Mapping[str, int]) -> None:
    """Run each switchable layer, and the batch norms behind them, at these widths from now on."""
    for name, layer in layers_of(model).items():
        layer.width = widths[name]
    norms.at(widths).apply(model)


def finished(model: nn.Module, norms: SwitchNorms) -> tuple[nn.Module, Change]:
    """The float network in evaluation mode, and the Change that gives what was trained, bit for bit.

    Every width is in it; those in use are those that the layers run at now.
    """
    plain = copy.deepcopy(model).eval()
    packed: dict[str, Packed] = {}
    activations: dict[str, WidthRounding] = {}
    widths: dict[str, int] = {}
    for name, layer in layers_of(plain).items():
        widths[name] = layer.width
        packed[name] = DoubleRounded.of(
            layer.like.weight.detach(), layer.step, layer.widths, layer.width, layer.floor
        )
        if len(layer.steps):
            steps = torch.stack([size_of(step.detach()) for step in layer.steps])
            activations[name] = WidthRounding(steps, layer.widths, layer.width, layer.signed)
        put(plain, name, layer.like)
    return plain.requires_grad_(False), Change(packed, [norms.at(widths)], activations)


# Once it is stored ---------------------------------------------------------------------------------------


def widths_of(small: Compressed) -> dict[str, int]:
    """The width in use of each layer that can be switched, empty for any other network."""
    return {n: form.width for n, form in small.packed.items() if isinstance(form, DoubleRounded)}


def switched(small: Compressed, widths: Mapping[str, int]) -> Compressed:
    """The network with those layers at other widths; raises ValueError for one that was not trained."""
    change, model = small.change, copy.deepcopy(small.model)
    forms = {n: replace(change.packed[n], width=b) for n, b in widths.items()}
    inputs = {n: replace(r, width=widths[n]) for n, r in change.activations.items() if n in widths}
    now = {**widths_of(small), **widths}
    rewrites = [r.at(now) if isinstance(r, SwitchNorms) else r for r in change.rewrites]
    for name, form in forms.items():
        place = model.get_submodule(name)
        if isinstance(place, RoundedInput):
            device = place.rounding.scale.device
            place.how, place.rounding = inputs[name], inputs[name].module().to(device)
            place = place.layer
        place.settings = {**place.settings, "width": form.width}
    for rewrite in rewrites:
        if isinstance(rewrite, SwitchNorms):
            rewrite.apply(model)
    packed, activations = {**change.packed, **forms}, {**change.activations, **inputs}
    return Compressed(
        model, small.plan, replace(change, packed=packed, activations=activations, rewrites=rewrites)
    )
