"""The comparison of compressors: our side on tiny networks, a peer played by a script, turns, bars."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from netweight.bench import compress, compress_worker
from netweight.bench.compress import Row, Shape, ask, bars, bench, checkpoint, measured
from netweight.bench.compress_worker import serve
from netweight.compression.quantize.gptq import GPTQ, gptq
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import BadInput
from netweight.core.plan import Plan
from netweight.core.task import Data, Task
from netweight.models.huggingface import load

TINY = Shape(width=32, layers=2, inner=48, vocabulary=50, windows=4, length=8)
PLAYED = {"name": "played", "torch": "0", "seconds": 2.0, "bytes": 100, "nll": 3.0}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return checkpoint("random-llama", 0, tmp_path_factory.mktemp("case"), TINY)


def played(tmp_path, *lines):
    """A Python that answers every request with those lines."""
    script = tmp_path / "python"
    script.write_text("\n".join([f"#!{sys.executable}", *(f"print({line!r})" for line in lines)]))
    script.chmod(0o755)
    return str(script)


def said(monkeypatch, capsys, request):
    """What the worker answers to it, here instead of in a process of its own."""
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(request)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: None)
        out = sys.stdout
        serve(compress_worker.load, compress_worker.ours, "netweight 0")
        sys.stdout = out
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_our_side_answers_with_its_time_memory_and_loss(case, method, monkeypatch, capsys):
    answer = said(monkeypatch, capsys, {**case, "method": method, "bits": 4, "symmetric": False})
    assert answer["name"] == "netweight 0" and answer["torch"] == torch.__version__
    assert 0 < answer["seconds"] < 60 and 0 <= answer["bytes"] < 1 << 30
    assert answer["nll"] == pytest.approx(math.log(50), abs=0.2)


def test_the_loss_is_that_of_the_decoded_network_on_the_test_windows(case, monkeypatch, capsys):
    request = {**case, "method": "gptq", "bits": 2, "symmetric": True, "settings": {"damping": 0.1}}
    answer = said(monkeypatch, capsys, request)
    model, tokens = load(case["folder"]), load_file(case["tokens"])
    data = Data(tokens["calibration"], batch=16)
    layers = [layer for layer in weighted(model) if ".layers." in layer]
    change = gptq(model, Task(data, data, "perplexity"), layers, GPTQ(2, True, damping=0.1))
    assert len(layers) == 14 and not torch.equal(tokens["calibration"], tokens["test"])
    x = tokens["test"]
    with torch.no_grad():
        logits = assemble(model, change, Plan()).plain()(x[:, :-1])
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()))
    assert answer["nll"] == pytest.approx(expected, rel=1e-5)


def test_a_request_that_cannot_be_done_is_answered_in_words(case, monkeypatch, capsys):
    wrong = {**case, "method": "gptq", "bits": 9, "symmetric": False}
    for request, words in [
        (wrong, "ValueError: need 2 <= bits <= 8"),
        ({**wrong, "bits": 4, "method": "no"}, "KeyError: 'no'"),
        ({}, "KeyError: 'folder'"),
    ]:
        assert said(monkeypatch, capsys, request)["error"].startswith(words)


def test_without_a_peer_ours_is_measured_alone_and_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compress, "find_spec", lambda _: None)
    found = bench(rows=[Row("random-llama", "gptq", 4, turns=1)], shape=TINY)
    (row,) = found["rows"]
    assert row["ours_seconds"] > 0 and row["ours_bytes"] > 0 and "times_as_fast" not in row
    assert found["bars"] == [] and "pip install 'netweight[peers]'" in found["note"]
    json.dumps(found)


def test_sides_are_compared_and_the_bars_follow(tmp_path, monkeypatch):
    peer = played(tmp_path, "a peer may print", json.dumps(PLAYED))
    real = ask
    monkeypatch.setattr(
        compress, "ask", lambda python, r: real(python, r) if python else {**PLAYED, "bytes": 60}
    )
    found = bench(peer_python=peer, rows=[Row("random-llama", "gptq", 4, turns=1)], shape=TINY)
    (row,) = found["rows"]
    assert (row["times_as_fast"], row["bytes_ratio"], row["nll_difference"]) == (1.0, 0.6, 0.0)
    assert [bar["reached"] for bar in found["bars"]] == [False, False, True]
    assert "note" not in found


def test_turns_alternate_over_the_networks_and_give_medians_and_means(tmp_path, monkeypatch):
    asked, seconds = [], iter([5.0, 1.0, 9.0])

    def answer(python, request):
        asked.append((python, request["folder"][-1]))
        if python:
            return {"error": "refuses"}
        value = next(seconds)
        return {**PLAYED, "seconds": value, "nll": value}

    monkeypatch.setattr(compress, "ask", answer)
    monkeypatch.setattr(compress, "checkpoint", lambda _n, turn, *_: {"folder": f"f{turn}", "tokens": "t"})
    row = measured(Row("small-llama", "awq", 3), {"ours": None, "peer": "py"}, tmp_path, TINY)
    assert asked == [(None, "0"), ("py", "0"), (None, "1"), (None, "2")]
    assert (row["ours_seconds"], row["ours_nll"], row["peer_error"]) == (5.0, 5.0, "refuses")
    assert bars(row) == []


def test_bars_are_at_their_limits():
    row = {"network": "n", "method": "m", "bits": 4}
    at = {"times_as_fast": 2.0, "bytes_ratio": 0.5, "nll_difference": 0.0}
    assert all(bar.passed for bar in bars({**row, **at}))
    for key, value in {"times_as_fast": 1.99, "bytes_ratio": 0.51, "nll_difference": 1e-4}.items():
        assert sum(bar.passed for bar in bars({**row, **at, key: value})) == 2


def test_a_peer_that_cannot_start_is_named_in_one_sentence(tmp_path):
    for python, words in [
        ("/no/such/python", "No such file"),
        (played(tmp_path, "nonsense"), "llmcompressor 0.14"),
    ]:
        with pytest.raises(BadInput, match=words) as caught:
            bench(peer_python=python, rows=[], shape=TINY)
        assert python in str(caught.value)
