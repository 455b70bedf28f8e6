"""What the two networks cost: bytes on disk, stored bits per weight, bit operations, memory and time.

Counted, not claimed: bytes are those of the files, memory is what the operators of one forward pass allocate
beside the weights, and latency is measured in turns (original, compressed, original, ...), so that whatever
else the machine does falls on both.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netweight.core.compressed import WEIGHTED, Compressed, weight_of, weighted
from netweight.core.intervals import quantile_interval
from netweight.core.result import Row
from netweight.core.task import Task
from netweight.evidence.average import evaluating

COST = "cost"
FLOAT_BITS = 32  # of an activation that is not rounded
RUNS, WARM_UP, SECONDS = 50, 3, 20.0  # timed runs of each network at most, runs before, and when to stop
LEAST = 5  # timed runs of each network at least


def rows(original: nn.Module, small: nn.Module, task: Task, packed: Compressed | None = None) -> list[Row]:
    """The cost of both networks for one test example.

    small: the network as it will run. packed: the compressed form it belongs to; without it only what two
    networks of any kind have in common is counted.
    """
    x = task.test.x[:1]
    table = [_exact("bytes on disk", float_file(original), disk(small, packed), *_disk_method(packed))]
    if packed is not None:
        before, after = stored_bits(original, packed)
        how = "counted on the stored tensors of the Linear and Conv weights, scales and places included"
        table.append(_exact("stored bits per weight", before, after, how, "bits"))
        macs, before, after = bit_operations(original, packed, x)
        how = f"multiply-adds ({macs:.6g}) times stored bits of the weight times bits of the input"
        table.append(_exact("bit operations", before, after, how, "per example"))
    how = "weights and buffers, and the most that operators of one forward pass hold at a time; one example"
    table.append(_exact("peak memory", peak_bytes(original, x), peak_bytes(small, x), how, "bytes"))
    return [*table, *latency_rows(original, small, x)]


def _exact(quantity: str, before: int | float, after: int | float, how: str, unit: str) -> Row:
    return Row(COST, quantity, float(before), float(after), math.nan, math.nan, 1, how, "counted", unit)


def _disk_method(packed: Compressed | None) -> tuple[str, str]:
    whole = "every file of the saved folder" if packed is not None else "a safetensors file of its tensors"
    return f"a float32 safetensors file of the original; {whole}", "bytes"


def float_file(model: nn.Module) -> int:
    """Bytes of the model's safetensors file with every floating-point number in float32."""
    kept = {t.data_ptr(): (name, t) for name, t in reversed(model.state_dict().items())}
    return file_bytes(
        {n: t.to("meta", torch.float32 if t.is_floating_point() else t.dtype) for n, t in kept.values()}
    )


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file: 8 for the header's length, the header filled up to eights, the tensors."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    header: dict[str, Any] = {}
    start = 0
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in order:
        stop = start + tensor.numel() * tensor.element_size()
        kind = names.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.").replace("uint", "U")
        kind = kind.replace("int", "I").upper()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + start


def disk(small: nn.Module, packed: Compressed | None) -> int:
    """Bytes of all files that `Compressed.save` writes; of a network that is not packed, of its tensors."""
    if packed is None:
        kept = {t.data_ptr(): (name, t) for name, t in reversed(small.state_dict().items())}
        return file_bytes(dict(kept.values()))
    with tempfile.TemporaryDirectory() as folder:
        packed.write(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def planned(original: nn.Module, packed: Compressed) -> list[str]:
    """The layers that bits are counted over: every Linear and Conv weight, and what else is packed of the
    original's own (a rewrite may make layers that it has not)."""
    there = dict(original.named_modules())
    return list(dict.fromkeys([*weighted(original), *(name for name in packed.packed if name in there)]))


def made(original: nn.Module, packed: Compressed) -> list[str]:
    """The packed layers that the original has not."""
    there = dict(original.named_modules())
    return [name for name in packed.packed if name not in there]


def gone(layer: str, packed: Compressed) -> bool:
    """Whether a rewrite took that layer of the original away."""
    return layer not in dict(packed.model.named_modules())


def stored_bits(original: nn.Module, packed: Compressed) -> tuple[float, float]:
    """Bits per weight of the original: of it and of the compressed network, over the layers of `planned` and
    what rewrites made of them."""
    before = weights = 0
    after = sum(packed.packed[layer].bits() for layer in made(original, packed))
    for layer in planned(original, packed):
        weight = weight_of(original, layer)
        plain = 8 * weight.numel() * weight.element_size()
        weights += weight.numel()
        before += plain
        if not gone(layer, packed):
            after += packed.packed[layer].bits() if layer in packed.packed else plain
    return before / weights, after / weights


def bit_operations(original: nn.Module, packed: Compressed, x: Tensor) -> tuple[float, float, float]:
    """(multiply-adds, bit operations before, bit operations after) of the Linear and Conv layers, for x."""
    count = multiply_adds(original, x)
    before = after = 0.0
    for layer, macs in count.items():
        weight = weight_of(original, layer)
        plain = 8.0 * weight.element_size()
        width = packed.packed[layer].bits() / weight.numel() if layer in packed.packed else plain
        rounding = packed.change.activations.get(layer)
        before += macs * plain * FLOAT_BITS
        if not gone(layer, packed):
            after += macs * width * (getattr(rounding, "bits", FLOAT_BITS) if rounding else FLOAT_BITS)
    new = made(original, packed)
    for layer, macs in multiply_adds(packed.plain(), x).items() if new else ():
        name = layer.removesuffix(".layer")  # inside `RoundedInput`
        if name in new:
            weights, rounding = packed.packed[name].decode().numel(), packed.change.activations.get(name)
            width = packed.packed[name].bits() / weights
            after += macs * width * (getattr(rounding, "bits", FLOAT_BITS) if rounding else FLOAT_BITS)
    return sum(count.values()), before, after


def multiply_adds(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Multiply-adds of each Linear and Conv layer in one forward pass of x, by layer name."""
    count: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def seen(module: nn.Module, _: Any, output: Tensor) -> None:
            count[name] = count.get(name, 0.0) + float(output.numel() * module.weight[0].numel())

        return seen

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WEIGHTED)]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        with evaluating(model):
            model(x.to(_device(model, x)))
    finally:
        for handle in handles:
            handle.remove()
    return count


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, while somebody holds them.

    known: storages that were there before. What a kernel needs inside itself is not seen.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it returned."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.known.discard(key)
        self.live -= size


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the weights and buffers and the most that one forward pass of x holds beside them."""
    device = _device(model, x)
    held = {
        t.untyped_storage()._cdata: t.untyped_storage() for t in chain(model.parameters(), model.buffers())
    }
    resident = sum(storage.nbytes() for storage in held.values())
    with evaluating(model):
        x = x.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            model(x)
            return resident + torch.cuda.max_memory_allocated(device) - before
        with Allocations({*held, x.untyped_storage()._cdata}) as watch:
            model(x)
    return resident + watch.peak


def latency_rows(original: nn.Module, small: nn.Module, x: Tensor) -> list[Row]:
    """Median and 90th percentile of the seconds of one forward pass of x."""
    times = in_turns(original, small, x)
    n, where = len(times), _device(original, x).type
    threads = f"{torch.get_num_threads()} threads"
    how = f"{n} runs in turns after {WARM_UP} to warm up, one example, {where}, {threads}"
    table = []
    for name, q in (("latency, median", 0.5), ("latency, 90th percentile", 0.9)):
        before, after = np.quantile(times, q, axis=0).tolist()
        low, high = quantile_interval(times[:, 1], q)
        table.append(Row(COST, name, before, after, low, high, n, how, "measured", "seconds"))
    return table


def in_turns(original: nn.Module, small: nn.Module, x: Tensor) -> np.ndarray:
    """Seconds of each run, `runs 2`, in turns until `RUNS` of each are done or `SECONDS` are over."""
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    with evaluating(original), evaluating(small):
        for _ in range(WARM_UP):
            seconds(original, x)
            seconds(small, x)
        while len(times) < LEAST or (len(times) < RUNS and time.perf_counter() - start < SECONDS):
            times.append((seconds(original, x), seconds(small, x)))
    return np.array(times)


def seconds(model: nn.Module, x: Tensor) -> float:
    """Of one forward pass; x is on the model's device before the clock starts."""
    device = _device(model, x)
    x = x.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device(model: nn.Module, x: Tensor) -> torch.device:
    return next((t.device for t in chain(model.parameters(), model.buffers())), x.device)
