"""netweight verify --out FILE and --check FILE: certificates written, and checked by code of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netweight.core.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from netweight.core.perturbation import Perturbation
    from netweight.core.task import Data
    from netweight.verification.bounds import Certificates


def write(
    path: str | Path,
    found: Certificates,
    within: Perturbation,
    model: tuple[str, nn.Module],
    data: tuple[str, Data],
) -> None:
    """Write what `certify(..., slopes=True)` found on the first examples of the data.

    model, data: the names that they have on the command line, and what was opened under them.
    """
    from netweight.core.graph import capture
    from netweight.verification.certificate import Reference, data_hash, model_hash, save, written

    name, network = model
    source, examples = data
    network_of = Reference(name, model_hash(capture(network, examples.x[:1])))
    save(path, found, written(found, network_of, Reference(source, data_hash(examples)), within))


def checked(
    path: str | Path, model: str | None = None, data: str | None = None
) -> tuple[dict[str, Any], bool]:
    """(the answer of `--check`, whether every input of the certificate that claims something is confirmed).

    model, data: their names; by default those in the certificate. A certificate cannot name code to run:
    where it names a factory, raises `BadInput`.
    """
    from netweight.cli import common
    from netweight.verification.certificate import read
    from netweight.verification.check import CONFIRMED, CONTRADICTED, NO_CLAIM, OPEN, recheck, share_confirmed

    certificate = read(path)
    if model is None and ":" in certificate.model.name:
        raise BadInput(
            f"{path}: the network was built by {certificate.model.name[:200]!r}, and code that a file names "
            "is not run; give MODEL yourself"
        )
    network, _ = common.open_model(model or certificate.model.name)
    examples = common.open_task(data or certificate.data.name, network).test
    results = recheck(certificate, network, examples)
    counts = Counter(result.status for result in results)
    content = {
        "certificate": str(path),
        "within": str(certificate.within),
        "method": certificate.method,
        "arithmetic": certificate.arithmetic,
        **{status.replace(" ", "_"): counts[status] for status in (CONFIRMED, OPEN, CONTRADICTED, NO_CLAIM)},
        "share_confirmed": share_confirmed(results),
        "first_reason": next((r.reason for r in results if r.status in (OPEN, CONTRADICTED)), None),
        "results": [asdict(result) for result in results],
    }
    return content, counts[OPEN] == counts[CONTRADICTED] == 0
