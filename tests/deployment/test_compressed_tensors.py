"""A folder in the compressed-tensors layout gives in Transformers what the packed network gives."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from netweight.compression.prune.magnitude import Magnitude, magnitude
from netweight.compression.quantize.rtn import RTN, encode, rtn
from netweight.core.compressed import Change, assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.models.llama import architecture
from netweight.nn.fake import DynamicRounding
from netweight.testing import tiny_language_model, tiny_model, tiny_task

compressed_tensors = pytest.importorskip("netweight.deployment.compressed_tensors")
pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return architecture(quick=True).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 2048, (2, 9), generator=torch.Generator().manual_seed(0))


def layers_of(model):
    return [name for name in weighted(model) if ".layers." in name]


def rounded(model, settings):
    return rtn(model, tiny_task(), layers_of(model), settings)


@pytest.mark.parametrize(
    "settings",
    [
        RTN(4, group=4),
        RTN(4, symmetric=True, group=4),
        RTN(3, symmetric=True),
        RTN(3),
        RTN(8, symmetric=True, group=-1),
        RTN(5),
    ],
    ids=repr,
)
def test_transformers_gives_the_same_logits(tmp_path, llama, tokens, settings):
    small = assemble(llama, rounded(llama, settings), Plan())
    made = compressed_tensors.export(small, tmp_path / "out", tokens)
    assert made.same and made.same_class == 1.0 and made.largest_difference < 1e-5
    assert made.integer_weights == made.packed_weights == 14
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        name = "model.layers.0.self_attn.q_proj"
        packed = file.get_tensor(f"{name}.weight_packed")
        bits = 4 if settings.bits <= 4 else 8
        assert packed.dtype == torch.int32 and packed.shape == (64, 64 * bits // 32)
        assert file.get_tensor(f"{name}.weight_shape").tolist() == [64, 64]
        names = set(file.keys())
        assert f"{name}.weight" not in names
        assert (f"{name}.weight_zero_point" in names) is not settings.symmetric
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pack-quantized" and said["ignore"] == ["lm_head"]
    assert len(said["config_groups"]) == 1


def test_a_plan_of_several_kinds_is_written_symmetrically(tmp_path, llama, tokens):
    kinds = [RTN(4, group=4), RTN(3), RTN(8, symmetric=True), RTN(8), RTN(4, symmetric=True, group=4)]
    mixed = {
        layer: rounded(llama, kinds[number % len(kinds)]).packed[layer]
        for number, layer in enumerate(layers_of(llama))
    }
    pruned = magnitude(llama, tiny_task(), layers_of(llama)[:1], Magnitude(0.5)).packed
    small = assemble(llama, Change({**mixed, **pruned}), Plan())
    made = compressed_tensors.export(small, tmp_path / "out", tokens)
    assert made.same and made.largest_difference < 1e-5
    assert (
        8 <= made.integer_weights < made.packed_weights == 14
    )  # pruned, and 8 bits off centre: as they decode
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not any("zero_point" in name for name in [*file.keys()])
        first = layers_of(llama)[0].removeprefix("hf.")
        assert torch.equal(file.get_tensor(f"{first}.weight"), pruned[layers_of(llama)[0]].decode())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([-1, 0, 4]),
    st.integers(1, 5),
    st.integers(1, 9),
    st.floats(-3, 3),
    st.integers(0, 10**6),
)
def test_codes_decode_to_the_weight(bits, symmetric, group, rows, groups, shift, seed):
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed)) + shift
    form = encode(weight, RTN(bits, symmetric=symmetric, group=group))
    for codes in (compressed_tensors.as_stored(form), compressed_tensors.as_symmetric(form)):
        if codes.bits > 8:
            continue
        parts = codes.tensors()
        values = unpacked(parts["weight_packed"], codes.bits, 4 * groups) - 2 ** (codes.bits - 1)
        count = {-1: 1, 0: 1, 4: groups}[codes.group]
        zero = torch.zeros(rows, count)
        if codes.zero is not None:
            zero = unpacked(parts["weight_zero_point"].T, codes.bits, rows).T - 2 ** (codes.bits - 1)
        scale = parts["weight_scale"].expand(rows, -1) if codes.group == -1 else parts["weight_scale"]
        each = 4 * groups // count
        decoded = (values - zero.repeat_interleave(each, 1)) * scale.repeat_interleave(each, 1)
        assert torch.equal(decoded, form.decode())


def unpacked(words, bits, count):
    shifts = bits * torch.arange(32 // bits)
    codes = (words.long()[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :count].float()


def test_what_the_layout_cannot_say_is_refused(tmp_path, llama, tokens):
    change = rounded(llama, RTN(4))
    layer = layers_of(llama)[0]
    for wrong, said in (
        (dataclasses.replace(change, activations={layer: DynamicRounding(8)}), "its input is rounded"),
        (dataclasses.replace(change, biases={layer: torch.ones(64)}), "its bias was changed"),
    ):
        with pytest.raises(DoesNotFit, match=said):
            compressed_tensors.export(assemble(llama, wrong, Plan()), tmp_path / "out", tokens)
    for other in (tiny_model(), tiny_language_model()):
        small = assemble(other, rtn(other, tiny_task(), weighted(other), RTN(4)), Plan())
        with pytest.raises(DoesNotFit, match="holds models of Transformers"):
            compressed_tensors.export(small, tmp_path / "out", tokens)
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(tmp_path, llama, tokens):
    (tmp_path / "thesis.txt").write_text("years of work")
    small = assemble(llama, rounded(llama, RTN(4)), Plan())
    with pytest.raises(BadInput, match="files that are not netweight's"):
        compressed_tensors.export(small, tmp_path, tokens)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
