"""The main job from end to end: bundled model and preferences -> LoRA -> held-out win rate -> report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_align import config as configuration
from t2i_align.cli.streams import Stream
from t2i_align.errors import UserError
from t2i_align.utils.files import atomic_folder, holds, output_lock, write_json, write_text

if TYPE_CHECKING:
    from t2i_align.evaluation.result import Evaluation

CONFIG = Path(__file__).parent / "assets" / "quickstart.yaml"
MARKER = ".quickstart"  # lists what a quickstart wrote to its folder, which the next one may replace
TEST_SEED = 90_000  # of the comparison alone; neither the pairs nor the tuning of the configuration used it
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
        overrides: `key=value` changes to the bundled configuration. Without `train.precision` among them it trains and
            draws in bf16 on a CPU with instructions for it, and without `train.attention` it trains on a CPU with plain
            matrix products where the model has them.
        output: folder to write to; what an earlier quickstart left there is replaced when this one is complete.
        prompts: what to compare on: a file of prompts, `testbed:test`, or a list.
        count: compare on the first so many prompts.

    Returns:
        The comparison; `seconds` in its settings is the whole job's time.

    Raises:
        UserError: an override that cannot be used, or an output folder that holds something else.
    """
    started = time.monotonic()
    if any(override.partition("=")[0] == "output_dir" for override in overrides):
        raise UserError("output_dir: the quickstart's run lies in its own output folder; choose that with --output")
    if count < 1:
        raise UserError(f"count must be a whole number of at least 1, found {count}")
    folder = Path(output).expanduser()
    # The latents outlive the folder that is replaced: they are the same next time.
    paths = [f"output_dir={folder / 'run'}", f"data.cache_dir={folder.parent / 'cache'}"]
    model = configuration.load(CONFIG, [*paths, *overrides]).model  # a wrong key is answered before torch is loaded
    with replacing(folder) as temporary:
        # Imported here: these load torch and diffusers, which takes seconds that belong to the job.
        import torch

        import pipelines
        from t2i_align.evaluation.compare import RESULT, evaluate
        from t2i_align.inference.models import resolve_model
        from t2i_align.inference.options import cpu_computes_bf16, resolve_prompts
        from t2i_align.training.output import write_settings
        from t2i_align.training.progress import LOG_FILE
        from t2i_align.training.report import write_report
        from t2i_align.training.run import align
        from t2i_align.utils.logging import silence_libraries

        silence_libraries()
        fast = []
        if not torch.accelerator.is_available():
            family = pipelines.family_of(resolve_model(model.path), model.revision)
            fast += ["train.precision=bf16"] * cpu_computes_bf16()
            fast += ["train.attention=math"] * (family is not None and "math" in family.attention_backends)
        config = configuration.load(CONFIG, [*paths, *fast, *overrides])
        compared = resolve_prompts(prompts)[:count]
        with _named(temporary / ".run", folder / "run"):
            run = align(replace(config, output_dir=str(temporary / ".run")), progress=progress)
        result = evaluate(
            base=config.model.path,
            aligned=run.weights,
            prompts=compared,
            scorers=["oracle"],
            out=temporary,
            seed=TEST_SEED,
            steps=config.validation.steps,
            guidance=config.validation.guidance,
            batch_size=BATCH_SIZE,
            precision=config.train.precision,
            keep_base=folder.parent / "cache" / "base",
            progress=progress,
            settings={
                "aligned": str(folder / "run" / run.weights.relative_to(run.output_dir)),  # where it will lie
                "seconds_training": round(time.monotonic() - started, 1),
                "training_steps": run.steps,
                "training_seed": config.train.seed,
            },
        )
        seconds = round(time.monotonic() - started, 1)
        result = replace(result, out=folder, settings=result.settings | {"seconds": seconds})
        write_json(temporary / RESULT, result.to_json())
        write_settings(run.output_dir, configuration.to_mapping(config))
        write_report(run.output_dir)
        log = run.output_dir / LOG_FILE
        write_text(log, log.read_text(encoding="utf-8").replace(str(run.output_dir), str(folder / "run")))
        run.output_dir.rename(temporary / "run")
    return result


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` on success; otherwise an earlier quickstart's result stays.

    Raises:
        UserError: `folder` holds something that no quickstart wrote, cannot be replaced, or is being written.
    """
    if os.path.ismount(folder.resolve()):
        raise UserError(f"{folder}: this is a mount point, which cannot be replaced; choose a folder in it as --output")
    with output_lock(folder, file=True), atomic_folder(folder) as temporary:
        if holds(folder, "quickstart", MARKER, ignored=()):  # it is replaced as a whole
            own = {MARKER, *(folder / MARKER).read_text(encoding="utf-8").splitlines()}
            if foreign := sorted(_content(folder) - own):
                reason = "was not written by the quickstart, which would remove it"
                raise UserError(f"{folder / foreign[0]}: {reason}; move it, or choose another --output")
        yield temporary
        write_text(temporary / MARKER, "\n".join(sorted(_content(temporary))) + "\n")


@contextmanager
def _named(temporary: Path, final: Path) -> Iterator[None]:
    """Inside the block, what is printed names the folder that the temporary one becomes."""

    class Named(Stream):
        def write(self, text: str) -> int:
            return super().write(text.replace(str(temporary), str(final)))

    with redirect_stdout(Named(sys.stdout)), redirect_stderr(Named(sys.stderr)):
        yield


def _content(folder: Path) -> set[str]:
    """The paths of all that is in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
