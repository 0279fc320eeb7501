"""Preferences that scorers are trained on and audited with: prompts, users, labels and images, split by both."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from t2i_align.data import opening, readers
from t2i_align.data.annotations import Annotations
from t2i_align.data.encode import Undecoded, check_space
from t2i_align.data.loader import digest
from t2i_align.data.media import ImageError, decode
from t2i_align.data.opening import source_fingerprint
from t2i_align.data.schema import Selection
from t2i_align.data.spec import is_held_out
from t2i_align.data.store import Store, is_complete, write
from t2i_align.errors import UserError
from t2i_align.reward_models.config import PreferenceConfig
from t2i_align.utils.progress import progress_bar

logger = logging.getLogger(__name__)
NO_USER = ""  # the user of preferences that name none


@dataclass(frozen=True)
class Preferences:
    """All groups of a source with two candidates or more, best first. `media` decodes a group's images.

    prompts, users, labels: one per group; labels [k].
    """

    store: Store
    numbers: Sequence[int]
    ids: Sequence[str]
    prompts: Sequence[str]
    users: Sequence[str]
    labels: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, size: int, what: str, progress: bool) -> Iterator[tuple[list[int], list[Image.Image]]]:
        """All groups in order with their images, at least `size` images at a time; `what` labels the progress bar."""
        rows: list[int] = []
        images: list[Image.Image] = []
        for row in progress_bar(iterable=range(len(self)), desc=what, unit="group", disable=not progress):
            rows.append(row)
            images += self.images(row)
            if len(images) >= size or row == len(self) - 1:
                yield rows, images
                rows, images = [], []

    def images(self, row: int) -> list[Image.Image]:
        """A group's images, best first."""
        try:
            return [decode(media) for media in Undecoded.media(*self.store.locate(self.numbers[row]))]
        except ImageError as error:  # it could be decoded when it was indexed
            raise UserError(f"group {self.ids[row]}: an image has changed since it was indexed: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Of these groups and the content of their images, wherever they lie."""
        source = {key: value for key, value in self.store.manifest["fingerprint"].items() if key != "root"}
        return digest({**source, "numbers": list(self.numbers)})


def open_preferences(
    path: str,
    root: Path,
    *,
    format: str = "auto",
    annotations: Sequence[str] = (),
    limit: int | None = None,
    progress: bool = True,
) -> Preferences:
    """Index a source under `root`, each image decoded once to see that it can be; a finished index is kept.

    Raises:
        UserError: a source that cannot be read, or without a group of two candidates.
    """
    file = readers.resolve(path)
    kind, added = readers.detect(file, format), Annotations.load(list(annotations))
    selection = Selection(candidates=2, limit=limit)
    survey = opening.survey(file, kind, added, selection)
    if not any(k >= 2 for k in survey.candidates):
        raise UserError(f"{path}: preferences need groups of two candidates or more, found {dict(survey.candidates)}")
    parts = {"root": str(file.resolve()), **source_fingerprint(survey, kind, annotations)}
    folder = root / f"images-{digest(parts)}"
    if not is_complete(folder):
        check_space(folder, survey.embedded_bytes)
        write(readers.read(file, kind, added), Undecoded(), folder, fingerprint=parts, total=survey.rows,
              selection=selection, progress=progress)  # fmt: skip
    store = Store(folder)
    numbers = [number for number in range(len(store)) if store.k[number] >= 2][:limit]
    if not numbers:
        raise UserError(f"{path}: no group of two candidates or more could be used; {folder}/skipped.jsonl says why")
    groups = [store.locate(number) for number in numbers]
    return Preferences(
        store,
        numbers,
        [columns["id"][row].as_py() for columns, row in groups],
        [columns["prompt"][row].as_py() for columns, row in groups],
        [columns["user"][row].as_py() or NO_USER for columns, row in groups],
        [torch.tensor(columns["scores"][row].as_py()) for columns, row in groups],
    )


def split(preferences: Preferences, config: PreferenceConfig) -> dict[str, list[int]]:
    """Hold out users, and of the other users' groups, prompts, by the same rule as `data split`.

    Returns rows: `train`; `new_prompts`, of users that are trained on; `new_users`, of held-out users, any prompt.

    Raises:
        UserError: nothing is left to train on.
    """
    parts: dict[str, list[int]] = {"train": [], "new_prompts": [], "new_users": []}
    for row, (prompt, user) in enumerate(zip(preferences.prompts, preferences.users, strict=True)):
        if user != NO_USER and is_held_out("user", user, share=config.holdout_users, seed=config.holdout_seed):
            parts["new_users"].append(row)
        elif is_held_out("prompt", prompt, share=config.holdout_prompts, seed=config.holdout_seed):
            parts["new_prompts"].append(row)
        else:
            parts["train"].append(row)
    for what, share in (("prompt", config.holdout_prompts), ("user", config.holdout_users)):
        if share and not parts[f"new_{what}s"]:
            few = "%s: no %s fell into the %.0f %% to be held out; there are few"
            logger.warning(few, config.path, what, 100 * share)
    if not parts["train"]:
        raise UserError(f"{config.path}: nothing is left to train on: all {len(preferences)} groups are held out")
    return parts
