"""Two gloo processes against one: the same numbers up to rounding, whole checkpoints, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import netweight
from netweight.core.errors import BadInput
from netweight.core.task import Data
from netweight.nn.quantized import Roundings, attach, begin, finished
from netweight.nn.quantizer import Learnt, Levels
from netweight.training import distributed
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Hooks, Training, train

gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo to train over"
)
HOW = Training(epochs=3, batch=7, rate=1e-2, cosine=True, decay=1e-3, clip=0.5)
REPLICATED = Training(epochs=3, batch=7, rate=0.05, optimizer="sgd")


class Scaled(nn.Module):
    """A parameter of no dimension, which FSDP2 does not split."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.scale


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), Scaled(),
            nn.Linear(12, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3),
        )  # fmt: skip


def examples(count: int = 52) -> Data:  # steps of 7 rows, the last one of 3: shares are unequal
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return Data(x, (x[:, 0, 0, 0] > 0).long() + (x[:, 0, 1, 1] > 0.5).long())


def loss(model, x, y, at):
    return F.cross_entropy(model(x), y)


def twice(run, once, at):
    """A method that edits weights between two passes and gradients after them."""
    once()
    for p in run.model.parameters():
        p.data.add_(p.grad, alpha=0.05)
    return once()


def halved(run, at):
    for p in run.model.parameters():
        p.grad.mul_(0.5)


def ran(kind: str, place: Path | None = None, stop: int = 99) -> dict:
    model = network()
    hooks = Hooks(passes=twice, before=halved) if kind == "edited" else Hooks()

    def stops(of, x, y, at):
        if at.epoch == stop:
            raise KeyboardInterrupt
        return loss(of, x, y, at)

    keep = place and Checkpoint(place, resume=True)
    how = HOW if kind == "sharded" else REPLICATED
    losses = train(model, examples(), stops, how, hooks=hooks, keep=keep)
    assert not any(distributed.is_part(tensor) for tensor in model.state_dict().values())
    return {"losses": losses, "state": {k: v.double().tolist() for k, v in model.state_dict().items()}}


def rounded() -> dict:
    """Weights and inputs rounded to 4 bits with learnt steps, by the loop and back to a packed network."""
    model = attach(
        network(), lambda name, layer: Roundings(Learnt(Levels.signed(4)), Learnt(Levels.signed(4)))
    )
    begin(model, examples().x)
    losses = train(model, examples(), loss, HOW)
    plain, change = finished(model)
    return {
        "losses": losses,
        "packed": [*change.packed],
        "steps": [float(p.detach()) for p in steps_of(model)],
    }


def steps_of(model):
    return [p for name, p in model.named_parameters() if name.endswith("step")]


def alike(one: dict, other: dict) -> None:
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, value in one["state"].items():
        assert torch.allclose(torch.tensor(other["state"][name]), torch.tensor(value), atol=2e-5, rtol=1e-4)


SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import torch
import test_distributed as t
torch.set_num_threads(1)
with t.distributed.joined() as place:
    assert place.count == 2
    found = {{"sharded": t.ran("sharded"), "edited": t.ran("edited"), "rounded": t.rounded()}}
    found["resumed"] = t.ran("sharded", Path({place!r}))
    try:
        t.ran("sharded", Path({after!r}), stop=2)
    except KeyboardInterrupt:
        pass
    for name, call in t.REFUSED.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = str(error)
    if place.first:
        Path({out!r}).write_text(json.dumps(found))
"""


def outside():
    """A method that optimizes what is no parameter of its network."""
    apart = nn.Parameter(torch.ones(2))
    groups = lambda model: [{"params": [*model.parameters(), apart]}]  # noqa: E731
    train(network(), examples(), loss, HOW, hooks=Hooks(groups=groups))


def captured():
    """A method whose loss looks at the network it was given in place of the argument."""
    model = network()
    train(model, examples(), lambda of, x, y, at: loss(of, x, y, at) + model[0].weight.sum(), HOW)


def float16():
    train(network(), examples(), loss, Training(epochs=1, precision="float16"))


REFUSED = {"outside": outside, "captured": captured, "float16": float16}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("two")
    place, after = folder / "before.pt", folder / "after.pt"
    with pytest.raises(KeyboardInterrupt):
        ran("sharded", place, stop=1)
    script = folder / "run.py"
    script.write_text(
        SCRIPT.format(
            tests=str(Path(__file__).parent), place=str(place), after=str(after), out=str(folder / "out.json")
        )
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(netweight.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return {**json.loads((folder / "out.json").read_text()), "after": after}


@gloo
@pytest.mark.parametrize("kind", ["sharded", "edited"])
def test_two_processes_give_the_numbers_of_one(both, kind):
    alone = ran(kind)
    alike(alone, both[kind])
    assert alone["losses"][-1] < alone["losses"][0]


@gloo
def test_learnt_steps_are_numbers_of_no_dimension_and_train_too(both):
    alone, two = rounded(), both["rounded"]
    assert two["packed"] == alone["packed"] == ["0", "5", "7"]
    assert two["losses"] == pytest.approx(alone["losses"], rel=0.02)  # a code may fall the other way
    assert two["steps"] == pytest.approx(alone["steps"], rel=0.25)  # LSQ's factor is of the share's size
    first = attach(network(), lambda name, layer: Roundings(Learnt(Levels.signed(4)), None))
    begin(first, examples().x)
    assert float(steps_of(first)[0].detach()) != pytest.approx(alone["steps"][0], rel=1e-3)


@gloo
def test_a_training_goes_on_with_another_number_of_processes(both):
    alike(ran("sharded"), both["resumed"])  # stopped alone, went on as two
    alike(ran("sharded"), ran("sharded", both["after"]))  # stopped as two, went on alone


@gloo
def test_what_several_processes_cannot_do_is_said(both):
    assert "trains more than its network" in both["outside"]
    assert "keeps a network of its own" in both["captured"]
    assert "float16 trains in one process" in both["float16"]


def test_alone_nothing_changes(monkeypatch):
    rows, generator = torch.arange(7), torch.Generator()
    assert distributed.count() == 1 and distributed.first()
    assert distributed.share(rows) == (rows, 1.0)
    assert distributed.chance(generator, 0, 3) is generator
    model = network()
    with distributed.spread(model, edited=False, precision="float16") as same:
        assert same is model and "forward" not in vars(model[1])


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_shares_cover_the_rows_and_weigh_them_equally(monkeypatch, length, processes):
    monkeypatch.setattr(distributed, "count", lambda: processes)
    rows, seen = torch.arange(length), torch.zeros(length)
    for rank in range(processes):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        own, counts = distributed.share(rows)
        assert len(own) >= 1
        seen[own] += counts / len(own) / processes  # what a row weighs in the mean over processes
    assert torch.allclose(seen, torch.full((length,), 1 / length))


def test_more_processes_than_devices_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="2 processes on a machine with 1 CUDA devices"), distributed.joined():
        pass
