"""The catalogue: one line per method and per system, as plain text that imports nothing of what it names.

A *system* is a published idea of which a reproduction holds the paper's claim against what we measure; it has
`reproduction`. A *method* can be called: it has `method` and, where the planner may choose it, `settings`.
README's table, `netweight methods`, the planner and the tests are read off this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from netweight.core.errors import BadInput, unknown
from netweight.core.origin import named


@dataclass(frozen=True)
class System:
    """One line. Paths are "package.module:name"; "" where there is none.

    room: the folder the method lies in. method: its function. settings: its dataclass of settings.
    reproduction: the module whose `reproduce(seed=, quick=)` returns the Claim. tags: what one looks for;
    "learnt" is a method that trains, so that the planner prices it by plain rounding on the same grid.
    "whole network" is a method that changes more than the weights of one layer, so that no planner mixes it.
    rewrites: the function that gives its exact rewrites alone, after which others may be planned.
    """

    slug: str
    title: str
    venue: str
    year: int
    room: str
    method: str = ""
    reproduction: str = ""
    settings: str = ""
    tags: tuple[str, ...] = ()
    rewrites: str = ""

    @property
    def result(self) -> str:
        """Name of the file under results/ that its reproduction writes, "" where it has none."""
        module = self.reproduction.rpartition(".")[2]
        return f"{module.replace('_', '-')}.json" if module else ""


_Q = "netweight.compression.quantize"
_P = "netweight.compression.prune"
_S = "netweight.compression.share"
_SURVEY = "netweight.reproduce.quantization_survey"
_LIRPA = "netweight.reproduce.auto_lirpa"
_RRCM = "netweight.reproduce.rrcm"

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
        "pgd", "Projected gradient ascent on the loss", "ICLR", 2018, "attacks",
        "netweight.attacks.pgd:pgd", tags=("inputs", "gradients"),
    ),
    System(
        "fgsm", "One step along the signs of the gradient", "ICLR", 2015, "attacks",
        "netweight.attacks.fgsm:fgsm", tags=("inputs", "gradients"),
    ),
    System(
        "apgd", "Gradient ascent that chooses its own steps", "ICML", 2020, "attacks",
        "netweight.attacks.apgd:apgd", tags=("inputs", "gradients"),
    ),
    System(
        "deepfool", "The shortest way to another class", "CVPR", 2016, "attacks",
        "netweight.attacks.deepfool:deepfool", tags=("inputs", "gradients"),
    ),
    System(
        "square", "Random search over squares, from scores alone", "ECCV", 2020, "attacks",
        "netweight.attacks.square:square", tags=("inputs", "black box"),
    ),
    System(
        "hop-skip-jump", "Along the boundary, from classes alone", "IEEE S&P", 2020, "attacks",
        "netweight.attacks.hop_skip_jump:hop_skip_jump", tags=("inputs", "black box"),
    ),
    System(
        "ensemble", "Several attacks in turn, as AutoAttack", "ICML", 2020, "attacks",
        "netweight.attacks.ensemble:ensemble", tags=("inputs", "gradients", "black box"),
    ),
    System(
        "bit-flips", "The stored bits that hurt most", "ICCV", 2019, "attacks",
        "netweight.attacks.bit_flips:bit_flips", tags=("weights", "memory", "gradients"),
    ),
    System(
        "gd-uap", "Generalizable Data-free Objective for Crafting Universal Adversarial Perturbations",
        "TPAMI", 2018, "attacks", "netweight.attacks.gd_uap:gd_uap", "netweight.reproduce.gd_uap",
        tags=("inputs", "gradients", "universal", "no data"),
    ),
    System(
        "fooling", "Deep Neural Networks are Easily Fooled", "CVPR", 2015, "attacks",
        "netweight.attacks.fooling:fooling", "netweight.reproduce.fooling",
        tags=("inputs", "no data", "black box", "evolution"),
    ),
    System(
        "disagree", "Inputs on which two networks part", "netweight", 2026, "attacks",
        "netweight.attacks.disagree:disagree", tags=("inputs", "gradients", "two networks"),
    ),
    System(
        "ibp", "Interval bounds, layer by layer", "arXiv", 2018, "verification",
        "netweight.verification.bounds:bounds", tags=("inputs", "proof"),
    ),
    System(
        "quantization-survey", "A Survey of Quantization Methods for Efficient Neural Network Inference",
        "arXiv", 2021, "compression", reproduction=_SURVEY, tags=("weights", "grid", "survey"),
    ),
    System(
        "certified", "Training on a proven bound of the loss", "NeurIPS", 2020, "training",
        "netweight.training.certified:certified", _LIRPA, tags=("inputs", "weights", "proof"),
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
        "auto-lirpa", "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond",
        "NeurIPS", 2020, "training", reproduction=_LIRPA, tags=("inputs", "weights", "proof"),
    ),
    System(
        "smoothing", "Randomized smoothing: a radius from votes of noisy copies", "ICML", 2019,
        "verification", "netweight.verification.smoothing:smooth", _RRCM,
        tags=("inputs", "proof", "statistical"),
    ),
    System(
        "consistency", "Pre-training for one representation at every noise level",
        "ICLR", 2025, "training", "netweight.training.consistency:pretrain", _RRCM,
        tags=("inputs", "no labels"),
    ),
    System(
        "rrcm", "Robust Representation Consistency Model via Contrastive Denoising", "ICLR", 2025,
        "training", reproduction=_RRCM, tags=("inputs", "proof", "statistical"),
    ),
    System(
        "weight-compander", "Weight Compander: A Simple Weight Reparameterization for Regularization",
        "IJCNN", 2023, "training", "netweight.training.weight_compander:weight_compander",
        "netweight.reproduce.weight_compander", "netweight.training.weight_compander:WeightCompander",
        ("weights", "regularization"),
    ),
    System(
        "mixed-precision-energy", "Improve Machine Learning carbon footprint using Nvidia GPU and Mixed "
        "Precision training", "arXiv", 2024, "training",
        "netweight.training.mixed_precision_energy:mixed_precision_energy",
        "netweight.reproduce.mixed_precision_energy",
        "netweight.training.mixed_precision_energy:MixedPrecisionEnergy", ("energy", "precision"),
    ),
    System(
        "double-rounding", "Nearly Lossless Adaptive Bit Switching", "arXiv", 2025, "training",
        "netweight.training.double_rounding:double_rounding", "netweight.reproduce.double_rounding",
        "netweight.training.double_rounding:DoubleRounding",
        ("weights", "activations", "grid", "mixed precision", "switchable"),
    ),
    System(
        "guided-self-distillation", "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen "
        "Regularization Imposed by Self-Distillation", "NeurIPS", 2021, "training",
        "netweight.training.guided_self_distillation:guided_self_distillation",
        "netweight.reproduce.guided_self_distillation",
        "netweight.training.guided_self_distillation:GuidedSelfDistillation", ("labels", "distillation"),
    ),
    System(
        "powernorm", "PowerNorm: Rethinking Batch Normalization in Transformers", "ICML", 2020, "training",
        "netweight.training.powernorm:powernorm", "netweight.reproduce.powernorm",
        "netweight.training.powernorm:PowerNorms", ("norms", "transformer"),
    ),
    System(
        "e2gc", "E2GC: one group size for all group convolutions", "VLSID", 2020, "inspection",
        "netweight.inspection.e2gc:e2gc", "netweight.reproduce.e2gc", tags=("energy", "convolution"),
    ),
    System(
        "cosma", "COSMA: order, addresses and replacement in a small memory", "arXiv", 2023, "deployment",
        "netweight.deployment.scratchpad.cosma:cosma", "netweight.reproduce.cosma", tags=("memory", "exact"),
    ),
    System(
        "quantized-distillation", "Model compression via distillation and quantization", "ICLR", 2018,
        "training", "netweight.training.quantized_distillation:quantized_distillation",
        "netweight.reproduce.quantized_distillation",
        "netweight.training.quantized_distillation:QuantizedDistillation",
        ("weights", "buckets", "distillation"),
    ),
    System(
        "differentiable-quantization", "Points of quantization that are trained while weights stay", "ICLR",
        2018, "training", "netweight.training.differentiable_quantization:differentiable_quantization",
        "netweight.reproduce.quantized_distillation",
        "netweight.training.differentiable_quantization:DifferentiableQuantization",
        ("weights", "buckets", "distillation"),
    ),
    System(
        "mixture-growth", "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters", "WACV",
        2024, "training", "netweight.training.mixture_growth:mixture_growth",
        "netweight.reproduce.mixture_growth", "netweight.training.mixture_growth:MixtureGrowth",
        ("growth", "templates"),
    ),
    System(
        "ofq", "Oscillation-free Quantization for Low-bit Vision Transformers", "ICML", 2023, "training",
        "netweight.training.ofq:ofq", "netweight.reproduce.ofq", "netweight.training.ofq:OFQ",
        ("weights", "activations", "grid", "attention", "distillation"),
    ),
    System(
        "gaqat", "GAQAT: Gradient-adaptive Quantization-aware Training for Domain Generalization", "arXiv",
        2024, "training", "netweight.training.gaqat:gaqat", "netweight.reproduce.gaqat",
        "netweight.training.gaqat:GAQAT", ("weights", "activations", "grid", "domains", "sharpness"),
    ),
    System(
        "cbnet", "A Converting Autoencoder Toward Low-latency and Energy-efficient DNN Inference at the Edge",
        "arXiv", 2024, "training", "netweight.training.cbnet:cbnet", "netweight.reproduce.cbnet",
        "netweight.training.cbnet:CBNet", ("inputs", "autoencoder", "early exit", "energy"),
    ),
    System(
        "tbt", "Binary and Ternary Natural Language Generation", "ACL", 2023, "training",
        "netweight.training.tbt:tbt", "netweight.reproduce.tbt", "netweight.training.tbt:TBT",
        ("weights", "activations", "grid", "distillation", "transformer"),
    ),
    System(
        "bdwp", "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design",
        "IEEE TCAD", 2023, "training", "netweight.training.bdwp:bdwp", "netweight.reproduce.bdwp",
        "netweight.training.bdwp:BDWP", ("weights", "pruning", "N:M", "accelerator"),
    ),
    System(
        "lpgnas", "Learned Low Precision Graph Neural Networks", "arXiv", 2020, "search",
        "netweight.search.lpgnas:lpgnas", "netweight.reproduce.lpgnas", "netweight.search.lpgnas:LPGNAS",
        ("weights", "activations", "grid", "mixed precision", "graph", "architecture"),
    ),
)  # fmt: skip


def find(slug: str) -> System:
    """The line of that slug; raises `BadInput` with the nearest known one."""
    for system in SYSTEMS:
        if system.slug == slug:
            return system
    raise unknown("method", slug, [system.slug for system in SYSTEMS])


def of_room(room: str | None = None) -> list[System]:
    """All lines of a room (the start of its name will do), or all; raises `BadInput` for another name."""
    rooms = {system.room for system in SYSTEMS}
    begun = [name for name in rooms if room and name.startswith(room)]  # compress, train: as the commands
    if room is not None and len(begun) != 1:
        raise unknown("room", room, rooms)
    room = begun[0] if begun else None
    return [system for system in SYSTEMS if room in (None, system.room)]


def reproductions() -> list[System]:
    """One line per reproduction: the systems that `netweight reproduce` runs."""
    return [system for system in SYSTEMS if system.result == f"{system.slug}.json"]


def reproduction(slug: str) -> System:
    """The system whose reproduction that is; raises `BadInput` for a slug that has none of its own."""
    find(slug)
    for system in reproductions():
        if system.slug == slug:
            return system
    where = find(slug).result.removesuffix(".json")
    hint = f"it is measured in {where!r}" if where else f"reproductions are: {', '.join(_slugs())}"
    raise BadInput(f"{slug!r} has no reproduction of its own; {hint}")


def _slugs() -> list[str]:
    return [system.slug for system in reproductions()]


def method(slug: str) -> Callable[..., Any]:
    """The function of a method, imported now; raises `BadInput` for a line that has none."""
    return _resolve(slug, find(slug).method, "method")


def settings(slug: str) -> type[Any]:
    """The settings class of a method of compression/, imported now; raises `BadInput` where there is none."""
    return _resolve(slug, find(slug).settings, "settings")  # type: ignore[return-value]


def rewrites(slug: str) -> Callable[..., Any]:
    """The function of a method's exact rewrites alone: (model, task, layers, settings) -> rewrites."""
    return _resolve(slug, find(slug).rewrites, "rewrites")


def _resolve(slug: str, path: str, what: str) -> Callable[..., Any]:
    if not path:
        raise BadInput(f"{slug!r} has no {what} to call; `netweight methods` lists what each line is")
    return named(path)
