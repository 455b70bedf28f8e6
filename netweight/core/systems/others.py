"""Methods of inspection, deployment and search."""

from netweight.core.systems.system import System

SYSTEMS = (
    System(
        "e2gc", "E2GC: one group size for all group convolutions", "VLSID", 2020, "inspection",
        "netweight.inspection.e2gc:e2gc", "netweight.reproduce.e2gc", tags=("energy", "convolution"),
    ),
    System(
        "cosma", "COSMA: order, addresses and replacement in a small memory", "arXiv", 2023, "deployment",
        "netweight.deployment.scratchpad.cosma:cosma", "netweight.reproduce.cosma", tags=("memory", "exact"),
    ),
    System(
        "lpgnas", "Learned Low Precision Graph Neural Networks", "arXiv", 2020, "search",
        "netweight.search.lpgnas:lpgnas", "netweight.reproduce.lpgnas", "netweight.search.lpgnas:LPGNAS",
        ("weights", "activations", "grid", "mixed precision", "graph", "architecture"),
    ),
)  # fmt: skip
