"""Preferences of clips second by second, for DenseDPO (arXiv 2506.03517, section 3.2): `segment_scores`.

Every labeller, a scorer or a judge, votes on each segment of a pair; a difference within a scorer's margin is no
preference, and neither is one for which a judge gives another clip when the two are exchanged. The majority decides,
and an even vote is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from t2i_align.data.annotations import Annotations, sidecar_identity
from t2i_align.data.media import ImageError, whole_clip
from t2i_align.data.schema import Group, Media
from t2i_align.data.segments import segments
from t2i_align.data.votes import majority
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers, check_options, memory_for, pick_device, unscorable
from t2i_align.labeling.annotate import Job
from t2i_align.labeling.groups import Batch, Summary, by_scorer, totals
from t2i_align.labeling.models import FIRST, SECOND, ClipJudge, Judge
from t2i_align.utils.resumable import Row

if TYPE_CHECKING:
    from reward_scorers import Scorer


def label(
    source: str | Path,
    out: str | Path,
    *,
    scorers: str | Sequence[str | Scorer] = (),
    judge: str | Judge | None = None,
    votes: Sequence[str | Path] = (),
    seconds: float = 1.0,
    fps: float = 8.0,
    least_decided: float = 0.2,
    whole: bool = False,
    format: str = "auto",
    judge_template: str | None = None,
    judge_revision: str | None = None,
    max_new_tokens: int = 16,
    precision: str = "fp32",
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Write `segment_scores` and `segment_seconds` of pairs of clips, with each labeller's own votes.

    Args:
        source: File or folder of preference data with clips.
        scorers: Specs of scorers: of images, averaged over a segment's frames, or of clips.
        judge: A vision-language model that compares two clips: folder or Hub id, or any `Judge`. It is asked in both
            orders.
        votes: Files of labels that vote as well: of people, or of this command.
        seconds: Of a segment; the last may be shorter.
        fps: Frames a second that are judged; a folder of frames is taken to have this rate.
        least_decided: Groups with this share of decided segments or less are skipped; 0 keeps all.
        whole: Write `scores` as well, the mean over the segments, for objectives on whole clips. They replace the
            source's.
        judge_template: Question for the judge, with {prompt}, and with {first} and {second} for the numbers of frames.
        judge_revision: The judge's branch, tag or commit on the Hub.
        max_new_tokens: Limit of the judge's answers.
        precision: The judge's weights: fp32, tf32, bf16 or fp16.
        device: Device of the models (default: the GPU if there is one).

    Others as in `t2i_align.labeling.annotate.caption`.

    Raises:
        UserError: an argument that cannot be used, no labeller, or a source without a group to label.
    """
    check_options(precision, fps)
    if not seconds * fps >= 1:
        raise UserError(f"seconds {seconds!r}: at {fps:g} frames a second, a segment has no frame; raise one of them")
    if not 0 <= least_decided < 1:
        raise UserError(f"least_decided must lie in [0, 1), found {least_decided!r}")
    if not scorers and not votes and judge is None:
        raise UserError("no labeller: give scorers, a judge or votes")
    listed = [Annotations.load([file]) for file in votes]
    job = Job(source, out, format, batch_size=1, force=force)
    place = pick_device(device)
    built = [scorer.to(place) for scorer in build_scorers(scorers)] if scorers else []
    options: Row = {"template": judge_template, "revision": judge_revision, "max_new_tokens": max_new_tokens}
    asked = ClipJudge(judge, **options, precision=precision, device=device) if isinstance(judge, str) else judge
    settings: Row = {
        "scorers": {scorer.name: scorer.version for scorer in built}, "seconds": seconds, "fps": fps,
        "votes": sidecar_identity(votes), "least_decided": least_decided, "whole": whole,
    }  # fmt: skip
    if asked:
        settings["judge"] = {"name": getattr(asked, "name", type(asked).__qualname__), **options}

    def annotate(batch: Batch) -> dict[str, Row]:
        batch.skip(lambda group: unscorable(built, group.prompt) or _no_pair(group, asked))
        rows: dict[str, Row] = {}
        for group in batch.left:
            try:
                clips, ranges = _segments(group.candidates, seconds, fps)
                with memory_for(1):
                    given = [_listed(one, group.id, len(ranges), seconds) for one in listed]
                    rows[group.id] = _row(group, clips, ranges, built, asked, given, seconds, whole)
            except ImageError as error:
                batch.reasons[group.id] = str(error)
        batch.skip(lambda group: _undecided(rows[group.id]["segment_scores"], least_decided))
        return rows

    return job.run(annotate, settings, progress=progress)


def _segments(candidates: Sequence[Media], seconds: float, fps: float) -> tuple[list[Tensor], list[range]]:
    """The clips and the frames of each of their segments; raises ImageError with the reason where there are none."""
    clips = []
    for place, media in enumerate(candidates):
        try:
            folder = isinstance(media, Path) and media.is_dir()  # of frames, which have no rate: all are taken
            clips.append(whole_clip(media, None if folder else fps))
        except ImageError as error:
            raise ImageError(f"candidate {place}: {error}") from error
    lengths = [len(clip) for clip in clips]
    ranges = segments(min(lengths), fps, seconds)
    if min(lengths) < seconds * fps:
        raise ImageError(f"{min(lengths) / fps:.3g} s, shorter than a segment of {seconds:g} s")
    if len(segments(max(lengths), fps, seconds)) != len(ranges):
        raise ImageError(f"its clips have {min(lengths) / fps:.3g} and {max(lengths) / fps:.3g} s")
    return clips, ranges


def _row(
    group: Group, clips: Sequence[Tensor], ranges: Sequence[range], scorers: Sequence[Scorer], judge: Judge | None,
    given: Sequence[np.ndarray | None], seconds: float, whole: bool,
) -> Row:  # fmt: skip
    """A group's row. Raises ImageError where a scorer has no number for a segment."""
    raw = np.array([_scores(scorer, clips, ranges, group.prompt) for scorer in scorers])
    votes, margins = [*raw], [scorer.tie_margin for scorer in scorers]
    if judge:
        wins = _verdicts(judge, clips, ranges, group.prompt)
        votes, margins = [*votes, np.stack([wins, -wins])], [*margins, 0.0]
    votes += (others := [one for one in given if one is not None])
    margins += [0.0] * len(others)
    if not votes:
        raise ImageError("none of the files of votes has it")
    labels = np.stack([majority(np.array(votes)[:, :, number], margins) for number in range(len(ranges))], 1)
    row: Row = {"segment_scores": labels.tolist(), "segment_seconds": seconds}
    row |= {"scores": labels.mean(1).tolist()} if whole else {}
    row |= {"by_scorer": by_scorer(scorers, raw)} if scorers else {}
    return row | ({"by_judge": wins.tolist()} if judge else {})


def _scores(scorer: Scorer, clips: Sequence[Tensor], ranges: Sequence[range], prompt: str) -> np.ndarray:
    """A scorer's number of each segment, [k, segments]."""
    # A measure of clips may need more frames than a segment has: it gets those around it as well.
    total, least = ranges[-1].stop, scorer.min_frames
    if total < least:
        raise ImageError(f"{total} frames; {scorer.name} judges {least} or more")
    starts = [min(own.start, total - least) for own in ranges]
    wanted = [slice(start, max(own.stop, start + least)) for start, own in zip(starts, ranges, strict=True)]
    parts = [clip[own] for clip in clips for own in wanted]
    scores = np.reshape(totals(scorer, parts, [prompt] * len(parts)), (len(clips), len(ranges)))
    if not np.isfinite(scores).all():
        raise ImageError(f"no finite score by {scorer.name}")
    return scores


def _verdicts(judge: Judge, clips: Sequence[Tensor], ranges: Sequence[range], prompt: str) -> np.ndarray:
    """1 for each segment whose first clip a judge prefers in both orders, -1 where it is the second; else 0."""
    one, other = ([[to_pil_image(clip[f]) for f in own] for own in ranges] for clip in clips)
    prompts = [prompt] * len(ranges)
    straight = judge(list(zip(one, other, strict=True)), prompts)
    exchanged = judge(list(zip(other, one, strict=True)), prompts)
    first = [answers == (FIRST, SECOND) for answers in zip(straight, exchanged, strict=True)]
    second = [answers == (SECOND, FIRST) for answers in zip(straight, exchanged, strict=True)]
    return np.array(first, float) - np.array(second, float)


def _listed(votes: Annotations, group: str, count: int, seconds: float) -> np.ndarray | None:
    """A file's votes on a group, [k, segments]; None where it has none. Raises ImageError for other segments."""
    values = votes.entries.get(group, {})
    if "segment_scores" not in values:
        return None
    scores, origin = values["segment_scores"]
    found = values["segment_seconds"].value if "segment_seconds" in values else None
    if (len(scores[0]), found) != (count, seconds):
        of = f"{len(scores[0])} segments of {found} s"
        raise ImageError(f"{origin}: votes on {of}, expected {count} of {seconds:g} s")
    return np.array(scores)


def _no_pair(group: Group, judge: Judge | None) -> str:
    if (k := len(group.candidates)) == 1 or (judge and k != 2):
        return f"{k} candidates; {'a judge compares two' if judge else 'a preference is between two or more'}"
    return ""


def _undecided(scores: Sequence[Sequence[float]], least: float) -> str:
    """Why a group has too few segments with a preference, or ""."""
    decided = sum(len({*segment}) > 1 for segment in zip(*scores, strict=True))
    count = len(scores[0])
    few = least > 0 and decided <= least * count
    return f"{decided} of {count} segments have a preference, expected more than {least:.0%}" if few else ""
