"""Words that may be replaced by synonyms: at most k positions of a sentence, each by one of its own.

The set is finite but large, (1 + s) ** t for t positions of s synonyms; a linear function over it is bounded
position by position: <a, x> plus the k largest of max_w <a_t, w - x_t> (Xu et al. 2020, arXiv:2002.12920,
section 3.4, where a dynamic programme gives the same number).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.exact import highest, spelled


@dataclass(frozen=True, eq=False)
class Synonyms:
    """Embedded sentences `b t d` in which at most k positions hold another row of `choices` `b t s d`.

    A position with fewer synonyms repeats its own word. Raises `BadInput` unless k is at least 0.
    """

    choices: Float[Tensor, "b t s d"]
    k: int = 1

    def __post_init__(self) -> None:
        if self.choices.ndim != 4 or self.k < 0:
            raise BadInput(
                f"synonyms of {tuple(self.choices.shape)}, k={self.k}: give choices of shape "
                "(examples, positions, synonyms, width) and k of at least 0"
            )

    def take(self, examples: Tensor) -> Synonyms:
        """The sets of some of the examples."""
        return Synonyms(self.choices[examples.to(self.choices.device)], self.k)

    def _words(self, x: Tensor) -> Float[Tensor, "b t d"]:
        b, t, _, d = self.choices.shape
        if x.numel() != b * t * d or len(x) != b:
            raise DoesNotFit(
                f"synonyms for sentences of ({b}, {t}, {d}) do not fit {tuple(x.shape)}; "
                "give one for each word"
            )
        return x.reshape(b, t, d)

    def project(self, s: Tensor, x: Tensor) -> Tensor:
        """Each position the nearest of its words; of more than k changed ones the k that gain most."""
        words, wanted = self._words(x), self._words(s)
        options = torch.cat([words.unsqueeze(2), self.choices.to(x)], 2)
        far = (options - wanted.unsqueeze(2)).norm(dim=3)
        place = far.argmin(2)
        gain = far[..., 0] - far.gather(2, place.unsqueeze(2)).squeeze(2)
        kept = torch.zeros_like(gain, dtype=torch.bool)
        kept.scatter_(1, gain.topk(min(self.k, gain.shape[1]), 1).indices, True)
        near = options.gather(2, place[..., None, None].expand(*place.shape, 1, words.shape[2])).squeeze(2)
        return torch.where((kept & (gain > 0)).unsqueeze(2), near, words).reshape(x.shape)

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """k random positions, each a random one of its words."""
        words = self._words(x)
        b, t, s, _ = self.choices.shape
        device = generator.device
        order = torch.rand(b, t, generator=generator, device=device).argsort(1).argsort(1).to(x.device)
        place = torch.randint(s, (b, t), generator=generator, device=device).to(x.device)
        other = self.choices.to(x)[torch.arange(b)[:, None], torch.arange(t), place]
        return torch.where((order < self.k).unsqueeze(2), other, words).reshape(x.shape)

    def contains(self, s: Tensor, x: Tensor) -> Bool[Tensor, " b"]:
        """Exact: every position holds one of its words, and at most k of them another than in x."""
        words, given = self._words(x), self._words(s)
        own = (given == words).all(2)
        known = (given.unsqueeze(2) == self.choices.to(given)).all(3).any(2)
        return (own | known).all(1) & ((~own).sum(1) <= self.k)

    def corners(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The box around all words of each position."""
        words = self._words(x)
        near = self.choices.to(x)
        near = near if self.k else words.unsqueeze(2)
        lower, upper = torch.minimum(words, near.amin(2)), torch.maximum(words, near.amax(2))
        return lower.reshape(x.shape), upper.reshape(x.shape)

    def support(self, a: Float[Tensor, "b r ..."], x: Tensor) -> Float[Tensor, "b r"]:
        """max <a, s>, exact but for rounding up."""
        words = self._words(x).double()
        b, t, d = words.shape
        wide = a.double().reshape(b, -1, t, d)
        moves = self.choices.to(words) - words.unsqueeze(2)
        gains = torch.einsum("brtd,btsd->brts", wide, moves).amax(3).clamp(min=0)
        best = gains.topk(min(self.k, t), 2).values
        terms = torch.cat([(wide * words.unsqueeze(1)).flatten(2), best], 2)
        lost = (d + 16) * 2.0**-52 * torch.einsum("brtd,btsd->brts", wide.abs(), moves.abs()).amax(3).sum(2)
        return highest(terms, lost, a.dtype)

    __str__ = spelled
