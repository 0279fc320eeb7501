"""Scores of images on disk, one row per image and scorer; an interrupted run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from itertools import islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reward_scorers.base import ScorerError, rounding
from t2i_align.data.media import DECODER, ImageError, decode, is_clip, whole_clip
from t2i_align.errors import UserError
from t2i_align.inference.options import PRECISIONS, check_counts, check_precision, memory_for, pick_device
from t2i_align.inference.scorers import build_scorers, unscorable
from t2i_align.labeling.listing import Entry, images_of, parse
from t2i_align.utils.files import output_lock

if TYPE_CHECKING:
    from reward_scorers import Scorer

IMAGE, SCORER = ("image", "sha256", "prompt"), ("scorer", "version")  # what a line is about, and who says it
JSONL, PARQUET = ".jsonl", ".parquet"
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (*IMAGE, *SCORER)),
        ("score", pa.float64()),
        ("error", pa.string()),
        ("parts", pa.map_(pa.string(), pa.float64())),
    ]
)
Row = dict[str, Any]
key_of = itemgetter(*IMAGE, *SCORER)


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

    Under torchrun the processes share the work; each writes beside `out`, and the first one gathers.

    Args:
        images: folder with the `samples.jsonl` of `generate`, images or clips; JSONL or parquet with `image` and
            `prompt` a row; preference data of any format, all of whose candidates are scored; or prepared images.
        scorers: their specs, such as `clip:ViT-B-32:laion400m_e32` or `oracle`.
        out: JSONL file to append to, or a .parquet: image, sha256 (of the file), prompt, scorer, version, score and
            parts; for an image that cannot be read `error` instead of a score. What it already holds is not scored
            again: delete a line to repeat it. Another image under the same name is another image.
        batch_size: images at a time.
        precision: "bf16" or "fp16" runs the networks under autocast, and says so in the version.
        device: default: the GPU if there is one.

    Raises:
        UserError: a list, line, scorer or device that cannot be used.
    """
    check_counts(batch_size=batch_size)
    check_precision(precision)
    crew = Crew()
    place = pick_device(device)
    entries, total = images_of(images)
    target = None if out is None else Path(out).expanduser().resolve()  # a link stays one
    if target is not None and (target.suffix not in (JSONL, PARQUET) or target.is_dir()):
        raise UserError(f"{target}: expected a file that ends in {JSONL} or {PARQUET}")
    with nullcontext() if target is None else output_lock(target, file=True, first=crew.first):
        if target is not None and crew.first:
            _gather(target)
        crew.wait()
        done = {} if target is None else {key_of(row): row for row in _read(target)}
        crew.wait()  # until all have read it, and nobody takes a line in the making for one that was cut off
        judges = [Judge(scorer.to(place), torch.device(place).type, precision) for scorer in build_scorers(scorers)]
        journal = None if target is None else _journal(target, crew.rank)
        totals = {judge.scorer.name: [0.0, 0, 0] for judge in judges}  # sum, scored, not scored
        with tqdm(total=total, unit="img", disable=not (progress and crew.first)) as bar:
            for rows in _batches(judges, entries, done, crew, batch_size, bar):
                new = [row for row in rows if key_of(row) not in done]
                if journal is not None and new:
                    with open(journal, "a", encoding="utf-8") as lines:
                        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                for row in rows:
                    count = totals[row["scorer"]]
                    if "error" in row:
                        count[2] += 1
                    elif row.get("score") is not None:
                        count[0], count[1] = count[0] + row["score"], count[1] + 1
        crew.wait()
        if target is not None and crew.first:
            _gather(target)
    return _summary(crew.summed(totals), crew.first)


@dataclass(frozen=True)
class Judge:
    """A scorer, on what, and in which precision."""

    scorer: Scorer
    device: str
    precision: str

    @cached_property
    def named(self) -> tuple[str, str]:
        """Name and version of its numbers, which also depend on rounding and on how images are decoded."""
        with self.autocast():
            return self.scorer.name, f"{self.scorer.version}{rounding()}, {DECODER}"

    def autocast(self) -> torch.autocast:
        """How its networks run."""
        return torch.autocast(self.device, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def refusal(self, prompt: str) -> str:
        """Why this prompt cannot be judged, or nothing."""
        with self.autocast():
            return unscorable([self.scorer], prompt)

    @torch.no_grad()
    def __call__(self, media: Sequence[Any], prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores and parts of images, or of one clip."""
        with self.autocast():
            if isinstance(media[0], Tensor):
                return self.scorer.judge(media[0].unsqueeze(0).float() / 255, prompts)
            return self.scorer.judge_images(media, prompts)


class Crew:
    """The processes that torchrun started, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.first = self.rank == 0
        if self.world > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=not torch.accelerator.is_available())

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            self.state.wait_for_everyone()

    def summed(self, totals: dict[str, list[float]]) -> dict[str, list[float]]:
        """The sums over all processes."""
        if self.world == 1:
            return totals
        from accelerate.utils import gather_object

        everyone = gather_object([totals])
        return {name: [sum(one[name][i] for one in everyone) for i in range(3)] for name in totals}


def _batches(
    judges: Sequence[Judge],
    entries: Iterator[Entry],
    done: dict[Any, Row],
    crew: Crew,
    batch_size: int,
    bar: tqdm[Any],
) -> Iterator[list[Row]]:
    """The rows of each batch that is this process's."""
    batches = iter(lambda: list(islice(entries, batch_size)), [])
    with ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as pool:
        for number, batch in enumerate(batches):
            if number % crew.world == crew.rank:
                yield _score_batch(judges, batch, done, pool)
            bar.update(len(batch))


def _score_batch(
    judges: Sequence[Judge], entries: Sequence[Entry], done: dict[Any, Row], pool: ThreadPoolExecutor
) -> list[Row]:
    """A row for each scorer and image: what an earlier run wrote of it, or a new one."""
    subjects = list(pool.map(attrgetter(*IMAGE), entries))  # which hashes the files
    wanted = [i for i, about in enumerate(subjects) if any((*about, *judge.named) not in done for judge in judges)]
    loaded = dict(zip(wanted, pool.map(_load, [entries[i] for i in wanted]), strict=True))  # the others stay closed
    rows = []
    for judge in judges:
        keys = [(*about, *judge.named) for about in subjects]
        heads = [dict(zip((*IMAGE, *SCORER), key, strict=True)) for key in keys]
        rows += [done[key] for key in keys if key in done]
        todo = [i for i, key in enumerate(keys) if key not in done]
        why_not = {i: loaded[i] if isinstance(loaded[i], str) else judge.refusal(entries[i].prompt) for i in todo}
        rows += [{**heads[i], "error": why} for i, why in why_not.items() if why]
        usable = [i for i in todo if not why_not[i]]
        images = [i for i in usable if isinstance(loaded[i], Image.Image)]
        for some in (images, *([i] for i in usable if isinstance(loaded[i], Tensor))):
            if not some:
                continue
            try:
                with memory_for(len(some)):
                    total, parts = judge([loaded[i] for i in some], [entries[i].prompt for i in some])
            except ScorerError as error:  # its rows are the batch's
                raise UserError(f"{entries[some[0]].image} ... {entries[some[-1]].image}: {error}") from error
            for place, i in enumerate(some):
                values = {name: number(part[place].item()) for name, part in parts.items()}
                told = {"parts": values} if values else {}
                rows.append({**heads[i], "score": number(total[place].item()), **told})
    return rows


def _load(entry: Entry) -> Any:
    """The image or clip, or why there is none."""
    if entry.error:
        return entry.error
    try:
        if isinstance(entry.media, Path) and is_clip(entry.media):
            return whole_clip(entry.media)
        return decode(entry.media)
    except ImageError as error:
        return str(error)


def number(value: float) -> float | None:
    """JSON has no NaN: null stands for "does not apply"."""
    return value if math.isfinite(value) else None


def _journal(target: Path, rank: int) -> Path:
    """Where a process writes as it goes: the file itself, or one beside it that is gathered in the end."""
    if rank == 0 and target.suffix != PARQUET:
        return target
    return target.with_name(f".{target.name}.{rank}.jsonl")


def _gather(target: Path) -> None:
    """Move what the processes, of this run or of one that was stopped, wrote beside `target` into it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = sorted(target.parent.glob(f".{escape(target.name)}.*.jsonl"))
    rows = _read(target)
    have = {key_of(row) for row in rows}  # all, where a run was killed between writing and unlinking
    new = [row for part in parts for row in _lines(part) if key_of(row) not in have]
    if new and target.suffix == PARQUET:
        temporary = target.with_name(f".{target.name}.tmp")
        table = [{**row, "parts": list((row.get("parts") or {}).items()) or None} for row in rows + new]
        pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), temporary)
        temporary.replace(target)
    elif new:
        with open(target, "a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
    for part in parts:
        part.unlink()


def _read(target: Path) -> list[Row]:
    if target.suffix != PARQUET:
        return list(_lines(target))
    if not target.is_file():
        return []
    try:
        table = pq.read_table(target)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{target}: not a readable parquet file: {error}") from error
    if not {*IMAGE, *SCORER} <= set(table.schema.names):
        raise UserError(f"{target}: not a file of scores; choose another output file")
    rows = []
    for row in table.to_pylist():
        row["parts"] = dict(row["parts"] or [])
        rows.append({key: value for key, value in row.items() if value not in (None, {}) or key in IMAGE})
    return rows


def _lines(file: Path) -> Iterator[Row]:
    """The rows of a JSONL of scores; a last line that its writer was killed in is cut off."""
    if not file.is_file():
        return
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    for number, line in enumerate(whole.decode().split("\n")[:-1], 1):
        row = parse(line, f"{file}, line {number}")
        if not {*IMAGE, *SCORER} <= row.keys():
            raise UserError(f"{file}, line {number}: not a line of scores; choose another output file")
        yield row
    if len(whole) < len(text):
        with open(file, "rb+") as stream:
            stream.truncate(len(whole))


def _summary(totals: dict[str, list[float]], say: bool) -> dict[str, float]:
    means = {}
    for name, (sum_of, count, unreadable) in totals.items():
        means[name] = sum_of / count if count else math.nan
        note = f"; {unreadable:.0f} could not be scored" if unreadable else ""
        if say:
            print(f"{name}: mean {means[name]:.4f} over {count:.0f} images{note}")
    return means
