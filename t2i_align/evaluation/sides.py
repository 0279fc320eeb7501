"""The two sides of an evaluation: their samples and scores, batch by batch, which continue after a kill.

FOLDER/.writing_evaluation-SETTINGS/SIDE-WEIGHTS.jsonl    a line per sample: its sha256 and each scorer's numbers
                                    SIDE-ROW.png          what the report may show of it
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from t2i_align.data.media import save_clip
from t2i_align.evaluation.report import keep
from t2i_align.evaluation.result import number
from t2i_align.inference.generate import LIST, Sample, in_background, judge, sample, save_image
from t2i_align.inference.options import memory_for
from t2i_align.utils.files import WRITING, append_line, json_lines, whole_lines, write_text
from t2i_align.utils.whole import is_whole

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from reward_scorers import Scorer

WORK = f"{WRITING}evaluation-"
Row = dict[str, Any]  # a line of pairs.jsonl: one prompt and seed, and at last both sides' scores
Columns = dict[str, NDArray[np.float64]]  # a score (`TOTAL`) and its parts by name -> [N], NaN where not applicable


def measure(
    side: str,
    pipeline: TrainablePipeline,
    weights: str,
    rows: Sequence[Row],
    scorers: Sequence[Scorer],
    work: Path,
    bar: tqdm,
    *,
    batch_size: int,
    fps: float,
    saved: Path | None = None,
    **options: Any,
) -> list[Row]:
    """The sha256 of each row's sample and its scores; what an earlier attempt has done is taken from its file, up to
    the first row whose image is lost.

    Args:
        side: "base" or "aligned". weights: what identifies its weights.
        work: folder for these numbers and the report's images. saved: for the samples themselves, if they are kept.
        options: of `sample`.
    """
    file = work / f"{side}-{weights}.jsonl"
    for other in {*work.glob(f"{side}-*.jsonl")} - {file}:  # the weights have changed meanwhile
        other.unlink()
    done, ending = whole_lines(file), ".mp4" if pipeline.video else ".png"

    def kept(row: int) -> bool:
        own = saved is None or is_whole(saved / side / f"{row:05d}{ending}")
        return own and is_whole(work / f"{side}-{row:06d}{ending}")

    if (whole := next((row for row in range(len(done)) if not kept(row)), len(done))) < len(done):
        done = done[:whole]
        write_text(file, json_lines(done))
    bar.set_description(side)
    bar.update(len(done))

    def store(start: int, samples: Sequence[Sample], records: Sequence[Row]) -> None:
        for row, one in enumerate(samples, start):
            keep(one, work, side, row, fps)
            if saved:
                save_sample(one, saved / side, row, fps)
        append_line(file, *records)  # after its images

    with in_background() as run, memory_for(batch_size):
        for start in range(len(done), len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts, seeds = [row["prompt"] for row in part], [row["seed"] for row in part]
            samples = sample(pipeline, prompts, seeds, batch_size=batch_size, **options)
            new: list[Row] = [{"sha256": _sha256(one), "scores": {}} for one in samples]
            for scorer in scorers:
                for place, parts in judge(scorer, samples, prompts):
                    new[place]["scores"][scorer.name] = {name: number(value) for name, value in parts.items()}
            for record, prompt in zip(new, prompts, strict=True):
                record["cut"] = [scorer.name for scorer in scorers if prompt in scorer.cut]
            run(store, start, samples, new)
            done += new
            bar.update(len(part))
    return done


def copy_side(side: str, source: Path, folder: Path) -> None:
    """Copy what `measure` has left of a side, if anything, from one folder to another."""
    for file in source.glob(f"{side}-*"):
        shutil.copyfile(file, folder / file.name)


def save_sample(sample: Sample, folder: Path, row: int, fps: float) -> None:
    """Write a sample as `generate` does, numbered by its row."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(sample, Tensor):
        save_clip(sample, folder / f"{row:05d}.mp4", fps)
    else:
        save_image(sample, folder / f"{row:05d}.png")


def write_lists(samples: Path, rows: Sequence[Row]) -> None:
    """Write each side's samples.jsonl, which `score` reads, beside its samples."""
    for folder in samples.iterdir():
        files = {int(file.stem): file.name for file in folder.iterdir()}
        lines = [{"prompt": row["prompt"], "seed": row["seed"], "file": files[i]} for i, row in enumerate(rows)]
        write_text(folder / LIST, json_lines(lines))


def _sha256(sample: Sample) -> str:
    content = sample.cpu().numpy().tobytes() if isinstance(sample, Tensor) else sample.tobytes()
    return hashlib.sha256(content).hexdigest()


def columns(records: Sequence[Row], scorer: str) -> Columns:
    """A scorer's numbers of one side by name, as arrays."""
    numbers = [record["scores"][scorer] for record in records]
    names = dict.fromkeys(name for parts in numbers for name in parts)
    return {name: np.array([parts.get(name) for parts in numbers], dtype=np.float64) for name in names}
