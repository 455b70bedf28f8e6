from netweight.attacks.pgd import pgd as attack
from netweight.core.compressed import Change, Compressed
from netweight.core.errors import NetweightError
from netweight.core.perturbation import L1, L2, Box, Linf
from netweight.core.plan import Budget, Option, Plan
from netweight.core.result import Evidence, Row
from netweight.core.task import Data, Metric, Task
from netweight.pipeline import compare, compress, load, plan
from netweight.verification.bounds import certify as verify

__version__: str
__all__ = [
    "L1",
    "L2",
    "Box",
    "Budget",
    "Change",
    "Compressed",
    "Data",
    "Evidence",
    "Linf",
    "Metric",
    "NetweightError",
    "Option",
    "Plan",
    "Row",
    "Task",
    "attack",
    "compare",
    "compress",
    "load",
    "plan",
    "verify",
]
