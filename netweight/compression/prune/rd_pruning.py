"""Rate-distortion pruning: each layer gives up as much as moves the network's outputs least in sum.

Paper: Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks",
ICCV 2023, arXiv:2308.10438.

With f the outputs on calibration inputs x, f_{l,k} those with ONLY layer l pruned by the share phi_k = k / K,
smallest |w| first, and C outputs,

    delta_l(k) = E_x 1/C sum_c (f(x) - f_{l,k}(x))_c^2            (worst=True: the maximum over x),

which add up: |f(W) - f(W + sum_l dW_l)|^2 ~ sum_l |f(W) - f(W + dW_l)|^2, as cross terms of small independent
changes of mean 0 vanish. So the shares k_l are those that

    minimise sum_l delta_l(k_l)   subject to   sum_l floor((1 - phi_{k_l}) N_l) c_l <= (1 - s) sum_l N_l c_l,

N_l the weights of a layer, c_l = 1, or counted="macs" the multiply-accumulates of one weight. The sum breaks
down where changes are large: prune a fifth of what is left at a time and retrain in between (what is zero
stays zero and costs nothing). A grid too coarse for the share that is left empties whole layers: of 90 %
zeros, K = 10 knows nothing between a tenth of a layer and none of it.

Differs from the paper: the knapsack is solved exactly by `core.knapsack`, which does not grow with the number
of weights (the paper's dynamic programme over all surviving counts finds the same optimum, see the
reproduction). The default is the mean over inputs, the published setting the worst input. Retraining is left
to `training/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from netweight.core import knapsack
from netweight.core.compressed import Change
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import capture, layer_macs
from netweight.core.progress import doing
from netweight.core.pruning import largest, surviving
from netweight.core.reruns import graph_of, reruns
from netweight.core.task import Data, Task, outputs
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Sparse

COUNTED = ("weights", "macs")
WHOLE = "it keeps (nearly) all of its weights, which take fewer bits without a mask"


@dataclass(frozen=True)
class RDPruning:
    """Settings of `rd_pruning`.

    sparsity: the share of zeros over all layers together, at least 0 and below 1 (counted="macs": of
    multiply-accumulates). points: K, steps of each layer's share. examples: calibration examples that curves
    are measured on. worst: the worst example instead of the mean.
    """

    sparsity: float = 0.5
    points: int = 40
    examples: int = 256
    worst: bool = False
    counted: str = "weights"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"need 0 <= sparsity < 1, got sparsity={self.sparsity}")
        if self.points < 1 or self.examples < 1:
            raise ValueError(f"need points >= 1, examples >= 1, got {self.points}, {self.examples}")
        if self.counted not in COUNTED:
            raise unknown("count", self.counted, COUNTED)


def rd_pruning(model: nn.Module, task: Task, layers: Sequence[str], settings: RDPruning) -> Change:
    """Prune Linear, Conv, transposed Conv and Embedding weights, each layer by a share of its own.

    One layer alone is pruned to `sparsity`, and no data is looked at. Raises `DoesNotFit` for another kind of
    layer, `BadInput` where the network's outputs are not finite.
    """
    weights, left = weights_to_pack(model, layers)
    if len(weights) == 1:
        counts = {layer: surviving(w.numel(), settings.sparsity) for layer, w in weights.items()}
    elif weights:
        data = task.calibration.take(settings.examples)
        found = curves(model, data, weights, settings.points, worst=settings.worst)
        each = macs_per_weight(model, data, weights) if settings.counted == "macs" else {}
        counts = allocation(weights, found, settings.sparsity, each)
    else:
        counts = {}
    left |= {layer: WHOLE for layer, w in weights.items() if not pays(w, counts[layer])}
    packed = {la: Sparse.of(w, largest(w, counts[la])) for la, w in weights.items() if la not in left}
    return Change(packed, left=left)


def kept(weight: Tensor, points: int) -> list[int]:
    """How many weights each step of the grid keeps: floor((1 - k / K) N), never more than are not zero.

    All of the layer where the share is too small to pay for the mask.
    """
    count, alive = weight.numel(), int(weight.count_nonzero())
    steps = [min(count * (points - k) // points, alive) for k in range(points + 1)]
    return [step if pays(weight, step) else weight.numel() for step in steps]


def pays(weight: Tensor, count: int) -> bool:
    """Whether so many weights and a mask take fewer bits than all weights."""
    return 8 * weight.element_size() * (weight.numel() - count) > 8 * -(-weight.numel() // 8)


def curves(
    model: nn.Module, data: Data, weights: Mapping[str, Tensor], points: int, *, worst: bool = False
) -> dict[str, list[float]]:
    """delta_l(k) for k = 0 to K, in squared units of the outputs; steps that take no weight are 0."""
    steps = {layer: kept(weight, points) for layer, weight in weights.items()}
    tried = {layer: sorted({c for c in counts if c < counts[0]}) for layer, counts in steps.items()}
    device, graphs = next(iter(weights.values())).device, {}
    batches = -(-len(data) // data.batch)
    squares: dict[tuple[str, int], list[Tensor]] = {(la, c): [] for la in tried for c in tried[la]}
    with doing("Measuring distortion curves", batches * len(squares)) as advance:
        for number, (x, _) in enumerate(data):
            whole = outputs(model, data.rows(slice(number * data.batch, number * data.batch + len(x))))
            if not whole.isfinite().all():
                raise BadInput(
                    f"{data.name}: the network's outputs are not finite on it; mend the network first"
                )

            def pruned(layer: str):
                return (weights[layer] * largest(weights[layer], c) for c in tried[layer])

            if len(x) not in graphs:
                graphs[len(x)] = graph_of(model, x.to(device))
            for layer, index, y in reruns(model, graphs[len(x)], x.to(device), list(tried), pruned):
                moved = (y.cpu().double() - whole.double()).square().reshape(len(x), -1).mean(1)
                squares[layer, tried[layer][index]].append(moved)
                advance()
    found: dict[str, list[float]] = {}
    for layer, counts in steps.items():
        together = {c: torch.cat(squares[layer, c]) for c in tried[layer]}
        value = {c: float(moved.max() if worst else moved.mean()) for c, moved in together.items()}
        found[layer] = [value.get(c, 0.0) for c in counts]
    return found


def allocation(
    weights: Mapping[str, Tensor],
    found: Mapping[str, Sequence[float]],
    sparsity: float,
    each: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """The weights that each layer keeps. each: what one weight of a layer costs, 1 if not given.

    Fewer than the budget allows are kept where the grid has no step between, or where a curve falls.
    """
    each = each or dict.fromkeys(weights, 1.0)
    grids = {layer: kept(weight, len(found[layer]) - 1) for layer, weight in weights.items()}
    total = sum(weight.numel() * each[layer] for layer, weight in weights.items())
    picks = knapsack.solve(
        [np.array(found[layer]) for layer in weights],
        [np.array(grids[layer], dtype=float)[:, None] * each[layer] for layer in weights],
        [surviving(total, sparsity)],
    )
    assert picks is not None, "all layers empty always fits"
    return {layer: grids[layer][pick] for layer, pick in zip(weights, picks)}


def macs_per_weight(model: nn.Module, data: Data, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Multiply-accumulates of one example for one weight; raises `DoesNotFit` for a layer without any."""
    x = data.x[:1].to(next(iter(weights.values())).device)
    counts = layer_macs(capture(model, x))
    for layer in weights:
        if layer not in counts:
            raise DoesNotFit(f'{layer}: it multiplies nothing; give counted="weights" or leave it out')
    return {layer: counts[layer] / weight.numel() for layer, weight in weights.items()}
