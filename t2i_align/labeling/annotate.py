"""Files of annotations beside a source: captions, negative captions and scores, for `data.annotations` of a run.

All three functions continue an unfinished `out`, record why a group is skipped, and keep the source's own order of
candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.data import opening, readers
from t2i_align.data.annotations import Annotations, sidecar_identity
from t2i_align.data.schema import Group
from t2i_align.data.votes import RULES as VOTES
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError, unknown
from t2i_align.inference.options import build_scorers, check_options, pick_device, unscorable
from t2i_align.labeling.groups import Annotate, Batch, Summary, by_scorer, fill
from t2i_align.labeling.models import DRAWN, RULES, Captioner, Perturber, load_captioner, load_perturber
from t2i_align.labeling.rules import KINDS, RulePerturber
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.resumable import SKIPPED, ResumableTable, Row

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

    c: the captioner's description of each image. p: the prompt for the winner, a perturbed prompt for the loser. h: the
    winner's description, and a perturbed description of the loser. The last two are defined on pairs without ties.

    Args:
        source: File or folder of preference data, or `testbed:pairs`.
        variant: c, p or h: both images described; the prompt, perturbed for the loser; or the winner's description, and
            the loser's perturbed.
        out: JSONL file.
        captioner: Folder, Hub id, `testbed:captioner`, or any `Captioner`; p needs none.
        perturber: `rules`, folder, Hub id, or any `Perturber`; c needs none.
        annotations: Files that add to the source, such as scores that decide who wins.
        format: Format of the source.
        kinds: Kinds of edits that `rules` makes.
        strength: Number of edits that `rules` makes.
        captioner_template: Instruction for the captioner, with {prompt} in it.
        captioner_revision: The captioner's branch, tag or commit on the Hub.
        perturber_template: Instruction for the perturber, with {caption} in it.
        perturber_revision: The perturber's branch, tag or commit on the Hub.
        max_new_tokens: Limit of the models' answers.
        precision: The models' weights: fp32, tf32, bf16 or fp16.
        seed: Seed of the perturbations.
        batch_size: Groups at a time, and images.
        device: Device of the models (default: the GPU if there is one).
        force: Replace what this command wrote to `out` before.
        progress: Show a progress bar.

    Raises:
        UserError: an argument that cannot be used, or a source without a group to annotate.
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    if variant != "p" and captioner is None:
        raise UserError(f"variant {variant} describes images: name a captioner (a folder, a Hub id, or {DRAWN})")
    _check_edits(precision, kinds, strength)
    job = Job(source, out, format, annotations, pairs=variant != "c", batch_size=batch_size, force=force)
    settings: Row = {"variant": variant, "annotations": sidecar_identity(annotations)}
    shared = {"max_new_tokens": max_new_tokens, "precision": precision}
    describe = change = None
    if variant != "p":
        own: Row = {"template": captioner_template, "revision": captioner_revision, **shared}
        describe, settings["captioner"] = _model(load_captioner, captioner, device, own)
    if variant != "c":
        own = {"template": perturber_template, "revision": perturber_revision, **shared}
        own |= {"kinds": list(kinds), "strength": strength}
        change, settings["perturber"] = _model(load_perturber, perturber, device, own, seed=seed)

    def annotate(batch: Batch) -> dict[str, Row]:
        if change:
            batch.skip(_no_winner)
        texts = {group.id: [group.prompt] * len(group.candidates) for group in batch.left}
        if describe:
            texts = batch.per_candidate(describe, batch_size)
            batch.skip(lambda group: "" if all(texts[group.id]) else "the captioner has no description of a candidate")
        if change:
            losers = {group.id: min(range(2), key=group.scores.__getitem__) for group in batch.left}
            for key, text in _changed(batch, {key: texts[key][place] for key, place in losers.items()}, change, seed):
                texts[key][losers[key]] = text
        return {key: {"captions": captions} for key, captions in texts.items()}

    return job.run(annotate, settings, images=describe is not None, progress=progress)


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
    """Write `negative_caption`, the perturbed prompt, which TDPO and TKTO need (arXiv 2509.25771).

    Args:
        perturber: `rules`, folder, Hub id, or any `Perturber`.
        batch_size: Groups at a time.

    Others as in `caption`.

    Raises:
        UserError: an argument that cannot be used, or a source without a group to annotate.
    """
    _check_edits(precision, kinds, strength)
    job = Job(source, out, format, batch_size=batch_size, force=force)
    own: Row = {"template": perturber_template, "revision": perturber_revision, "max_new_tokens": max_new_tokens}
    own |= {"precision": precision, "kinds": list(kinds), "strength": strength}
    change, settings = _model(load_perturber, perturber, device, own, seed=seed)

    def annotate(batch: Batch) -> dict[str, Row]:
        changed = _changed(batch, {group.id: group.prompt for group in batch.groups}, change, seed)
        return {key: {"negative_caption": text} for key, text in changed}

    return job.run(annotate, {"perturber": settings}, images=False, progress=progress)


def _check_edits(precision: str, kinds: Sequence[str], strength: int) -> None:
    """Raise UserError for what is misspelt, also where no model or no rule makes use of it."""
    check_options(precision)
    RulePerturber(kinds=tuple(kinds), strength=strength)


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
        scorers: Specs of scorers, such as `clip:ViT-B-32:laion400m_e32` or `oracle`.
        rule: How several scorers become one number: `majority`, `mean_rank` or `sum`. Default: a single scorer's scores
            as they are, which SmPO needs (arXiv 2506.02698), and `majority` of several.
        device: Device of the scorers (default: the GPU if there is one).

    Others as in `caption`.

    Raises:
        UserError: an argument that cannot be used, or a source without a group to annotate.
    """
    if rule is not None and rule not in VOTES:
        raise unknown("rule", rule, VOTES)
    job = Job(source, out, format, batch_size=batch_size, force=force)
    place = pick_device(device)
    built = [scorer.to(place) for scorer in build_scorers(scorers)]
    combine = VOTES[rule := rule or ("sum" if len(built) == 1 else "majority")]
    margins = [scorer.tie_margin for scorer in built]

    def annotate(batch: Batch) -> dict[str, Row]:
        batch.skip(lambda group: unscorable(built, group.prompt))
        if rule != "sum":
            batch.skip(lambda group: "" if len(group.candidates) > 1 else "a single candidate, none to compare it with")
        return {
            key: {"scores": combine(raw, margins).tolist(), "by_scorer": by_scorer(built, raw)}
            for key, raw in batch.scores(built, batch_size).items()
        }

    versions = {scorer.name: scorer.version for scorer in built}
    return job.run(annotate, {"rule": rule, "scorers": versions}, progress=progress)


class Job:
    """A source to annotate, of which only an outline has been read, and the table to write.

    Raises:
        UserError: an `out` that cannot be written; a source that cannot be read, or has no group, or no pair where
            `pairs` are needed.
    """

    def __init__(
        self, source: str | Path, out: str | Path, format: str, annotations: Sequence[str | Path] = (), *,
        pairs: bool = False, batch_size: int, force: bool,
    ) -> None:  # fmt: skip
        check_options(batch_size=batch_size)
        self.processes, self.batch_size, self.force = Distributed(), batch_size, force
        self.table = ResumableTable(out, rank=self.processes.rank)
        self.path = readers.resolve(source).absolute()
        self.format, self.annotations = readers.detect(self.path, format), Annotations.load(annotations)
        self.table.check_not_read([self.path, *annotations, *readers.READERS[self.format].files(self.path)])
        self.table.check_own(force=force)
        survey = opening.survey(self.path, self.format, self.annotations)
        self.total, self.identity = survey.rows, survey.identity
        survey.check_usable(source)
        if pairs and survey.candidates.get(2, 0) == survey.ties.get(2, 0):
            counts = dict(survey.candidates)
            raise UserError(f"{source}: no pair with a winner in it; its groups by candidates: {counts}")

    def run(self, annotate: Annotate, settings: Row, *, images: bool = True, progress: bool) -> Summary:
        """Fill the table; `images` says whether they are read. Raises UserError if no group could be annotated."""
        table, processes = self.table, self.processes
        with ExitStack() as begun:
            for first in (True, False):  # the first process begins the table, then the others join it
                if first == (processes.rank == 0):
                    begun.enter_context(table.begun({"source": self.identity, **settings}, force=self.force))
                processes.gather(None)
            items = readers.read(self.path, self.format, self.annotations, best_first=False, images=images)
            share, total = processes.share(items, self.batch_size), self.total // processes.world
            fill(table, share, annotate, total=total, progress=progress and processes.rank == 0)
            written = processes.gather((table.keys, table.skipped))  # waits for all of them
            keys, skipped = (set[Any]().union(*part) for part in zip(*written, strict=True))
            if processes.rank == 0:
                table.merge()
            why = Path(f"{table.out}{SKIPPED}") if skipped else None
            if not keys:
                raise UserError(f"{table.out}: none of {len(skipped)} groups could be annotated; {why} says why")
            if processes.rank == 0:
                table.finish()
        return Summary(out=table.out, groups=len(keys), skipped=len(skipped), why_skipped=why)


def _model(load: Any, model: Any, device: str | None, options: Row, **recorded: Any) -> tuple[Any, Row]:
    """A captioner or perturber, loaded where it is a name, and what is recorded about it."""
    built = load(model, **options, device=device) if isinstance(model, str) else model
    # A plain function without a name will do as well.
    name = getattr(built, "name", None) or getattr(built, "__qualname__", type(built).__qualname__)
    return built, {"name": str(name), **options, **recorded}


def _changed(batch: Batch, texts: Mapping[str, str], change: Perturber, seed: int) -> Iterable[tuple[str, str]]:
    """Group ids with their perturbed texts; groups whose text cannot be changed are skipped."""
    seeds = [stable_seed(seed, key) for key in texts]
    changed = dict(zip(texts, change([*texts.values()], seeds) if texts else (), strict=True))
    batch.skip(lambda group: "" if changed[group.id] else f"the perturber cannot change {texts[group.id]!r}")
    return [(key, text) for key, text in changed.items() if text]


def _no_winner(group: Group) -> str:
    if len(group.candidates) != 2:
        return f"{len(group.candidates)} candidates; this variant is defined on pairs"
    return "a tie: neither candidate is the winner" if group.is_tie else ""
