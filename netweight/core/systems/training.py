"""Methods that train."""

from netweight.core.systems.system import System

_LIRPA = "netweight.reproduce.auto_lirpa"
_RRCM = "netweight.reproduce.rrcm"

SYSTEMS = (
    System(
        "certified", "Training on a proven bound of the loss", "NeurIPS", 2020, "training",
        "netweight.training.certified:certified", _LIRPA, tags=("inputs", "weights", "proof"),
    ),
    System(
        "adversarial", "Training on the worst that an attack finds around each example", "ICLR", 2018,
        "training", "netweight.training.adversarial:adversarial",
        settings="netweight.training.adversarial:Adversarial", tags=("inputs", "gradients", "robustness"),
    ),
    System(
        "srat", "Imbalanced Adversarial Training with Reweighting", "ICDM", 2022, "training",
        "netweight.training.srat:srat", "netweight.reproduce.srat", "netweight.training.srat:SRAT",
        ("inputs", "gradients", "robustness", "imbalance"),
    ),
    System(
        "doubly-robust-training", "Doubly Robust Instance-Reweighted Adversarial Training", "ICLR", 2024,
        "training", "netweight.training.doubly_robust_training:doubly_robust_training",
        "netweight.reproduce.doubly_robust_training",
        "netweight.training.doubly_robust_training:DoublyRobust",
        ("inputs", "gradients", "robustness", "reweighting"),
    ),
    System(
        "accelat", "AccelAT: A Framework for Accelerating the Adversarial Training of Deep Neural Networks "
        "Through Accuracy Gradient", "IEEE Access", 2022, "training", "netweight.training.accelat:accelat",
        "netweight.reproduce.accelat", "netweight.training.accelat:AccelAT",
        ("inputs", "gradients", "robustness", "schedule"),
    ),
    System(
        "auto-lirpa", "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond",
        "NeurIPS", 2020, "training", reproduction=_LIRPA, tags=("inputs", "weights", "proof"),
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
        "shallow-deep", "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking", "ICML",
        2019, "training", "netweight.training.shallow_deep:shallow_deep", "netweight.reproduce.dynn",
        "netweight.training.shallow_deep:ShallowDeep", ("early exits",),
    ),
    System(
        "stable",
        "Reliable Representations Make A Stronger Defender: Unsupervised Structure Refinement for Robust GNN",
        "KDD", 2022, "training", "netweight.training.stable:stable", "netweight.reproduce.stable",
        "netweight.training.stable:Stable", ("graph", "poisoning", "contrast"),
    ),
    System(
        "skipnet", "SkipNet: Learning Dynamic Routing in Convolutional Networks", "ECCV", 2018, "training",
        "netweight.training.skipnet:skipnet", settings="netweight.training.skipnet:SkipNet",
        tags=("skipping",),
    ),
    System(
        "weight-mark", "Embedding Watermarks into Deep Neural Networks", "ICMR", 2017, "training",
        "netweight.training.weight_mark:weight_mark", "netweight.reproduce.ipp_survey",
        "netweight.training.weight_mark:WeightMark", ("ownership", "weights"),
    ),
    System(
        "trigger-mark", "Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by "
        "Backdooring", "USENIX Security", 2018, "training", "netweight.training.trigger_mark:trigger_mark",
        "netweight.reproduce.ipp_survey", "netweight.training.trigger_mark:TriggerMark",
        ("ownership", "black box"),
    ),
    System(
        "passport", "Rethinking Deep Neural Network Ownership Verification: Embedding Passports to Defeat "
        "Ambiguity Attacks", "NeurIPS", 2019, "training", "netweight.training.passport:passport",
        "netweight.reproduce.ipp_survey", "netweight.training.passport:Passports", ("ownership", "norms"),
    ),
    System(
        "advstyle", "Adversarial Style Augmentation for Domain Generalization", "arXiv", 2023, "training",
        "netweight.training.advstyle:advstyle", "netweight.reproduce.advstyle",
        "netweight.training.advstyle:AdvStyle", ("domains", "styles", "adversarial"),
    ),
)  # fmt: skip
