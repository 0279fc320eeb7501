"""Whom images are made for: a person by a file of choices, or a mix of users, through the personal branch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2i_align.conditioning import personal
from t2i_align.data import readers
from t2i_align.data.annotations import NONE, Annotations
from t2i_align.data.schema import Group, Skipped
from t2i_align.data.users import choice, choices_by_user
from t2i_align.errors import UserError, unknown
from t2i_align.inference.models import Aligned, run_of

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from t2i_align.conditioning.preferences import Embedder

logger = logging.getLogger(__name__)


@dataclass
class Served:
    """Users and their weights, which sum to 1, and the scale of the branch."""

    choices: Mapping[str, Sequence[Group]] = field(repr=False)
    weights: Mapping[str, float]
    scale: float
    recorded: dict[str, Any]
    _tokens: Tensor | None = field(default=None, repr=False)

    def tokens(self, pipeline: TrainablePipeline) -> Tensor:
        """The weighted mean of the users' tokens, [T, width], by the branch on the pipeline; computed once.

        Raises:
            UserError: an embedder that cannot be used, or too few choices for it.
        """
        if self._tokens is None:
            from t2i_align.conditioning.preferences import rebuilt

            branch = getattr(pipeline.denoiser, personal.NAME)
            embedder = rebuilt(branch.embedding).to(pipeline.device)
            parts = [
                weight * tokens_of(branch, embedder, self.choices[user], user) for user, weight in self.weights.items()
            ]
            self._tokens = torch.stack(parts).sum(0)
        return self._tokens


@torch.no_grad()
def tokens_of(branch: personal.Personal, embedder: Embedder, groups: Sequence[Group], user: str = "") -> Tensor:
    """The tokens [T, width] of one user's choices; of an embedder that reads several together, the mean over these.

    Raises:
        UserError: too few choices, or an image that is missing or damaged.
    """
    together = embedder.together
    used = [choice(group) for group in groups[: len(groups) - len(groups) % together]]
    if not used:
        raise UserError(f"user {user!r}: {len(groups)} choices; the embedder reads {together} together")
    rows = embedder(used).to(next(branch.parameters()).device)
    # Rows of single choices are pooled by the branch; those of whole conversations are users of their own.
    return branch.encoder(rows.flatten(0, 1).unsqueeze(0) if together == 1 else rows).mean(0)


def resolve_user(
    adapter: Aligned | None, user: str | Path | None, users: str | Mapping[str, float] | None, scale: float
) -> Served | None:
    """Whom to serve: the choices in the file `user`; or `users` by name, of that file or of the adapter's data.

    Raises:
        UserError: an adapter without a personal branch, a file that cannot be read or with a row that cannot be used,
            an unknown user, weights that are no positive numbers, or several users and no names.
    """
    if user is None and users is None:
        if adapter is not None and adapter.kind == "personal":
            logger.warning("%s serves users; without one (user, users) its images are for nobody", adapter.path)
        return None
    if adapter is None or adapter.kind != "personal":
        raise UserError("user: only a run with a personal branch serves users; this model has none")
    if not math.isfinite(scale):
        raise UserError(f"user_scale must be a finite number, found {scale!r}")
    weights = _weights(users) if users is not None else None
    source, items = _of_run(adapter) if user is None else (str(user), map(_strict, readers.read(user)))
    choices = choices_by_user(items, source)
    if weights is None and len(choices) > 1:
        raise UserError(
            f"{source}: choices of {len(choices)} users; name one or several (users): {', '.join(sorted(choices)[:8])}"
        )
    weights = weights or dict.fromkeys(choices, 1.0)
    for name in weights:
        if name not in choices:
            raise unknown(f"user in {source}", name, choices)
    recorded = {
        "user": str(user) if user is not None else None,
        "users": weights if users else None,
        "user_scale": scale,
    }
    return Served(choices, weights, scale, recorded)


@contextmanager
def user_on(pipeline: TrainablePipeline, served: Served | None, guidance: float) -> Iterator[None]:
    """Sample for these users inside the block; the pipeline carries their personal branch."""
    if served is None:
        yield
        return
    guided = guidance > 1 and not pipeline.distilled_guidance
    with personal.serving(pipeline.denoiser, served.tokens(pipeline), guided=guided, scale=served.scale):
        yield


def _weights(users: str | Mapping[str, float]) -> dict[str, float]:
    """`a:0.7,b:0.3` by name, normalised; a name alone weighs 1."""
    if isinstance(users, str):
        parts = [part.rpartition(":") if ":" in part else (part, ":", "1") for part in users.split(",")]
        given: list[tuple[str, Any]] = [(name.strip(), weight) for name, _, weight in parts]
    else:
        given = list(users.items())
    out: dict[str, float] = {}
    for name, text in given:
        try:
            weight = float(text)
        except (TypeError, ValueError):
            weight = math.nan
        if not (name and weight >= 0 and math.isfinite(weight)) or name in out:
            raise UserError(f"users: expected names with weights such as ann:0.7,bob:0.3, found {users!r}")
        out[name] = weight
    if not (total := sum(out.values())):
        raise UserError(f"users: all weights are 0: {users!r}")
    return {name: weight / total for name, weight in out.items()}


def _of_run(adapter: Aligned) -> tuple[str, Iterator[Group | Skipped]]:
    """The data that a branch was trained on, of which some rows may be unusable."""
    if (run := run_of(adapter)) is None:
        raise UserError("users: no run.yaml beside the branch names its training data; give the users' file (user)")
    data = run["data"]
    annotations = Annotations.load(data["annotations"]) if data["annotations"] else NONE
    return data["path"], readers.read(data["path"], data["format"], annotations)


def _strict(item: Group | Skipped) -> Group:
    """A row of a person's own file, of which none should be unusable."""
    if isinstance(item, Skipped):
        raise UserError(f"{item.origin}: {item.reason}")
    return item
