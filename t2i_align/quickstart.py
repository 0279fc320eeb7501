"""The main job from end to end: bundled model and preferences -> LoRA -> held-out win rate -> report."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_align import config as configuration
from t2i_align.errors import UserError
from t2i_align.utils.files import write_text

if TYPE_CHECKING:
    from t2i_align.evaluation.result import Evaluation

CONFIG = Path(__file__).parent / "assets" / "quickstart.yaml"
MARKER = ".quickstart"  # a folder that holds this file was made by a quickstart, and the next one may replace it
COMPLETE = "complete"  # what becomes the output folder, while it is made
TEST_SEED = 90_000  # the comparison's own; neither the pairs nor the tuning of the configuration used it
BATCH_SIZE = 64  # images of 64 x 64 pixels drawn at a time


def quickstart(
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs/quickstart",
    prompts: str | Path | Sequence[str] = "testbed:test",
    count: int = 256,
    progress: bool = True,
) -> Evaluation:
    """Align, compare with the base on prompts that training never saw, and write `result.json` and `report.html`.

    Args:
        overrides: `key=value` changes to the bundled configuration.
        output: folder to write to; what an earlier quickstart left there is replaced when this one is complete.
        prompts: what to compare on: a text file with one prompt per line, `testbed:test`, or a list.
        count: compare on the first so many prompts.

    Returns:
        The comparison; `seconds` in its settings is the whole job's time.

    Raises:
        UserError: an override that cannot be used, or an output folder that holds something else.
    """
    started = time.monotonic()
    if any(override.partition("=")[0] == "output_dir" for override in overrides):
        raise UserError("output_dir: the quickstart's run lies in its own output folder; choose that with --output")
    folder = Path(output).expanduser()
    config = configuration.load(CONFIG, [f"output_dir={folder / 'run'}", *overrides])
    # The latents outlive the folder that is replaced: they are the same next time.
    data = replace(config.data, cache_dir=config.data.cache_dir or str(folder.parent / "cache"))
    config = replace(config, data=data)
    with replacing(folder) as temporary:
        # Imported here: these load torch and diffusers, which takes seconds that belong to the job.
        from t2i_align.evaluation.compare import RESULT, evaluate
        from t2i_align.inference.prompts import resolve_prompts
        from t2i_align.training.output import write_settings
        from t2i_align.training.run import align
        from t2i_align.utils.logging import silence_libraries

        silence_libraries()
        texts = resolve_prompts(prompts)[:count]
        run = align(replace(config, output_dir=str(temporary / "run")), progress=progress)
        trained = time.monotonic()
        training = {
            "aligned": str(folder / run.weights.relative_to(temporary)),  # where it will lie
            "seconds_training": round(trained - started, 1),
            "training_steps": run.steps,
            "training_seed": config.train.seed,
        }
        result = evaluate(
            base=config.model.path,
            aligned=run.weights,
            prompts=texts,
            scorers=["oracle"],
            out=temporary / COMPLETE,
            seed=TEST_SEED,
            steps=config.validation.steps,
            guidance=config.validation.guidance,
            batch_size=BATCH_SIZE,
            progress=progress,
            settings=training,
        )
        whole = {"seconds": round(time.monotonic() - started, 1)}
        result = replace(result, out=folder, settings=result.settings | whole)
        values = json.dumps(result.to_json(), indent=2, ensure_ascii=False)
        write_text(temporary / COMPLETE / RESULT, values + "\n")
        write_settings(run.output_dir, configuration.to_mapping(config))
        run.output_dir.rename(temporary / COMPLETE / "run")
    return result


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, whose COMPLETE takes its place when the block has ended well.

    Whatever else happens, what an earlier quickstart left in `folder` stays, and nothing is left beside it.

    Raises:
        UserError: `folder` holds something that no quickstart wrote, or cannot be replaced.
    """
    place = folder.resolve()
    if place.exists() and not place.is_dir():
        raise UserError(f"{folder}: this is a file; the quickstart needs a folder")
    if place.is_dir() and any(place.iterdir()) and not (place / MARKER).is_file():
        raise UserError(f"{folder}: this folder holds something that no quickstart wrote; choose another --output")
    if os.path.ismount(place):
        raise UserError(f"{folder}: this is a mount point, which cannot be replaced; choose a folder in it as --output")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-unfinished-", dir=place.parent) as name:
        temporary = Path(name)
        yield temporary
        (temporary / COMPLETE / MARKER).write_text("The next quickstart replaces this folder.\n")
        if place.exists():
            place.rename(temporary / "earlier")
        (temporary / COMPLETE).rename(place)
