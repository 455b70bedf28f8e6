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
    System(
        "ipp-survey", "Intellectual Property Protection for Deep Learning Model and Dataset Intelligence",
        "arXiv", 2024, "inspection", reproduction="netweight.reproduce.ipp_survey",
        tags=("ownership", "weights", "data"),
    ),
    System(
        "boundary-fingerprint", "IPGuard: Fingerprinting the Classification Boundary", "AsiaCCS", 2021,
        "inspection", "netweight.inspection.ownership.boundary_fingerprint:boundary_fingerprint",
        "netweight.reproduce.ipp_survey", tags=("ownership", "inputs", "gradients"),
    ),
    System(
        "dataset-inference", "Dataset Inference: Ownership Resolution in Machine Learning", "ICLR", 2021,
        "inspection", "netweight.inspection.ownership.dataset_inference:dataset_inference",
        "netweight.reproduce.ipp_survey", tags=("ownership", "data", "black box"),
    ),
    System(
        "radioactive-data", "Radioactive data: tracing through training", "ICML", 2020, "inspection",
        "netweight.inspection.ownership.radioactive_data:radioactive_data", "netweight.reproduce.ipp_survey",
        tags=("ownership", "data", "inputs"),
    ),
)  # fmt: skip
