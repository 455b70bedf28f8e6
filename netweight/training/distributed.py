"""One training over several processes, as `torchrun` starts them; alone, every function here does nothing.

    torchrun --nproc-per-node 2 -m netweight train MODEL --data DATA --out DIR

Each process takes its share of the rows of each step. With n_r of n rows in process r of R, its loss (a mean
over its rows) counts n_r R / n, and gradients are averaged over the processes: the gradient of the mean over
all rows, whatever the shares are. Batch norm takes mean and variance over all rows too (Ioffe & Szegedy 2015,
over processes as Peng et al. 2018, arXiv:1711.07240), so that one process and several give the same numbers
up to rounding. Checkpoints are whole: a training may go on with another number of processes.

Weights, gradients and the optimizer's state are sharded (FSDP2, `torch.distributed.fsdp.fully_shard`; Zhao et
al., VLDB 2023, arXiv:2304.11277) on a copy of the network, which gives its weights back at the end. A method
that edits gradients or weights itself (`passes`, `before`, `after` of its hooks) is given whole ones: its
network is replicated, and gradients alone are averaged. Parameters of no dimension, which FSDP2 does not
split, are replicated too.

Chance: of each step, a source with one seed for all processes, so that a method's draws agree; torch's own
(dropout) differs between processes. Where a loss draws per row, processes repeat each other's draws. What a
layer takes from the size of its batch (LSQ's gradient factor of inputs) is that of the share.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from netweight.core.errors import BadInput, DoesNotFit


@dataclass(frozen=True)
class Place:
    """Which of `count` processes this one is, and the device it trains on."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0


@contextlib.contextmanager
def joined() -> Iterator[Place]:
    """Join the processes that torchrun started (gloo on the CPU, nccl on CUDA), or be alone."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise BadInput(
            f"{local + 1} processes on a machine with {torch.cuda.device_count()} CUDA devices; start one "
            "for each with --nproc-per-node, or hide the devices with CUDA_VISIBLE_DEVICES="
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if size == 1:
        yield Place(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Place(rank, size, device)
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return count() == 1 or dist.get_rank() == 0


def gathered(value: Any) -> list[Any]:
    """The value of each process, in order of rank; all processes have to ask."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def share(rows: Tensor) -> tuple[Tensor, float]:
    """This process's rows of a step, and what its loss counts; all rows where there are fewer than processes.

    Shares differ by one row at most.
    """
    processes = count()
    if processes == 1 or len(rows) < processes:
        return rows, 1.0
    own = rows.tensor_split(processes)[dist.get_rank()]
    return own, len(own) * processes / len(rows)


def chance(generator: torch.Generator, seed: int, step: int) -> torch.Generator:
    """The source of chance of a step, the same in all processes; torch's own is set, a different one in each.

    Alone: the generator. The order of the examples is drawn from the generator itself, alone and together.
    """
    if count() == 1:
        return generator
    own = (seed * 1_000_003 + step) % 2**40 * 2**20
    torch.manual_seed(own + 1 + dist.get_rank())
    return torch.Generator().manual_seed(own)


@torch.no_grad()
def averaged(loss: Tensor, model: nn.Module) -> Tensor:
    """The mean of the loss over the processes; the gradients that are not sharded are averaged in place.

    Called after each backward pass: what was averaged before stays as it is.
    """
    if count() == 1:
        return loss
    grads = [p.grad for p in model.parameters() if p.grad is not None and not is_part(p.grad)]
    flat = torch.cat([loss.reshape(1), *(grad.reshape(-1).to(loss) for grad in grads)])
    dist.all_reduce(flat)
    flat /= count()
    for grad, mean in zip(grads, flat[1:].split([grad.numel() for grad in grads])):
        grad.copy_(mean.reshape(grad.shape))
    return flat[0]


def norm(grads: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, shards of other processes included."""
    grads = list(grads)
    if count() == 1:
        return nn.utils.get_total_norm(grads)
    kinds = [[g for g in grads if is_part(g)], [g for g in grads if not is_part(g)]]
    return nn.utils.get_total_norm([whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind])


# The network over several processes -----------------------------------------------------------------------


@contextlib.contextmanager
def spread(model: nn.Module, *, edited: bool, precision: str) -> Iterator[nn.Module]:
    """The network to train: `model` itself, or a sharded copy whose weights `model` has at the end.

    edited: the method edits gradients or weights itself, so that they stay whole. Raises `BadInput` for
    float16, whose scaling of the loss has no sharded form, `DoesNotFit` for a method that keeps the network
    it was given in a place of its own.
    """
    if count() == 1:
        yield model
        return
    if precision == "float16":
        raise BadInput("float16 trains in one process; over several give --precision bfloat16 or float32")
    trained = model if edited else sharded(model)
    with shared_statistics(trained):
        yield trained
    if trained is model:
        return
    if any(p.grad is not None for p in model.parameters()):
        raise DoesNotFit("this method keeps a network of its own and does not train over several processes")
    model.load_state_dict(whole(trained.state_dict()))


def settle(optimizer: Optimizer, model: nn.Module) -> None:
    """Parameters are moved one by one: torch's loops over lists take no mixture of sharded and whole ones.

    Raises `DoesNotFit` where several processes would move something that is no parameter of the model.
    """
    if count() == 1:
        return
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise DoesNotFit("this method trains more than its network and does so in one process only")
    for group in optimizer.param_groups:
        group["foreach"] = False


def sharded(model: nn.Module) -> nn.Module:
    """A copy of the model with each parameter split over the processes along its first axis."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(model)
    device = next(model.parameters()).device.type
    scalars = {p for p in model.parameters() if p.ndim == 0}
    mesh = init_device_mesh(device, (count(),))
    return fully_shard(model, mesh=mesh, ignored_params=scalars)  # type: ignore[return-value]


def whole(state: Any) -> Any:
    """A state with every sharded tensor put together; all processes have to ask."""
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if is_part(state) else state


def is_part(tensor: Any) -> bool:
    """Whether it is a DTensor: one of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def parted(tensor: Any, like: Tensor) -> Any:
    """This process's part of a whole tensor where `like` is sharded and has its shape."""
    if not (is_part(like) and isinstance(tensor, Tensor) and tensor.shape == like.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def fill(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load whole states of a model and its optimizer, each process its part."""
    now = model.state_dict()
    model.load_state_dict(
        {
            name: parted(tensor, now[name]) if name in now else tensor
            for name, tensor in state["model"].items()
        }
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {key: parted(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": entries})
    settle(optimizer, model)  # what the checkpoint says of lists is of another number of processes


# Batch norm over all rows ---------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over all processes, and of the gradients that arrive at it in each of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


@contextlib.contextmanager
def shared_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, each batch norm in training mode uses mean and variance over the rows of all processes."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.forward = _over_all(module, module.forward)
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _over_all(module: nn.modules.batchnorm._BatchNorm, alone: Any) -> Any:
    """The forward function of a batch norm with statistics over all processes."""

    def forward(x: Tensor) -> Tensor:
        if not module.training:
            return alone(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        sums = _Sum.apply(torch.cat([x.float().sum(axes), x.new_full((1,), x.numel() // x.shape[1]).float()]))
        numbers, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        apart = x.float() - mean.reshape(shape)
        var = _Sum.apply(apart.square().sum(axes)) / numbers
        if module.running_mean is not None:
            with torch.no_grad():
                module.num_batches_tracked.add_(1)
                rate = module.momentum or 1 / float(module.num_batches_tracked)
                module.running_mean.lerp_(mean.detach(), rate)
                module.running_var.lerp_(var.detach() * numbers / (numbers - 1).clamp(min=1), rate)
        y = apart * (var + module.eps).rsqrt().reshape(shape)
        if module.weight is not None:
            y = y * module.weight.reshape(shape) + module.bias.reshape(shape)
        return y.to(x.dtype)

    return forward
