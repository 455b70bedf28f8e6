import json

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.core.origin import build, origin_of
from netweight.data.text import Subwords

transformers = pytest.importorskip("transformers")
from netweight.models.huggingface import Classifier, LanguageModel, describe, load  # noqa: E402


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_logits_are_those_of_the_library(folder):
    model = load(folder)
    ids = torch.randint(40, (2, 7))
    own = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert isinstance(model, LanguageModel)
    assert not model.training
    assert model.netweight_tokenizer is None
    with torch.no_grad():
        assert torch.equal(model(ids), own(ids).logits)
    bare = build(origin_of(model))
    bare.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(bare(ids), model(ids))
    assert describe(folder).files["config.json"] == (folder / "config.json").read_bytes()


def test_tokenizer_comes_with_the_folder(folder):
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    model = load(folder)
    assert model.netweight_tokenizer("a b c").tolist() == [0, 1, 2]
    assert isinstance(build(origin_of(model)).netweight_tokenizer, Subwords)


def test_image_classifier(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, Classifier)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_folders_that_are_refused(folder):
    with pytest.raises(BadInput, match="no such file"):
        load(folder / "none")
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="cannot load"):
        load(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BadInput, match=r"only pytorch_model\.bin, a pickle"):
        load(folder)
    weights.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(BadInput, match="not a safetensors file beside it"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"architectures": ["Bert"]}, "expected one ending in ForCausalLM"),
        ({"architectures": None}, "expected one ending in"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ({"model_type": "nonsense"}, "cannot load"),
        ({"hidden_size": 32}, "cannot load|another shape"),
        ({"num_hidden_layers": 2}, "missing or of another shape"),
    ],
)
def test_configs_that_are_refused(folder, values, sentence):
    change(folder / "config.json", **values)
    with pytest.raises(BadInput, match=sentence):
        load(folder)


def test_no_code_of_the_folder_is_run(folder):
    (folder / "net.py").write_text("raise SystemExit('run')")
    auto = {"AutoConfig": "net.Config", "AutoModelForCausalLM": "net.Model"}
    change(folder / "config.json", auto_map=auto, model_type="mine")
    with pytest.raises(BadInput, match="cannot load"):
        load(folder)
    origin = describe(folder)
    with pytest.raises(BadInput, match="cannot be built"):
        build(origin)
