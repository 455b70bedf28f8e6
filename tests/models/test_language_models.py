import copy
import math

import pytest
import torch
from torch import nn

from netweight.core.origin import build, origin_of
from netweight.core.task import Data
from netweight.data.shared import shared_data
from netweight.data.text import Characters
from netweight.models import lm_training, trained
from netweight.models.lm_training import Training, perplexity, rate_at, train

pytest.importorskip("transformers")
from netweight.models import llama, opt

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here (NETWEIGHT_DATA)")


def test_rate_rises_then_falls_to_nothing():
    how = Training(steps=100, rate=2.0, warmup=10)
    rates = [rate_at(step, how) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[99] < 1e-3
    assert rates.index(max(rates)) == 9


def test_training_learns_a_cycle_and_is_the_same_twice():
    tokens = torch.arange(400) % 5
    found = []
    for _ in range(2):
        with trained.seeded(1):
            model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
            losses = train(model, tokens, Training(60, batch=4, length=6, rate=5e-2, warmup=5), seed=3)
        found.append(losses)
    assert found[0] == found[1]
    assert losses[0] > 1.2
    assert losses[-1] < 0.1
    assert not model.training
    data = Data(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 3]]))
    assert 1 < perplexity(model, data) < 1.2


def test_perplexity_of_knowing_nothing_is_the_vocabulary():
    model = nn.Embedding(7, 7)
    nn.init.zeros_(model.weight)
    tokens = torch.randint(7, (600, 3))
    assert math.isclose(perplexity(model, Data(tokens, tokens)), 7, rel_tol=1e-5)


@pytest.mark.parametrize(("module", "weights"), [(llama, 1_315_968), (opt, 891_904)])
def test_architectures(module, weights):
    model = module.architecture().eval()
    assert sum(p.numel() for p in model.parameters()) == weights
    ids = torch.randint(100, (2, 9))
    with torch.no_grad():
        out, changed = model(ids), model(torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1))
    assert out.shape[:2] == (2, 9)
    assert torch.allclose(out[:, :-1], changed[:, :-1], atol=1e-5)  # no token sees a later one
    assert not torch.allclose(out[:, -1], changed[:, -1], atol=1e-5)


@needs_data
@pytest.mark.parametrize("make", [llama.quick_llama, opt.quick_opt])
def test_quick_models_know_a_little_and_are_built_again(make, monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_CACHE", str(tmp_path))
    model = make()
    tokenizer = model.netweight_tokenizer
    data = lm_training.held_out(tokenizer, 64).take(40)
    assert perplexity(model, data) < tokenizer.size / 3
    monkeypatch.setattr(f"{make.__module__}.train", None)
    again = make()  # from the cache
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    bare = build(origin_of(copy.deepcopy(model)))
    bare.load_state_dict(model.state_dict())
    assert torch.equal(bare(data.x[:2]), model(data.x[:2]))
    assert bare.netweight_tokenizer == tokenizer
    assert isinstance(tokenizer, Characters) == (make is opt.quick_opt)
