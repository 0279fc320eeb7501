"""The main job from end to end: bundled model and preferences -> LoRA -> held-out win rate -> report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_align import config as configuration
from t2i_align.errors import UserError

CONFIG = Path(__file__).parent / "assets" / "quickstart.yaml"
MARKER = ".quickstart"  # a folder that holds this file was made by a quickstart, and the next one may replace it
TEST_SEED = 90_000  # the comparison's own; neither the pairs nor the tuning of the configuration used it


def quickstart(
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs/quickstart",
    prompts: Sequence[str] | str = "testbed:test",
    progress: bool = True,
) -> dict[str, Any]:
    """Align, compare with the base on prompts that training never saw, and write `result.json` and `report.html`.

    Args:
        overrides: `key=value` changes to the bundled configuration.
        output: folder to write to; what an earlier quickstart left there is replaced.
        prompts: what to compare on.

    Returns:
        What `result.json` holds: the comparison's numbers, with `seconds` for the whole job.

    Raises:
        UserError: an override that cannot be used, or an output folder that holds something else.
    """
    started = time.monotonic()
    folder = Path(output)
    config = configuration.load(CONFIG, [f"output_dir={folder / 'run'}", *overrides])
    claim(folder)
    # Imported here: both load torch and diffusers, which takes seconds that belong to the job.
    from t2i_align.evaluation.compare import evaluate
    from t2i_align.run import align

    run = align(config, progress=progress)
    trained = time.monotonic()
    evaluate(
        base=config.model.path,
        aligned=run.weights,
        prompts=prompts,
        scorers=["oracle"],
        out=folder,
        seed=TEST_SEED,
        steps=config.validation.steps,
        guidance=config.validation.guidance,
        progress=progress,
    )
    file = folder / "result.json"
    result = json.loads(file.read_text())
    result["seconds"] = round(time.monotonic() - started, 1)
    result["seconds_training"] = round(trained - started, 1)
    result["training_steps"], result["training_seed"] = run.steps, config.train.seed
    file.write_text(json.dumps(result, indent=2) + "\n")
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


def table(result: Mapping[str, Any], output: str | Path) -> str:
    """The result in a few lines for the terminal."""
    rows = [_row("win rate", result["win_rate"], result["win_rate_ci"])]
    rows += [
        _row(name, result[f"{name}_win_rate"], result[f"{name}_win_rate_ci"]) for name in ("faithfulness", "quality")
    ]
    return "\n".join(
        [
            "",
            "aligned against base, same prompts and seeds            95 % interval",
            *rows,
            f"  mean score    {result['mean_before']:.3f} -> {result['mean_after']:.3f}",
            "",
            f"{result['seconds']:.0f} seconds in all. Report with pictures: {Path(output) / 'report.html'}",
        ]
    )


def _row(name: str, rate: float, interval: Sequence[float]) -> str:
    return f"  {name:<13} {rate:6.1%}                                  {interval[0]:.1%} to {interval[1]:.1%}"
