"""Attacks: what finds the worst."""

from netweight.core.systems.system import System

_DYNN = "netweight.reproduce.dynn"

SYSTEMS = (
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
        "fab", "Along the boundary of a class, back towards the input", "ICML", 2020, "attacks",
        "netweight.attacks.fab:fab", tags=("inputs", "gradients"),
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
        "dynn", "Dynamic Neural Network is All You Need: Understanding the Robustness of Dynamic Mechanisms",
        "ICCV workshop", 2023, "attacks", reproduction=_DYNN, tags=("inputs", "early exits", "transfer"),
    ),
    System(
        "early", "Every early exit is wrong, and the end right", "ICCV workshop", 2023, "attacks",
        "netweight.attacks.early:early", _DYNN, tags=("inputs", "gradients", "early exits"),
    ),
    System(
        "routed", "Gradient ascent along the way that an input takes", "ICCV workshop", 2023, "attacks",
        "netweight.attacks.routed:routed", _DYNN, tags=("inputs", "gradients", "early exits"),
    ),
    System(
        "deepsloth", "A Panda? No, It's a Sloth: Slowdown Attacks on Adaptive Multi-Exit Neural Network "
        "Inference", "ICLR", 2021, "attacks", "netweight.attacks.deepsloth:deepsloth", _DYNN,
        tags=("inputs", "gradients", "early exits", "cost"),
    ),
    System(
        "random-edges", "New edges between nodes drawn at random", "KDD", 2022, "attacks",
        "netweight.attacks.random_edges:random_edges", "netweight.reproduce.stable",
        tags=("graph", "poisoning"),
    ),
    System(
        "dice", "Delete internally, connect externally", "Nature Human Behaviour", 2018, "attacks",
        "netweight.attacks.dice:dice", "netweight.reproduce.stable", tags=("graph", "poisoning"),
    ),
    System(
        "metattack", "Adversarial Attacks on Graph Neural Networks via Meta Learning", "ICLR", 2019,
        "attacks", "netweight.attacks.metattack:metattack", "netweight.reproduce.stable",
        tags=("graph", "poisoning", "gradients"),
    ),
    System(
        "bifurcation", "A Novel Bifurcation Method for Observation Perturbation Attacks on RL Agents",
        "arXiv", 2024, "attacks", "netweight.attacks.bifurcation:bifurcation",
        "netweight.reproduce.bifurcation", tags=("inputs", "gradients", "controllers", "time series"),
    ),
    System(
        "disagree", "Inputs on which two networks part", "netweight", 2026, "attacks",
        "netweight.attacks.disagree:disagree", tags=("inputs", "gradients", "two networks"),
    ),
)  # fmt: skip
