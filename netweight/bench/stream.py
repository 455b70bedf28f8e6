"""Peak memory of compressing a checkpoint block by block: it must follow the block, not the depth.

Writes random Llama-architecture checkpoints of one width and several depths, compresses each in a process
of its own, and reads that process's peak resident size from the operating system.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netweight.core import io
from netweight.core.errors import need

CHILD = """
import json, resource, sys, torch
from pathlib import Path
from netweight.core.plan import Budget
from netweight.core.task import Data
from netweight.streaming import compress_folder
torch.set_num_threads(1)
folder, out, method = sys.argv[1:4]
tokens = torch.randint(0, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if method != "none":
    data = Data(tokens, batch=2, name="random tokens")
    compress_folder(folder, data, Budget(bits=4.5), Path(out), method=method)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"before": before * 1024, "peak": peak * 1024}))
"""


def bench(*, width: int = 1536, depths: tuple[int, ...] = (4, 20), method: str = "rtn") -> dict[str, Any]:
    """Bytes of checkpoint and result, peak bytes above an idle process, and seconds, for each depth."""
    rows = []
    for depth in depths:
        with tempfile.TemporaryDirectory() as place:
            folder, out = Path(place) / "checkpoint", Path(place) / "small"
            size = write_checkpoint(folder, width, depth)
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(folder), str(out), method],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds = time.perf_counter() - start
            memory = json.loads(done.stdout)
            rows.append(
                {
                    "blocks": depth,
                    "checkpoint_bytes": size,
                    "result_bytes": sum(file.stat().st_size for file in out.iterdir()),
                    "peak_growth_bytes": memory["peak"] - memory["before"],
                    "seconds": seconds,
                }
            )
    block = (rows[-1]["checkpoint_bytes"] - rows[0]["checkpoint_bytes"]) / max(1, depths[-1] - depths[0])
    return {
        "method": method,
        "width": width,
        "block_bytes": block,
        "rows": rows,
        "peak_deepest_over_shallowest": rows[-1]["peak_growth_bytes"] / rows[0]["peak_growth_bytes"],
    }


def write_checkpoint(folder: Path, width: int, depth: int, vocabulary: int = 1000) -> int:
    """A Llama-architecture checkpoint of random bfloat16 weights, a shard per block; gives its bytes."""
    transformers = need("transformers")
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 128 * 128,
        num_hidden_layers=depth,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        io.write_tensors(folder / file, {name: random_weight(shapes[name], generator) for name in names})
    where = {name: file for file, names in shards.items() for name in names}
    io.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def random_weight(like: Tensor, generator: torch.Generator) -> Tensor:
    """Ones for a norm, small normal numbers for a matrix, in bfloat16."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return (torch.randn(like.shape, generator=generator) * 0.02).bfloat16()
