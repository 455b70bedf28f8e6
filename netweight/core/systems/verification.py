"""Proofs: bounds of what can happen at worst."""

from netweight.core.systems.system import System

_LIRPA = "netweight.reproduce.auto_lirpa"
_RRCM = "netweight.reproduce.rrcm"

SYSTEMS = (
    System(
        "ibp", "Interval bounds, layer by layer", "arXiv", 2018, "verification",
        "netweight.verification.bounds:bounds", tags=("inputs", "proof"),
    ),
    System(
        "crown", "Linear bounds of every value, carried back to the inputs", "NeurIPS", 2018,
        "verification", "netweight.verification.crown:bound", _LIRPA, tags=("inputs", "weights", "proof"),
    ),
    System(
        "decide", "Properties decided by branch and bound on inputs or neurons", "NeurIPS", 2021,
        "verification", "netweight.verification.decide:decide", tags=("inputs", "proof", "counterexample"),
    ),
    System(
        "difference", "Bounds on how far two networks part, by propagating the difference", "netweight", 2026,
        "verification", "netweight.verification.difference:joined", tags=("inputs", "weights", "proof"),
    ),
    System(
        "smoothing", "Randomized smoothing: a radius from votes of noisy copies", "ICML", 2019,
        "verification", "netweight.verification.smoothing:smooth", _RRCM,
        tags=("inputs", "proof", "statistical"),
    ),
)  # fmt: skip
