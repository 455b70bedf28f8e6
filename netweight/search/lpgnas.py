"""LPGNAS: the blocks of a graph network and the bits of each of their parts, found in one search.

Paper: Zhao, Wang, Bates, Mullins, Jamnik and Lio, "Learned Low Precision Graph Neural Networks", 2020,
arXiv:2009.09232.

A supernet (`search.supernet`) holds every block; logits a say what is computed, logits q what each part is
rounded to (`models.graph_parts`). With P = softmax((logits + eta N) / tau), N of the Gumbel distribution,
eta falling from 1 to 0 and tau from 1 to 0.1 over E epochs, each epoch is

    w <- w - lr dL_train / dw                                   one path, that of the argmax of P
    a <- a - lr dL_val / da                                     from epoch E_a on
    q <- q - lr d(L_val + beta L_q) / dq                        from epoch E_q > E_a on
    L_q = sum over parts of E_q[bits] elements / (32 elements in all), of weights and of activations

with the gradients of `supernet`. The most likely options make the network that is trained from scratch on
the training nodes; its weights are those of the epoch that is best on the validation nodes. With `designs`
above 1, networks drawn from softmax(logits) that are no larger are trained beside it, and the one that is
best on the validation nodes is kept. More beta, fewer bits.

Learning is transductive (`models.graph_block`): the model given holds the graph, an example is the number
of a node. `task.train` is trained on, `task.calibration` validates, test nodes are not looked at.

Differs from the paper: no code is published; formats, options and epochs are partly ours. Before E_q each
part has the most bits on offer. w, a and q move at the same time, by the gradients at the weights before
the step. A shortcut starts at the input of its own block, not of any earlier one. L_q counts the
architecture of the draw, and its gradient reaches a as well. The logits of the most bits start ahead of the
others (`search.supernet.AHEAD`). More designs than the likeliest are ours.
Ties of validation accuracy go to the lower loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.core.progress import steps
from netweight.core.task import Data, Task
from netweight.data.graphs import Graph
from netweight.models.graph_block import Choice, GraphNetwork
from netweight.models.graph_parts import Parts, bits_of, buffer_bits, rounded, shipped, weight_bits
from netweight.models.trained import seeded
from netweight.search.supernet import Options, Supernet
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Loss, Moment, Training, train
from netweight.training.nodes import at_once, digest, fit, graph_of
from netweight.training.trained import Trained, about

COLDEST = 0.1  # tau at the end
KINDS = ("architecture", "roundings")


@dataclass(frozen=True)
class LPGNAS:
    """Settings of `lpgnas`.

    beta: what a bit costs against the loss. epochs: of the search (those of the final training are
    `Training.epochs`). architecture_from, roundings_from: the shares of them after which a and q move. rate:
    of the logits. base: the smallest width. weights, formats: what is on offer (`nn.fixed_point`). designs:
    how many are trained at the end, the likeliest and others that are drawn and no larger, of which the best
    on the validation nodes is kept.
    """

    beta: float = 0.1
    epochs: int = 400
    architecture_from: float = 0.25
    roundings_from: float = 0.375
    rate: float = 0.01
    base: int = 16
    weights: tuple[str, ...] = ("binary", "ternary", "4", "8")
    formats: tuple[str, ...] = ("2.2", "4.4", "8.8")
    designs: int = 1

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and self.rate > 0 and self.epochs >= 1 and self.base >= 1):
            raise BadInput(
                f"beta={self.beta}, rate={self.rate}, epochs={self.epochs}, base={self.base}: beta is from 0 "
                "on, the others above 0"
            )
        if self.base % 8 and self.base not in (1, 2, 4):
            raise BadInput(f"base={self.base}: up to 8 heads have to divide it; give a multiple of 8")
        if not 0 <= self.architecture_from <= self.roundings_from <= 1:
            raise BadInput(
                f"architecture_from={self.architecture_from}, roundings_from={self.roundings_from}: shares "
                "from 0 to 1, the second not below the first"
            )
        if self.designs < 1:
            raise BadInput(f"designs={self.designs}: one is trained at least")
        if not (self.weights and self.formats):
            raise BadInput("weights and formats name one rounding each at least, such as 4 and 4.4")
        for part, names in (("linear", self.weights), ("input", self.formats)):
            for name in names:
                bits_of(part, name or "none")


@dataclass(frozen=True)
class Design:
    """What a search found: choice and roundings of every block."""

    choices: tuple[Choice, ...]
    parts: tuple[Parts, ...]

    def told(self, graph: Graph) -> dict[str, Any]:
        """The design with its sizes, ready for JSON. Bits of codes, without steps and biases."""
        return {
            "blocks": [asdict(choice) for choice in self.choices],
            "roundings": [asdict(part) for part in self.parts],
            "weight_bits": weight_bits(graph, self.choices, self.parts),
            "buffer_bits": buffer_bits(graph, self.choices, self.parts),
        }


def lpgnas(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: LPGNAS = LPGNAS(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A network of as many blocks as the model, found and trained with rounded weights and activations.

    Of the model its graph, blocks and dropout are taken, not its weights. Notes: the design, its sizes in
    bits, the logits and the losses of the search, and validation accuracy. Raises `DoesNotFit` for a network
    without a graph, and for data without nodes to train on and others to validate.
    """
    graph = graph_of(model, task, "lpgnas")
    keep = about(keep, "lpgnas", (settings, digest(graph)))
    supernet, losses = searched(model, task, how, settings, keep=keep and keep.part("search"))
    device = next(model.parameters()).device
    design, found = best_of(
        designs(supernet, settings.designs, how.seed),
        lambda design, number: fitted(
            graph,
            design,
            task,
            how,
            dropout=model.dropout,
            device=device,
            keep=keep and keep.part(f"design-{number}"),
        ),
    )
    notes = {**design.told(graph), **found.notes, "search_losses": list(losses)}
    notes["logits"] = [
        {name: p.tolist() for kind in KINDS for name, p in getattr(block, kind).items()}
        for block in supernet.blocks
    ]
    return replace(found, notes=notes)


# The search -----------------------------------------------------------------------------------------------


def searched(
    model: GraphNetwork, task: Task, how: Training, settings: LPGNAS, *, keep: Checkpoint | None = None
) -> tuple[Supernet, tuple[float, ...]]:
    """The supernet after the search, with its losses; weights move at `how.rate`."""
    options = Options(settings.base, settings.weights, settings.formats)
    with seeded(how.seed):
        supernet = Supernet(model.graph, options, len(model.blocks), model.dropout)
    supernet.to(next(model.parameters()).device)
    plan = replace(how, epochs=settings.epochs)
    hooks = Hooks(
        groups=lambda net: groups(net, settings.rate / how.rate),
        order=at_once(len(task.train)),
        passes=alternating(task.calibration, settings, how.seed),
    )
    losses = train(supernet, task.train, one_path(settings, how.seed), plan, hooks=hooks, keep=keep)
    return supernet, losses


def groups(supernet: nn.Module, faster: float) -> list[dict[str, Any]]:
    """Weights, and logits at a rate of their own without decay."""
    logits = {id(p) for block in supernet.blocks for kind in KINDS for p in getattr(block, kind).values()}
    weights = [p for p in supernet.parameters() if id(p) not in logits]
    moved = [p for p in supernet.parameters() if id(p) in logits]
    return [{"params": weights}, {"params": moved, "factor": faster, "weight_decay": 0.0}]


def chance(seed: int, step: int, turn: int) -> torch.Generator:
    """The noise of one draw, the same in every process and after a stop."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + turn)


def annealed(epoch: int, settings: LPGNAS) -> tuple[float, float]:
    """eta and tau of an epoch."""
    left = 1 - epoch / max(settings.epochs - 1, 1)
    return left, COLDEST + (1 - COLDEST) * left


def rounds(epoch: int, settings: LPGNAS) -> bool:
    """Whether roundings are drawn yet."""
    return epoch >= settings.roundings_from * settings.epochs


def one_path(settings: LPGNAS, seed: int) -> Loss:
    """L_train of the network that a draw gives, without gradients to the logits."""

    def value(supernet: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        picks = supernet.draw(chance(seed, at.step, 0), *annealed(at.epoch, settings))
        picks = picks if rounds(at.epoch, settings) else supernet.widest(picks)
        return F.cross_entropy(supernet(x, picks).float(), y)

    return value


def alternating(
    validation: Data, settings: LPGNAS, seed: int
) -> Callable[[Running, Callable[[], Tensor], Moment], Tensor]:
    """`Hooks.passes`: the weights' gradients on training nodes, then the logits' on validation nodes."""

    def passes(run: Running, once: Callable[[], Tensor], at: Moment) -> Tensor:
        value = once()
        if at.epoch < settings.architecture_from * settings.epochs:
            return value
        supernet, learnt = run.model, KINDS if rounds(at.epoch, settings) else KINDS[:1]
        supernet.eval()  # no dropout where options are judged
        picks = supernet.draw(chance(seed, at.step, 1), *annealed(at.epoch, settings), learnt)
        picks = picks if len(learnt) == 2 else supernet.widest(picks)
        x, y = validation.x.to(next(supernet.parameters()).device), validation.y
        found = F.cross_entropy(supernet(x, picks).float(), y.to(x.device))
        found = found + settings.beta * supernet.share(picks) if len(learnt) == 2 else found
        logits = [p for kind in learnt for p in supernet.logits(kind)]
        moves = torch.autograd.grad(run.scaler.scale(found), logits, allow_unused=True)
        for p, move in zip(logits, moves):
            p.grad = move
        supernet.train()
        return value

    return passes


def likeliest(supernet: Supernet) -> Design:
    """The most likely option of every decision."""
    picks = supernet.draw(None, 0.0, COLDEST)
    return Design(
        supernet.choices(picks), tuple(block.parts(each) for block, each in zip(supernet.blocks, picks))
    )


DRAWS = 200  # that are looked at, for as many designs as are wanted


def designs(supernet: Supernet, count: int, seed: int) -> list[Design]:
    """The likeliest design, and others drawn in proportion to the logits that are no larger, none twice.

    count: how many at most; fewer where `DRAWS` draws do not give as many.
    """
    found = [likeliest(supernet)]
    most = weight_bits(supernet.graph, found[0].choices, found[0].parts)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS if count > 1 else 0):
        picks = supernet.draw(generator, 1.0, 1.0)
        parts = tuple(block.parts(each) for block, each in zip(supernet.blocks, picks))
        design = Design(supernet.choices(picks), parts)
        if design not in found and weight_bits(supernet.graph, design.choices, parts) <= most:
            found.append(design)
        if len(found) == count:
            break
    return found


def best_of(designs: Sequence[Design], fit: Callable[[Design, int], Trained]) -> tuple[Design, Trained]:
    """The design that is best on the validation nodes once trained, the first of several. fit: by number."""
    found = [(design, fit(design, number)) for number, design in enumerate(steps(designs, "Designs"))]
    return max(found, key=lambda pair: pair[1].notes["validation_accuracy"])


# The network that was found -------------------------------------------------------------------------------


def fitted(
    graph: Graph,
    design: Design,
    task: Task,
    how: Training,
    *,
    dropout: float = 0.5,
    device: torch.device | str = "cpu",
    keep: Checkpoint | None = None,
) -> Trained:
    """The network of a design, trained from scratch on `task.train` with its parts rounded."""
    with seeded(how.seed):
        network = GraphNetwork(graph, design.choices, dropout=dropout)
    model = rounded(network, design.parts).to(device)
    losses, score = fit(model, task, how, keep=keep)
    plain, change = shipped(model)
    return Trained(plain, change, losses, {"validation_accuracy": score})
