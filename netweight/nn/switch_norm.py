"""A batch norm with several sets of gains, shifts and statistics, of which one is in use.

Networks that run at several precisions, widths or mixtures see inputs of another distribution in each: one
set of statistics for all of them fits none (Yu et al., "Slimmable Neural Networks", ICLR 2019,
arXiv:1812.08928). Bulat and Tzimiropoulos, "Bit-Mixer", ICCV 2021, arXiv:2103.17267, keep a set for each pair
of widths of the layer before and the layer itself (`SwitchNorms.pairs`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from netweight.core.compressed import replace as put
from netweight.core.errors import DoesNotFit, unknown
from netweight.core.widths import norm_keys

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SwitchNorm(nn.Module):
    """One batch norm for each key; `now` is the one that computes."""

    def __init__(self, norm: nn.Module, keys: Sequence[str], now: str | None = None) -> None:
        """norm: every set begins as a copy of it. now: the first key, if none is given."""
        super().__init__()
        if not isinstance(norm, BATCH_NORMS):
            raise DoesNotFit(f"a {type(norm).__name__} has no batch statistics to keep several sets of")
        self.norms = nn.ModuleDict({key: copy.deepcopy(norm) for key in keys})
        self.use(keys[0] if now is None else now)

    def use(self, key: str) -> None:
        """Compute with that set from now on; raises `BadInput` for a key there is none of."""
        if key not in self.norms:
            raise unknown("set of a batch norm", key, self.norms)
        self.now = key

    def forward(self, x: Tensor) -> Tensor:
        """The norm in use."""
        return self.norms[self.now](x)


@dataclass(frozen=True)
class SwitchNorms:
    """A rewrite: these batch norms become `SwitchNorm`s, all sets equal at first, so the function stays.

    norms: their names. follows, before: for each the layer in front of it, and the layer in front of that
    one, "" for none (see `core.widths.norm_keys`). keys: of the sets, the same for every norm. pairs: a key
    names the widths of both layers. now: the key in use at each norm.
    """

    norms: tuple[str, ...]
    follows: tuple[str, ...]
    before: tuple[str, ...]
    keys: tuple[str, ...]
    now: tuple[str, ...]
    pairs: bool = False

    def __post_init__(self) -> None:
        if not len(self.norms) == len(self.follows) == len(self.before) == len(self.now):
            raise ValueError(f"{len(self.norms)} norms, but not as many layers before them and keys in use")
        if not set(self.now) <= set(self.keys):
            raise ValueError(f"a norm uses a set that it does not have: {sorted(set(self.now))}")

    @classmethod
    def of(
        cls, norms: Mapping[str, tuple[str, str]], widths: Sequence[int], now: int, *, pairs: bool = False
    ) -> SwitchNorms:
        """For norms and the (layer, layer before it) of each: a set for every width or pair of widths."""
        keys = [f"{a}_{b}" for a in widths for b in widths] if pairs else [str(b) for b in widths]
        key = f"{now}_{now}" if pairs else str(now)
        follows, before = zip(*norms.values()) if norms else ((), ())
        return cls(tuple(norms), follows, before, tuple(keys), (key,) * len(norms), pairs)

    def at(self, widths: Mapping[str, int]) -> SwitchNorms:
        """The same with the sets of those widths in use."""
        return replace(self, now=tuple(norm_keys(self.follows, self.before, self.pairs, widths)))

    def apply(self, model: nn.Module) -> None:
        """Replace in place; a norm that is a `SwitchNorm` already is only set to its key."""
        for name, key in zip(self.norms, self.now):
            norm = model.get_submodule(name)
            if isinstance(norm, SwitchNorm):
                norm.use(key)
            else:
                put(model, name, SwitchNorm(norm, self.keys, key))
