"""Whether data can serve an objective: checked before anything is encoded, and again on what could be encoded."""

from __future__ import annotations

from collections import Counter
from typing import Any

from t2i_align.data.schema import Survey
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements

COMMANDS = {"captions": "caption", "negative_caption": "perturb", "scores": "relabel"}  # that make the columns


def check_requirements(needs: Requirements, survey: Survey, path: str, limit: int | None = None) -> None:
    """Raise UserError unless some group of the source can serve the objective, and all that can make one batch."""
    if not survey.groups:
        raise UserError(f"{path}: no usable group among {survey.rows} rows. First reasons: {'; '.join(survey.reasons)}")
    check_candidates(needs, survey.candidates, path)
    check_columns(needs, survey.columns, survey.groups, path)
    if not needs.ties and survey.ties == survey.candidates:
        raise UserError(f"{path}: all {survey.groups} groups are ties, from which this objective learns nothing")
    disliked = survey.disliked if needs.likes_only else 0
    usable = Counter(survey.candidates) - Counter({} if needs.ties else survey.ties) - Counter({1: disliked})
    enough = {k: count for k, count in usable.items() if k >= needs.candidates}
    if not enough:
        few = sum(count for k, count in survey.candidates.items() if k < needs.candidates)
        raise nothing_left(needs, path, survey.groups, sum(survey.ties.values()), disliked, few)
    if limit is None:  # else the first ones may well be alike
        check_alike(needs, enough, path)


def check_candidates(needs: Requirements, candidates: dict[int, int], path: str) -> None:
    """Raise UserError where no group has enough candidates. candidates: number of groups by their k."""
    if candidates and max(candidates) < needs.candidates:
        raise UserError(
            f"{path}: the objective compares {needs.candidates} candidates of a prompt, "
            f"but the groups here have {_listed(candidates)}"
        )


def check_columns(needs: Requirements, columns: dict[str, int], groups: int, path: str) -> None:
    """Raise UserError where a required column is missing. columns: how many of the groups have each."""
    for name in needs.columns:
        found = columns.get(name, 0)
        if name == "scores" and found:  # a scorer's numbers may happen to be 0 and 1 in some of the groups
            continue
        if found < groups:
            what = f"{name!r} that are more than labels" if name == "scores" else repr(name)
            command = COMMANDS.get(name)
            hint = f" `t2i-align {command}` makes it: name its file in data.annotations." if command else ""
            raise UserError(
                f"{path}: the objective needs {what} with each group, but only {found} of {groups} groups have it."
                f"{hint}"
            )


def check_alike(needs: Requirements, candidates: dict[int, int], path: str) -> None:
    """Raise UserError where groups of different k cannot make one batch."""
    if len(candidates) > 1 and not wants_pairs(needs):
        raise UserError(
            f"{path}: for this objective, groups must have the same number of candidates, found {_listed(candidates)}"
        )


def wants_pairs(needs: Requirements) -> bool:
    """Whether groups of any size give their best and their worst candidate."""
    return needs.candidates == 2 and not needs.lists


def nothing_left(needs: Requirements, path: str, groups: int, ties: int, disliked: int, few: int) -> UserError:
    """The error for data of which the objective can use nothing."""
    return UserError(
        f"{path}: no group is left: of {groups}, {ties} are ties, {disliked} are disliked, "
        f"{few} have fewer than {needs.candidates} candidates"
    )


def _listed(candidates: dict[Any, Any]) -> str:
    return ", ".join(f"{k} candidate{'s' * (int(k) > 1)} ({count} groups)" for k, count in sorted(candidates.items()))
