"""Compare two models on the same prompts and seeds: win rate and mean change with confidence intervals."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2i_align.conditioning.adapter import files_of
from t2i_align.config import ModelConfig
from t2i_align.data.loader import digest as digest_of
from t2i_align.data.spec import normalise
from t2i_align.errors import UserError, unknown
from t2i_align.evaluation.report import render
from t2i_align.evaluation.result import Evaluation, ScorerResult, number
from t2i_align.evaluation.sides import WORK, Row, columns, copy_side, measure, write_lists
from t2i_align.evaluation.stats import Ties, check_policy, compare, outcomes
from t2i_align.inference.generate import LIST, TOTAL, sample_seed
from t2i_align.inference.models import (
    Aligned,
    adapter_on,
    is_checkpoint,
    load_pipeline,
    resolve_aligned,
    resolve_base,
    resolve_model,
)
from t2i_align.inference.options import build_scorers, check_options, resolve_prompts, use_precision
from t2i_align.inference.users import resolve_user, user_on
from t2i_align.utils.files import atomic_folder, check_own, holds, json_lines, json_text, output_lock, write_files
from t2i_align.utils.logging import silent
from t2i_align.utils.progress import progress_bar
from t2i_align.utils.tensors import tensors_hash

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from reward_scorers import Scorer

RESULT, PAIRS, REPORT, SAMPLES = "result.json", "pairs.jsonl", "report.html", "samples"


@silent
def evaluate(
    *,
    base: str | Path | TrainablePipeline | None = None,
    aligned: str | Path | TrainablePipeline,
    prompts: str | Path | Sequence[str],
    scorers: str | Sequence[str | Scorer],
    out: str | Path,
    seeds_per_prompt: int = 1,
    seed: int = 0,
    user: str | Path | None = None,
    users: str | Mapping[str, float] | None = None,
    user_scale: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    tie_margin: float | Mapping[str, float] | None = None,
    ties: Ties = "half",
    batch_size: int | None = None,
    images: int = 24,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    expert: str | None = None,
    prediction_type: str | None = None,
    segments: int | None = None,
    precision: str = "fp32",
    device: str | None = None,
    save_samples: bool = False,
    keep_base: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Compare `aligned` with `base` and write `result.json`, `pairs.jsonl` and `report.html` to the folder `out`.

    Both sides draw each sample from the same seed, `sample_seed(seed, prompt index, k)`, whatever the batch size, and
    are scored as the 8-bit images that would be saved; clips as their 8-bit frames, before any video codec. The same
    call continues where an earlier one was stopped; the files are written at the very end.

    Args:
        base: path, Hub id, `testbed:sd`, or a loaded pipeline; None: the base of the training run `aligned` is from.
        aligned: a LoRA for the base (file, folder, Hub id, or the folder of a training run or of a step of it), or
            another model, which may be a loaded pipeline.
        scorers: their specs, or scorers; the first one gives the headline.
        out: folder for the result and the report.
        seeds_per_prompt: pairs per prompt. The intervals resample prompts, whatever this is.
        seed: first seed.
        fps: frames a second at which the report shows clips (default: the base's own).
        tie_margin: differences up to this are ties: one number, or one by scorer name (default: the scorer's own).
        ties: "half" counts a tie as half a win, "drop" leaves it out.
        images: pairs in the report: half of them drawn at random, the others the largest wins and losses.
        revision: branch, tag or commit of the base on the Hub (default: that of the training run `aligned` is from, if
            any; the same for variant, single_file_config, expert, prediction_type and segments).
        save_samples: also keep all samples, in `samples/base` and `samples/aligned`, for `score` with other scorers.
        keep_base: folder that keeps the base's numbers and images for the next comparison with it, on the same prompts,
            seeds, scorers and options, which then draws the aligned side alone.
        force: replace the evaluation that `out` holds.
        settings: further entries for `result.json`, such as how the model was trained; they win over its own.

    Others as in `t2i_align.inference.generate.generate`, of the base and of an aligned model.

    Raises:
        UserError, PipelineError: anything above that cannot be used, or an `out` that holds something; nothing was
            generated then.
    """
    import pipelines  # with diffusers, whose import takes seconds
    from reward_scorers.weights import digest

    started = time.monotonic()
    texts = resolve_prompts(prompts)
    counts = {"steps": steps, "height": height, "width": width, "frames": frames, "batch_size": batch_size}
    counts["segments"] = segments
    check_options(precision, fps, seeds_per_prompt=seeds_per_prompt, **counts)
    if images < 0:
        raise UserError(f"images must be 0 or more, found {images}")
    other = resolve_aligned(aligned) if isinstance(aligned, str | Path) else Aligned("model", aligned.source)
    served = resolve_user(other, user, users, user_scale)
    if base is None and not isinstance(aligned, str | Path):
        raise UserError("base: none given, and a loaded pipeline does not tell which model it was aligned from")
    version = {"revision": revision, "variant": variant, "single_file_config": single_file_config}
    version |= {"expert": expert, "prediction_type": prediction_type}
    loaded = not isinstance(base, str | Path | None)
    if segments and (loaded or not isinstance(aligned, str | Path)):
        raise UserError("segments: only for models that are given by their paths; a loaded pipeline has its own way")
    model = None if loaded else resolve_base(base, other, segments, **version)  # type: ignore[arg-type]
    folder = Path(out).expanduser()
    _check_free(folder, force, save_samples)
    judges = build_scorers(scorers)
    margins = _margins(judges, tie_margin, ties)
    try:
        for scorer in judges:
            scorer.check_prompts(texts)
    except ValueError as error:
        raise UserError(str(error)) from error
    pipeline: TrainablePipeline
    pipeline = load_pipeline(model, precision, device) if model else base  # type: ignore[assignment]
    if not isinstance(aligned, str | Path):
        _check_media(pipeline.video, aligned.video, aligned.source)
    elif other.kind == "model":
        whole_path = resolve_base(None, other).path if is_checkpoint(other.path) else other.path
        if (family := pipelines.family_of(resolve_model(whole_path))) is not None:
            _check_media(pipeline.video, family.video, other.path)
    else:
        # Put it on and take it off again: one that does not fit should fail before the base has been sampled.
        with adapter_on(pipeline, other), user_on(pipeline, served, 1.0):
            pass
    for scorer in judges:
        scorer.to(pipeline.device)

    # Of the base, for both: two models that each took their own size would not share their noise.
    default_height, default_width = pipeline.default_size
    height, width, frames = height or default_height, width or default_width, frames or pipeline.default_frames
    pipeline.check_size(height, width, frames)
    steps, guidance, batch_size = pipeline.sampling(steps, guidance, batch_size)
    video, fps = pipeline.video, fps or pipeline.fps
    rows: list[Row] = [
        {"prompt": text, "prompt_index": index, "k": k, "seed": sample_seed(seed, index, k)}
        for index, text in enumerate(texts)
        for k in range(seeds_per_prompt)
    ]
    sampling: dict[str, Any] = {"steps": steps, "guidance": guidance, "height": height, "width": width}
    sampling["frames"] = frames
    autocast = use_precision(precision) if loaded else None
    origin: dict[str, Any] = asdict(model) if model else {"path": pipeline.source, **version}
    decisive = [origin, other.path, rows, sampling, precision, loaded, {s.name: s.recorded_version for s in judges}]
    kept = keep_base and Path(keep_base).expanduser() / digest_of([*decisive[:1], *decisive[2:]])
    decisive += [served.recorded] if served else []
    decisive += [SAMPLES] if save_samples else []
    adapter = None if other.kind == "model" else "-".join(map(digest, files_of(other.kind, other.path)))
    with output_lock(folder), progress_bar(total=2 * len(rows), unit="img", disable=not progress) as bar:
        _check_free(folder, force, save_samples)  # another run may have come and gone since the first check
        work = folder / f"{WORK}{digest_of(decisive)}"
        work.mkdir(exist_ok=True)
        what: Any = {"rows": rows, "scorers": judges, "work": work, "bar": bar, "batch_size": batch_size, "fps": fps}
        what |= sampling | {"saved": work / SAMPLES if save_samples else None}
        weights = tensors_hash(pipeline.denoiser.state_dict())
        if kept and not any(work.iterdir()):
            copy_side("base", kept, work)
        before = measure("base", pipeline, weights, **what, autocast=autocast)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(kept) as temporary:
                copy_side("base", work, temporary)
        if adapter:
            with adapter_on(pipeline, other), user_on(pipeline, served, guidance):
                whose = f"-{tensors_hash({'tokens': served.tokens(pipeline)})}" if served else ""
                after = measure("aligned", pipeline, f"{weights}-{adapter}{whose}", **what, autocast=autocast)
        elif not isinstance(aligned, str | Path):
            weights = tensors_hash(aligned.denoiser.state_dict())
            after = measure("aligned", aligned, weights, **what, autocast=autocast)
        else:
            del pipeline
            gc.collect()
            torch.cuda.empty_cache()
            whole = ModelConfig(
                path=other.path,
                single_file_config=origin["single_file_config"],
                segments=model.segments if model else None,
            )
            if Path(other.path).is_file():  # which may not say it either
                whole = replace(whole, prediction_type=origin["prediction_type"])
            pipeline = load_pipeline(whole, precision, device)
            _check_media(video, pipeline.video, other.path)  # a single file is known only once it is loaded
            after = measure("aligned", pipeline, tensors_hash(pipeline.denoiser.state_dict()), **what)
        bar.close()
        cut = {(name, row["prompt"]) for row, one in zip(rows, before, strict=True) for name in one["cut"]}
        recorded = {
            "base": origin.pop("path"),
            **origin,
            "aligned": str(aligned) if isinstance(aligned, str | Path) else aligned.source,
            "aligned_kind": other.kind,
            "adapter_sha256": adapter,
            "prompts": len(texts),
            "different_prompts": len({normalise(text) for text in texts}),
            "identical_pairs": sum(old["sha256"] == new["sha256"] for old, new in zip(before, after, strict=True)),
            "prompts_cut": {judge.name: sum(name == judge.name for name, _ in cut) for judge in judges},
            "samples": len(rows),
            "seeds_per_prompt": seeds_per_prompt,
            "seed": seed,
            "seeds": [row["seed"] for row in rows],
            "ties": ties,
            "tie_margin": margins[judges[0].name],
            **sampling,
            "fps": fps if video else None,
            **(served.recorded if served else {}),
            "precision": precision,
            "seconds": round(time.monotonic() - started, 1),
            **(settings or {}),
        }
        scores = {scorer.name: _compared(scorer, rows, before, after, margins[scorer.name], ties) for scorer in judges}
        result = Evaluation(out=folder, scorers=scores, settings=recorded)
        report = render(result.to_json(), rows, work, images)
        if _are_samples(folder / SAMPLES):  # of the evaluation that is replaced
            shutil.rmtree(folder / SAMPLES)
        if save_samples:
            write_lists(work / SAMPLES, rows)
            (work / SAMPLES).rename(folder / SAMPLES)
        write_files(folder, {REPORT: report, PAIRS: json_lines(rows), RESULT: json_text(result.to_json())})
        for unfinished in folder.glob(f"{WORK}*"):
            shutil.rmtree(unfinished)
    if not any(scores.total.n for scores in result.scorers.values()):
        raise UserError(f"{folder}: no pair could be scored: {', '.join(result.scorers)} gave no finite number")
    return result


def _compared(
    scorer: Scorer, rows: Sequence[Row], before: Sequence[Row], after: Sequence[Row], margin: float, ties: Ties
) -> ScorerResult:
    """One scorer's comparison of both sides; its numbers of each pair are added to `rows`."""
    old_parts, new_parts = columns(before, scorer.name), columns(after, scorer.name)
    both = {part: (old, new_parts[part]) for part, old in old_parts.items() if part in new_parts}
    prompts = [normalise(row["prompt"]) for row in rows]
    comparisons = {part: compare(*sides, prompts, margin=margin, ties=ties) for part, sides in both.items()}
    outcome = outcomes(*both[TOTAL], margin=margin)
    for i, row in enumerate(rows):
        parts = {part: [number(old[i]), number(new[i])] for part, (old, new) in both.items()}
        old, new = parts.pop(TOTAL)
        label = {1.0: "win", 0.0: "loss", 0.5: "tie"}.get(float(outcome[i]))
        row.setdefault("scores", {})[scorer.name] = {"before": old, "after": new, "outcome": label, "parts": parts}
    total = comparisons.pop(TOTAL)
    return ScorerResult(version=scorer.version, tie_margin=margin, total=total, parts=comparisons)


def _check_media(base: bool, aligned: bool, path: str | Path) -> None:
    if base != aligned:
        outputs = {True: "clips", False: "images"}
        raise UserError(f"the base makes {outputs[base]} and {path} makes {outputs[aligned]}: they cannot be compared")


def _margins(scorers: Sequence[Scorer], given: float | Mapping[str, float] | None, ties: str) -> dict[str, float]:
    own = {scorer.name: scorer.tie_margin for scorer in scorers}
    given = {} if given is None else given if isinstance(given, Mapping) else dict.fromkeys(own, given)
    for name in given:
        if name not in own:
            raise unknown("scorer in tie_margin", name, own)
    margins = own | dict(given)
    for margin in margins.values():
        check_policy(margin, ties)
    return margins


def _check_free(folder: Path, force: bool, save_samples: bool) -> None:
    """Raise UserError unless the folder has no finished evaluation yet, or one to be replaced."""
    if save_samples and (folder / SAMPLES).exists() and not _are_samples(folder / SAMPLES):
        raise UserError(f"{folder / SAMPLES}: is not of an evaluation; move it, or choose another folder")
    if holds(folder, "evaluation", REPORT):
        check_own("evaluate", *(folder / name for name in (REPORT, PAIRS, RESULT)))
        if (folder / RESULT).is_file() and not force:  # else it was killed
            raise UserError(f"{folder}: holds an evaluation; choose another folder, or force (--force) to replace it")


def _are_samples(folder: Path) -> bool:
    """Whether an evaluation wrote these samples."""
    return all((folder / side / LIST).is_file() for side in ("base", "aligned"))
