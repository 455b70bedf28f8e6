"""The training loop: schedules by hand, the same numbers again, kills at any moment, divergence, nonsense."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import netweight
from netweight.core.errors import BadInput
from netweight.core.task import Data
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Diverged, Hooks, Training, rate_at, train


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )


def examples(count: int = 50) -> Data:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return Data(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())


def cross_entropy(model, x, y, at):
    noise = torch.randn(x.shape, generator=at.generator)
    return F.cross_entropy(model(x + 0.01 * noise), y)


HOW = Training(epochs=6, batch=16, rate=1e-2, milestones=(4,), clip=1.0)


def bits(model: nn.Module) -> list:
    return [tensor.tolist() for tensor in model.state_dict().values()]


def trained(how: Training = HOW, loss=cross_entropy, **options) -> tuple[list, tuple[float, ...]]:
    model = network()
    losses = train(model, examples(), loss, how, **options)
    assert not model.training
    return bits(model), losses


def test_it_learns_and_the_same_seed_gives_the_same_numbers():
    before = torch.get_rng_state()
    first, losses = trained()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again, same = trained()
    assert first == again
    assert losses == same
    assert len(losses) == 6
    assert losses[-1] < 0.85 * losses[0]
    assert trained(Training(epochs=6, batch=16, rate=1e-2, milestones=(4,), clip=1.0, seed=1))[1] != losses


def test_each_epoch_sees_every_example_once_and_moments_count_on():
    seen, moments = [], []

    def loss(model, x, y, at):
        seen.append(x)
        moments.append((at.step, at.epoch, at.steps))
        assert model.training
        return F.cross_entropy(model(x), y)

    trained(Training(epochs=2, batch=16), loss)
    assert moments == [(i, i // 4, 4) for i in range(8)]
    assert [len(x) for x in seen] == [16, 16, 16, 2] * 2
    for epoch in (seen[:4], seen[4:]):
        rows = torch.cat(epoch)
        assert torch.equal(rows[rows[:, 0].argsort()], examples().x[examples().x[:, 0].argsort()])
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))


def test_one_step_by_hand_with_the_gradient_clipped():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    data = Data(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    how = Training(epochs=1, batch=1, rate=0.5, optimizer="sgd", clip=1.0)
    losses = train(model, data, lambda m, x, y, at: m(x).sum(), how)
    assert losses == (11.0,)
    assert torch.allclose(model.weight, torch.tensor([[1 - 0.5 * 0.6, 2 - 0.5 * 0.8]]))


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples():
    losses = trained(Training(epochs=1, batch=16), lambda model, x, y, at: model(x).sum() * 0 + len(x))[1]
    assert losses == (pytest.approx((3 * 16 * 16 + 2 * 2) / 50),)


def test_a_hook_changes_gradients_before_they_are_clipped():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])

    def first_only(run, at):
        run.model.weight.grad[:, 1] = 0

    how = Training(epochs=1, batch=1, rate=0.5, optimizer="sgd", clip=1.0)
    data = Data(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    train(model, data, lambda m, x, y, at: m(x).sum(), how, hooks=Hooks(before=first_only))
    assert torch.allclose(model.weight, torch.tensor([[0.5, 2.0]]))


def test_rates_by_hand():
    how = Training(epochs=10, rate=1.0, milestones=(4, 8), drop=0.1, warmup=2)
    wanted = {0: 5e-4, 1: 0.5005, 2: 1.0, 3.9: 1.0, 4: 0.1, 8: 0.01}
    for epoch, rate in wanted.items():
        assert rate_at(epoch, how) == pytest.approx(rate)
    wave = Training(epochs=8, rate=2.0, cosine=True)
    assert [rate_at(e, wave) for e in (0, 4, 8)] == pytest.approx([2.0, 1.0, 0.0])


@given(epoch=st.floats(0, 20), milestones=st.lists(st.integers(0, 20), max_size=3), cosine=st.booleans())
def test_rates_lie_between_0_and_the_highest_and_fall_after_the_warm_up(epoch, milestones, cosine):
    how = Training(epochs=20, rate=0.3, milestones=tuple(milestones), warmup=2, cosine=cosine)
    assert 0 <= rate_at(epoch, how) <= 0.3
    if epoch >= 2:
        assert rate_at(min(epoch + 1, 20), how) <= rate_at(epoch, how)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stopped_at", [1, 5, 13, 23])
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, stopped_at, optimizer):
    how = Training(epochs=6, batch=16, rate=1e-2, milestones=(4,), optimizer=optimizer)
    place = tmp_path / "run.pt"
    steps = iter(range(100))

    def stops(model, x, y, at):
        if next(steps) == stopped_at:
            raise KeyboardInterrupt
        return cross_entropy(model, x, y, at)

    with pytest.raises(KeyboardInterrupt):
        trained(how, stops, keep=Checkpoint(place))
    assert place.exists() == (stopped_at >= 4)
    assert trained(how, keep=Checkpoint(place, resume=True)) == trained(how)
    assert trained(how, keep=Checkpoint(place, resume=True)) == trained(how)  # finished: nothing left to do


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import test_loop as t
def killed(model, x, y, at):
    if at.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.cross_entropy(model, x, y, at)
t.trained(loss=killed, keep=t.Checkpoint(Path({place!r})))
"""


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    place = tmp_path / "run.pt"
    script = SCRIPT.format(tests=str(Path(__file__).parent), place=str(place))
    environment = {**os.environ, "PYTHONPATH": str(Path(netweight.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert trained(keep=Checkpoint(place, resume=True)) == trained()


def test_checkpoints_every_few_epochs_and_at_the_end(tmp_path):
    times = []

    def loss(model, x, y, at):
        if at.step % at.steps == 0 and (tmp_path / "run.pt").exists():
            times.append((at.epoch, len(torch.load(tmp_path / "run.pt", weights_only=True)["losses"])))
        return cross_entropy(model, x, y, at)

    trained(Training(epochs=5, batch=50), loss, keep=Checkpoint(tmp_path / "run.pt", every=2))
    assert times == [(2, 2), (3, 2), (4, 4)]
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["losses"]) == 5


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    place = tmp_path / "run.pt"
    trained(keep=Checkpoint(place, about="eps 0.1"))
    other = Training(epochs=6, batch=16, rate=2e-2, milestones=(4,), clip=1.0)
    sentence = "of other weights, data or settings; train without --resume"
    with pytest.raises(BadInput, match=sentence):
        trained(other, keep=Checkpoint(place, resume=True, about="eps 0.1"))
    with pytest.raises(BadInput, match=sentence):
        trained(keep=Checkpoint(place, resume=True, about="eps 0.2"))
    with pytest.raises(BadInput, match=sentence):
        train(network(1), examples(), cross_entropy, HOW, keep=Checkpoint(place, True, "eps 0.1"))
    with pytest.raises(BadInput, match=sentence):
        train(network(), examples(49), cross_entropy, HOW, keep=Checkpoint(place, True, "eps 0.1"))
    whole = place.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nonsense", b""):
        place.write_bytes(damaged)
        with pytest.raises(BadInput):
            trained(keep=Checkpoint(place, resume=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(bad):
    model, good = network(), []

    def loss(of, x, y, at):
        if at.step == 5:
            good.append(bits_of_parameters(of))
            return F.cross_entropy(of(x), y) * bad
        return F.cross_entropy(of(x), y)

    def bits_of_parameters(of):
        return [p.tolist() for p in of.parameters()]

    with pytest.raises(
        Diverged, match=r"epoch 2, step 6: the loss is (nan|inf), .*; lower the rate \(0.01\)"
    ):
        train(model, examples(), loss, HOW)
    assert bits_of_parameters(model) == good[0]


def test_a_gradient_that_is_not_finite_stops_too():
    def loss(model, x, y, at):
        return (model(x).sum() * 0).sqrt()  # 0, with a gradient of 0 times infinity

    with pytest.raises(Diverged, match="the norm of its gradient nan"):
        trained(loss=loss)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, "epochs=0, batch=64: training needs at least one"),
        ({"epochs": 1, "batch": 0}, "batch=0: training needs at least one"),
        ({"epochs": 1, "rate": 0.0}, "rate=0.0: the learning rate is a number above 0"),
        ({"epochs": 1, "rate": math.nan}, "rate=nan"),
        ({"epochs": 1, "clip": 0.0}, "clip=0.0: the norm of a gradient"),
        ({"epochs": 1, "optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
    ],
)
def test_settings_that_make_no_sense(settings, sentence):
    with pytest.raises(BadInput, match=sentence):
        Training(**settings)


def test_data_without_labels_and_networks_without_weights():
    with pytest.raises(BadInput, match="there are no labels to train on"):
        train(network(), Data(torch.rand(3, 4)), cross_entropy, HOW)
    with pytest.raises(BadInput, match="ReLU: it has no parameters to train"):
        train(nn.ReLU(), examples(), cross_entropy, HOW)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    model = network().cuda()
    losses = train(model, examples(), lambda m, x, y, at: F.cross_entropy(m(x), y), HOW)
    assert losses[-1] < losses[0]


def squares(model, x, y, at):
    return (model(x) ** 2).mean()


def test_groups_have_rates_and_decay_of_their_own():
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)

    def groups(of):
        return [{"params": [of.weight]}, {"params": [of.bias], "factor": 10.0, "weight_decay": 0.0}]

    how = Training(epochs=1, batch=1, rate=0.01, optimizer="sgd", decay=1.0)
    data = Data(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    train(model, data, lambda m, x, y, at: m(x).sum(), how, hooks=Hooks(groups=groups))
    assert torch.allclose(model.weight, torch.tensor([[1 - 0.01 * (3 + 1), 1 - 0.01 * (4 + 1)]]))
    assert torch.allclose(model.bias, torch.tensor([1 - 0.1 * 1.0]))


def test_a_second_pass_adds_to_the_gradient_and_passes_may_look_elsewhere():
    data = Data(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    how = Training(epochs=3, batch=1, rate=0.01, optimizer="sgd")
    once_, twice = nn.Linear(2, 1), nn.Linear(2, 1)
    twice.load_state_dict(once_.state_dict())

    def both(run, once, at):
        once()
        return once()

    train(once_, data, lambda m, x, y, at: 2 * squares(m, x, y, at), how)
    train(twice, data, squares, how, hooks=Hooks(passes=both))
    assert torch.allclose(once_.weight, twice.weight, rtol=1e-6)


def test_an_order_of_ones_own_decides_the_rows_and_the_steps():
    seen = []

    def watch(model, x, y, at):
        seen.append((at.step, at.steps, x[:, 0].tolist()))
        return squares(model, x, y, at)

    order = [torch.tensor([0, 0]), torch.tensor([1])]
    data = Data(torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 1]))
    train(nn.Linear(2, 1), data, watch, Training(epochs=2), hooks=Hooks(order=lambda generator: order))
    assert seen == [(0, 2, [3, 3]), (1, 2, [5]), (2, 2, [3, 3]), (3, 2, [5])]


def test_after_edits_weights_and_its_memory_survives_a_stop(tmp_path):
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

    def ran(epochs, resume):
        torch.manual_seed(0)
        model, count = nn.Linear(4, 1), Count()

        def after(run, at):
            count.steps += 1
            run.model.weight.clamp_(-0.01, 0.01)

        keep = Checkpoint(tmp_path / "run.pt", resume=resume)
        how = Training(epochs=4, batch=16, rate=0.1)
        if epochs < 4:

            def stops(m, x, y, at):
                if at.epoch == epochs:
                    raise KeyboardInterrupt
                return squares(m, x, y, at)

            with pytest.raises(KeyboardInterrupt):
                train(model, examples(), stops, how, hooks=Hooks(after=after, state=count), keep=keep)
        else:
            train(model, examples(), squares, how, hooks=Hooks(after=after, state=count), keep=keep)
        return model, int(count.steps)

    whole, steps = ran(4, False)
    ran(2, False)
    again, steps_again = ran(4, True)
    assert steps == steps_again == 4 * 4
    assert whole.weight.abs().max() <= 0.01 and torch.equal(whole.weight, again.weight)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_float32_weights_to_about_the_same_loss(precision):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    seen = set()

    def loss(model, x, y, at):
        z = model(x)
        seen.add(z.dtype)
        return nn.functional.cross_entropy(z.float(), y)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    data = Data(x, (x[:, 0] > 0).long())
    ends = [
        train(net, data, loss, Training(epochs=20, batch=16, rate=1e-2, precision=p))[-1]
        for net, p in zip(nets, ("float32", precision))
    ]
    assert seen == {torch.float32, getattr(torch, precision)} and nets[1][0].weight.dtype == torch.float32
    assert ends[1] == pytest.approx(ends[0], abs=0.03) and ends[0] < 0.3
    assert not torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_in_float16_an_infinite_gradient_leaves_out_one_step_and_halves_the_scale():
    model = nn.Linear(2, 1)
    before, scales = model.weight.detach().clone(), []

    def passes(run, once, at):
        found = once()
        if at.step == 1:
            model.weight.grad[0, 0] = math.inf
        return found

    def after(run, at):
        scales.append((run.scaler.get_scale(), torch.equal(model.weight, before)))
        before.copy_(model.weight)

    data = Data(torch.rand(4, 2), torch.zeros(4, dtype=torch.long))
    how = Training(epochs=3, batch=4, rate=0.01, precision="float16")
    loss = lambda m, x, y, at: m(x).float().square().mean() / 1000  # noqa: E731
    train(model, data, loss, how, hooks=Hooks(passes=passes, after=after))
    assert [same for _, same in scales] == [False, True, False]
    assert scales[0][0] == 2**16 and scales[1][0] == scales[2][0] == 2**15


def test_a_loss_that_is_not_finite_names_the_step_and_the_layer(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    def breaks(m, x, y, at):
        return squares(m, x, y, at) + (m[1].weight.sum() * math.nan if at.epoch == 2 else 0)

    place = tmp_path / "run.pt"
    with pytest.raises(Diverged, match=r"epoch 3, step 9: .* first at 1\.weight"):
        train(model, examples(), breaks, Training(epochs=4, batch=16), keep=Checkpoint(place))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with pytest.raises(BadInput, match="of other weights"):  # whole, but of another first network
        train(model, examples(), squares, Training(epochs=4, batch=16), keep=Checkpoint(place, resume=True))


def test_parts_of_a_training_are_forgotten_with_it_and_nothing_else(tmp_path):
    keep = Checkpoint(tmp_path / "net[1].training", about="settings")
    parts = [keep, keep.part("first"), keep.part("second")]
    assert len({part.path for part in parts}) == len({part.about for part in parts}) == 3
    others = [tmp_path / "net[1].training.txt", tmp_path / "net1.training.part-first"]
    for path in (*(part.path for part in parts), *others):
        path.write_text("x")
    keep.forget()
    keep.forget()
    assert {*tmp_path.iterdir()} == {*others}
