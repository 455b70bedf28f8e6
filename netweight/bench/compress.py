"""Compressing beside llm-compressor: time, peak memory and what the network then knows.

Every row is a network, a method and a grid (asymmetric, one scale per row, so that both sides have the same
codes to choose from) on the same calibration windows. In every turn first ours, then the peer, each in a
process of its own with one thread that has loaded the network and its libraries before the clock starts:

    seconds  CPU seconds, median over the turns
    bytes    growth of the peak resident memory over that of the loaded network, median. Ours holds the packed
             weights beside the float ones then, the peer writes over its weights
    nll      nats per next token of held-out windows, mean over the turns

The turns of the small Llama take its training seeds in turn, so that the nll is of several networks. The
large one is random: its nll says only that both sides round alike. Bars: half the peer's time, half its
memory, at most its nll. A method that the peer refuses here is measured on our side alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import netweight
from netweight.core import io, progress
from netweight.core.errors import BadInput, need
from netweight.core.result import Bar
from netweight.data import files

FASTER, LEANER = 2.0, 0.5  # bars: their seconds / ours, our bytes / theirs
LIMIT = 1800.0  # seconds that one answer may take
WINDOWS, TESTED, LENGTH = (
    64,
    256,
    128,
)  # of the small Llama: windows of calibration and of test, tokens of each
Answer = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What is compressed, how, to how many bits, and how often."""

    network: str
    method: str
    bits: int
    turns: int = 3


@dataclass(frozen=True)
class Shape:
    """A random Llama, and how many random windows it is calibrated on."""

    width: int = 768
    layers: int = 12
    inner: int = 2048
    vocabulary: int = 32_000
    windows: int = 16
    length: int = 128


ROWS = (
    Row("small-llama", "gptq", 4),
    Row("small-llama", "gptq", 3),
    Row("small-llama", "awq", 4),
    Row("small-llama", "awq", 3),
    Row("random-llama", "gptq", 4, turns=1),
)


def bench(
    *, peer_python: str | None = None, rows: Sequence[Row] = ROWS, shape: Shape = Shape()
) -> dict[str, Any]:
    """The table and the bars.

    peer_python: the Python of an environment with llmcompressor; this one by default, if it is installed.
    Raises `BadInput` for a Python that does not start or has no llmcompressor.
    """
    sides: dict[str, str | None] = {"ours": None}
    if peer_python is not None or find_spec("llmcompressor") is not None:
        sides["peer"] = peer_python or sys.executable
        about = ask(sides["peer"], {})
        if not about.get("name"):
            raise BadInput(
                f"{sides['peer']}: the peer does not start there ({about['error']}); give a Python with "
                "llmcompressor 0.14 (pip install 'netweight[peers]')"
            )
    with tempfile.TemporaryDirectory() as place:
        table = [
            measured(row, sides, Path(place), shape) for row in progress.steps(rows, "Compressing in turns")
        ]
    held = [bar for row in table for bar in bars(row)]
    answer: dict[str, Any] = {
        "threads": 1,
        "grid": "asymmetric, one scale per row",
        "rows": table,
        "bars": [{**asdict(bar), "reached": bar.passed} for bar in held],
    }
    if len(sides) == 1:
        answer["note"] = (
            "no peer: install llmcompressor 0.14 (pip install 'netweight[peers]'), or give --peer-python PATH"
        )
    return answer


def measured(row: Row, sides: dict[str, str | None], place: Path, shape: Shape) -> Answer:
    """One row: all sides in turns; one that fails is not asked again."""
    answers: dict[str, list[Answer]] = {name: [] for name in sides}
    failed: dict[str, str] = {}
    for turn in progress.steps(range(row.turns), f"{row.network} {row.method} {row.bits} bits"):
        case = checkpoint(row.network, turn, place, shape)
        request = {**case, "method": row.method, "bits": row.bits, "symmetric": False}
        for name, python in sides.items():
            if name in failed:
                continue
            answer = ask(python, request)
            if "error" in answer:
                failed[name] = answer["error"]
            else:
                answers[name].append(answer)
    found: Answer = {"network": row.network, "method": row.method, "bits": row.bits, "turns": row.turns}
    for name in sides:
        found |= {f"{name}_error": failed[name]} if name in failed else figures(name, answers[name])
    if "ours_seconds" in found and "peer_seconds" in found:
        found["times_as_fast"] = found["peer_seconds"] / found["ours_seconds"]
        found["bytes_ratio"] = found["ours_bytes"] / found["peer_bytes"]
        found["nll_difference"] = found["ours_nll"] - found["peer_nll"]
    return found


def figures(name: str, answers: Sequence[Answer]) -> Answer:
    """Median seconds and bytes and the mean nll of one side."""
    return {
        f"{name}_by": f"{answers[0]['name']}, torch {answers[0]['torch']}",
        f"{name}_seconds": statistics.median(a["seconds"] for a in answers),
        f"{name}_bytes": statistics.median(a["bytes"] for a in answers),
        f"{name}_nll": statistics.fmean(a["nll"] for a in answers),
    }


def bars(row: Answer) -> list[Bar]:
    """What is promised of a row that both sides could do; of others nothing can be said."""
    if "times_as_fast" not in row:
        return []
    what = f"{row['network']} {row['method']} {row['bits']} bits"
    return [
        Bar(f"{what}: times as fast as the peer", row["times_as_fast"], FASTER, "at least"),
        Bar(f"{what}: peak memory / the peer's", row["bytes_ratio"], LEANER, "at most"),
        Bar(f"{what}: nll above the peer's", row["nll_difference"], 0.0, "at most"),
    ]


def ask(python: str | None, request: Answer) -> Answer:
    """The answer of a fresh process: ours, or the peer in that Python; {"error": ...} where there is none."""
    module = "compress_worker" if python is None else "compress_peer"
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one, "PYTHONPATH": str(Path(netweight.__file__).parents[1])}
    try:
        done = subprocess.run(
            [python or sys.executable, "-m", f"netweight.bench.{module}", json.dumps(request)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=LIMIT,
        )
    except OSError as error:
        raise BadInput(f"{python}: {error.strerror}; give the Python of the peer's environment") from error
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {LIMIT:.0f} s"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])  # a peer may have printed before
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]}


def checkpoint(network: str, turn: int, place: Path, shape: Shape) -> dict[str, str]:
    """The folder of a network as transformers reads it and the file of its windows, written once."""
    name = f"small-{turn}" if network == "small-llama" else "random"
    folder, tokens = place / name, place / f"{name}.safetensors"
    if not tokens.exists():
        hf, windows = small(turn) if network == "small-llama" else random_llama(shape)
        hf.config.architectures = ["LlamaForCausalLM"]
        hf.save_pretrained(folder)
        io.write_tensors(tokens, windows)
    return {"folder": str(folder), "tokens": str(tokens)}


def small(seed: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The trained small Llama, and text."""
    from netweight.models.llama import small_llama

    model = small_llama(seed)
    task = files.load("wikitext2", model=model, length=LENGTH)
    return model.hf, {
        "calibration": task.calibration.take(WINDOWS).x.contiguous(),
        "test": task.test.take(TESTED).x.contiguous(),
    }


def random_llama(shape: Shape) -> tuple[Any, dict[str, torch.Tensor]]:
    """A Llama as it is before training, and random tokens."""
    transformers = need("transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(shape.width // 64, 1),
        num_key_value_heads=max(shape.width // 64, 1),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    size, generator = (shape.windows, shape.length), torch.Generator().manual_seed(1)
    return model, {
        name: torch.randint(shape.vocabulary, size, generator=generator) for name in ("calibration", "test")
    }
