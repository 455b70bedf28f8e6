"""Block by block: the same folder as any other, the same after a stop, close to the original."""

from dataclasses import replace

import pytest
import torch

from netweight import streaming
from netweight.bench.stream import write_checkpoint
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core import io
from netweight.core.affine import Mixing, Turn
from netweight.core.compressed import Change, Compressed, weight_of
from netweight.core.errors import BadInput
from netweight.core.permute import Permute
from netweight.core.plan import Budget
from netweight.core.rewrite import rewritten
from netweight.core.task import Data, outputs
from netweight.models import huggingface

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "checkpoint"
    write_checkpoint(folder, width=128, depth=3, vocabulary=300)
    return folder


@pytest.fixture(scope="module")
def tokens():
    return Data(torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(0)), batch=2)


def test_result_is_an_ordinary_folder_and_close_to_the_original(checkpoint, tokens, tmp_path):
    plan = streaming.compress_folder(checkpoint, tokens, Budget(bits=8.5), tmp_path / "small", group=64)
    assert len(plan.choices) == 3 * 7
    assert plan.bits_per_weight <= 8.5
    small, original = Compressed.load(tmp_path / "small"), huggingface.load(checkpoint)
    off = outputs(small.model, tokens) - outputs(original, tokens).float()
    assert 0 < float(off.abs().max()) < 0.05 * float(outputs(original, tokens).abs().max())


def test_awq_is_stored_with_the_scales_it_was_rounded_under(checkpoint, tokens, tmp_path):
    streaming.compress_folder(checkpoint, tokens, Budget(bits=8.6), tmp_path / "small", method="awq")
    original = outputs(huggingface.load(checkpoint), tokens)
    off = outputs(Compressed.load(tmp_path / "small").model, tokens) - original
    assert 0 < float(off.abs().max()) < 0.05 * float(original.abs().max())


def test_rewrites_that_change_values_alone_are_stored(checkpoint, tokens, tmp_path, monkeypatch):
    """Neurons in another order, and a matrix between value and output: exact, with no trace in the folder."""
    seen = []

    def shuffled(block, task, layers, settings):
        order = torch.randperm(len(weight_of(block, "block.mlp.up_proj")), generator=torch.Generator())
        producers = ("block.mlp.gate_proj", "block.mlp.up_proj")
        turns = torch.linalg.qr(torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)))[0]
        heads = weight_of(block, "block.self_attn.v_proj").shape[0] // 64
        rewrites = [
            Permute(producers, (), ("block.mlp.down_proj",), order),
            Mixing("block.self_attn.v_proj", "block.self_attn.o_proj", turns[:1].repeat(heads, 1, 1)),
        ]
        seen.append([type(rewrite) for rewrite in rewrites])
        grid = rtn(rewritten(block, rewrites), task, layers, RTN(8, group=64))
        return replace(grid, rewrites=rewrites)

    monkeypatch.setattr(streaming.catalogue, "method", lambda slug: shuffled)
    streaming.compress_folder(checkpoint, tokens, Budget(bits=8.6), tmp_path / "small", method="awq")
    assert seen == 3 * [[Permute, Mixing]]
    original, small = huggingface.load(checkpoint), Compressed.load(tmp_path / "small")
    expected = outputs(original, tokens)
    off = outputs(small.model, tokens) - expected
    assert 0 < float(off.abs().max()) < 0.05 * float(expected.abs().max())
    name = "hf.model.layers.1.mlp.up_proj"
    moved = weight_of(small.plain(), name) - weight_of(original, name)
    assert float(moved.abs().max()) > 0.05  # the order is another


def test_rewrites_that_add_a_module_are_refused(checkpoint, tokens, tmp_path, monkeypatch):
    def turned(block, task, layers, settings):
        readers = tuple(f"block.self_attn.{part}_proj" for part in "qkv")
        return Change({}, rewrites=[Turn("block.input_layernorm", readers, torch.eye(128))])

    monkeypatch.setattr(streaming.catalogue, "method", lambda slug: turned)
    with pytest.raises(BadInput, match="cannot be stored block by block"):
        streaming.compress_folder(checkpoint, tokens, Budget(bits=8.6), tmp_path / "small", method="awq")
    assert not (tmp_path / "small").exists()


def test_a_stop_between_blocks_changes_nothing(checkpoint, tokens, tmp_path, monkeypatch):
    budget = Budget(bits=4.5)
    streaming.compress_folder(checkpoint, tokens, budget, tmp_path / "whole", method="rtn", group=64)
    write = streaming._write_block

    def stop_at_two(partial, number, small, prefix):
        if number == 2:
            raise KeyboardInterrupt
        write(partial, number, small, prefix)

    monkeypatch.setattr(streaming, "_write_block", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        streaming.compress_folder(checkpoint, tokens, budget, tmp_path / "cut", method="rtn", group=64)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(streaming, "_write_block", write)
    streaming.compress_folder(
        checkpoint, tokens, budget, tmp_path / "cut", method="rtn", group=64, resume=True
    )
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name


def test_refuses_a_foreign_token_a_nan_weight_and_other_budgets(checkpoint, tokens, tmp_path):
    with pytest.raises(BadInput, match="vocabulary of 300"):
        bad = Data(torch.full((2, 8), 300))
        streaming.compress_folder(checkpoint, bad, Budget(bits=4), tmp_path / "a")
    with pytest.raises(BadInput, match="mean bits alone"):
        streaming.compress_folder(checkpoint, tokens, Budget(size=1000), tmp_path / "b")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    shard = io.read_tensors(broken / "model-1.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    shard[name][0, 0] = float("nan")
    io.write_tensors(broken / "model-1.safetensors", shard)
    with pytest.raises(BadInput, match=f"{name} holds NaN"):
        streaming.compress_folder(broken, tokens, Budget(bits=4.5), tmp_path / "c", method="rtn", group=64)
    assert not (tmp_path / "c").exists()
