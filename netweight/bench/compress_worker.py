"""One side of the comparison of compressors, one request in a process of its own: JSON in, JSON out.

    python -m netweight.bench.compress_worker '{"folder": ..., ...}'     # ours; `compress_peer` is the other

A request names a checkpoint folder, a .safetensors with the token windows `calibration` and `test` (`b t`),
a method (gptq, awq), bits and whether the grid is symmetric; all layers in decoder blocks are compressed,
with one scale per row. The answer:

    seconds  CPU seconds of compressing, without loading, but with what is imported meanwhile
    bytes    growth of the peak resident memory over what is resident once the model is loaded and touched
    nll      mean negative log-likelihood (nats) of the test windows' next tokens, weights decoded

or {"error": "..."}. Nothing of this library but this file is imported on the other side.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Request = dict[str, Any]
Compress = Callable[[nn.Module, Tensor, Request], Callable[[], nn.Module]]  # gives how to have the network
BLOCKS = ".layers."  # in the names of layers of decoder blocks


def serve(load: Callable[[str], nn.Module], compress: Compress, name: str) -> None:
    """Answer the request of the command line; what libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        answer = {
            "name": name,
            "torch": torch.__version__,
            **answered(load, compress, json.loads(sys.argv[1])),
        }
    except (Exception, SystemExit) as error:  # a peer may fail in any way, and that is an answer
        words = " ".join(str(error).split())[:200]
        answer = {"name": name, "error": f"{type(error).__name__}: {words}"}
    answers.write(json.dumps(answer) + "\n")


@torch.no_grad()
def answered(load: Callable[[str], nn.Module], compress: Compress, request: Request) -> dict[str, Any]:
    """One network compressed and judged."""
    from safetensors.torch import load_file

    model, tokens = load(request["folder"]), load_file(request["tokens"])
    for tensor in model.state_dict().values():
        tensor.sum()  # what lies in a mapped file is resident from here
    gc.collect()
    before = clear_peak()
    start = time.process_time()
    small = compress(model, tokens["calibration"], request)
    seconds = time.process_time() - start
    grown = resident("VmHWM") - before
    return {"seconds": seconds, "bytes": grown, "nll": nll(small(), tokens["test"])}


def nll(model: nn.Module, tokens: Tensor) -> float:
    """Nats per next token, a few windows at a time."""
    total, count = 0.0, 0
    for x in tokens.split(4):
        out = model(x[:, :-1])
        logits = out if isinstance(out, Tensor) else out.logits
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
        count += x[:, 1:].numel()
    return total / count


def clear_peak() -> int:
    """Bytes resident now; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def load(folder: str) -> nn.Module:
    """The model, and everything that compressing it will import."""
    for name in ("compression.quantize.awq", "compression.quantize.gptq", "core.compressed", "core.plan"):
        import_module(f"netweight.{name}")
    return import_module("netweight.models.huggingface").load(folder)


def ours(model: nn.Module, calibration: Tensor, request: Request) -> Callable[[], nn.Module]:
    """GPTQ or AWQ of this library."""
    from netweight.compression.quantize.awq import AWQ, awq
    from netweight.compression.quantize.gptq import GPTQ, gptq
    from netweight.core.compressed import assemble, weighted
    from netweight.core.plan import Plan
    from netweight.core.task import Data, Task

    data = Data(calibration, batch=request.get("batch", 16), name="calibration")
    task = Task(data, data, "perplexity").blind()
    layers = [layer for layer in weighted(model) if BLOCKS in layer]
    bits, extra = request["bits"], request.get("settings", {})
    ways = {
        "awq": lambda: awq(model, task, layers, AWQ(bits, group=0, **extra)),
        "gptq": lambda: gptq(model, task, layers, GPTQ(bits, request["symmetric"], **extra)),
    }
    change = ways[request["method"]]()
    return lambda: assemble(model, change, Plan()).plain()


if __name__ == "__main__":
    from netweight import __version__

    serve(load, ours, f"netweight {__version__}")
