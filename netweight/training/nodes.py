"""Training on the nodes of one graph: all of them in one step, the weights of the best epoch kept.

Learning is transductive (`models.graph_block`): the network holds the graph, an example is the number of a
node. `task.train` is trained on, `task.calibration` validates, test nodes are not looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit
from netweight.core.task import Data, Task
from netweight.data.graphs import Graph
from netweight.models.graph_block import GraphNetwork
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.trained import loss


def graph_of(model: nn.Module, task: Task, method: str) -> Graph:
    """The graph of the model; raises `DoesNotFit` for a model or a task that has none of what is needed."""
    if not isinstance(model, GraphNetwork):
        raise DoesNotFit(
            f"{type(model).__name__}: it holds no graph; {method} works on the graph of a "
            "GraphNetwork (netweight.models.graph_block)"
        )
    if task.train is None:
        raise DoesNotFit(
            f"{task.calibration.name}: {method} needs nodes to train on beside those that validate; give both"
        )
    for data in (task.train, task.calibration):
        nodes = data.x
        if data.y is None or nodes.ndim != 1 or nodes.is_floating_point():
            raise DoesNotFit(
                f"{data.name}: examples are numbers of nodes with a class each; give x `b`, y `b`"
            )
        if not 0 <= int(nodes.min()) <= int(nodes.max()) < model.graph.nodes:
            raise DoesNotFit(f"{data.name}: {model.graph.name} has nodes 0 to {model.graph.nodes - 1} alone")
        if not 0 <= int(data.y.min()) <= int(data.y.max()) < model.graph.classes:
            raise DoesNotFit(
                f"{data.name}: {model.graph.name} has classes 0 to {model.graph.classes - 1} alone"
            )
    return model.graph


def digest(graph: Graph) -> str:
    """What tells this graph from another, for checkpoints."""
    seen = hashlib.sha256()
    for tensor in (graph.edges, graph.offsets, graph.columns, graph.values):
        seen.update(tensor.cpu().contiguous().numpy().tobytes())
    return seen.hexdigest()


def at_once(count: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    """All nodes in one step: one pass over the graph gives the scores of them all."""
    return lambda generator: [torch.arange(count)]


class Best(nn.Module):
    """The weights that scored highest so far, kept from step to step."""

    score: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = [*model.state_dict()]
        self.register_buffer("score", torch.tensor([-torch.inf, 0.0], dtype=torch.float64))
        for index, tensor in enumerate(model.state_dict().values()):
            self.register_buffer(f"kept_{index}", tensor.clone())

    @torch.no_grad()
    def look(self, model: nn.Module, data: Data) -> None:
        """Keep the weights if they are better: more nodes right, or as many with a lower loss."""
        was_training = model.training
        x = data.x.to(next(model.parameters()).device)
        logits = model.eval()(x).float()
        y = data.y.to(x.device)
        right = (logits.argmax(1) == y).double().mean()
        self.offer(model, right, -F.cross_entropy(logits, y))
        model.train(was_training)

    @torch.no_grad()
    def offer(self, model: nn.Module, first: Tensor, second: Tensor) -> None:
        """Keep the weights if the first number is higher, or as high and the second one higher."""
        score = torch.stack([first.double().cpu(), second.double().cpu()])
        if score.tolist() > self.score.tolist():
            self.score.copy_(score)
            for index, tensor in enumerate(model.state_dict().values()):
                getattr(self, f"kept_{index}").copy_(tensor)

    def put_back(self, model: nn.Module) -> None:
        """Give the model the weights that were kept."""
        model.load_state_dict({name: getattr(self, f"kept_{i}") for i, name in enumerate(self.names)})


def fit(
    model: nn.Module, task: Task, how: Training, *, keep: Checkpoint | None = None
) -> tuple[tuple[float, ...], float]:
    """Train the model in place on `task.train`; the loss of each epoch, and the validation accuracy.

    It ends with the weights of the epoch that was best on `task.calibration`.
    """
    best = Best(model)

    def after(run: Running, at: Moment) -> None:
        best.look(run.model, task.calibration)

    hooks = Hooks(order=at_once(len(task.train)), after=after, state=best)
    losses = train(model, task.train, loss, how, hooks=hooks, keep=keep)
    best.put_back(model)
    return losses, float(best.score[0])
