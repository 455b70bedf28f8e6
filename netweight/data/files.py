"""DATA of the command line, as examples: a built-in name, .npz, .csv, .txt or a folder of images.

parts = load("images.npz", model=model)
check(parts.test, model)
task = Task(parts.calibration, parts.test, train=parts.train)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, NetweightError, unknown
from netweight.core.task import IGNORED, Data
from netweight.data import arrays, constructed, digits, folders, graphs, images, sms, tables, text
from netweight.data.shared import shared_data as shared_data
from netweight.data.split import Split, at_random, in_order

BUILT_IN = (
    "digits", "cifar10", "mnist", "wikitext2", "shakespeare", "sms-spam", constructed.NAME, *graphs.NAMES,
)  # fmt: skip
TEXT_CALIBRATION, TEXT_TEST = 128, 256  # windows of WikiText-2, spread over the whole texts
SMS_CALIBRATION = 512  # messages
TRAIN = 10_000  # images of the large built-in sets that `Split.train` holds
KINDS = "a built-in name, file.npz, a folder of images by class, file.csv:target or file.txt"


def load(data: str, *, model: nn.Module | None = None, length: int = 128, seed: int = 0) -> Split:
    """The parts of a data set.

    model: says how text becomes tokens (its `netweight_tokenizer`) and how long a window may be.
    length: tokens per window of a text. seed: of the split, where the data has no parts of its own.
    Raises `BadInput` with one sentence for anything that cannot be used.
    """
    if data in BUILT_IN:
        return _built_in(data, model, length)
    path = Path(data)
    file, colon, target = data.rpartition(":")
    if colon and Path(file).suffix.lower() == ".csv" and not path.exists():
        return at_random(tables.load(file, target), seed)
    if path.is_dir():
        return folders.load(path, seed)
    match path.suffix.lower():
        case ".npz":
            return arrays.load(path, seed)
        case ".csv":
            return at_random(tables.load(path), seed)
        case ".txt":
            tokens = tokenizer_of(model)(text.read_text(path))
            return in_order(text.windows(tokens, window(model, length), name=path.name))
    if path.exists():
        raise BadInput(f"{data}: data of this kind cannot be read; expected {KINDS}")
    if path.suffix or "/" in data:
        raise BadInput(f"{data}: there is no such file or folder; expected {KINDS}")
    raise unknown("data", data, BUILT_IN)


def _built_in(name: str, model: nn.Module | None, length: int) -> Split:
    """The parts of a set of `BUILT_IN`."""
    if name in graphs.NAMES:
        return graphs.parts(name)
    if name == constructed.NAME:
        return constructed.parts()
    if name == "digits":
        return Split(digits.calibration(), digits.test(), digits.train)
    if name in ("cifar10", "mnist"):
        source = images.cifar10() if name == "cifar10" else images.mnist()
        return Split(source.calibration(), source.test(), lambda: source.train(TRAIN))
    tokenizer, length = tokenizer_of(model), window(model, length)
    if name == "sms-spam":
        return Split(
            sms.train(tokenizer, length).take(SMS_CALIBRATION),
            sms.test(tokenizer, length),
            lambda: sms.train(tokenizer, length),
        )
    if name == "shakespeare":
        return in_order(text.windows(tokenizer(text.shakespeare()), length, name=name))
    train = text.windows(tokenizer(text.wikitext2("train")), length, name="wikitext2 (train)")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    test = text.windows(tokenizer(text.wikitext2("test")), length, name="wikitext2 (test)")
    spread = torch.arange(0, len(test), max(1, len(test) // TEXT_TEST))[:TEXT_TEST]
    return Split(train.rows(order[:TEXT_CALIBRATION]), test.rows(spread), lambda: train)


def tokenizer_of(model: nn.Module | None) -> text.Tokenizer:
    """The model's `netweight_tokenizer`; without a model, or without that attribute, `text.Characters`."""
    tokenizer = getattr(model, "netweight_tokenizer", text.Characters())
    if tokenizer is None:
        raise BadInput("the model came without a tokenizer.json; put it beside its config.json to use text")
    return tokenizer


def window(model: nn.Module | None, length: int) -> int:
    """`length`, or the positions that the model knows, if these are fewer."""
    config = getattr(getattr(model, "hf", None), "config", None)
    return min(length, getattr(config, "max_position_embeddings", None) or length)


@torch.no_grad()
def check(data: Data, model: nn.Module) -> None:
    """Raises `DoesNotFit` where the model cannot take the examples, `BadInput` for labels that do not fit.

    Runs the model on two examples: of token numbers, those with the largest and the smallest.
    """
    rows = _extremes(data.x)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    try:
        out = model.eval()(data.x[rows].to(device))
    except NetweightError:
        raise
    except Exception as error:  # a module raises anything for a shape it does not take
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DoesNotFit(
            f"{data.name}: examples {_shape(data.x)} do not fit the model ({reason}); "
            "give data of its input shape"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != len(rows):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise DoesNotFit(
            f"{data.name}: for {len(rows)} examples the model gives {got}; expected one row per example"
        )
    if data.y is not None:
        _check_labels(data.y, out, data.name)


def _check_labels(y: Tensor, out: Tensor, name: str) -> None:
    """Raises `BadInput` unless labels `b ...` can be told from outputs `b ... k`."""
    if y.is_floating_point():
        if y[0].numel() != out[0].numel():
            raise BadInput(
                f"{name}: {y[0].numel()} targets per example, the model gives {out[0].numel()}; give as many"
            )
        return
    if y.shape[1:] != out.shape[1:-1]:
        raise BadInput(
            f"{name}: labels {_shape(y)} for outputs {_shape(out)}; give one class number per row of outputs"
        )
    y = y[y != IGNORED] if y.ndim > 1 else y
    if not len(y):
        raise BadInput(f"{name}: all labels are {IGNORED}, which counts for nothing; give class numbers")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= out.shape[-1]:
        raise BadInput(
            f"{name}: labels go from {low} to {high}, but the model has {out.shape[-1]} outputs; "
            f"number the classes from 0 to {out.shape[-1] - 1}"
        )


def _extremes(x: Tensor) -> Tensor:
    """Two rows: the first ones, or those with the largest and the smallest token number."""
    if x.is_floating_point() or not x[0].numel():
        return torch.arange(min(2, len(x)))
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    return torch.stack([flat.amax(1).argmax(), flat.amin(1).argmin()])


def _shape(x: Tensor) -> str:
    """The shape of one example, for a sentence."""
    return "x".join(str(n) for n in x.shape[1:]) or "of one number"
