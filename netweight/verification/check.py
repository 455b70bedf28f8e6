"""Checks a certificate with code of its own: a second, simple prover (`check_bounds`) and a few points.

    results = recheck(read("proof.json"), model, data)

The stored bounds are claims, nothing more. An input that is claimed to be verified is

    confirmed       if the checker's own proof of its margin, same set and arithmetic, is above 0
    contradicted    if a point of the set has another class, or a margin below the stored bound
    not confirmed   else, and whenever the network, the data, a label, the slopes or the file are not those
                    of the certificate

The proof is by backward linear bounds (Zhang et al. 2018, arXiv:1811.00866) in float64, with the checker's
own intermediate bounds; slopes from the file are tried beside the checker's own. Nothing of the engine is
used, only the captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from netweight.core import progress
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import Graph, capture, evaluate
from netweight.core.task import Data
from netweight.verification.certificate import Certificate, Entry, data_hash, model_hash, slopes_hash
from netweight.verification.check_bounds import Network, Region, margins, network

CONFIRMED, OPEN, CONTRADICTED, NO_CLAIM = "confirmed", "not confirmed", "contradicted", "no claim"
TOLERANCE = 1e-5  # of a stored bound, relative: by how much a point may lie below it


@dataclass(frozen=True)
class Result:
    """One input.

    stored, bound: verdict and bound of the certificate. margin: what the checker proves itself, nan where it
    did not try. reason: in words, where it is not confirmed in full.
    """

    index: int
    label: int
    stored: str
    bound: float
    status: str
    margin: float
    reason: str = ""


def recheck(certificate: Certificate, model: nn.Module | Compressed, data: Data) -> list[Result]:
    """What becomes of each input of the certificate; `data` is what its indices count.

    Raises `BadInput` for an index or a label that is none of the data or the network, `DoesNotFit` naming the
    operator for a network that cannot be re-checked.
    """
    indices = [entry.index for entry in certificate.inputs]
    if max(indices) >= len(data):
        raise BadInput(
            f"the certificate speaks of example {max(indices)}, the data have {len(data)}; give its data"
        )
    own = data.rows(torch.tensor(indices))
    graph = capture(model, own.x[:1])
    complaint = complaint_about(certificate, graph, own)
    net = network(graph)
    found = []
    for row, entry in progress.steps(list(enumerate(certificate.inputs)), "Checking", total=len(indices)):
        result = _checked(certificate, net, own, row, entry)
        if complaint and result.status in (CONFIRMED, NO_CLAIM):
            result = replace(result, status=OPEN, reason=complaint)
        found.append(result)
    return found


def share_confirmed(results: Sequence[Result]) -> float:
    """Of the inputs with a claim, or a complaint: how many are confirmed."""
    claimed = [result for result in results if result.status != NO_CLAIM]
    return sum(result.status == CONFIRMED for result in claimed) / len(claimed) if claimed else 1.0


def complaint_about(certificate: Certificate, graph: Graph, data: Data) -> str:
    """Why nothing that is found here would speak of what was certified; empty if all is as it was."""
    if not certificate.whole:
        return "the certificate was changed after it was written"
    if model_hash(graph) != certificate.model.sha256:
        return f"the network is not the one that was certified ({certificate.model.name})"
    if data_hash(data) != certificate.data.sha256:
        return f"the examples are not the ones that were certified ({certificate.data.name})"
    return ""


def _checked(certificate: Certificate, net: Network, data: Data, row: int, entry: Entry) -> Result:
    """One input."""

    def result(status: str, margin: float = math.nan, reason: str = "") -> Result:
        return Result(entry.index, entry.label, entry.verdict, entry.bound, status, margin, reason)

    if entry.verdict != "verified":
        return result(NO_CLAIM, reason=f"the certificate says {entry.verdict}")
    x = data.x[row : row + 1].cpu()
    rows = objective(entry.label, math.prod(net.shapes[net.graph.outputs[0]]))
    region = Region.of(x, certificate.within)
    slopes = chosen(certificate, net, row, len(rows))
    margin, point = margins(net, region, rows, certificate.arithmetic, [slopes] if slopes else [])
    least = float(margin.min())
    for candidate in (x, certificate.within.project(point.to(x.dtype), x)):
        at = float(at_point(net.graph, candidate, certificate.arithmetic, rows).min())
        if at <= 0:
            return result(CONTRADICTED, least, f"a point of the set has another class (margin {at:.6g})")
        if at < entry.bound - TOLERANCE * (1 + abs(entry.bound)):
            return result(
                CONTRADICTED, least, f"a point of the set has margin {at:.6g}, below the stored bound"
            )
    if data.y is not None and int(data.y[row]) != entry.label:
        return result(OPEN, least, f"its label is {int(data.y[row])} in the data")
    if slopes_hash(certificate.slopes, row) != entry.slopes and certificate.slopes:
        return result(OPEN, least, "its slopes are not the ones that were certified")
    if not least > 0:
        return result(
            OPEN, least, f"the checker proves a margin of {least:.6g} only, stored is {entry.bound:.6g}"
        )
    lower = least < entry.bound - TOLERANCE * (1 + abs(entry.bound))
    return result(
        CONFIRMED, least, "only with the checker's own margin, not the stored bound" if lower else ""
    )


def objective(label: int, classes: int) -> Tensor:
    """The rows output_label - output_j for every other class j, `k out`; raises `BadInput` for no class."""
    if label >= classes or classes < 2:
        raise BadInput(f"the certificate has label {label}, the network {classes} outputs; give its network")
    eye = torch.eye(classes, dtype=torch.float64)
    return eye[label] - torch.cat([eye[:label], eye[label + 1 :]])


def chosen(certificate: Certificate, net: Network, row: int, count: int) -> Mapping[str, Tensor]:
    """The stored choices of the lines below, by node; raises `BadInput` where they are of another shape."""
    found = {}
    for name, tensor in certificate.slopes.items():
        node, _, side = name.rpartition("/")
        if side != "lower" or node not in net.steps:  # the engine may have rewritten the graph
            continue
        if tuple(tensor.shape[1:]) != (count, *net.shapes[node]):
            raise BadInput(
                f"the stored slopes {name!r} of {tuple(tensor.shape[1:])} do not fit the node of that name; "
                "give the network and the slopes of the certificate"
            )
        found[node] = tensor[row].double()
    return found


def at_point(graph: Graph, x: Tensor, arithmetic: str, rows: Tensor) -> Tensor:
    """The margins at a point, as the network computes in that arithmetic (real: float64)."""
    dtype = torch.float32 if arithmetic == "float32" else torch.float64
    constants = {
        name: tensor.cpu().to(dtype) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in graph.constants.items()
    }
    with torch.no_grad():
        outputs = evaluate(replace(graph, constants=constants), x.to(dtype))
    if not isinstance(outputs, Tensor):
        raise DoesNotFit("the network has several outputs; certificates are about one")
    return rows @ outputs.double().flatten()
