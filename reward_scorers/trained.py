"""The scorer that `t2i-align train-scorer` writes: `trained:FOLDER`, or for one user of PAL `trained:FOLDER:USER`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from reward_scorers.base import Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.heads import PAL, HeadScorer, LinearHead
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.registry import build
from reward_scorers.towers import TwoTowers
from reward_scorers.weights import load_checkpoint, loading

METADATA, HEAD, CLIP = "scorer.json", "head.safetensors", "clip"
HEADS = {"name", "base", "base_weights", "width"}
REQUIRED = {"clip": {"name"}, "linear": HEADS, "pal": HEADS | {"users", "pal"}}  # metadata of each kind
LAYOUT = 1  # raised when a folder written before can no longer be read


def trained(argument: str) -> Scorer:
    """`trained:FOLDER` or `trained:FOLDER:USER`; the folder may be the run's, which has the scorer in scorer/.

    USER selects whose taste a PAL scores by; without one, the mean of the users of its training.

    Raises:
        ScorerError: an unknown user, weights that do not fit, or a base whose weights are others than in training.
    """
    path, _, user = argument.partition(":")
    folder, metadata = read_metadata(Path(path))
    name, kind, users = f"trained:{metadata['name']}", metadata["kind"], metadata.get("users", [])
    if kind == "clip":
        if user:
            raise ScorerError(f"trained: {folder} knows no users, found user {user!r}")
        return HFClipScorer(str(folder / CLIP), name=name)
    base, base_weights = build(metadata["base"]), metadata["base_weights"]
    if not isinstance(base, TwoTowers) or base.version.rpartition(", ")[2] != base_weights:
        raise ScorerError(
            f"trained: {folder} was trained on {metadata['base']} with {base_weights}, found {base.version}"
        )
    if user and user not in users:
        known = ", ".join(users[:5]) or "none"
        raise ScorerError(f"trained: {folder} does not know the user {user!r}. Known: {known} ...")
    head, weights = load_head(folder, metadata)
    row, name = (users.index(user), f"{name}:{user}") if user else (-1, name)
    return HeadScorer(base, head, name, f"{kind} {weights}", user=row)


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


def load_head(folder: Path, metadata: dict[str, Any]) -> tuple[nn.Module, str]:
    """The head with its weights, and what identifies these."""
    with loading(f"trained: {folder / METADATA}"):
        head = make_head(metadata)
    return head, load_checkpoint(head, str(folder / HEAD), "trained", target="its metadata")
