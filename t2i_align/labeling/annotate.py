"""Files of annotations beside a source: captions, negative captions and scores, for `data.annotations` of a run.

All three functions continue an unfinished `out`, skip groups that cannot be used and say why, and keep the
source's own order of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from t2i_align.data import readers
from t2i_align.data.annotations import Annotations, sidecar_identity
from t2i_align.data.formats import Survey
from t2i_align.data.media import ImageError, decode
from t2i_align.data.schema import Group, Items, Skipped
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError, unknown
from t2i_align.inference.options import check_counts, memory_for, pick_device
from t2i_align.inference.scorers import build_scorers, unscorable
from t2i_align.labeling.captioner import DRAWN, Captioner, load_captioner
from t2i_align.labeling.perturber import RULES, Perturber, load_perturber
from t2i_align.labeling.rules import KINDS
from t2i_align.labeling.votes import RULES as VOTES
from t2i_align.utils.resumable import ResumableTable, Row, Summary

if TYPE_CHECKING:
    from reward_scorers import Scorer

VARIANTS = ("c", "p", "h")


def caption(
    source: str | Path,
    variant: str,
    out: str | Path,
    *,
    captioner: str | Captioner | None = None,
    perturber: str | Perturber = RULES,
    annotations: Sequence[str | Path] = (),
    format: str = "auto",
    kinds: Sequence[str] = KINDS,
    strength: int = 1,
    captioner_template: str | None = None,
    captioner_revision: str | None = None,
    perturber_template: str | None = None,
    perturber_revision: str | None = None,
    max_new_tokens: int = 128,
    precision: str = "fp32",
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Write `captions`, one per candidate: the three variants of DCPO (arXiv 2502.06023).

    c: what the captioner says of each image. p: the winner has the prompt, the loser a perturbed prompt. h: the
    winner has its description, the loser a perturbed description of its own. The last two are of pairs without ties.

    Args:
        source: file or folder of preference data, or `testbed:pairs`.
        variant: c, p or h.
        out: JSONL file.
        captioner: folder, Hub id, `testbed:captioner`, or any `Captioner`; p needs none.
        perturber: `rules`, folder, Hub id, or any `Perturber`; c needs none.
        annotations: files that add to the source, such as scores that say who wins.
        format: of the source.
        kinds, strength: of the edits of `rules`.
        captioner_template, perturber_template: what the models are told, with {prompt} or {caption} in it.
        captioner_revision, perturber_revision: branch, tag or commit on the Hub.
        max_new_tokens, precision: of the models' answers and weights.
        batch_size: groups at a time, and images.
        force: replace what `out` holds.

    Raises:
        UserError: anything above that cannot be used, or a source without a group to annotate.
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    if variant != "p" and captioner is None:
        raise UserError(f"variant {variant} describes images: name a captioner (a folder, a Hub id, or {DRAWN})")
    check_counts(batch_size=batch_size)
    sidecar = ResumableTable(out, force=force)
    opened = Source.open(source, format, annotations, pairs=variant != "c")
    settings: Row = {"variant": variant, "annotations": sidecar_identity(annotations)}
    model = {"max_new_tokens": max_new_tokens, "precision": precision}
    describe = change = None
    if variant != "p":
        own: Row = {"template": captioner_template, "revision": captioner_revision, **model}
        describe = load_captioner(captioner, **own, device=device) if isinstance(captioner, str) else captioner
        settings["captioner"] = {"name": _name(describe), **own}
    if variant != "c":
        own = {"template": perturber_template, "revision": perturber_revision, **model}
        own |= {"kinds": list(kinds), "strength": strength}
        change = load_perturber(perturber, **own, device=device) if isinstance(perturber, str) else perturber
        settings["perturber"] = {"name": _name(change), **own, "seed": seed}

    def annotate(groups: Sequence[Group]) -> list[Row | Skipped]:
        batch = Batch(groups)
        if change is not None:
            batch.skip(_without_a_winner)
        texts = {group.id: [group.prompt] * len(group.candidates) for group in batch.left}
        if describe is not None:
            texts = _descriptions(batch, describe, batch_size)
        if change is not None:
            losers = {group.id: min(range(2), key=group.scores.__getitem__) for group in batch.left}
            changed = _changed(batch, {key: texts[key][loser] for key, loser in losers.items()}, change, seed)
            for key, text in changed.items():
                texts[key][losers[key]] = text
        return batch.results({key: {"captions": value} for key, value in texts.items()})

    with sidecar.begun({"source": opened.identity, **settings}):
        items = opened.items(images=describe is not None)
        return sidecar.fill(items, annotate, total=opened.survey.rows, batch=batch_size, progress=progress)


def perturb(
    source: str | Path,
    out: str | Path,
    *,
    perturber: str | Perturber = RULES,
    format: str = "auto",
    kinds: Sequence[str] = KINDS,
    strength: int = 1,
    perturber_template: str | None = None,
    perturber_revision: str | None = None,
    max_new_tokens: int = 128,
    precision: str = "fp32",
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Write `negative_caption`, the prompt perturbed, which TDPO and TKTO want (arXiv 2509.25771).

    Arguments and errors are those of `caption`.
    """
    check_counts(batch_size=batch_size)
    sidecar = ResumableTable(out, force=force)
    opened = Source.open(source, format)
    own: Row = {"template": perturber_template, "revision": perturber_revision, "max_new_tokens": max_new_tokens}
    own |= {"precision": precision, "kinds": list(kinds), "strength": strength}
    change = load_perturber(perturber, **own, device=device) if isinstance(perturber, str) else perturber

    def annotate(groups: Sequence[Group]) -> list[Row | Skipped]:
        batch = Batch(groups)
        changed = _changed(batch, {group.id: group.prompt for group in groups}, change, seed)
        return batch.results({key: {"negative_caption": text} for key, text in changed.items()})

    with sidecar.begun({"source": opened.identity, "perturber": {"name": _name(change), **own, "seed": seed}}):
        items = opened.items(images=False)
        return sidecar.fill(items, annotate, total=opened.survey.rows, batch=batch_size, progress=progress)


def relabel(
    source: str | Path,
    scorers: str | Sequence[str | Scorer],
    out: str | Path,
    *,
    rule: str | None = None,
    format: str = "auto",
    batch_size: int = 8,
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Write `scores`, one per candidate, and each scorer's own with its version under `by_scorer`.

    Args:
        source: file or folder of preference data, or `testbed:pairs`.
        scorers: their specs, such as `clip:ViT-B-32:laion400m_e32` or `oracle`.
        out: JSONL file.
        rule: `majority`, `mean_rank` or `sum` of the scorers (`t2i_align.labeling.votes`). Default: a single scorer's
            scores as they are, which SmPO wants (arXiv 2506.02698), and `majority` of several.
        batch_size: groups at a time, and images.

    Raises:
        UserError: anything above that cannot be used, or a source without a group to annotate.
    """
    check_counts(batch_size=batch_size)
    if rule is not None and rule not in VOTES:
        raise unknown("rule", rule, VOTES)
    sidecar = ResumableTable(out, force=force)
    opened = Source.open(source, format)
    place = pick_device(device)
    built = [scorer.to(place) for scorer in build_scorers(scorers)]
    rule = rule or ("sum" if len(built) == 1 else "majority")
    margins = [scorer.tie_margin for scorer in built]

    def annotate(groups: Sequence[Group]) -> list[Row | Skipped]:
        batch = Batch(groups)
        batch.skip(lambda group: unscorable(built, group.prompt))
        if rule != "sum":
            batch.skip(lambda group: "" if len(group.candidates) > 1 else "a single candidate, none to compare it with")
        raw = raw_scores(batch, built, batch_size)
        rows: dict[str, Row] = {}
        for group in batch.left:
            by_scorer = {
                scorer.name: {"version": scorer.version, "scores": values}
                for scorer, values in zip(built, raw[group.id].tolist(), strict=True)
            }
            rows[group.id] = {"scores": VOTES[rule](raw[group.id], margins).tolist(), "by_scorer": by_scorer}
        return batch.results(rows)

    versions = {scorer.name: scorer.version for scorer in built}
    with sidecar.begun({"source": opened.identity, "rule": rule, "scorers": versions}):
        return sidecar.fill(opened.items(), annotate, total=opened.survey.rows, batch=batch_size, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Preference data to annotate, of which nothing but its outline has been read."""

    path: Path
    format: str
    annotations: Annotations
    survey: Survey

    @classmethod
    def open(
        cls, source: str | Path, format: str, annotations: Sequence[str | Path] = (), *, pairs: bool = False
    ) -> Source:
        """Raises UserError for a source that cannot be read, or has no group, or none of the `pairs` that it needs."""
        path = readers.resolve(source).absolute()
        kind, added = readers.detect(path, format), Annotations.load(annotations)
        survey = readers.survey(path, kind, added)
        if survey.groups == 0:
            raise UserError(f"{source}: no group in it that can be used: {'; '.join(survey.reasons)}")
        if pairs and survey.candidates.get(2, 0) == survey.ties.get(2, 0):
            raise UserError(f"{source}: no pair with a winner in it; its groups by candidates: {survey.candidates}")
        return cls(path=path, format=kind, annotations=added, survey=survey)

    @property
    def identity(self) -> str:
        return readers.identity(self.path, self.format)

    def items(self, *, images: bool = True) -> Items:
        return readers.read(self.path, self.format, self.annotations, best_first=False, images=images)


@dataclass
class Batch:
    """Groups that are annotated together, and why some cannot be: reasons by group id."""

    groups: Sequence[Group]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> list[Group]:
        """The groups that have no reason yet."""
        return [group for group in self.groups if group.id not in self.reasons]

    def skip(self, reason: Callable[[Group], str]) -> None:
        """Leave out the groups for which the function `reason` gives one."""
        self.reasons |= {group.id: text for group in self.left if (text := reason(group))}

    def images(self) -> dict[str, list[Image.Image]]:
        """The candidates of the groups that are left; those with an image that cannot be used are skipped."""
        found = {}
        for group in self.left:
            try:
                found[group.id] = [_decoded(group, i) for i in range(len(group.candidates))]
            except ImageError as error:
                self.reasons[group.id] = str(error)
        return found

    def results(self, rows: Mapping[str, Row]) -> list[Row | Skipped]:
        """One a group: its row with its id in front, or that it is skipped."""
        return [
            Skipped(id=group.id, origin=group.origin, reason=self.reasons[group.id])
            if group.id in self.reasons
            else {"id": group.id, **rows[group.id]}
            for group in self.groups
        ]


def _descriptions(batch: Batch, describe: Captioner, batch_size: int) -> dict[str, list[str]]:
    images = batch.images()
    prompts = [group.prompt for group in batch.left for _ in group.candidates]
    flat = [image for group in batch.left for image in images[group.id]]
    said: list[str] = []
    for some in _slices(len(flat), batch_size):
        with memory_for(len(flat[some])):
            said += describe(flat[some], prompts[some])
    answers = iter(said)
    texts = {group.id: [next(answers) for _ in group.candidates] for group in batch.left}
    batch.skip(lambda group: "" if all(texts[group.id]) else "the captioner found nothing to say of a candidate")
    return texts


def _changed(batch: Batch, texts: Mapping[str, str], change: Perturber, seed: int) -> dict[str, str]:
    """The texts perturbed, by group id; groups whose text stays what it is are skipped."""
    if not texts:
        return {}
    seeds = [stable_seed(seed, key) for key in texts]
    changed = dict(zip(texts, change(list(texts.values()), seeds), strict=True))
    batch.skip(
        lambda group: "" if changed[group.id] else f"the perturber found nothing to change in {texts[group.id]!r}"
    )
    return {key: text for key, text in changed.items() if text}


def raw_scores(batch: Batch, scorers: Sequence[Scorer], batch_size: int) -> dict[str, np.ndarray]:
    """Each scorer's scores, [scorers, k], by group id; groups that cannot be scored are skipped."""
    images = batch.images()
    prompts = [group.prompt for group in batch.left for _ in group.candidates]
    flat = [image for group in batch.left for image in images[group.id]]
    scores = np.empty((len(scorers), len(flat)))
    for row, scorer in zip(scores, scorers, strict=True):
        for some in _slices(len(flat), batch_size):
            with memory_for(len(flat[some])):
                row[some] = scorer.score_images(flat[some], prompts[some]).cpu().numpy()
    ends = np.cumsum([len(group.candidates) for group in batch.left])
    parts = np.split(scores, ends[:-1], axis=1) if len(ends) else []
    raw = {group.id: part for group, part in zip(batch.left, parts, strict=True)}
    names = [scorer.name for scorer in scorers]
    batch.skip(lambda group: _not_finite(names, raw[group.id]))
    return raw


def _without_a_winner(group: Group) -> str:
    if len(group.candidates) != 2:
        return f"{len(group.candidates)} candidates; this variant is defined on pairs"
    return "a tie: neither candidate is the winner" if group.is_tie else ""


def _not_finite(names: Sequence[str], scores: np.ndarray) -> str:
    bad = [name for name, row in zip(names, scores, strict=True) if not np.isfinite(row).all()]
    return f"no finite score by {', '.join(bad)}" if bad else ""


def _decoded(group: Group, candidate: int) -> Image.Image:
    try:
        return decode(group.candidates[candidate])
    except ImageError as error:
        raise ImageError(f"candidate {candidate}: {error}") from error


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _name(model: Captioner | Perturber | None) -> str:
    """What identifies it; a plain function will do as well."""
    return str(getattr(model, "name", None) or getattr(model, "__qualname__", type(model).__qualname__))
