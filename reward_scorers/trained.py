"""The scorer that `t2i-align train-scorer` writes: `trained:FOLDER`, or for one user of PAL `trained:FOLDER:USER`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_scorers.base import Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.heads import PAL, LinearHead
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.registry import build, register
from reward_scorers.towers import OnTowers, TwoTowers, rated
from reward_scorers.weights import digest, fit, read_state

METADATA, HEAD, CLIP = "scorer.json", "head.safetensors", "clip"
HEADS = {"name", "base", "base_weights", "width"}
REQUIRED = {"clip": {"name"}, "linear": HEADS, "pal": HEADS | {"users", "pal"}}  # metadata of each kind
LAYOUT = 1  # raised when a folder written before can no longer be read


@register("trained")
def from_spec(argument: str) -> Scorer:
    """`trained:FOLDER` or `trained:FOLDER:USER`; the folder may be the run's, which has the scorer in scorer/."""
    path, _, user = argument.partition(":")
    folder, metadata = read_metadata(Path(path))
    name = f"trained:{metadata['name']}"
    if metadata["kind"] == "clip":
        if user:
            raise ScorerError(f"trained: {folder} knows no users, found user {user!r}")
        return HFClipScorer(str(folder / CLIP), name=name)
    return HeadScorer(folder, metadata, user or None)


def read_metadata(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a trained scorer, and the metadata in it.

    Raises:
        ScorerError: no trained scorer there, or one that another version wrote.
    """
    folder = next((place for place in (path, path / "scorer") if (place / METADATA).is_file()), None)
    if folder is None:
        raise ScorerError(f"trained: {path}: no {METADATA} in it; expected what `t2i-align train-scorer` leaves")
    file = folder / METADATA
    try:
        metadata = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScorerError(f"trained: {file}: not the metadata of a scorer: {error}") from error
    layout, kind = metadata.get("layout"), metadata.get("kind")
    if layout != LAYOUT:
        raise ScorerError(f"trained: {folder}: written with layout {layout!r}, this version reads {LAYOUT}")
    if kind not in REQUIRED:
        raise ScorerError(f"trained: {file}: expected the kind {' or '.join(REQUIRED)}, found {kind!r}")
    if lacking := sorted(REQUIRED[kind] - metadata.keys()):
        raise ScorerError(f"trained: {file}: the metadata of kind {kind} lacks {', '.join(lacking)}")
    return folder, metadata


def make_head(metadata: dict[str, Any]) -> nn.Module:
    """Build the head from its metadata, with random weights."""
    if metadata["kind"] == "linear":
        return LinearHead(metadata["width"])
    return PAL(metadata["width"], len(metadata["users"]), **metadata["pal"])


def load_head(folder: Path, metadata: dict[str, Any]) -> nn.Module:
    """The head with its weights."""
    head = make_head(metadata)
    fit(head, read_state(folder / HEAD, "trained"), f"trained: {folder / HEAD} does not fit")
    return head.eval().requires_grad_(False)


class HeadScorer(OnTowers):
    """A head on the features of a CLIP-style scorer.

    Args:
        folder, metadata: as of `read_metadata`. user: whose taste; None is the mean of the users of its training.

    Raises:
        ScorerError: an unknown user, weights that do not fit, or a base whose weights are others than in training.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], user: str | None = None) -> None:
        base, base_weights, users = build(metadata["base"]), metadata["base_weights"], metadata.get("users", [])
        if not isinstance(base, TwoTowers) or base.version.rpartition(", ")[2] != base_weights:
            raise ScorerError(
                f"trained: {folder} was trained on {metadata['base']} with {base_weights}, found {base.version}"
            )
        if user is not None and user not in users:
            known = ", ".join(users[:5]) or "none"
            raise ScorerError(f"trained: {folder} does not know the user {user!r}. Known: {known} ...")
        super().__init__(base)
        self.head = load_head(folder, metadata)
        self.user = -1 if user is None else users.index(user)
        self.name = f"trained:{metadata['name']}" + (f":{user}" if user is not None else "")
        self.version = f"{metadata['kind']} sha256 {digest(folder / HEAD)}, {base.name}, {base.version}"

    def _score(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        users = torch.full((len(inputs),), self.user, device=inputs.device)
        return rated(self.head, self.towers.encode_images(inputs), self.towers.text_features(prompts), users=users)
