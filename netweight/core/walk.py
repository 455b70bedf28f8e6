"""One pass over a network that stops at its layers: each is handed over with all its inputs before it runs.

The calibration data goes through in a few parts, each a forward pass in a thread of its own of which one runs
at a time. A part stops where it would call a layer that was not handed over; once all parts stand still, the
earliest layer that any stands at is handed over with the Gram matrix of the inputs of all parts, and they go
on, with another weight in it where there is one. So

    H_l = E[x_l x_l^T],    x_l the input of layer l in the network as it was changed up to l,

costs one forward pass in all, holds one H and the activations at one place of the network, and asks nothing
of the network but that it calls its layers: what runs in between (skip connections, attention) just runs.

The order is that of a first pass over one example; a layer that it does not call (an expert) has its place
by the order of the modules. Linear layers that are called in a row with one tensor (query, key and value) are
handed over together. A layer that is called several times in a pass has several inputs, which no one place of
it shows: its H is that of the unchanged network, from `core.moments`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit
from netweight.core.moments import moments, need_inputs, same, second_moment, watched
from netweight.core.progress import doing
from netweight.core.task import Data

PARTS = 8  # their activations between layers are in memory together, those inside a layer one part at a time
See = Callable[[tuple[str, ...], Float[Tensor, "groups d d"]], None]
Weight = Callable[[str], Tensor | None]


class _Enough(Exception):
    """The rest of the network need not run."""


@dataclass(eq=False)
class Part:
    """Some of the examples, on their way: at the layer `at` with input `x`, None when it is through."""

    x: Tensor | None
    at: str | None = None
    error: BaseException | None = None
    stop: bool = False
    thread: threading.Thread | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stands: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


def walk(model: nn.Module, data: Data, layers: Sequence[str], see: See, weight: Weight | None = None) -> None:
    """`see(some, H)` for all layers in the order of their calls; after that, `weight(layer)` is what a layer
    runs with in this pass (its own where that is None).

    H: `groups d d`, in the precision of its products (see `core.moments.second_moment`). The model runs in
    evaluation mode without gradients and is left as it was. Raises `DoesNotFit` for a layer without a matrix
    of inputs or one that is never called.
    """
    need_inputs(model, layers)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    groups, often = in_order(model, data.x[:1].to(device), layers)
    ahead = {group[0]: group for group in groups}
    with doing("Layer by layer", len(groups) + len(often)) as advance:
        for layer, seen in moments(model, data, often).items():
            see((layer,), seen.gram)
            advance()
        shown = data.batched(max(data.batch, -(-len(data) // PARTS)))
        parts = [Part(x) for x, _ in shown]
        with standing(model, parts, layers, ahead, weight, device):
            while ahead and any(part.at for part in parts):
                layer = next(leader for leader in ahead if any(part.at == leader for part in parts))
                here = [part for part in parts if part.at == layer]
                gram = second_moment(model.get_submodule(layer), [part.x for part in here])
                group = ahead.pop(layer)
                see(group, gram.div_(len(data)))
                del gram
                TRIM(0)
                advance()
                if ahead:
                    for part in here:
                        _go_on(part)
    for layer in ahead:
        raise DoesNotFit(f"{layer}: the layer is never called on the calibration data; leave it out")


def in_order(model: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The layers in the order of their calls on x, those that read one tensor together, and those that are
    called more than once. What this example does not call (an expert) comes where the modules have it."""
    calls: Counter[str] = Counter()
    groups: list[list[str]] = []
    last: list[tuple[Tensor, object]] = []  # the tensor is kept: its address must not be used again

    def see(layer: str, x: Tensor) -> None:
        calls[layer] += 1
        now, linear = same(x), isinstance(model.get_submodule(layer), nn.Linear)
        if linear and last and last[0][1] == now:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last[:] = [(x, now)] if linear else []

    with watched(model, layers, see):
        model(x)
    often = [layer for layer in layers if calls[layer] > 1]
    once = [tuple(layer for layer in group if calls[layer] == 1) for group in groups]
    found = [group for group in once if group]
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    for layer in sorted((layer for layer in layers if not calls[layer]), key=place.__getitem__):
        later = (i for i, group in enumerate(found) if place[group[0]] > place[layer])
        found.insert(next(later, len(found)), (layer,))
    return found, often


@contextlib.contextmanager
def standing(
    model: nn.Module,
    parts: Sequence[Part],
    layers: Sequence[str],
    ahead: dict[str, tuple[str, ...]],
    weight: Weight | None,
    device: torch.device,
) -> Iterator[None]:
    """Every part stands at its first layer; with the block, all are ended and the model is as it was."""
    running: dict[int, Part] = {}  # by thread: calls of the model from elsewhere are none of ours

    def before(layer: str, x: Tensor) -> None:
        part = running.get(threading.get_ident())
        if part is None:
            return
        if layer in ahead:
            part.at, part.x = layer, x
            part.stands.release()
            part.turn.acquire()
            part.at = part.x = None
            if part.stop:
                raise _Enough
        if weight is not None and (other := weight(layer)) is not None:
            vars(model.get_submodule(layer))["weight"] = other  # found before the parameter, which stays

    def after(module: nn.Module, _inputs: object, _output: object) -> None:
        vars(module).pop("weight", None)

    handles = [model.get_submodule(n).register_forward_hook(after, always_call=True) for n in layers]
    with watched(model, layers, before):
        try:
            for part in parts:
                x, part.x = part.x, None
                context = contextvars.copy_context()
                part.thread = threading.Thread(
                    target=context.run, args=(_run, part, model, x, device, running), daemon=True
                )
                part.thread.start()
                _go_on(part)
            yield
        finally:
            for part in parts:
                if part.thread is not None:
                    part.stop = True
                    part.turn.release()
                    part.thread.join()
            for handle in handles:
                handle.remove()


@torch.no_grad()
def _run(part: Part, model: nn.Module, x: Tensor, device: torch.device, running: dict[int, Part]) -> None:
    """The forward pass of one part, in its own thread."""
    part.turn.acquire()
    running[threading.get_ident()] = part
    try:
        if not part.stop:
            model(x.to(device))
    except _Enough:
        pass
    except BaseException as error:
        part.error = error
    part.at = part.x = None
    part.stands.release()


def _trimmer() -> Callable[[int], object]:
    """glibc keeps what a thread has freed for that thread alone, so for every part; this gives it back."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return lambda _keep: None


TRIM = _trimmer()


def _go_on(part: Part) -> None:
    """Let it run to the next layer that it stands at, or to its end; raises what the network raised."""
    part.turn.release()
    part.stands.acquire()
    TRIM(0)
    if part.error is not None:
        raise part.error
