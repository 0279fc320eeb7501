"""Groups that are labelled together: reading, decoding and scoring them, and a reason for each that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2i_align.data.media import ImageError, SeveralFrames, decode, is_clip, whole_clip
from t2i_align.data.schema import Group, Media, Skipped
from t2i_align.inference.generate import TOTAL, Sample, judge
from t2i_align.inference.options import memory_for
from t2i_align.utils.progress import progress_bar
from t2i_align.utils.resumable import ResumableTable, Row

if TYPE_CHECKING:
    from reward_scorers import Scorer

Annotate = Callable[["Batch"], Mapping[str, Row]]  # rows by group id
Call = Callable[[list[Any], list[str]], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was written.

    why_skipped: file with the reasons, if a group was skipped. missing: prompts that other processes have not finished;
    until there are none, nothing is in `out`.
    """

    out: Path
    groups: int = 0
    skipped: int = 0
    why_skipped: Path | None = None
    missing: int = 0

    def summary(self) -> str:
        """For people: how many groups, where, and why some were skipped."""
        if self.missing:
            return f"{self.missing} prompts are left to other processes; the last one to finish writes {self.out}"
        why = f"; why: {self.why_skipped}" if self.why_skipped else ""
        return f"{self.groups} groups in {self.out}, {self.skipped} skipped{why}"


@dataclass
class Batch:
    """Groups that are labelled together, and why some cannot be: reasons by group id."""

    groups: Sequence[Group]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> list[Group]:
        """The groups that have no reason yet."""
        return [group for group in self.groups if group.id not in self.reasons]

    def skip(self, reason: Callable[[Group], str]) -> None:
        """Leave out the groups for which the function `reason` gives one."""
        self.reasons |= {group.id: text for group in self.left if (text := reason(group))}

    def per_candidate(self, call: Call, size: int, read: Callable[[Media], Any] = decode) -> dict[str, list[Any]]:
        """What `call` gives for each candidate, by group id; groups with an unusable image are skipped.

        Args:
            call: gives a value per image, from images and their prompts. size: images at a time. read: opens them.
        """
        images: list[Any] = []
        for group in self.left:
            decoded: list[Any] = []
            try:
                for media in group.candidates:
                    decoded.append(read(media))
                images += decoded
            except ImageError as error:
                self.reasons[group.id] = f"candidate {len(decoded)}: {error}"
        prompts = [group.prompt for group in self.left for _ in group.candidates]
        values: list[Any] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            with memory_for(len(part)):
                values += call(part, prompts[start : start + size])
        rest = iter(values)
        return {group.id: list(islice(rest, len(group.candidates))) for group in self.left}

    def scores(self, scorers: Sequence[Scorer], size: int) -> dict[str, np.ndarray]:
        """Each scorer's scores, [scorers, k], by group id; groups that cannot be scored are skipped."""

        def score(samples: Sequence[Sample], prompts: Sequence[str]) -> Iterable[tuple[float, ...]]:
            return zip(*(totals(scorer, samples, prompts) for scorer in scorers), strict=True)

        raw = {key: np.array(values).T for key, values in self.per_candidate(score, size, opened).items()}
        self.skip(lambda group: _not_finite(scorers, raw[group.id]))
        return {group.id: raw[group.id] for group in self.left}


def opened(media: Media) -> Sample:
    """An image, or all frames of a clip or animation. Raises ImageError with the reason where it cannot be used."""
    try:
        return whole_clip(media) if isinstance(media, Path) and is_clip(media) else decode(media)
    except SeveralFrames:
        return whole_clip(media)


def totals(scorer: Scorer, samples: Sequence[Sample], prompts: Sequence[str]) -> list[float]:
    """A scorer's score of each image or clip."""
    judged = dict(judge(scorer, samples, prompts))
    return [judged[place][TOTAL] for place in range(len(samples))]


def fill(
    table: ResumableTable,
    batches: Iterable[Sequence[Group | Skipped]],
    annotate: Annotate,
    *,
    total: int,
    progress: bool,
) -> None:
    """Write a row for each group, or why there is none.

    A batch always holds the same items, so that a continued table equals an uninterrupted one even where a model's
    answer depends on what else is in its batch.

    Args:
        annotate: gives the rows of a batch by group id, and skips the groups for which there is none.
        total: number of items.
    """
    with progress_bar(total=total, unit="group", desc=table.out.name, disable=not progress) as bar:
        for chunk in batches:
            if not all(_is_done(table, item) for item in chunk):
                groups = Batch([item for item in chunk if isinstance(item, Group)])
                rows = annotate(groups)
                table.add(
                    [{"id": group.id, **rows[group.id]} for group in groups.left],
                    [asdict(skip) for item in chunk if (skip := _skip(item, groups.reasons))],
                )
            bar.update(len(chunk))


def by_scorer(scorers: Sequence[Scorer], scores: np.ndarray) -> Row:
    """What a row records of each scorer: its version, and its scores of [scorers, k]."""
    return {
        scorer.name: {"version": scorer.version, "scores": own}
        for scorer, own in zip(scorers, scores.tolist(), strict=True)
    }


def _is_done(table: ResumableTable, item: Group | Skipped) -> bool:
    written = isinstance(item, Group) and (item.id,) in table.keys  # a skipped duplicate has the id of a group
    return written or (item.id, item.origin) in table.skipped


def _skip(item: Group | Skipped, reasons: Mapping[str, str]) -> Skipped | None:
    if isinstance(item, Skipped):
        return item
    return Skipped(id=item.id, origin=item.origin, reason=reasons[item.id]) if item.id in reasons else None


def _not_finite(scorers: Sequence[Scorer], scores: np.ndarray) -> str:
    names = [scorer.name for scorer, row in zip(scorers, scores, strict=True) if not np.isfinite(row).all()]
    return f"no finite score by {', '.join(names)}" if names else ""
