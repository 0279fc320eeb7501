"""Scores of images on disk, one row per image and scorer; an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from reward_scorers import ScorerError
from t2i_align.data import opening, readers, tables
from t2i_align.data.encode import Undecoded
from t2i_align.data.media import ImageError, frame_files
from t2i_align.data.schema import Group, Media, Skipped
from t2i_align.data.store import Store, is_store
from t2i_align.errors import UserError
from t2i_align.evaluation.result import number
from t2i_align.inference.generate import LIST, TOTAL, judge
from t2i_align.inference.options import build_scorers, check_options, memory_for, pick_device, unscorable, use_precision
from t2i_align.labeling.groups import opened
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.logging import silent
from t2i_align.utils.progress import progress_bar
from t2i_align.utils.resumable import JSONL, PARQUET, ResumableTable, Row

if TYPE_CHECKING:
    from reward_scorers import Scorer

KEY = ("image", "sha256", "prompt", "scorer", "version")  # primary key of a row
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


@silent
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
        UserError: a list, row, scorer or device that cannot be used; or not one image can be scored.
    """
    check_options(precision, batch_size=batch_size)
    processes = Distributed()
    place = pick_device(device)
    found, total = candidates(images)
    table = None if out is None else ResumableTable(out, KEY, schema=SCHEMA, rank=processes.rank)
    with table.begun() if table else nullcontext():
        written = {table.key_of(row): row for row in table.rows()} if table else {}
        built = [scorer.to(place) for scorer in build_scorers(scorers)]
        totals, why = {scorer.name: np.zeros(3) for scorer in built}, ""  # sum, scored, not scored; a reason for that
        own = processes.share(found, batch_size)
        dtype = use_precision(precision)
        with (
            torch.no_grad(),
            torch.autocast(torch.device(place).type, dtype, enabled=dtype is not None),
            progress_bar(total=total // processes.world, unit="img", disable=not progress or processes.rank > 0) as bar,
            ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as pool,
        ):
            versions = [(scorer.name, scorer.recorded_version) for scorer in built]
            for batch in _read_ahead(own, written, versions, pool):
                rows = [row for scorer in built for row in _rows(scorer, batch, written)]
                if table:
                    table.add(rows)
                for row in rows:
                    scored = row.get("score") is not None  # not so where a scorer gives NaN
                    totals[row["scorer"]] += (row["score"] if scored else 0, scored, not scored)
                    why = why or row.get("error", "")
                bar.update(len(batch))
        long = {scorer.name: scorer.cut for scorer in built}  # prompts
        everywhere = processes.gather((totals, why, long))  # waits for all of them
        if table and processes.rank == 0:
            table.merge()
    means = {}
    for name in totals:
        value, scored, failed = sum(part[name] for part, *_ in everywhere)
        note = f"; {failed:.0f} could not be scored" if failed else ""
        if cut := set[str]().union(*(prompts[name] for *_, prompts in everywhere)):
            note += f"; {len(cut)} prompts were longer than its text encoder reads, and cut"
        if scored:
            means[name] = float(value / scored)
        if processes.rank == 0:
            mean = f"mean {means[name]:.4f} over {scored:.0f} images{note}" if scored else "no image could be scored"
            print(f"{name}: {mean}")
    if not means:
        reasons = [reason for _, reason, _ in everywhere if reason] or ["the scorers give no finite number"]
        raise UserError(f"{images}: none of its {total} images could be scored, such as: {reasons[0]}")
    return means


@dataclass(frozen=True)
class Candidate:
    """An image or clip to score.

    image: its name in the rows. media: path or encoded bytes. error: why it cannot be scored, or "".
    """

    image: str
    media: Media
    prompt: str
    error: str = ""

    def key(self) -> tuple[str, str | None, str]:
        """Name, hash (all models' images have the same names; None where it cannot be read) and prompt."""
        return self.image, None if self.error else _sha256(self.media), self.prompt

    def load(self) -> Image.Image | Tensor | str:
        """The image, the clip, or why there is none."""
        try:
            return self.error or opened(self.media)
        except (ImageError, OSError) as error:  # OSError: a name that is too long
            return str(error)


class _Read(NamedTuple):
    """A candidate with its key, and the image, the clip, or why there is none; "" where all its scores are known."""

    candidate: Candidate
    key: tuple[str, str | None, str]
    media: Image.Image | Tensor | str


def _read_ahead(
    batches: Iterator[list[Candidate]], written: Mapping[Any, Row], versions: Sequence[Any], pool: ThreadPoolExecutor
) -> Iterator[list[_Read]]:
    """The batches; while one is scored, the next is read. What every scorer has scored is not opened."""

    def read(candidate: Candidate) -> _Read:
        key = candidate.key()
        known = all((*key, *version) in written for version in versions)
        return _Read(candidate, key, "" if known else candidate.load())

    reading = None
    for batch in batches:
        following = pool.map(read, batch)  # begins at once
        if reading:
            yield list(reading)
        reading = following
    if reading:
        yield list(reading)


def _sha256(media: Media) -> str | None:
    """Hash of an image or of a clip's frames; None if it cannot be read."""
    try:
        if isinstance(media, Path) and media.is_dir():
            return _sha256(json.dumps([(file.name, _sha256(file)) for file in frame_files(media)]).encode())
        if isinstance(media, Path) and not media.is_file():  # a pipe would be waited for
            return None
        return hashlib.sha256(media if isinstance(media, bytes) else media.read_bytes()).hexdigest()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def _rows(scorer: Scorer, batch: Sequence[_Read], written: Mapping[Any, Row]) -> list[Row]:
    """A row for each candidate: what an earlier run wrote, or its score and parts, or the error."""
    rows: list[Row] = []
    new: dict[int, Image.Image | Tensor] = {}
    for place, (candidate, image, media) in enumerate(batch):
        key = (*image, scorer.name, scorer.recorded_version)
        rows.append(written.get(key) or dict(zip(KEY, key, strict=True)))
        if key in written:
            continue
        if error := media if isinstance(media, str) else unscorable([scorer], candidate.prompt):
            rows[place]["error"] = error
        elif not isinstance(media, str):
            new[place] = media
    places = list(new)
    try:
        with memory_for(len(new)):
            for index, values in judge(scorer, list(new.values()), [batch[i].candidate.prompt for i in places]):
                rows[places[index]]["score"] = number(values.pop(TOTAL))
                if values:
                    rows[places[index]]["parts"] = {name: number(value) for name, value in values.items()}
    except ScorerError as error:
        names = [batch[place].candidate.image for place in places]
        raise UserError(f"{names[0]} ... {names[-1]}: {error}") from error
    return rows


# Sources: an image with a prompt is a group with one candidate -----------------------------------------------------


def candidates(source: str | Path, best_first: bool = False) -> tuple[Iterator[Candidate], int]:
    """The candidates of a source, none of them opened, and how many there are.

    best_first: preference data's groups from their best, instead of in their own order.

    Raises:
        UserError: nothing there or nothing listed; a row without an image or a prompt.
    """
    path = Path(source).expanduser()
    file = path / LIST if path.is_dir() else path
    if path.is_dir() and is_store(path):
        store = Store(path)
        if "conditioning" in store.manifest:
            raise UserError(f"{source}: holds encoded latents, not images; score the source they were encoded from")
        return _stored(store), int(store.k.sum())
    columns = {*tables.header(file)} if file.suffix in (JSONL, PARQUET) else set()
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
        raise UserError(f"{str(error).rstrip('.')}. {OTHER_SOURCES}") from error
    survey = opening.survey(source)
    if not survey.groups:
        raise UserError(f"{source}: no group in it that can be used: {'; '.join(survey.reasons)}. {OTHER_SOURCES}")
    total = survey.rows - survey.groups + sum(k * n for k, n in survey.candidates.items())
    return _flat(readers.read(source, best_first=best_first)), total


def _flat(items: Iterable[Group | Skipped]) -> Iterator[Candidate]:
    """All candidates in their order; a row that cannot be used is one with an error."""
    for item in items:
        if isinstance(item, Skipped):
            yield Candidate(f"{item.id} ({item.origin})", b"", "", item.reason)
        else:
            for place, media in enumerate(item.candidates):
                yield Candidate(f"{item.id}#{place}", media, item.prompt)


def _stored(store: Store) -> Iterator[Candidate]:
    for index in range(len(store)):
        columns, row = store.locate(index)
        name, prompt = columns["id"][row].as_py(), columns["prompt"][row].as_py()
        for place, media in enumerate(Undecoded.media(columns, row)):
            yield Candidate(f"{name}#{place}", media, prompt)


def _listed(row: tables.Row, file: Path) -> Candidate:
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
    return Candidate(name, media if isinstance(media, bytes) else file.parent / media, prompt)
