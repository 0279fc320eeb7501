"""Scores of pictures on disk, one JSONL line a picture and scorer; an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from t2i_align.errors import UserError
from t2i_align.generate import LIST, check_sampling
from t2i_align.sources import build_scorers, memory_for, pick_device

if TYPE_CHECKING:
    from reward_scorers import Scorer

IMAGE_KEYS = ("image", "file")  # a JSONL of one's own, and what `generate` writes
PICTURE, SCORER = ("image", "sha256", "prompt"), ("scorer", "version")  # what a line is about, and who says it


@dataclass(frozen=True)
class Entry:
    """A picture to score. `image`: as the list names it; `path`: where that is."""

    image: str
    path: Path
    prompt: str

    @cached_property
    def sha256(self) -> str | None:
        """Of the file: every `generate` gives its pictures the same names. None if it cannot be read."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError:
            return None


def score(
    pictures: str | Path,
    scorers: str | Sequence[str | Scorer],
    out: str | Path | None = None,
    *,
    batch_size: int = 8,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Score pictures against their prompts; prints and returns each scorer's mean.

    Args:
        pictures: folder with the `samples.jsonl` of `generate`, or a JSONL file with `image` (relative to it) and
            `prompt` a line.
        scorers: their specs, such as `clip:ViT-B-32:laion400m_e32` or `oracle`.
        out: JSONL file to append to: image, sha256 (of the file), prompt, scorer, version, score and parts; for a
            picture that cannot be read `error` instead of a score. What it already holds is not scored again: delete
            a line to repeat it. Another picture under the same name is another picture.
        batch_size: pictures at a time.
        device: default: the GPU if there is one.

    Raises:
        UserError: a list, line, scorer or device that cannot be used.
    """
    check_sampling(batch_size=batch_size)
    place = pick_device(device)
    entries = read_list(Path(pictures))
    target = None if out is None else Path(out)
    rows = [] if target is None else _continue(target)
    built = build_scorers(scorers)
    picture_of = attrgetter(*PICTURE)
    wanted = {picture_of(entry) for entry in entries}
    done = {itemgetter(*PICTURE, *SCORER)(row) for row in rows}
    results = [row for row in rows if itemgetter(*PICTURE)(row) in wanted]
    for scorer in built:
        scorer.to(place)
        todo = [entry for entry in entries if (*picture_of(entry), scorer.name, scorer.version) not in done]
        with tqdm(total=len(todo), unit="img", desc=scorer.name, disable=not progress) as bar:
            for start in range(0, len(todo), batch_size):
                new = list(_score_batch(scorer, todo[start : start + batch_size]))
                results += new
                if target is not None:
                    with open(target, "a") as lines:
                        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                bar.update(len(new))
    return _summary(built, results)


def read_list(source: Path) -> list[Entry]:
    """The pictures of a folder's `samples.jsonl` or of a JSONL file, each line checked; opens no picture."""
    file = source / LIST if source.is_dir() else source
    if not file.is_file():
        expected = f"a folder with {LIST}" if source.is_dir() else f"a JSONL file or a folder with {LIST}"
        raise UserError(f"{file}: no such file; expected {expected}")
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        row = _parse(line, f"{file}, line {number}")
        key = next((key for key in IMAGE_KEYS if key in row), None)
        if key is None or not isinstance(row[key], str):
            raise UserError(f"{file}, line {number}: expected a path under 'image', found the keys {', '.join(row)}")
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UserError(f"{file}, line {number}: expected text under 'prompt', found {row.get('prompt')!r}")
        entries.append(Entry(row[key], file.parent / row[key], row["prompt"]))
    if not entries:
        raise UserError(f"{file}: no picture listed")
    return entries


def open_picture(path: Path) -> Image.Image:
    """A picture with its pixels loaded.

    Raises:
        OSError, SyntaxError, ValueError: whatever PIL says of a missing, truncated or foreign file.
    """
    with Image.open(path) as picture:
        picture.load()
        return picture.copy() if getattr(picture, "n_frames", 1) == 1 else picture


def _score_batch(scorer: Scorer, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    judge = {"scorer": scorer.name, "version": scorer.version}
    readable, pictures = [], []
    for entry in entries:
        head = {key: getattr(entry, key) for key in PICTURE} | judge
        try:
            picture = open_picture(entry.path)
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"animated, {frames} frames")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield {**head, "error": f"{type(error).__name__}: {error}"}
            continue
        readable.append(head)
        pictures.append(picture)
    if not pictures:
        return
    with memory_for(len(pictures)):
        total, parts = scorer.judge_images(pictures, [head["prompt"] for head in readable])
    for row, head in enumerate(readable):
        values = {name: number(part[row].item()) for name, part in parts.items()}
        yield {**head, "score": number(total[row].item()), **({"parts": values} if values else {})}


def number(value: float) -> float | None:
    """JSON has no NaN: null stands for "does not apply"."""
    return value if math.isfinite(value) else None


def _continue(target: Path) -> list[dict[str, Any]]:
    """The lines an earlier run wrote; a last line that it was killed in is cut off."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        return []
    text = target.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    rows = [_parse(line, f"{target}, line {n}") for n, line in enumerate(whole.decode().split("\n")[:-1], 1)]
    for n, row in enumerate(rows, 1):
        if not {*PICTURE, *SCORER} <= row.keys():
            raise UserError(f"{target}, line {n}: not a line of scores; choose another output file")
    if len(whole) < len(text):
        with open(target, "rb+") as stream:
            stream.truncate(len(whole))
    return rows


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _summary(scorers: Sequence[Scorer], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    means = {}
    for scorer in scorers:
        own = [row for row in rows if row["scorer"] == scorer.name and row["version"] == scorer.version]
        values = [row["score"] for row in own if row.get("score") is not None]
        means[scorer.name] = sum(values) / len(values) if values else math.nan
        skipped = sum("error" in row for row in own)
        note = f"; {skipped} could not be read" if skipped else ""
        print(f"{scorer.name}: mean {means[scorer.name]:.4f} over {len(values)} pictures{note}")
    return means
