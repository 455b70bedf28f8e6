"""One side of the comparison of verifiers, in a process of its own: JSON lines in, JSON lines out.

    python -m netweight.bench.verify_worker            # ours; `verify_peer` is the other side

A request names a case (an .npz with the weights, inputs and objective), a method and what to do:

    {"case": "...", "network": "kw_mnist", "eps": 0.1, "method": "crown", "do": "time"}

    time    {"seconds": CPU seconds of this process, "lower": [[...]]}
    memory  {"bytes": growth of the peak resident memory, for which the process must be a fresh one}
    either  {"error": "..."} where the verifier failed

What is needed once per network (tracing it) is done before the clock starts. Nothing but torch and numpy is
imported before the verifier.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netweight.bench.verify_nets import network, random_network

Bound = Callable[[str], Tensor]  # a method of `METHODS` -> lower bounds `b k` of the rows of the objective
Prepare = Callable[["Case"], Bound]  # a verifier

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "alpha-crown-all")
WARM = 1  # the seed of the small random network (a convolutional one) that loads the code of a method


@dataclass(frozen=True, eq=False)
class Case:
    """Lower bounds of `objective` times the outputs are asked for, for all |s - x|_inf <= eps."""

    network: nn.Module
    x: Tensor
    objective: Tensor
    eps: float


def write_case(path: Path, model: nn.Module, x: Tensor, objective: Tensor) -> None:
    """The arrays of a case, as any Python reads them."""
    weights = {f"weight {name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(path, x=x.numpy(), objective=objective.float().numpy(), **weights)


def read_case(path: str, name: str, eps: float) -> Case:
    """What `write_case` wrote, in the network of that name."""
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    x, objective = tensors.pop("x"), tensors.pop("objective")
    model = network(name)
    model.load_state_dict({key.removeprefix("weight "): tensor for key, tensor in tensors.items()})
    return Case(model.eval().requires_grad_(False), x, objective, eps)


def small_case() -> Case:
    """A case of a few kilobytes."""
    model, shape = random_network(WARM)
    return Case(model.requires_grad_(False), torch.full((1, *shape), 0.5), torch.eye(10)[None, :9], 0.05)


def serve(prepare: Prepare, name: str) -> None:
    """Say who answers, then answer the requests on stdin until it ends. What libraries print is on stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    torch.manual_seed(0)
    held: dict[str, Bound] = {}  # the last case
    answer: dict[str, Any] = {"name": name, "torch": torch.__version__}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    for line in sys.stdin:
        try:
            answer = answered(prepare, json.loads(line), held)
        except (Exception, SystemExit) as error:  # a verifier may fail in any way, and that is an answer
            answer = {"error": described(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def described(error: BaseException) -> str:
    """Its kind and text; where it has no text, the function that raised it."""
    text = " ".join(str(error).split())[:200]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text or f'in {where.name} of {Path(where.filename).name}'}"


def answered(prepare: Prepare, request: dict[str, Any], held: dict[str, Bound]) -> dict[str, Any]:
    """The answer to one request; the case that was prepared last is kept in `held`."""
    case, method = request["case"], request["method"]
    if request["do"] == "memory":
        return {"bytes": growth(prepare, request)}
    if case not in held:
        held.clear()
        held[case] = prepare(read_case(case, request["network"], request["eps"]))
    return timed(lambda: held[case](method))


def timed(work: Callable[[], Tensor]) -> dict[str, Any]:
    """CPU seconds and the result of one call, started with an empty garbage collector."""
    gc.collect()
    start = time.process_time()
    lower = work()
    seconds = time.process_time() - start
    return {"seconds": seconds, "lower": lower.detach().double().tolist()}


def growth(prepare: Prepare, request: dict[str, Any]) -> int:
    """Bytes by which the peak grows while the method runs once; its code is loaded by a small case before."""
    method = request["method"]
    prepare(small_case())(method)
    bound = prepare(read_case(request["case"], request["network"], request["eps"]))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    bound(method)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def ours(case: Case) -> Bound:
    """The bounds of this library; a method may name an arithmetic after a colon, "real" by default."""
    from netweight.core.perturbation import Linf
    from netweight.verification.bounds import bounds, captured

    graph, within = captured(case.network, case.x), Linf(case.eps)

    def bound(method: str) -> Tensor:
        name, _, arithmetic = method.partition(":")
        found = bounds(
            graph,
            case.x,
            within,
            objective=case.objective,
            method=name,
            arithmetic=arithmetic or "real",
            upper=False,
        )
        return found.lower

    return bound


if __name__ == "__main__":
    from netweight import __version__

    serve(ours, f"netweight {__version__}")
