"""What a training step costs once weights and inputs are rounded in it: ResNet-20, batch 128, float32, CPU.

One step is forward, cross-entropy, backward and SGD. The networks take turns on the same images, in this
process, on one thread; the figures are medians of CPU seconds, and of the ratios of neighbouring turns.

    plain      the network as it is
    ours       `nn.quantizer.Learnt` at 4 bits on the weight and the input of all layers but first and last
    torch.ao   torch's learnable fake quantizers (`_LearnableFakeQuantize`, LSQ as well) in the same places,
               and its moving-average ones (`FakeQuantize`), which learn nothing, beside them
    Brevitas   its steps as parameters, started from statistics, in the same places
    N:M masks  no step: the 2:8 masks of forward and backward pass of all layers, as BDWP makes them in each

A peer that is not installed is named in `missing`; torch.ao is a part of torch.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import replace
from netweight.core.progress import steps
from netweight.models.resnet_cifar import architecture
from netweight.nn import quantized
from netweight.nn.nm_sparse import BOTH, INPUTS, OUTPUTS, TWO_OF_EIGHT, mask, misfit
from netweight.nn.quantizer import Learnt, Levels

BITS, BATCH, TURNS = 4, 128, 9
MOST = 1.6  # ours / plain
MASKS, SHARE = "N:M masks", 0.05  # of a plain step


class Both(nn.Module):
    """A layer with a fake quantizer on its input and one on its weight."""

    def __init__(self, like: nn.Module, weight: nn.Module, inputs: nn.Module) -> None:
        super().__init__()
        self.like, self.of_weight, self.of_input = like, weight, inputs

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of what both give."""
        like, weight = self.like, self.of_weight(self.like.weight)
        return F.conv2d(self.of_input(x), weight, like.bias, like.stride, like.padding)


def bench(*, turns: int = TURNS, batch: int = BATCH) -> dict[str, Any]:
    """Seconds of each, ratios, and the bars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = measured(turns, batch)
    finally:
        torch.set_num_threads(threads)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    over = {name: ratio(seconds["ours"], seconds[name]) for name in seconds if name not in ("ours", MASKS)}
    bars = [bar("ours / plain", over["plain"], MOST)]
    bars += [bar(f"{MASKS} / plain", ratio(seconds[MASKS], seconds["plain"]), SHARE)]
    bars += [
        bar(f"ours / {name}", over[name], 1.0) for name in ("torch.ao, learnt", "Brevitas") if name in over
    ]
    return {
        "network": "ResNet-20",
        "batch": batch,
        "bits": BITS,
        "turns": turns,
        "missing": "" if "Brevitas" in found else "Brevitas is not installed: pip install 'netweight[peers]'",
        "rows": [
            {"step": name, "cpu_seconds": value, "over_plain": ratio(seconds[name], seconds["plain"])}
            for name, value in found.items()
        ],
        "bars": bars,
    }


def ratio(one: list[float], other: list[float]) -> float:
    """The median of the ratios of neighbouring turns: what slows the machine slows both."""
    return statistics.median(a / b for a, b in zip(one, other))


def bar(name: str, value: float, most: float) -> dict[str, Any]:
    """A bar of the answer."""
    return {"name": name, "measured": value, "bar": most, "direction": "at most", "reached": value <= most}


def measured(turns: int, batch: int) -> dict[str, list[float]]:
    """CPU seconds of one step of each network, in turns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    known = {name: make for name, make in MAKERS.items() if name != "Brevitas" or find_spec("brevitas")}
    with torch.random.fork_rng(), warnings.catch_warnings():  # torch.ao warns of what it will leave out
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        plain = architecture(20)
        networks = {name: make(plain) for name, make in known.items()}
    taken = {name: stepper(network.train(), x, y) for name, network in networks.items()}
    return in_turns({**taken, MASKS: masks(plain)}, turns)


def in_turns(taken: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of each call, one after the other and again; the first turn of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in taken}
    for turn in steps(range(turns + 1), "Training steps"):
        for name, once in taken.items():
            start = time.process_time()
            once()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def stepper(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step, to be called again and again."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.01, momentum=0.9)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    return once


def masks(network: nn.Module) -> Callable[[], None]:
    """Both masks of every layer that 2:8 divides, made once a call."""
    layers = [layer for layer in network.modules() if not misfit(layer, TWO_OF_EIGHT, BOTH)]
    weights = [layer.weight.detach() for layer in layers]

    def once() -> None:
        for weight in weights:
            mask(weight, TWO_OF_EIGHT, INPUTS)
            mask(weight, TWO_OF_EIGHT, OUTPUTS)

    return once


# The networks ---------------------------------------------------------------------------------------------


def ours(plain: nn.Module) -> nn.Module:
    """LSQ as this library does it."""
    inner = set(quantized.inner_layers(plain))

    def rule(name: str, layer: nn.Module) -> quantized.Roundings | None:
        if name not in inner:
            return None
        return quantized.Roundings(Learnt(Levels.signed(BITS)), Learnt(Levels.unsigned(BITS)))

    return quantized.attach(plain, rule)


def around(plain: nn.Module, weight: Callable[[], nn.Module], inputs: Callable[[], nn.Module]) -> nn.Module:
    """The same layers with other fake quantizers."""
    network = copy.deepcopy(plain)
    for name in quantized.inner_layers(plain):
        replace(network, name, Both(network.get_submodule(name), weight(), inputs()))
    return network


def torch_learnt(plain: nn.Module) -> nn.Module:
    """LSQ as torch.ao does it; one batch has set the first steps, then its observers are off."""
    module = import_module("torch.ao.quantization._learnable_fake_quantize")
    observers = import_module("torch.ao.quantization.observer")

    def make(low: int, high: int, dtype: torch.dtype, scheme: torch.qscheme) -> Callable[[], nn.Module]:
        def fake() -> nn.Module:
            return module._LearnableFakeQuantize(
                observers.MovingAverageMinMaxObserver,
                low,
                high,
                use_grad_scaling=True,
                dtype=dtype,
                qscheme=scheme,
                reduce_range=False,
            )

        return fake

    half = 2 ** (BITS - 1)
    network = around(
        plain,
        make(-half, half - 1, torch.qint8, torch.per_tensor_symmetric),
        make(0, 2 * half - 1, torch.quint8, torch.per_tensor_affine),
    )
    fakes = [m for m in network.modules() if isinstance(m, module._LearnableFakeQuantize)]
    for each in fakes:
        each.enable_static_estimate()
    quantized.begin(network, torch.rand(8, 3, 32, 32))
    for each in fakes:
        each.enable_param_learning()
    return network


def torch_average(plain: nn.Module) -> nn.Module:
    """Moving averages of the range, as torch.ao's quantization-aware training has them by default."""
    fake = import_module("torch.ao.quantization.fake_quantize")
    half = 2 ** (BITS - 1)
    weight = fake.default_weight_fake_quant.with_args(quant_min=-half, quant_max=half - 1)
    inputs = fake.default_fake_quant.with_args(quant_min=0, quant_max=2 * half - 1)
    return around(plain, weight, inputs)


def brevitas(plain: nn.Module) -> nn.Module:
    """LSQ as Brevitas does it: steps as parameters, on weights and unsigned inputs."""
    layers, kinds = import_module("brevitas.nn"), import_module("brevitas.quant")
    network = copy.deepcopy(plain)
    for name in quantized.inner_layers(plain):
        like = network.get_submodule(name)
        conv = layers.QuantConv2d(
            like.in_channels,
            like.out_channels,
            3,
            like.stride,
            like.padding,
            bias=False,
            weight_quant=kinds.Int8WeightPerTensorFloat,
            weight_bit_width=BITS,
            weight_scaling_impl_type="parameter_from_stats",
            input_quant=kinds.Uint8ActPerTensorFloat,
            input_bit_width=BITS,
            input_collect_stats_steps=1,
            return_quant_tensor=False,
        )
        conv.weight.data.copy_(like.weight.data)
        replace(network, name, conv)
    return network


MAKERS = {
    "plain": copy.deepcopy,
    "ours": ours,
    "torch.ao, learnt": torch_learnt,
    "torch.ao, averages": torch_average,
    "Brevitas": brevitas,
}
