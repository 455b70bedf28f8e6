"""k-means codebooks: the table is that of each layer, the laws, tables of embeddings, what is left."""

import pytest
import torch
from torch import nn

from netweight.compression.share.kmeans import KMeans, kmeans
from netweight.core.compressed import weight_of, weighted
from netweight.core.plan import Budget
from netweight.core.task import Task
from netweight.nn.codebook import Codebook
from netweight.pipeline import compress
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_laws(bits):
    check_compressor(kmeans, KMeans(bits))


def test_each_layer_has_the_best_table_of_its_own():
    model = tiny_model()
    for layer, form in kmeans(model, tiny_task(), weighted(model), KMeans(2)).packed.items():
        assert isinstance(form, Codebook) and form.groups == 1 and form.bits_per_code == 2
        weight, levels = weight_of(model, layer), form.levels()[0]
        nearest = (weight[..., None] - levels).abs().argmin(-1)
        assert torch.equal(form.decode(), levels[nearest])
        for k, level in enumerate(levels):  # each entry is the mean of what it stands for
            assert torch.isclose(weight[nearest == k].mean(), level, rtol=2e-3, atol=1e-4)


def test_embeddings_and_the_default_width():
    model = tiny_language_model()
    layers = weighted(model, embeddings=True)
    packed = kmeans(model, tiny_text_task(), layers, KMeans()).packed
    assert packed.keys() == set(layers) and packed["embedding"].bits_per_code == 4


def test_weights_without_spread_and_without_numbers():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.fill_(0.1)
        model[2].weight[0, 0] = torch.nan
    change = kmeans(model, tiny_task(), ["0", "1", "2"], KMeans(3))
    assert change.left == {"2": "its weight holds NaN or Inf"}
    assert all(torch.equal(change.packed[n].decode(), weight_of(model, n)) for n in ("0", "1"))
    half = nn.Sequential(nn.Linear(4, 4)).half()
    assert "not fewer than the 256 of its weight" in kmeans(half, tiny_task(), ["0"], KMeans(4)).left["0"]


def test_it_is_planned_layer_by_layer():
    model, task = tiny_model(), tiny_task()
    small = compress(model, Task(task.calibration, task.test), Budget(bits=4), method="kmeans")
    used = {option.settings["bits"] for option in small.plan.choices.values()}
    assert small.bits() <= 4 * sum(weight_of(model, layer).numel() for layer in weighted(model))
    assert len(used) > 1 and {o.method for o in small.plan.choices.values()} == {"kmeans"}


@pytest.mark.parametrize("bits", [0, 9])
def test_nonsense(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        KMeans(bits)
