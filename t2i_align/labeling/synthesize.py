"""Preferences made from prompts alone: models x seeds -> images -> scorers -> groups (Syn-Pic, arXiv 2410.18013).

    <out>/settings.json          what it is made with; another run with other settings is refused
          images/000012/0-3.png  prompt 12 by model 0, its image 3
          model-0.json           hash of the weights
          scores.jsonl           each scorer's scores of a prompt's images (further processes: .scores.jsonl.RANK.jsonl)
          groups.jsonl           the groups, as the `jsonl` reader takes them, with scores by scorer, seeds and models
          skipped.jsonl          what is not in there, and why

Images and scores that are there are not made again, so it continues after a kill. Several processes (torchrun,
accelerate launch, on several machines that share the folder) each take every so-many-th block of prompts; the one that
finishes last writes `groups.jsonl`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from PIL import Image

from t2i_align.data.schema import Group, Skipped
from t2i_align.data.votes import majority, shares
from t2i_align.errors import UserError, unknown
from t2i_align.inference.generate import in_background, sample, sample_seed, save_image
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_aligned, resolve_base
from t2i_align.inference.options import build_scorers, check_options, pick_device, resolve_prompts, unscorable
from t2i_align.labeling.groups import Batch, Summary, by_scorer, fill
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.files import claim, json_lines, locked, read_json, write_text
from t2i_align.utils.logging import silent
from t2i_align.utils.progress import progress_bar
from t2i_align.utils.resumable import ResumableTable, Row
from t2i_align.utils.tensors import tensors_hash
from t2i_align.utils.whole import is_whole

if TYPE_CHECKING:
    from reward_scorers import Scorer

SCORED_AT_ONCE = 8  # images, where no batch size is given
BLOCK = 32  # prompts of one process whose images are scored and recorded together
SETTINGS, SCORES, GROUPS, SKIPPED = "settings.json", "scores.jsonl", "groups.jsonl", "skipped.jsonl"
PAIRS = ("best_worst", "all")


@silent
def synthesize(
    prompts: str | Path | Sequence[str],
    models: Sequence[str | Path],
    scorers: str | Sequence[str | Scorer],
    out: str | Path,
    *,
    per_prompt: int = 4,
    pairs: str | None = None,
    agree: float = 0.0,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    device: str | None = None,
    progress: bool = True,
) -> Summary:
    """Make preference data from prompts.

    A candidate's score is the share of comparisons with the other candidates that it wins, over all scorers
    (phi of arXiv 2410.18013; a difference within a scorer's tie margin is half a win).

    Args:
        models: paths, Hub ids, training runs or LoRAs, `testbed:sd`.
        scorers: specs of scorers, such as `clip:ViT-B-32:laion400m_e32` or `oracle`.
        out: folder for images, scores and `groups.jsonl`.
        per_prompt: images of each prompt by each model.
        pairs: `best_worst` or `all` pairs instead of groups of all candidates.
        agree: share of the scorers that must prefer the better one of a pair, or a group's best to its worst.

    Others as in `t2i_align.inference.generate.generate`; each distinct prompt is used once.

    Raises:
        UserError: an argument that cannot be used, or a folder begun with other settings.
    """
    texts = list(dict.fromkeys(resolve_prompts(prompts)))
    check_options(precision, per_prompt=per_prompt, steps=steps, height=height, width=width, batch_size=batch_size)
    if pairs is not None and pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    if not 0 <= agree <= 1:
        raise UserError(f"agree must lie in [0, 1], found {agree!r}")
    names = [str(model) for model in models]
    if len(set(names)) < len(names) or len(names) * per_prompt < 2:
        raise UserError(f"models: expected different ones that make 2 candidates or more, found {', '.join(names)}")
    for name in names:
        resolve_aligned(name)
    processes = Distributed()
    place = pick_device(device)
    built = [scorer.to(place) for scorer in build_scorers(scorers)]
    work = _Work(Path(out).expanduser(), texts, names, per_prompt, seed, built, processes, progress)
    sampling = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt, "height": height,
                "width": width}  # fmt: skip
    work.begin({**sampling, "precision": precision})
    for index in range(len(names)):
        work.draw(index, {**sampling, "batch_size": batch_size}, precision, place)
    work.score(batch_size or SCORED_AT_ONCE)
    return work.finish(pairs, agree)


@dataclass
class _Work:
    """One process's share of the prompts, and the files in `out`."""

    out: Path
    prompts: Sequence[str]
    models: Sequence[str]
    per_prompt: int
    seed: int
    scorers: Sequence[Scorer]
    processes: Distributed
    progress: bool

    def __post_init__(self) -> None:
        self.lock = FileLock(self.out / ".lock")
        self.table = ResumableTable(self.out / SCORES, rank=self.processes.rank)
        self.margins = [scorer.tie_margin for scorer in self.scorers]
        self.groups = [self._group(number) for number in range(len(self.prompts))]
        share = self.processes.share(range(len(self.groups)), BLOCK)
        # Blocks of this process's prompts: the reason why one cannot be scored, or "".
        self.own = [{i: unscorable(self.scorers, self.prompts[i]) for i in block} for block in share]

    def begin(self, settings: Row) -> None:
        """Start the folder, or continue one that was begun with the same settings."""
        text = "\n".join(self.prompts)
        settings = {
            "prompts": hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16],
            "models": self.models,
            "per_prompt": self.per_prompt,
            "seed": self.seed,
            **settings,
            "scorers": {scorer.name: scorer.version for scorer in self.scorers},
        }
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.lock):
            claim(self.out / SETTINGS, settings, content="synthesis", advice="choose another folder")

    def draw(self, model: int, sampling: Row, precision: str, device: str) -> None:
        """This process's images by one model, which is loaded only where some are missing."""
        name = self.models[model]
        own = (i for block in self.own for i, reason in block.items() if not reason)
        wanted = [(i, k) for i in own for k in range(self.per_prompt)]
        rows = [(i, k) for i, k in wanted if not is_whole(self._image(i, model, k))]
        if not rows:
            return
        aligned = resolve_aligned(name)
        whole = aligned.kind == "model"
        pipeline = load_pipeline(aligned.path if whole else resolve_base(None, aligned), precision, device)
        if pipeline.video:
            raise UserError(f"{name}: this model makes clips; preferences are made of images here")
        batch_size = sampling["batch_size"] or pipeline.sampling()[2]
        with (
            adapter_on(pipeline, None if whole else aligned),
            progress_bar(total=len(rows), desc=f"draw {name}", unit="img", disable=not self.progress) as bar,
            in_background() as run,
        ):
            with locked(self.lock):  # refuses other weights under the same name
                claim(self._identity(model), {"model": name, "sha256": tensors_hash(pipeline.denoiser.state_dict())})
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                seeds = [sample_seed(self.seed, i, k) for i, k in part]
                images = sample(pipeline, [self.prompts[i] for i, _ in part], seeds, **sampling)
                run(self._save, model, part, images)
                bar.update(len(part))

    def score(self, batch_size: int) -> None:
        """Record the scores [scorers, k] of this process's prompts, or why there are none."""

        def item(group: Group, reason: str) -> Group | Skipped:
            return Skipped(id=group.id, origin=group.origin, reason=reason) if reason else group

        batches = [[item(self.groups[i], reason) for i, reason in block.items()] for block in self.own]

        def annotate(batch: Batch) -> dict[str, Row]:
            return {key: {"scores": raw.tolist()} for key, raw in batch.scores(self.scorers, batch_size).items()}

        with self.table.begun():
            fill(self.table, batches, annotate, total=sum(map(len, batches)), progress=self.progress)

    def finish(self, pairs: str | None, agree: float) -> Summary:
        """Write the groups, if all prompts are done."""
        scores = {row["id"]: np.array(row["scores"]) for row in self.table.rows()}
        refused = {row["id"]: row for row in self.table.skips()}
        if missing := sum(group.id not in scores.keys() | refused.keys() for group in self.groups):
            return Summary(out=self.out / GROUPS, missing=missing)
        files = map(self._identity, range(len(self.models)))
        identities = [read_json(file) if file.exists() else {} for file in files]  # none if all prompts were refused
        rows: list[Row] = []
        skipped: list[Row] = []
        for i, group in enumerate(self.groups):
            if group.id in refused:
                skipped.append(refused[group.id])
                continue
            raw = scores[group.id]
            share = majority(raw, self.margins)
            for name, chosen, reason in self._chosen(group, raw, pairs, agree):
                if reason:
                    skipped.append({"id": name, "origin": group.origin, "reason": reason})
                    continue
                places = [divmod(place, self.per_prompt) for place in chosen]
                row = {
                    "id": name,
                    "prompt": group.prompt,
                    "images": [self._image(i, model, k).relative_to(self.out).as_posix() for model, k in places],
                    "scores": share[chosen].tolist(),
                    "by_scorer": by_scorer(self.scorers, raw[:, chosen]),
                    "seeds": [sample_seed(self.seed, i, k) for _, k in places],
                    "models": [identities[model] for model, _ in places],
                }
                rows.append(row)
        for file, lines in ((SKIPPED, skipped), (GROUPS, rows)):
            with locked(self.lock):
                write_text(self.out / file, json_lines(lines))
        if not rows:
            raise UserError(f"{self.out}: no group is left of {len(self.prompts)} prompts; {SKIPPED} says why")
        why = self.out / SKIPPED if skipped else None
        return Summary(out=self.out / GROUPS, groups=len(rows), skipped=len(skipped), why_skipped=why)

    def _chosen(
        self, group: Group, raw: np.ndarray, pairs: str | None, agree: float
    ) -> Iterator[tuple[str, list[int], str]]:
        """Of each group that is wanted: its id, the places of its candidates, and why it is left out, or ""."""
        order = np.argsort(-majority(raw, self.margins), kind="stable").tolist()
        prefers = shares(raw, self.margins)
        for better, worse in combinations(order, 2) if pairs == "all" else [(order[0], order[-1])]:
            share, reason = prefers[better, worse], ""
            if pairs and share == prefers[worse, better]:
                reason = "the scorers prefer neither"
            elif share < agree:
                reason = f"{share:.2f} of the scorers prefer the better one, expected at least {agree:g}"
            chosen = [better, worse] if pairs else sorted(order)
            yield f"{group.id}#{better}-{worse}" if len(chosen) < len(order) else group.id, chosen, reason

    def _group(self, number: int) -> Group:
        """A prompt's group, its candidates in the order of models and seeds."""
        media = [self._image(number, model, k) for model in range(len(self.models)) for k in range(self.per_prompt)]
        return Group(id=f"{number:06d}", prompt=self.prompts[number], candidates=tuple(media),
                     scores=(0.0,) * len(media), origin=f"{self.out}, prompt {number}")  # fmt: skip

    def _save(self, model: int, places: Sequence[tuple[int, int]], images: Sequence[Image.Image]) -> None:
        for (i, k), image in zip(places, images, strict=True):
            save_image(image, self._image(i, model, k))

    def _image(self, prompt: int, model: int, k: int) -> Path:
        return self.out / "images" / f"{prompt:06d}" / f"{model}-{k}.png"

    def _identity(self, model: int) -> Path:
        return self.out / f"model-{model}.json"
