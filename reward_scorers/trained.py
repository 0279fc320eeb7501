"""What `t2i-align train-scorer` leaves, as a scorer: `trained:FOLDER`, or for one user of PAL `trained:FOLDER:USER`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from reward_scorers.base import Judgement, Scorer, ScorerError
from reward_scorers.heads import PAL, LinearHead
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.registry import build, register
from reward_scorers.towers import TwoTowers, rated
from reward_scorers.weights import digest, fit, read_state

DESCRIPTION, HEAD, CLIP = "scorer.json", "head.safetensors", "clip"
HEADS = {"name", "base", "base_weights", "width"}
NEEDED = {"clip": {"name"}, "linear": HEADS, "pal": HEADS | {"users", "pal"}}  # kinds, and what describes them
LAYOUT = 1  # raised when a folder written before can no longer be read


@register("trained")
def from_spec(argument: str) -> Scorer:
    """`trained:FOLDER` or `trained:FOLDER:USER`; the folder may be the run's, which has the scorer in scorer/."""
    path, _, user = argument.partition(":")
    folder, told = describe(Path(path))
    name = f"trained:{told['name']}"
    if told["kind"] == "clip":
        if user:
            raise ScorerError(f"trained: {folder} knows no users, found user {user!r}")
        return HFClipScorer(str(folder / CLIP), name=name)
    return HeadScorer(folder, told, user or None)


def describe(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a trained scorer, and what it says of itself.

    Raises:
        ScorerError: no trained scorer there, or one that another version wrote.
    """
    folder = next((place for place in (path, path / "scorer") if (place / DESCRIPTION).is_file()), None)
    if folder is None:
        raise ScorerError(f"trained: {path}: no {DESCRIPTION} in it; expected what `t2i-align train-scorer` leaves")
    try:
        told = dict(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScorerError(f"trained: {folder / DESCRIPTION}: not a description: {error}") from error
    if told.get("layout") != LAYOUT:
        raise ScorerError(f"trained: {folder}: written with layout {told.get('layout')!r}, this version reads {LAYOUT}")
    kind = told.get("kind")
    if kind not in NEEDED or (lacking := NEEDED[kind] - told.keys()):
        found = f"lacks {', '.join(sorted(lacking))}" if kind in NEEDED else f"the kind {kind!r}"
        raise ScorerError(f"trained: {folder / DESCRIPTION}: expected a description of {' or '.join(NEEDED)}: {found}")
    return folder, told


def make_head(told: dict[str, Any]) -> nn.Module:
    """The head that a description asks for, with random weights."""
    if told["kind"] == "linear":
        return LinearHead(told["width"])
    return PAL(told["width"], len(told["users"]), **told["pal"])


def load_head(folder: Path, told: dict[str, Any]) -> nn.Module:
    """The head with its weights."""
    head = make_head(told)
    fit(head, read_state(folder / HEAD, "trained"), f"trained: {folder / HEAD} does not fit")
    return head.eval().requires_grad_(False)


class HeadScorer(Scorer):
    """A head on the features of a CLIP-style scorer.

    Args:
        folder, told: as of `describe`. user: whose taste; None is the mean of all users the head was trained with.

    Raises:
        ScorerError: an unknown user, weights that do not fit, or a base whose weights are others than in training.
    """

    differentiable = True

    def __init__(self, folder: Path, told: dict[str, Any], user: str | None = None) -> None:
        base = build(told["base"])
        if not isinstance(base, TwoTowers) or base.version.rpartition(", ")[2] != told["base_weights"]:
            raise ScorerError(
                f"trained: {folder} was trained on {told['base']} with {told['base_weights']}, found {base.version}"
            )
        if user is not None and user not in told.get("users", []):
            known = ", ".join(told.get("users", [])[:5]) or "none"
            raise ScorerError(f"trained: {folder} does not know the user {user!r}. Known: {known} ...")
        self.base, self.head = base, load_head(folder, told)
        self.user = -1 if user is None else told["users"].index(user)
        self.name = f"trained:{told['name']}" + (f":{user}" if user is not None else "")
        self.version = f"{told['kind']} sha256 {digest(folder / HEAD)}, {base.name}, {base.version}"

    def to(self, device: torch.device | str) -> HeadScorer:
        """Move the networks. Returns itself."""
        self.base.to(device)
        self.head.to(device)
        return self

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._rated(self.base.preprocess(pixels.float().to(self.base.device)), prompts)

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        return self._rated(self.base.inputs(images), prompts), {}

    def _rated(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        users = torch.full((len(inputs),), self.user, device=inputs.device)
        return rated(self.head, self.base.encode_images(inputs), self.base.text_features(prompts), users=users)
