"""The one shape of preference data: groups of candidates for a prompt, and batches of them.

A group is one prompt with k candidates and what is known about which is better: k = 2 is a pair, k = 1 a liked
(score > 0) or disliked (score < 0) sample, k > 2 a ranking. Candidates are kept best first, ties in source order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

Media = bytes | Path
Conditioning = dict[str, Tensor]
Model = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (noisy_latents, timesteps, conditioning) -> model_pred


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with k candidates.

    `id` is unique and stable within a source (randomness is keyed by it); `origin` names the file and row for
    messages. `scores` has one number per candidate, higher is better, equal is a tie. `captions` has one text per
    candidate, `negative_caption` is a text that does not fit the best one. `user` says whose preference it is.
    """

    id: str
    prompt: str
    candidates: tuple[Media, ...]
    scores: tuple[float, ...]
    origin: str
    captions: tuple[str, ...] | None = None
    negative_caption: str | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        k = len(self.candidates)
        if k == 0:
            raise ValueError(f"{self.origin}: a group needs at least one candidate")
        if len(self.scores) != k or (self.captions is not None and len(self.captions) != k):
            raise ValueError(f"{self.origin}: {k} candidates, but {len(self.scores)} scores")
        if not all(math.isfinite(score) for score in self.scores):
            raise ValueError(f"{self.origin}: scores must be finite numbers, found {list(self.scores)}")

    @property
    def texts(self) -> tuple[str, ...]:
        """All that a text encoder is to see: the prompt, the captions, the negative caption."""
        negative = () if self.negative_caption is None else (self.negative_caption,)
        return (self.prompt, *(self.captions or ()), *negative)

    def best_first(self) -> Group:
        """The same group with its candidates in descending order of score; ties keep their order."""
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])
        return replace(
            self,
            candidates=tuple(self.candidates[i] for i in order),
            scores=tuple(self.scores[i] for i in order),
            captions=None if self.captions is None else tuple(self.captions[i] for i in order),
        )


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that could not be used, and why. Written to the manifest; never dropped in silence."""

    id: str
    origin: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B groups with the same number k of candidates, encoded.

    keys: what each sample's randomness is keyed by ("epoch/group id"), [B].
    latents: [B, k, *latent shape], float32, best first. scores: [B, k].
    sizes: what the model is told of each image's size and crop, [B, k, 6] (see `images.time_ids`), float32; None for
    families that are told nothing.
    conditioning: a dict of batch-first tensors [B, ...] that only the model family opens; the prompt's.
    captions: the candidates' own captions, [B, k, ...]; negative_caption: [B, ...]. Both only where the objective
        asked for them.
    empty: the empty prompt's conditioning, [1, ...], for objectives that guide.
    state: the objective's, scalars (see `Objective.update_state`).
    """

    keys: tuple[str, ...]
    latents: Tensor
    scores: Tensor
    conditioning: Conditioning
    captions: Conditioning | None = None
    negative_caption: Conditioning | None = None
    sizes: Tensor | None = None
    empty: Conditioning | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def take(self, places: list[int]) -> Batch:
        """The batch with the candidates at these places of each group, 0 the best; a place may come twice."""
        return replace(
            self,
            latents=self.latents[:, places],
            scores=self.scores[:, places],
            captions=None if self.captions is None else {name: t[:, places] for name, t in self.captions.items()},
            sizes=None if self.sizes is None else self.sizes[:, places],
        )
