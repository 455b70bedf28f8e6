"""auto_LiRPA (https://github.com/Verified-Intelligence/auto_LiRPA, BSD-3-Clause) as the other side of
`netweight bench verify`.

    PYTHON -m netweight.bench.verify_peer       # started by the bench, with this repository on its path

PYTHON is an environment with auto_LiRPA 0.7.1 (which needs torch below 2.9), numpy, safetensors and
jaxtyping; the last two only to import the ResNet of this library. Options are those of its examples: 20
iterations of alpha-CROWN, everything else by default. "alpha-crown" computes the bounds inside once and
optimises the last pass alone; "alpha-crown-all" is the default of `compute_bounds`, which optimises every
pass.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from netweight.bench.verify_worker import Bound, Case, serve

NAMES = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown-all": "CROWN-Optimized"}
ITERATIONS = 20


def peer(case: Case) -> Bound:
    """A bound module for the case."""
    auto_lirpa = import_module("auto_LiRPA")
    options = {"optimize_bound_args": {"iteration": ITERATIONS}}
    module = auto_lirpa.BoundedModule(case.network, torch.zeros_like(case.x), bound_opts=options)
    x = auto_lirpa.BoundedTensor(case.x, auto_lirpa.PerturbationLpNorm(norm=float("inf"), eps=case.eps))

    def bound(method: str) -> Tensor:
        inside = None
        module.set_bound_opts({"optimize_bound_args": {"init_alpha": method != "alpha-crown"}})
        if method == "alpha-crown":
            *_, inside = module.init_alpha((x,), c=case.objective, bound_upper=False)
        with torch.set_grad_enabled(method.startswith("alpha")):
            found = module.compute_bounds(
                x=(x,),
                C=case.objective,
                method=NAMES.get(method, "CROWN-Optimized"),
                bound_upper=False,
                interm_bounds=inside,
            )
        return found[0]

    return bound


if __name__ == "__main__":
    serve(peer, f"auto_LiRPA {import_module('auto_LiRPA').__version__}")
