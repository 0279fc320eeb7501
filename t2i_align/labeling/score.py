"""Scores of images on disk, one row per image and scorer; an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reward_scorers import ScorerError
from t2i_align.data import readers, tables
from t2i_align.data.media import ImageError, decode, frame_files, is_clip, whole_clip
from t2i_align.data.schema import Group, Media, Skipped
from t2i_align.data.store import Store, is_store
from t2i_align.errors import UserError
from t2i_align.evaluation.result import number
from t2i_align.inference.generate import LIST
from t2i_align.inference.options import PRECISIONS, check_counts, check_precision, memory_for, pick_device
from t2i_align.inference.scorers import build_scorers, unscorable
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.resumable import JSONL, PARQUET, ResumableTable, Row

if TYPE_CHECKING:
    from reward_scorers import Scorer

IMAGE, SCORER = ("image", "sha256", "prompt"), ("scorer", "version")
KEY = (*IMAGE, *SCORER)  # primary key of a row
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in KEY),
        ("score", pa.float64()),
        ("error", pa.string()),
        ("parts", pa.map_(pa.string(), pa.float64())),
    ]
)
IMAGE_KEYS, PROMPT_KEYS = ("image", "file"), ("prompt", "caption")  # of a list of images
GROUP_KEYS = ("images", "videos", "chosen")  # JSONL with one of these is preference data
OTHER_SOURCES = f"Or give a folder with {LIST}, or JSONL or parquet with 'image' and 'prompt'."


def score(
    images: str | Path,
    scorers: str | Sequence[str | Scorer],
    out: str | Path | None = None,
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Score images against their prompts; prints and returns each scorer's mean.

    Under torchrun the processes share the work, and the first one merges what they wrote.

    Args:
        images: Folder with the `samples.jsonl` of `generate`, images or clips; JSONL or parquet with `image` and
            `prompt` in each row; preference data of any format, all candidates of which are scored; or prepared images.
        scorers: Specs of scorers, such as `clip:ViT-B-32:laion400m_e32` or `oracle`.
        out: JSONL file to append to, or a .parquet: image, sha256 (of the file), prompt, scorer, version, score and
            parts; for an image that cannot be scored, `error` instead of a score. What it already holds is not scored
            again: delete a row to repeat it. Another image under the same name is another image.
        batch_size: Images at a time.
        precision: bf16 or fp16 runs the networks under autocast, which the recorded version names.
        device: Device of the scorers (default: the GPU if there is one).
        progress: Show a progress bar.

    Raises:
        UserError: a list, row, scorer or device that cannot be used.
    """
    check_counts(batch_size=batch_size)
    check_precision(precision)
    processes = Distributed()
    place = pick_device(device or processes.device)
    candidates, total = _candidates(images)
    table = None if out is None else ResumableTable(out, KEY, schema=SCHEMA, rank=processes.rank)
    with table.begun() if table else nullcontext():
        written = {table.key_of(row): row for row in table.rows()} if table else {}
        runs = [_ScorerRun(scorer.to(place), torch.device(place).type, precision) for scorer in build_scorers(scorers)]
        totals = {run.scorer.name: np.zeros(3) for run in runs}  # sum, scored, not scored
        with (
            tqdm(total=total, unit="img", disable=not progress or processes.rank > 0) as bar,
            ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as pool,
        ):
            for index, batch in enumerate(iter(lambda: list(islice(candidates, batch_size)), [])):
                if index % processes.world == processes.rank:
                    rows = _score_batch(runs, batch, written, pool)
                    if table:
                        table.add(rows)
                    for row in rows:
                        if "error" in row or row.get("score") is not None:
                            totals[row["scorer"]] += (row.get("score") or 0, "error" not in row, "error" in row)
                bar.update(len(batch))
        processes.wait()
        if table and processes.rank == 0:
            table.merge()
    everywhere = processes.gather(totals)
    return _means({name: sum(part[name] for part in everywhere) for name in totals}, report=processes.rank == 0)


@dataclass(frozen=True)
class _Candidate:
    """An image or clip to score.

    image: its name in the rows. media: path or encoded bytes. error: why it cannot be scored, or "".
    """

    image: str
    media: Media
    prompt: str
    error: str = ""

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the file or its frames: all models' images have the same names; None if it cannot be read."""
        if self.error:
            return None
        if isinstance(self.media, bytes):
            return hashlib.sha256(self.media).hexdigest()
        try:
            if not self.media.is_dir():
                return hashlib.sha256(self.media.read_bytes()).hexdigest()
            names = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in frame_files(self.media)]
            return hashlib.sha256(json.dumps(names).encode()).hexdigest()
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None

    def load(self) -> Image.Image | Tensor | str:
        """The image, the clip, or why there is none."""
        try:
            clip = isinstance(self.media, Path) and is_clip(self.media)
            return self.error or (whole_clip(self.media) if clip else decode(self.media))
        except ImageError as error:
            return str(error)


@dataclass(frozen=True)
class _ScorerRun:
    """A scorer on its device, in its precision."""

    scorer: Scorer
    device: str
    precision: str

    @cached_property
    def identity(self) -> tuple[str, str]:
        """Name and version of its numbers, which also depend on rounding and on how images are decoded."""
        with self.autocast():
            return self.scorer.name, self.scorer.recorded_version

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    @torch.no_grad()
    def rows(self, batch: Sequence[_Candidate], media: Mapping[int, Any], indices: Collection[int]) -> Iterator[Row]:
        """A row for each of these candidates of a batch: score and parts, or the error."""
        with self.autocast():
            errors = {
                i: media[i] if isinstance(media[i], str) else unscorable([self.scorer], batch[i].prompt)
                for i in indices
            }
            yield from (self._row(batch[i], error=error) for i, error in errors.items() if error)
            usable = [i for i in indices if not errors[i]]
            stills = [i for i in usable if isinstance(media[i], Image.Image)]
            for part in ([stills] if stills else []) + [[i] for i in usable if i not in stills]:
                try:
                    with memory_for(len(part)):
                        images = [media[i] for i in part]
                        # A clip is scored by itself.
                        inputs = images if part == stills else images[0].unsqueeze(0).float() / 255
                        total, parts = self.scorer.judge(inputs, [batch[i].prompt for i in part])
                except ScorerError as error:
                    raise UserError(f"{batch[part[0]].image} ... {batch[part[-1]].image}: {error}") from error
                for place, i in enumerate(part):
                    values = {name: number(values[place].item()) for name, values in parts.items()}
                    row = self._row(batch[i], score=number(total[place].item()))
                    yield row | ({"parts": values} if values else {})

    def _row(self, candidate: _Candidate, **values: Any) -> Row:
        return dict(zip(KEY, (*attrgetter(*IMAGE)(candidate), *self.identity), strict=True)) | values


def _score_batch(
    runs: Sequence[_ScorerRun], batch: Sequence[_Candidate], written: Mapping[Any, Row], pool: ThreadPoolExecutor
) -> list[Row]:
    """A row for each scorer and image: what an earlier run wrote, or a new one."""
    subjects = list(pool.map(attrgetter(*IMAGE), batch))  # hashes the files
    new = {run: [i for i, subject in enumerate(subjects) if (*subject, *run.identity) not in written] for run in runs}
    unread = sorted({i for indices in new.values() for i in indices})  # the others are not opened
    media = dict(zip(unread, pool.map(_Candidate.load, [batch[i] for i in unread]), strict=True))
    rows = []
    for run, indices in new.items():
        keys = [(*subject, *run.identity) for subject in subjects]
        rows += [written[key] for key in keys if key in written]
        rows += run.rows(batch, media, indices)
    return rows


def _means(totals: Mapping[str, np.ndarray], *, report: bool) -> dict[str, float]:
    means = {}
    for name, (total, scored, failed) in totals.items():
        means[name] = float(total / scored) if scored else float("nan")
        if report:
            note = f"; {failed:.0f} could not be scored" if failed else ""
            print(f"{name}: mean {means[name]:.4f} over {scored:.0f} images{note}")
    return means


# Sources: an image with a prompt is a group with one candidate -----------------------------------------------------


def _candidates(source: str | Path) -> tuple[Iterator[_Candidate], int]:
    """The candidates of a source, none of them opened, and how many there are.

    Raises:
        UserError: nothing there or nothing listed; a row without an image or a prompt.
    """
    path = Path(source).expanduser()
    file = path / LIST if path.is_dir() else path
    if path.is_dir() and is_store(path):
        store = Store(path)
        if "conditioning" in store.manifest:
            raise UserError(f"{source}: holds encoded latents, not images; score the source they were encoded from")
        return _flat(_stored(store)), int(store.k.sum())
    columns = {*tables.columns(file)} if file.suffix in (JSONL, PARQUET) else set()
    if columns & {*IMAGE_KEYS} and not columns & {*GROUP_KEYS}:
        rows = tables.rows(file, (*IMAGE_KEYS, *PROMPT_KEYS))
        listed = (_listed(row, file) for row in rows if isinstance(row, tables.Row))
        if file.suffix == PARQUET:  # which may hold the images
            return listed, tables.open_parquet(file).metadata.num_rows
        checked = list(listed)
        return iter(checked), len(checked)
    try:
        readers.detect(readers.resolve(source))
    except UserError as error:
        raise UserError(f"{error} {OTHER_SOURCES}") from error
    survey = readers.survey(source)
    if not survey.groups:
        raise UserError(f"{source}: no group in it that can be used: {'; '.join(survey.reasons)}. {OTHER_SOURCES}")
    skipped = survey.rows - survey.groups
    return _flat(readers.read(source, best_first=False)), sum(k * n for k, n in survey.candidates.items()) + skipped


def _flat(items: Iterable[Group | Skipped]) -> Iterator[_Candidate]:
    """All candidates in their order; a row that cannot be used is one with an error."""
    for item in items:
        if isinstance(item, Skipped):
            yield _Candidate(f"{item.id} ({item.origin})", b"", "", item.reason)
        else:
            for place, media in enumerate(item.candidates):
                yield _Candidate(f"{item.id}#{place}", media, item.prompt)


def _stored(store: Store) -> Iterator[Group]:
    for index in range(len(store)):
        columns, row = store.group(index)
        name, prompt, scores = (columns[key][row].as_py() for key in ("id", "prompt", "scores"))
        media = tuple(store.media(index))
        yield Group(id=name, prompt=prompt, candidates=media, scores=tuple(scores), origin=str(store.path))


def _listed(row: tables.Row, file: Path) -> _Candidate:
    values = row.values
    media = next((values[key] for key in IMAGE_KEYS if values.get(key) is not None), None)
    name = media if isinstance(media, str) else row.id
    if isinstance(media, dict):  # the Image feature of `datasets`
        name, media = media.get("path") or row.id, media.get("bytes") or media.get("path")
    if not isinstance(media, str | bytes) or not media or readers.has_lone_surrogate(name):
        images = {key: values[key] for key in IMAGE_KEYS if key in values} or f"the keys {', '.join(values)}"
        raise UserError(f"{row.origin}: expected a path under 'image', found {images}")
    prompt = next((values[key] for key in PROMPT_KEYS if key in values), None)
    if not isinstance(prompt, str) or not prompt.strip() or readers.has_lone_surrogate(prompt):
        raise UserError(f"{row.origin}: expected text under 'prompt', found {prompt!r}")
    return _Candidate(name, media if isinstance(media, bytes) else file.parent / media, prompt)
