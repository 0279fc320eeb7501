"""Preferences that a run measures and does not train on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from t2i_align.config import DataConfig, RunConfig
from t2i_align.data.loader import PreferenceDataset, PreparedDataset
from t2i_align.data.spec import is_spec, normalise

logger = logging.getLogger(__name__)


def held_out_data(config: RunConfig) -> DataConfig | None:
    """The preferences that are measured and not trained on, read and encoded as the others."""
    if (path := config.validation.data) is None:
        return None
    root = None if is_spec(Path(path)) else config.data.root
    return replace(config.data, path=path, root=root, format="auto", limit=None, stream=None)


def warn_of_overlap(source: PreferenceDataset, held_out: PreferenceDataset) -> None:
    """Say how many held-out prompts are also trained on, where both can be listed."""
    if not isinstance(source, PreparedDataset) or not isinstance(held_out, PreparedDataset):
        return
    trained, other = ({*map(normalise, data.some_prompts(len(data.numbers)))} for data in (source, held_out))
    if both := trained & other:
        logger.warning(
            "validation.data: %d of its %d prompts are also trained on, as %r, so its numbers may look too good; "
            "`t2i-align data split` makes two sources without a common prompt", len(both), len(other), min(both)
        )  # fmt: skip
