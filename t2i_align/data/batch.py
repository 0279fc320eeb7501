"""What objectives see: B groups with the same number k of candidates, encoded, and the networks they are shown to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from t2i_align.data.schema import COLUMNS, WithColumns

Conditioning = dict[str, Tensor]
Rewarder = Callable[[Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]  # clean latents, prompts -> [B], parts
Model = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (noisy_latents, timesteps, conditioning) -> model_pred


@dataclass(frozen=True, kw_only=True)
class Batch(WithColumns):
    """B groups with the same number k of candidates, encoded.

    keys: what each sample's randomness is keyed by ("epoch/group id"), [B].
    latents: [B, k, *latent shape], float32, best first. scores: [B, k].
    sizes: each image's size and crop for the model, [B, k, 6] (see `loader.time_ids`), float32; None for families
        that are not conditioned on it.
    conditioning: a dict of batch-first tensors [B, ...] that only the model family opens; the prompt's.
    columns: the optional columns that the objective requires. Of texts, their conditioning: `batch.captions` is
        [B, k, ...], `batch.negative_caption` [B, ...]; `batch.segment_scores` has a number for each latent frame,
        [B, k, f] (see `segments`); of others a tuple of values, [B] or [B, k].
    empty: the empty prompt's conditioning, [1, ...], for objectives that guide.
    state: the objective's, scalars (see `Objective.update_state`).
    prompts, rewarder: for objectives with a scorer, the prompts' texts, and what scores clean latents for them.
    """

    keys: tuple[str, ...]
    latents: Tensor = field(repr=False)
    scores: Tensor
    conditioning: Conditioning = field(repr=False)
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sizes: Tensor | None = None
    empty: Conditioning | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    rewarder: Rewarder | None = None

    def take(self, places: list[int]) -> Batch:
        """The batch with the candidates at these places of each group, 0 the best; a place may come twice."""

        def chosen(tensor: Tensor) -> Tensor:  # an index made from a list would have the host wait for the device
            return torch.stack([tensor[:, place] for place in places], dim=1)

        def taken(name: str, value: Any) -> Any:
            if not COLUMNS[name].per_candidate:
                return value
            if isinstance(value, Tensor):
                return chosen(value)
            if COLUMNS[name].text:
                return {key: chosen(tensor) for key, tensor in value.items()}
            return tuple(COLUMNS[name].take(row, places) for row in value)

        return replace(
            self,
            latents=chosen(self.latents),
            scores=chosen(self.scores),
            columns={name: taken(name, value) for name, value in self.columns.items()},
            sizes=None if self.sizes is None else chosen(self.sizes),
        )
