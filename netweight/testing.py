"""Tiny networks and tasks, and the laws that every method of a room keeps: for tests, ours and those of new
methods.

    check_compressor(rtn, RTN(bits=4))      # AssertionError with the first law that does not hold
"""

from __future__ import annotations

import copy
import dataclasses
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import Change, Compressed, Packed, assemble, weight_of, weighted
from netweight.core.plan import Plan
from netweight.core.stored import put_together, take_apart
from netweight.core.task import Data, Task, outputs

CHANNELS, SIDE, CLASSES, WORDS = 4, 7, 4, 12
Method = Callable[[nn.Module, Task, Sequence[str], Any], Change]


def tiny_model(seed: int = 0) -> nn.Sequential:
    """Images `b 4 7 7` to 4 classes: two convolutions (one with groups, stride and padding), batch norm, two
    Linear layers; 6 thousand weights, all rows multiples of 8. In evaluation mode, with norms as if
    trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(CHANNELS, 16, 2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 3 * 3, 32),
            nn.ReLU(),
            nn.Linear(32, CLASSES),
        )
        for norm in (model[1], model[4]):
            for tensor in (norm.weight.data, norm.running_var):  # type: ignore[union-attr]
                tensor.uniform_(0.5, 1.5)  # type: ignore[operator]
            for tensor in (norm.bias.data, norm.running_mean):  # type: ignore[union-attr]
                tensor.uniform_(-0.2, 0.2)  # type: ignore[operator]
    return model.eval()


def tiny_task(seed: int = 0) -> Task:
    """Random images in [0, 1] for `tiny_model`; the last batch is smaller than the others."""
    generator = torch.Generator().manual_seed(seed)

    def images(count: int, name: str) -> Data:
        x = torch.rand(count, CHANNELS, SIDE, SIDE, generator=generator)
        y = torch.randint(CLASSES, (count,), generator=generator)
        return Data(x, y, 10, name, low=0.0, high=1.0)

    return Task(images(24, "tiny calibration"), images(16, "tiny test"), train=images(32, "tiny training"))


class TinyLanguageModel(nn.Module):
    """Token ids `b t` to logits `b t 12`: an embedding, attention, two Linear layers, a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for the next token at every place."""
        x = self.embedding(tokens)
        h = self.norm(x)
        query, key, value = self.query(h)[:, None], self.key(h)[:, None], self.value(h)[:, None]
        x = x + self.output(F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0])
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return self.head(x)


def tiny_language_model(seed: int = 0) -> TinyLanguageModel:
    """Two thousand random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyLanguageModel().eval()


def tiny_text_task(seed: int = 0) -> Task:
    """Random token ids with the next tokens as targets, for `tiny_language_model`."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int, name: str) -> Data:
        tokens = torch.randint(WORDS, (count, 7), generator=generator)
        return Data(tokens[:, :-1], tokens[:, 1:], 5, name)

    return Task(text(12, "tiny calibration text"), text(8, "tiny test text"), "perplexity")


def check_compressor(
    method: Method,
    settings: Any,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    layers: Sequence[str] | None = None,
) -> None:
    """Every law of a method of compression/, on `tiny_model` or the network given.

    layers: those that the method fits (all of `weighted` if not given, at least two).
    """
    model = tiny_model() if model is None else model
    task = tiny_task() if task is None else task
    layers = weighted(model) if layers is None else list(layers)
    check_settings(settings)
    change = check_untouched(method, model, task, layers, settings)
    check_agree(change, method(model, task.blind(), layers, settings))
    check_layers(change, layers)
    check_layers(method(model, task.blind(), layers[1:], settings), layers[1:])
    rewritten = copy.deepcopy(model)
    for rewrite in change.rewrites:
        rewrite.apply(rewritten)
    for layer, form in change.packed.items():
        check_form(form, weight_of(rewritten, layer), layer)
    small = assemble(model, change, Plan())
    check_rest(small, rewritten)
    check_runs(small, model, task.calibration)
    check_saved(small, model, task.calibration)


def check_settings(settings: Any) -> None:
    """Settings are a frozen dataclass of int, float, bool, str, None or tuples of these."""
    law = "settings are a frozen dataclass of plain values"
    assert dataclasses.is_dataclass(settings) and type(settings).__dataclass_params__.frozen, law
    for value in dataclasses.asdict(settings).values():  # type: ignore[call-overload]
        for item in value if isinstance(value, tuple) else (value,):
            assert item is None or isinstance(item, (int, float, bool, str)), law


def check_untouched(
    method: Method, model: nn.Module, task: Task, layers: Sequence[str], settings: Any
) -> Change:
    """The model and the global random states are as before, and the test data was not read."""
    before, traits = {name: t.clone() for name, t in model.state_dict().items()}, _traits(model)
    modes, randomness = [m.training for m in model.modules()], _randomness()
    change = method(model, task.blind(), layers, settings)
    after = model.state_dict()
    same = before.keys() == after.keys() and all(_identical(before[name], after[name]) for name in before)
    assert same and traits == _traits(model), "the model is untouched"
    assert modes == [m.training for m in model.modules()], "the model's mode is untouched"
    assert _randomness() == randomness, "the global random state is untouched"
    return change


def check_agree(a: Change, b: Change) -> None:
    """Two runs give the same, bit for bit."""
    law = "two runs agree"
    assert a.packed.keys() == b.packed.keys() and a.activations.keys() == b.activations.keys(), law
    assert len(a.rewrites) == len(b.rewrites) and dict(a.left) == dict(b.left), law
    assert _all_identical(a.biases, b.biases), law
    pairs = [(a.packed[layer], b.packed[layer]) for layer in a.packed]
    pairs += [(a.activations[layer], b.activations[layer]) for layer in a.activations]
    for one, other in [*pairs, *zip(a.rewrites, b.rewrites)]:
        (tensors, plain), (tensors2, plain2) = take_apart(one), take_apart(other)
        assert plain == plain2 and _all_identical(tensors, tensors2), law


def check_layers(change: Change, layers: Sequence[str]) -> None:
    """Exactly the layers asked for are packed or left, never both; a reason is given for those left."""
    asked, packed, left = set(layers), set(change.packed), set(change.left)
    assert packed | left == asked and not packed & left, "exactly the layers asked for are packed or left"
    assert set(change.activations) <= asked, "only inputs of the layers asked for are rounded"
    assert set(change.biases) <= asked, "only biases of the layers asked for are changed"
    assert all(change.left.values()), "a layer that is left has a reason"


def check_form(form: Packed, weight: Tensor, layer: str = "weight") -> None:
    """The laws of a stored form of that weight."""
    assert isinstance(form, Packed), f"{layer}: a form decodes, counts bits, projects and makes a layer"
    decoded = form.decode()
    assert decoded.shape == weight.shape and decoded.dtype == weight.dtype, (
        f"{layer}: shape and dtype are kept"
    )
    assert decoded.isfinite().all(), f"{layer}: decoded weights are finite"
    assert _identical(decoded, form.decode()), f"{layer}: decoding twice gives the same"
    tensors, plain = take_apart(form)
    counted = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    assert form.bits() == counted, f"{layer}: bits are those of the stored tensors"
    assert form.bits() < 8 * weight.numel() * weight.element_size(), f"{layer}: bits are saved"
    again = put_together(tensors, plain)
    assert _identical(again.decode(), decoded), f"{layer}: a form taken apart and put together is the same"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    for other in (decoded, weight, weight + noise * weight.std()):
        once = form.project(other)
        twice = once.project(once.decode())
        assert _identical(once.decode(), twice.decode()), f"{layer}: projecting is idempotent"
        assert once.bits() == form.bits(), f"{layer}: projecting keeps the form"
    assert _identical(form.project(decoded).decode(), decoded), (
        f"{layer}: what is stored projects onto itself"
    )


def check_rest(small: Compressed, rewritten: nn.Module) -> None:
    """What is neither packed nor rewritten is stored as it was: biases, norms, layers not asked for."""
    kept = rewritten.state_dict()
    plain = small.plain().state_dict()
    for name, tensor in kept.items():
        owner, _, last = name.rpartition(".")
        if owner in small.change.activations:
            name = f"{owner}.layer.{last}"
        if not (
            last == "weight" and owner in small.packed or last == "bias" and owner in small.change.biases
        ):
            assert name in plain and _identical(plain[name], tensor), "the rest of the network is untouched"


def check_runs(small: Compressed, model: nn.Module, data: Data) -> None:
    """The assembled network runs, its shape is that of the original, and its float twin gives the same."""
    original, packed = outputs(model, data), outputs(small.model, data)
    assert packed.shape == original.shape and packed.isfinite().all(), "the assembled network runs"
    assert _identical(outputs(small.plain(), data), packed), "the float twin gives equal outputs"


def check_saved(small: Compressed, model: nn.Module, data: Data) -> None:
    """Saved and loaded, outputs are bit for bit the same and so is what is stored."""
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "small")
        back = Compressed.load(Path(folder) / "small", like=model)
    assert _identical(outputs(back.model, data), outputs(small.model, data)), (
        "saving and loading changes nothing"
    )
    assert back.bits() == small.bits(), "saving and loading keeps the bits"
    assert dict(back.change.left) == dict(small.change.left), "saving and loading keeps what was left"


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _all_identical(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_identical(a[name], b[name]) for name in a)


def _traits(model: nn.Module) -> list[Any]:
    """What a method may forget to put back: hooks, gradients, attributes."""
    hooks = [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks), type(module), sorted(vars(module)))
        for name, module in model.named_modules()
    ]
    gradients = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return [*hooks, *gradients]


def _randomness() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
