"""One token through a 4-bit Linear, against float32, and what memory speed allows.

Each call takes the next of several copies of its weights, `SPAN` bytes of them in all, as a network of many
layers does: no call finds its weights in the cache. The bound is the time that reading them once takes at the
speed of memory: that of the quickest sum over 256 MB, or copy of them (written bytes count too), before and
after the same comparison. A product of one token out of memory cannot be faster.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from netweight.bench.run_turns import in_turns, milliseconds, on_threads, ratio, read_speed, session
from netweight.compression.quantize.rtn import RTN, encode
from netweight.core.errors import need
from netweight.core.result import Bar
from netweight.deployment import matmulnbits
from netweight.nn.kernels import fast
from netweight.nn.packed import Affine

SPAN = 64 << 20  # bytes of weights that one way goes through
BUFFER = 64 << 20  # numbers of float32 that are summed: 256 MB
LEAST, FROM = 3.0, 2048  # times as fast as float32, for layers of this many inputs and outputs or more
READS = 5  # of the buffer, before and after
DECODED = 3  # runs of decoding on each call, which is slow and timed apart


def decode(
    sizes: tuple[tuple[int, int], ...], runs: int, threads: tuple[int, ...], group: int, buffer: int = BUFFER
) -> list[dict[str, Any]]:
    """A row for each size (inputs, outputs) and number of threads; buffer: numbers read for the bound."""
    buffers = torch.ones(buffer), torch.empty(buffer)
    found = []
    for count in threads:
        with on_threads(count):
            found += [one(size, runs, count, group, buffers) for size in sizes]
    return found


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The ratio of every layer that is large enough, on one thread."""
    return [
        Bar(f"float32 / 4 bits through torch, {row['layer']}", row["float32_over_int4"], LEAST, "at least")
        for row in rows
        if row["threads"] == 1 and min(row["inputs"], row["outputs"]) >= FROM
    ]


@torch.inference_mode()
def one(
    size: tuple[int, int], runs: int, threads: int, group: int, buffers: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """One layer: float32, torch's 4-bit product and ONNX Runtime's in turns; decoding on each call apart."""
    inputs, outputs = size
    generator = torch.Generator().manual_seed(inputs + outputs)
    like = nn.Linear(inputs, outputs, bias=False)
    like.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator) * 0.02)
    form = encode(like.weight.detach(), RTN(bits=4, group=group))
    stored = form.layer(like)
    quick, kernels = fast(nn.Sequential(stored))
    x = torch.randn(1, inputs, generator=generator)
    content = product(form)
    small = max(1, SPAN * 8 // form.bits())
    runtime: list[Callable[[], Any]] = [_run(session(content, threads), x) for _ in range(small)]
    ways = {
        "float32": _copies(like, x, max(1, SPAN // (4 * inputs * outputs))),
        "int4": _copies(quick, x, small),
        "onnxruntime": runtime,
    }
    before = read_speed(buffers, READS)
    taken = in_turns(ways, runs)
    speed = max(before, read_speed(buffers, READS))
    expected = stored(x)
    off = {"int4": quick(x), "onnxruntime": torch.from_numpy(runtime[0]()[0])}
    return {
        "layer": f"{inputs} x {outputs}",
        "inputs": inputs,
        "outputs": outputs,
        "threads": threads,
        "group": group,
        "kernel": kernels["0"],
        **milliseconds(taken),
        "decoded_each_call_ms": 1e3 * statistics.median(in_turns({"": [lambda: stored(x)]}, DECODED)[""]),
        "float32_over_int4": ratio(taken["float32"], taken["int4"]),
        "float32_over_onnxruntime": ratio(taken["float32"], taken["onnxruntime"]),
        "gigabytes_per_second": speed / 1e9,
        "float32_bound_ms": 1e3 * 4 * inputs * outputs / speed,
        "int4_bound_ms": 1e3 * form.bits() / 8 / speed,
        "int4_over_bound": statistics.median(taken["int4"]) * speed / (form.bits() / 8),
        **{
            f"{name}_relative_difference": float((y - expected).abs().max() / expected.abs().max())
            for name, y in off.items()
        },
    }


def product(form: Affine) -> bytes:
    """A model of one MatMulNBits that rounds its inputs to 8 bits (accuracy level 4)."""
    onnx = need("onnx")
    block = matmulnbits.block_of(form)
    parts = dict(zip(("codes", "scale", "zero"), matmulnbits.blocks(form, block)))
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *parts],
        ["y"],
        domain=matmulnbits.DOMAIN,
        K=form.shape[1],
        N=form.shape[0],
        bits=4,
        block_size=block,
        accuracy_level=4,
    )
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", width])
        for name, width in (("x", form.shape[1]), ("y", form.shape[0]))
    ]
    tensors = [onnx.numpy_helper.from_array(values.numpy(), name) for name, values in parts.items()]
    graph = onnx.helper.make_graph([node], "product", ends[:1], ends[1:], tensors)
    sets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(matmulnbits.DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


def _copies(layer: nn.Module, x: Tensor, count: int) -> list[Callable[[], Any]]:
    """Calls of as many copies of the layer."""
    return [lambda each=each: each(x) for each in (layer, *(copy.deepcopy(layer) for _ in range(count - 1)))]


def _run(session_: Any, x: Tensor) -> Callable[[], Any]:
    """A call of the session."""
    given = {"x": x.numpy()}
    return lambda: session_.run(None, given)
