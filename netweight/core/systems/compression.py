"""Methods that make a trained network smaller without training it again."""

from netweight.core.systems.system import System

_Q = "netweight.compression.quantize"
_P = "netweight.compression.prune"
_S = "netweight.compression.share"
_SURVEY = "netweight.reproduce.quantization_survey"

SYSTEMS = (
    System(
        "rtn", "Rounding to the nearest grid point", "arXiv", 2021, "compression",
        f"{_Q}.rtn:rtn", _SURVEY, f"{_Q}.rtn:RTN", ("weights", "grid", "no data"),
    ),
    System(
        "clip", "Ranges by error or percentile", "arXiv", 2020, "compression",
        f"{_Q}.clip:clip", _SURVEY, f"{_Q}.clip:Clip", ("weights", "grid", "no data"),
    ),
    System(
        "gptq", "GPTQ: rounding errors passed on to weights not yet rounded", "ICLR", 2023, "compression",
        f"{_Q}.gptq:gptq", "netweight.reproduce.gptq", f"{_Q}.gptq:GPTQ", ("weights", "grid", "calibration"),
    ),
    System(
        "awq", "AWQ: channels that carry most are scaled before rounding", "MLSys", 2024, "compression",
        f"{_Q}.awq:awq", "netweight.reproduce.awq", f"{_Q}.awq:AWQ",
        ("weights", "grid", "calibration", "whole network"), rewrites=f"{_Q}.awq:scales",
    ),
    System(
        "affinequant", "AffineQuant: learnt matrices around each product before rounding", "ICLR", 2024,
        "compression", f"{_Q}.affinequant:affinequant", "netweight.reproduce.affinequant",
        f"{_Q}.affinequant:AffineQuant", ("weights", "grid", "calibration", "learnt", "whole network"),
    ),
    System(
        "adaround", "AdaRound: up or down is learnt, layer by layer", "ICML", 2020, "compression",
        f"{_Q}.adaround:adaround", _SURVEY, f"{_Q}.adaround:AdaRound",
        ("weights", "grid", "calibration", "learnt"),
    ),
    System(
        "brecq", "BRECQ: up or down is learnt for the weights of a block together", "ICLR", 2021,
        "compression", f"{_Q}.brecq:brecq", _SURVEY, f"{_Q}.brecq:BRECQ",
        ("weights", "activations", "grid", "calibration", "learnt", "whole network"),
    ),
    System(
        "powerquant", "PowerQuant: power grids with the exponent of least weight error", "ICLR", 2023,
        "compression", f"{_Q}.powerquant:powerquant", "netweight.reproduce.nupes",
        f"{_Q}.powerquant:PowerQuant", ("weights", "grid", "no data"),
    ),
    System(
        "nupes", "NUPES: codes on a power grid and its exponent, learnt layer by layer", "TPAMI", 2025,
        "compression", f"{_Q}.nupes:nupes", "netweight.reproduce.nupes", f"{_Q}.nupes:NUPES",
        ("weights", "activations", "grid", "calibration", "learnt"),
    ),
    System(
        "smoothquant", "SmoothQuant: outliers of activations moved into weights", "ICML", 2023, "compression",
        f"{_Q}.smoothquant:smoothquant", _SURVEY, f"{_Q}.smoothquant:SmoothQuant",
        ("weights", "activations", "grid", "calibration", "whole network"),
    ),
    System(
        "equalize", "Equal ranges across layers", "ICCV", 2019, "compression",
        f"{_Q}.equalize:equalize", _SURVEY, f"{_Q}.equalize:Equalize",
        ("weights", "grid", "whole network"), rewrites=f"{_Q}.equalize:equalized",
    ),
    System(
        "bias-correction", "The mean error taken off the bias", "ICCV", 2019, "compression",
        f"{_Q}.bias_correction:bias_correction", _SURVEY, f"{_Q}.bias_correction:BiasCorrection",
        ("weights", "grid", "calibration", "whole network"),
    ),
    System(
        "zeroq", "ZeroQ: calibration on inputs made of batch norms", "CVPR", 2020, "compression",
        f"{_Q}.zeroq:zeroq", _SURVEY, f"{_Q}.zeroq:ZeroQ",
        ("weights", "activations", "grid", "no data", "whole network"),
    ),
    System(
        "hawq-v3", "HAWQ-V3: Dyadic Neural Network Quantization", "ICML", 2021, "compression",
        f"{_Q}.hawq_v3:hawq_v3", "netweight.reproduce.hawq_v3", f"{_Q}.hawq_v3:HAWQV3",
        ("weights", "activations", "grid", "calibration", "whole network", "mixed precision"),
    ),
    System(
        "magnitude", "Smallest weights first", "NeurIPS", 2015, "compression",
        f"{_P}.magnitude:magnitude", "", f"{_P}.magnitude:Magnitude", ("weights", "pruning", "no data"),
    ),
    System(
        "nm-magnitude", "N of M weights kept, the largest", "arXiv", 2021, "compression",
        f"{_P}.nm_magnitude:nm_magnitude", "", f"{_P}.nm_magnitude:NMMagnitude",
        ("weights", "pruning", "no data"),
    ),
    System(
        "splitquant", "SplitQuant: a layer becomes three, each with a range of its own", "Edge AI", 2025,
        "compression", f"{_Q}.splitquant:splitquant", "netweight.reproduce.splitquant",
        f"{_Q}.splitquant:SplitQuant", ("weights", "grid", "no data"),
    ),
    System(
        "rd-pruning", "Each layer pruned by how far it moves the output", "ICCV", 2023, "compression",
        f"{_P}.rd_pruning:rd_pruning", "netweight.reproduce.rd_pruning", f"{_P}.rd_pruning:RDPruning",
        ("weights", "pruning", "calibration"),
    ),
    System(
        "kmeans", "Deep Compression: weights share a table of values", "ICLR", 2016, "compression",
        f"{_S}.kmeans:kmeans", "netweight.reproduce.jlcm", f"{_S}.kmeans:KMeans",
        ("weights", "codebook", "no data"),
    ),
    System(
        "jlcm", "JLCM: tables of values and places in them learnt together", "ICLR", 2024, "compression",
        f"{_S}.jlcm:jlcm", "netweight.reproduce.jlcm", f"{_S}.jlcm:JLCM",
        ("weights", "codebook", "calibration", "learnt", "whole network"),
    ),
    System(
        "planner", "One plan over all methods, beside the best single method", "netweight", 2026,
        "compression", reproduction="netweight.reproduce.planner", tags=("weights", "whole network"),
    ),
    System(
        "quantization-survey", "A Survey of Quantization Methods for Efficient Neural Network Inference",
        "arXiv", 2021, "compression", reproduction=_SURVEY, tags=("weights", "grid", "survey"),
    ),
)  # fmt: skip
