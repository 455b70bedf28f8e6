"""The networks that are built in: what they reach, that they are the same twice, and where they come from."""

import copy

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.core.origin import build, origin_of
from netweight.core.task import METRICS, outputs
from netweight.data import digits, images
from netweight.data.shared import shared_data
from netweight.models import resnet_cifar
from netweight.models.digits_cnn import digits_cnn
from netweight.models.trained import cached_file, seeded

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here (NETWEIGHT_DATA)")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETWEIGHT_CACHE", str(folder))
        yield folder


def accuracy(model, data):
    return METRICS["accuracy"].of(outputs(model, data), data.y).mean().item()


def same(a, b):
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_digits_cnn_is_good_and_the_same_twice(kept):
    threads, random = torch.get_num_threads(), torch.random.get_rng_state()
    first = digits_cnn()
    assert accuracy(first, digits.test()) >= 0.97
    assert not first.training
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), random)
    file = cached_file("digits-cnn-v1-0")
    whole = file.read_bytes()
    assert same(first, digits_cnn())
    file.write_bytes(whole[: len(whole) // 2])
    assert same(first, digits_cnn())  # trained again
    assert file.read_bytes() == whole
    assert not same(first, digits_cnn(1))


def test_a_cache_of_another_network_is_not_used(kept):
    from netweight.core.io import read_tensors, write_tensors

    first, file = digits_cnn(), cached_file("digits-cnn-v1-0")
    state = read_tensors(file)
    for changed in (
        {"1.weight": state["1.weight"][:3]},
        {"1.weight": torch.full_like(state["1.weight"], torch.nan)},
    ):
        write_tensors(file, {**state, **changed})
        assert same(first, digits_cnn())


def test_a_cache_that_cannot_be_used_is_done_without(monkeypatch, tmp_path, kept):
    first = digits_cnn()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NETWEIGHT_CACHE", str(tmp_path / "file" / "inside"))
    assert same(first, digits_cnn())


def test_seeded_restores_after_an_error():
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), seeded(0):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads


def test_digits_cnn_is_built_again_without_training(kept, monkeypatch):
    model = digits_cnn()
    monkeypatch.setattr("netweight.models.digits_cnn.fit", None)
    monkeypatch.setattr("netweight.models.trained.io.read_tensors", None)
    bare = build(origin_of(copy.deepcopy(model)))
    assert {n: t.shape for n, t in bare.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert not same(model, bare)


def test_option_a_shortcut_by_hand():
    block = resnet_cifar.Block(4, 8, 2)
    torch.nn.init.zeros_(block.bn2.weight)  # the branch gives 0: what is left is relu of the shortcut
    x = torch.rand(2, 4, 6, 6)
    y = block.eval()(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert (y[:, :2] == 0).all()
    assert (y[:, 6:] == 0).all()


@pytest.mark.parametrize(("depth", "weights"), [(20, 269_722), (32, 464_154), (44, 658_586)])
def test_resnets_have_as_many_weights_as_published(depth, weights):
    model = resnet_cifar.architecture(depth)
    assert sum(p.numel() for p in model.parameters()) == weights
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


@needs_data
def test_resnet20_knows_the_first_test_images():
    model = resnet_cifar.resnet20()
    assert accuracy(model, images.cifar10().test(300)) >= 0.78  # 81.02 % on all 5,000
    bare = build(origin_of(model))
    assert bare.state_dict().keys() == model.state_dict().keys()


def test_foreign_resnet_weights_are_one_sentence(tmp_path):
    path = tmp_path / "a.th"
    with pytest.raises(BadInput, match="no such file"):
        resnet_cifar.resnet20(path)
    torch.save({"state_dict": resnet_cifar.architecture(32).state_dict()}, path)
    with pytest.raises(BadInput, match="not the weights of this ResNet"):
        resnet_cifar.resnet20(path)
    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(BadInput, match="not the weights of this ResNet"):
        resnet_cifar.resnet20(path)
    model = resnet_cifar.architecture(20)
    torch.nn.init.constant_(model.linear.bias, torch.inf)
    torch.save({"state_dict": model.state_dict()}, path)
    with pytest.raises(BadInput, match="NaN or Inf"):
        resnet_cifar.resnet20(path)
