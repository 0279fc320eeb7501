"""The main job from end to end: bundled model and preferences -> LoRA -> held-out win rate -> report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_align import config as configuration
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from t2i_align.evaluation.result import Evaluation

CONFIG = Path(__file__).parent / "assets" / "quickstart.yaml"
MARKER = ".quickstart"  # a folder that holds this file was made by a quickstart, and the next one may replace it
TEST_SEED = 90_000  # the comparison's own; neither the pairs nor the tuning of the configuration used it


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
        output: folder to write to; what an earlier quickstart left there is replaced.
        prompts, count: what to compare on, the first so many.

    Returns:
        The comparison; `seconds` in its settings is the whole job's time.

    Raises:
        UserError: an override that cannot be used, or an output folder that holds something else.
    """
    started = time.monotonic()
    folder = Path(output)
    config = configuration.load(CONFIG, [f"output_dir={folder / 'run'}", *overrides])
    claim(folder)
    # Imported here: these load torch and diffusers, which takes seconds that belong to the job.
    from t2i_align.console import quiet
    from t2i_align.evaluation.compare import evaluate
    from t2i_align.run import align, write_atomically
    from t2i_align.sources import resolve_prompts

    quiet()
    run = align(config, progress=progress)
    trained = time.monotonic()
    result = evaluate(
        base=config.model.path,
        aligned=run.weights,
        prompts=resolve_prompts(prompts)[:count],
        scorers=["oracle"],
        out=folder,
        seed=TEST_SEED,
        steps=config.validation.steps,
        guidance=config.validation.guidance,
        progress=progress,
    )
    whole = {
        "seconds": round(time.monotonic() - started, 1),
        "seconds_training": round(trained - started, 1),
        "training_steps": run.steps,
        "training_seed": config.train.seed,
    }
    result = replace(result, settings=result.settings | whole)
    write_atomically(folder / "result.json", json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
    return result


def claim(folder: Path) -> None:
    """Empty the output folder if an earlier quickstart made it, and mark it; refuse one that holds anything else."""
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder}: this is a file; the quickstart needs a folder")
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UserError(f"{folder}: this folder holds something that no quickstart wrote; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("The next quickstart replaces this folder.\n")
