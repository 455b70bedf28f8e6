"""The parts of attention in decoder blocks known by name: what its heads read and write."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from netweight.core.sites import BLOCKS

PARTS = {  # class of a decoder block: query, key, value, output, and whether positions rotate query and key
    "OPTDecoderLayer": ("q_proj", "k_proj", "v_proj", "out_proj", False),
    "LlamaDecoderLayer": ("q_proj", "k_proj", "v_proj", "o_proj", True),
    "MistralDecoderLayer": ("q_proj", "k_proj", "v_proj", "o_proj", True),
    "Qwen2DecoderLayer": ("q_proj", "k_proj", "v_proj", "o_proj", True),
    "Qwen3DecoderLayer": ("q_proj", "k_proj", "v_proj", "o_proj", True),
}
HOME = "self_attn"


@dataclass(frozen=True)
class Attention:
    """query, key, value, output: names of Linear layers. width: channels of a head.

    rotary: whether a rotation by position lies between query, key and their product. bilinear: whether
    nothing else does (Qwen 3 has a norm there).
    """

    query: str
    key: str
    value: str
    output: str
    width: int
    rotary: bool
    bilinear: bool


def decoder_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks in the order in which they run; [""], the model, where none is known."""
    return [name for name, block in model.named_modules() if type(block).__name__ in BLOCKS] or [""]


def attention(model: nn.Module, block: str) -> Attention | None:
    """The attention of that block, None where it is not known."""
    module = model.get_submodule(block)
    parts = PARTS.get(type(module).__name__)
    if parts is None:
        return None
    home = f"{block}.{HOME}" if block else HOME
    *names, rotates = parts
    heads = module.get_submodule(HOME)
    bilinear = not hasattr(heads, "q_norm") and not hasattr(heads, "k_norm")
    query, key, value, output = (f"{home}.{name}" for name in names)
    return Attention(query, key, value, output, heads.head_dim, rotates, bilinear)
