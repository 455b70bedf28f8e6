"""Bit flips: the few bits of stored weights that hurt most, found by gradients.

Paper: Rakin et al., "Bit-Flip Attack: Crushing Neural Network with Progressive Bit Search", ICCV 2019,
arXiv:1903.12269 (section 3).

A weight is (code - zero) * scale: flipping bit i of a code moves it by +-2^i * scale. k times:

    in each layer    the bit with the largest +-2^i * scale * grad_w l, the first-order gain of the loss
    over all layers  flip each of these bits alone, keep the one that gives the largest loss

Differs from the paper: codes are unsigned with a zero point, of 2 to 8 bits; only the `LAYERS` layers with
the largest first-order gain are tried; weights that are not codes on a uniform grid are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from netweight.core import compressed, grid, progress
from netweight.core.compressed import Compressed
from netweight.core.errors import DoesNotFit
from netweight.core.flips import BitFlips
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import victim
from netweight.nn.packed import Affine

LAYERS = 8


def bit_flips(
    small: Compressed, x: Num[Tensor, "b *in"], y: Int[Tensor, " b"] | None, within: Perturbation
) -> Found:
    """The memory of codes with at most k bits flipped: points `1 bytes` (see `memory`).

    hit: whether it is right on no more of x than guessing would be. y: class numbers; None stands for the
    network's own predictions. `with_memory` gives the network back. Deterministic. Raises `DoesNotFit` for
    other sets than bit flips and for networks without codes on a uniform grid.
    """
    if not isinstance(within, BitFlips):
        raise DoesNotFit(f"bit-flips changes stored bits, but {within} is no set of them; give bitflips=10")
    twin = small.plain()
    layers = _layers(small, twin)
    with victim(twin, x, y, "bit-flips") as v:
        for _ in progress.steps(range(within.k), "Flipping bits"):
            _flip_one(layers, lambda: F.cross_entropy(v.scores(v.x), v.of))
        with torch.no_grad():
            right = float((v.scores(v.x).argmax(1) == v.of).float().mean())
        chance = 1 / v.clean.shape[1]
    packed = [grid.pack(layer.codes, layer.form.bits_per_code) for layer in layers]
    return Found(torch.cat(packed)[None], torch.tensor([right <= chance]))


def memory(small: Compressed) -> UInt8[Tensor, "1 bytes"]:
    """The bytes of all codes on a uniform grid, layer after layer in the order of `small.packed`."""
    return torch.cat([form.codes for form in _forms(small).values()])[None]


def with_memory(small: Compressed, bytes_: UInt8[Tensor, "1 bytes"]) -> Compressed:
    """The network with other codes in memory; raises ValueError where their number differs."""
    forms = _forms(small)
    parts = bytes_[0].split([len(form.codes) for form in forms.values()])
    flipped = {
        name: replace(form, codes=part) for (name, form), part in zip(forms.items(), parts, strict=True)
    }
    model = copy.deepcopy(small.model)
    for name, form in flipped.items():
        place = _place(small, name)
        compressed.replace(model, place, form.layer(model.get_submodule(place).plain()))
    change = replace(small.change, packed={**small.change.packed, **flipped})
    return Compressed(model, small.plan, change)


@dataclass(frozen=True)
class Layer:
    """One attacked layer. codes: as they are now, one byte each, flat. step: what a code step moves a weight.

    weight: the parameter of the float twin that the codes stand for.
    """

    form: Affine
    codes: UInt8[Tensor, " n"]
    step: Float[Tensor, " n"]
    weight: nn.Parameter

    def flip(self, place: int, bit: int) -> None:
        """Flip one bit, in the codes and in the twin."""
        up = 1 - 2 * ((int(self.codes[place]) >> bit) & 1)
        self.codes[place] ^= 1 << bit
        with torch.no_grad():
            self.weight.view(-1)[place] += up * 2**bit * self.step[place]


def _layers(small: Compressed, twin: nn.Module) -> list[Layer]:
    layers = []
    for name, form in _forms(small).items():
        weight = twin.get_submodule(_place(small, name)).weight
        assert isinstance(weight, nn.Parameter)
        ones = grid.in_groups(torch.ones(form.shape, device=weight.device), form.group)
        step = (ones * form.scale.reshape(-1, 1)).reshape(-1).to(weight)
        layers.append(Layer(form, form.integers().reshape(-1).clone(), step, weight))
    return layers


def _forms(small: Compressed) -> dict[str, Affine]:
    forms = {name: form for name, form in small.packed.items() if isinstance(form, Affine)}
    if not forms:
        raise DoesNotFit("no weight is stored as codes on a uniform grid, so there are no bits to flip")
    return forms


def _place(small: Compressed, name: str) -> str:
    return f"{name}.layer" if name in small.change.activations else name


def _flip_one(layers: list[Layer], loss: Callable[[], Tensor]) -> None:
    """The best bit of each layer by its slope; of those the one with the largest loss stays flipped."""
    slopes = torch.autograd.grad(loss(), [layer.weight for layer in layers])
    best = []
    for layer, slope in zip(layers, slopes, strict=True):
        bits = torch.arange(layer.form.bits_per_code, device=slope.device)
        up = 1.0 - 2.0 * ((layer.codes[:, None] >> bits) & 1)
        gain = up * 2.0**bits * (layer.step * slope.reshape(-1))[:, None]
        at = int(gain.argmax())
        best.append((float(gain.view(-1)[at]), layer, at // len(bits), at % len(bits)))
    tried = sorted(best, key=lambda one: one[0], reverse=True)[:LAYERS]
    losses = []
    for _, layer, place, bit in tried:
        layer.flip(place, bit)
        with torch.no_grad():
            losses.append(float(loss()))
        layer.flip(place, bit)
    _, layer, place, bit = tried[max(range(len(tried)), key=losses.__getitem__)]
    layer.flip(place, bit)
