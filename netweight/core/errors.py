"""What a user can do wrong, as one sentence each: the thing, what was expected, what to do.

The command line turns every `NetweightError` into that sentence and exit code 2; `--debug` shows the
traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

EXTRAS = {
    "transformers": "llm",
    "tokenizers": "llm",
    "compressed_tensors": "llm",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "ray": "ray",
    "torch_geometric": "graph",
    "gymnasium": "rl",
    "fastapi": "serve",
}


class NetweightError(Exception):
    """A mistake that the user can mend; its text is the one sentence that is shown."""


class BadInput(NetweightError):
    """A file, a model, data or an option that cannot be used."""


class DoesNotFit(NetweightError, ValueError):
    """A method cannot treat this layer, or data does not fit this model."""


class ImpossibleBudget(NetweightError):
    """No plan meets the budget; the sentence says what the smallest possible is."""


class MissingExtra(NetweightError):
    """An optional package is not installed; the sentence names the extra that brings it."""


def need(module: str) -> ModuleType:
    """Import an optional module, or raise `MissingExtra` with the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        extra = EXTRAS.get(package, package)
        raise MissingExtra(
            f"{package} is not installed; install it with: pip install 'netweight[{extra}]'"
        ) from error


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is none of `known`, with the nearest known one as a suggestion."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
    return BadInput(f"unknown {kind} {name!r}; {hint}")
