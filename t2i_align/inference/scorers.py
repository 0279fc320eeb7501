"""Resolve user-supplied scorers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t2i_align.errors import UserError

if TYPE_CHECKING:
    from reward_scorers import Scorer


def build_scorers(specs: str | Sequence[str | Scorer]) -> list[Scorer]:
    """Scorers from their specs, each name checked before the first is built; the testbed's oracles are among them.

    Raises:
        UserError: none given, an unknown name, weights that cannot be used, or two scorers of one name.
    """
    import reward_scorers
    import t2i_align.testbed.scorer  # noqa: F401  (registers `oracle` and `motion_oracle`)

    given: list[Any] = [specs] if isinstance(specs, str | reward_scorers.Scorer) else list(specs)
    if not given:
        raise UserError(f"scorers: none given. Choices: {', '.join(reward_scorers.names())}.")
    try:
        for spec in given:
            if not isinstance(spec, reward_scorers.Scorer):
                reward_scorers.check_spec(spec)
        built = [spec if isinstance(spec, reward_scorers.Scorer) else reward_scorers.build(spec) for spec in given]
    except reward_scorers.ScorerError as error:
        raise UserError(str(error)) from error
    names = [scorer.name for scorer in built]
    if len(set(names)) < len(names):
        raise UserError(f"scorers: two of the same name among {', '.join(names)}")
    return built


def unscorable(scorers: Sequence[Scorer], prompt: str) -> str:
    """Reason a prompt cannot be scored, or ""."""
    from reward_scorers import ScorerError

    try:
        for scorer in scorers:
            scorer.check_prompts([prompt])
    except ScorerError as error:
        return str(error)
    return ""
