"""VNN-COMP properties decided on this machine, beside what was published for them.

Families, networks, properties and the published results come from the data folder (`vnncomp/`). A published
verdict is "sat" where a counterexample was checked, else the agreement of the tools; "disputed" ones, which a
tool contradicted, are counted apart. Published times were taken on other machines.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from netweight.core import progress
from netweight.core.errors import BadInput, NetweightError, unknown
from netweight.data.shared import shared_file
from netweight.verification.decide import decided

DECIDED = ("sat", "unsat")


def bench(*, family: str | None = None, limit: int = 3, timeout: float = 60.0) -> dict[str, Any]:
    """Per family: how many of the properties looked at are decided here, and how many were by the best tool.

    limit: properties of each family, spread evenly over its list. timeout: seconds for each, loading
    included. Raises `BadInput` for an unknown family, or where the data is not there.
    """
    table = shared_file("vnncomp/results_summary.csv")
    with table.open() as file:
        published = list(csv.DictReader(file))
    families = sorted({row["family"] for row in published})
    if family is not None and family not in families:
        raise unknown("family", family, families)
    if limit < 1:
        raise BadInput(f"a limit of {limit} leaves nothing to look at; give at least 1")
    chosen = [row for name in families if family in (None, name) for row in _spread(published, name, limit)]
    instances = [
        one(table.parent / row["family"], row, timeout) for row in progress.steps(chosen, "Properties")
    ]
    return {
        "timeout_s": timeout,
        "decided": sum(found["result"] in DECIDED for found in instances),
        "instances": len(instances),
        "contradictions": [found for found in instances if found["contradicts"]],
        "rows": [
            _family(name, instances) for name in families if any(i["family"] == name for i in instances)
        ],
        "details": instances,
    }


def one(folder: Path, row: dict[str, str], timeout: float) -> dict[str, Any]:
    """One property: the result here, or the sentence of what is missing, beside the published verdict."""
    said, disputed = row["verdict"], row["disputed"] == "1"
    try:
        verdict = decided(str(folder / f"{row['onnx']}.gz"), folder / f"{row['vnnlib']}.gz", timeout=timeout)
        found = {"result": verdict.word, "seconds": round(verdict.seconds, 2), "bound": verdict.bound}
        found |= {"domains": verdict.domains}
    except NetweightError as error:
        found = {"result": "error", "sentence": str(error)}
    opposite = said in DECIDED and found["result"] in DECIDED and found["result"] != said
    return {
        "family": row["family"],
        "onnx": row["onnx"],
        "vnnlib": row["vnnlib"],
        **found,
        "published": said,
        "published_s": float(row["fastest_s"]) if row["fastest_s"] else None,
        "disputed": disputed,
        "contradicts": opposite and not disputed,
    }


def _spread(published: list[dict[str, str]], family: str, limit: int) -> list[dict[str, str]]:
    """At most `limit` rows of a family, evenly from the first to the last."""
    rows = [row for row in published if row["family"] == family]
    count = min(limit, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _family(name: str, instances: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of one family."""
    own = [found for found in instances if found["family"] == name]
    results = Counter(found["result"] for found in own)
    return {
        "family": name,
        "instances": len(own),
        "decided": sum(results[word] for word in DECIDED),
        "published_decided": sum(found["published"] in DECIDED for found in own),
        **{word: results[word] for word in (*DECIDED, "unknown", "timeout", "error") if results[word]},
        "contradictions": sum(found["contradicts"] for found in own),
        "against_disputed": sum(
            found["disputed"] and {found["result"], found["published"]} == set(DECIDED) for found in own
        ),
    }
