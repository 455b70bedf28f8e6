"""Makes trained neural networks smaller and shows what that did to them: measured, attacked, proven.

Names load on first use, so that `import netweight` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Budget": "core.plan",
    "Option": "core.plan",
    "Plan": "core.plan",
    "Change": "core.compressed",
    "Compressed": "core.compressed",
    "Evidence": "core.result",
    "Row": "core.result",
    "NetweightError": "core.errors",
    "Data": "core.task",
    "Metric": "core.task",
    "Task": "core.task",
    "Box": "core.perturbation",
    "L1": "core.perturbation",
    "L2": "core.perturbation",
    "Linf": "core.perturbation",
    "compress": "pipeline",
    "compare": "pipeline",
    "plan": "pipeline",
    "load": "pipeline",
    "verify": "verification.bounds:certify",
    "attack": "attacks.pgd:pgd",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'netweight' has no attribute {name!r}")
    module, _, inner = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(f"netweight.{module}"), inner or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
