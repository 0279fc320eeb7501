"""One run from its configuration: check, load, prepare, train, save."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from diffusers.training_utils import cast_training_params

import pipelines
from pipelines import TrainablePipeline
from t2i_align import config as configuration
from t2i_align.conditioning import soft_tokens
from t2i_align.config import RunConfig
from t2i_align.data.loader import PreferenceDataset, open_dataset
from t2i_align.data.schema import Model
from t2i_align.errors import UserError
from t2i_align.inference.resolve import resolve_model
from t2i_align.training import checkpoint
from t2i_align.training.optim import check_optimizer
from t2i_align.training.reference import build_reference, choose_kind, no_reference
from t2i_align.training.trainer import METRICS_FILE, Trainer
from t2i_align.training.validation import Validation
from t2i_align.utils.files import output_lock

RUN_FILE = "run.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Text encoders of the size of T5-XXL overflow half precision, and nobody runs them in single.
LARGE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.bfloat16}
# What may change between a run and its continuation without making it another run. Batch sizes may trade places
# with each other and with processes: the trainer sees to it that a step takes as many groups as before.
FREE_ON_RESUME = (
    "resume",
    "log",
    "validation",
    "health",
    "data.workers",
    "data.cache_dir",
    "train.batch_size",
    "train.accumulate",
)
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")  # only these do not depend on how many steps there are
WRITING = ".writing_"  # what a killed run may have left behind


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """weights: the LoRA's or soft tokens' file, or the folder of the whole pipeline. metrics: the last logged ones."""

    output_dir: Path
    weights: Path
    steps: int
    metrics: dict[str, float]


def align(
    config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, progress: bool = True
) -> RunResult:
    """Align a diffusion model with preferences.

    Args:
        config: a RunConfig, the same as nested values, or the path of a YAML file.
        overrides: `key=value` changes to a mapping or file.
        progress: show progress bars.

    Raises:
        UserError, pipelines.PipelineError: input that cannot be used, before long work starts.
    """
    if isinstance(config, (str, Path)):
        config = configuration.load(config, overrides)
    elif isinstance(config, Mapping):
        config = configuration.from_mapping(configuration.with_overrides(config, overrides))
    output = Path(config.output_dir)
    check_machine(config)
    AcceleratorState._reset_state()  # a second run in one notebook may want another precision
    accelerator = Accelerator(
        # Without being told, accelerate takes each of several CPU processes for a run of its own.
        cpu=not torch.accelerator.is_available(),
        mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
        log_with=list(config.log.trackers) or None,
        project_dir=str(output),
    )
    if accelerator.is_main_process:
        with output_lock(output) if output.is_dir() else nullcontext():  # another run's is refused before long work
            check_output(config)
    lora, needs_reference = config.lora is not None, config.objective.needs.reference
    moving = config.train.reference_update is not None
    if needs_reference:
        choose_kind(config.train.reference, lora=lora, moving=moving)
    elif moving:
        raise UserError(f"train.reference_update: {config.objective.name} asks no reference that could be updated")
    check_optimizer(config)
    validate = Validation(config, accelerator) if config.validation.every else None
    pipeline = load_model(config, accelerator.device)
    size, frames = extent(config, pipeline)
    pipeline.shift_timesteps(config.train.timestep_shift, *size, frames)
    prepare_denoiser(config, pipeline)
    source = load_data(config, accelerator, pipeline, progress)
    config = replace(config, objective=config.objective.fit_to_data(source.stats))
    if accelerator.is_main_process:
        check_same_run(config, fit_to_data=True)
    if config.validation.every:
        pipeline.load_encoders()
    elif config.data.cache and not config.data.stream:
        pipeline.drop_encoders()
    reference = reference_for(config, pipeline, accelerator.device)
    if config.train.compile:
        pipeline.denoiser.compile()  # in place, so that policy and adapter-off reference are the same compiled module
    trainer = Trainer(config, accelerator, pipeline, reference, source, validate, progress)
    with output_lock(output, first=accelerator.is_main_process):
        if accelerator.is_main_process:
            check_output(config)  # another run may have come and gone meanwhile
        if config.resume:
            trainer.resume()
        if accelerator.is_main_process:  # all that can be wrong has been seen: from here on the folder holds this run
            write_atomically(output / RUN_FILE, yaml.safe_dump(configuration.to_mapping(config), sort_keys=False))
            print(describe(config, pipeline, source))
        if config.log.trackers:
            accelerator.init_trackers(config.log.project)
        try:
            metrics = trainer.run()
            weights = output / config.trains
            if accelerator.is_main_process:
                with trainer.averaged():
                    weights = save_weights(pipeline, weights, config.trains)
            accelerator.wait_for_everyone()  # gloo aborts when one process leaves while another still talks
        finally:
            accelerator.end_training()
    return RunResult(output_dir=output, weights=weights, steps=trainer.step, metrics=metrics)


def check_machine(config: RunConfig) -> None:
    """Raise UserError for a precision this machine cannot train in, or a tracker that is not installed."""
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision 'fp16' needs a CUDA GPU; use 'bf16' or 'fp32'")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.log.trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers {tracker!r} is not installed: pip install {tracker}")


def reference_for(config: RunConfig, pipeline: TrainablePipeline, device: torch.device) -> Model:
    """The reference that the objective asks, of the base weights; where it asks none, nothing is kept."""
    if not config.objective.needs.reference:
        return no_reference
    return build_reference(
        config.train.reference,
        pipeline,
        device,
        lora=config.lora is not None,
        compile=config.train.compile,
        moving=config.train.reference_update is not None,
    )


def load_model(config: RunConfig, device: torch.device) -> TrainablePipeline:
    """The pipeline on its device, without VAE and text encoders."""
    pipeline = pipelines.load(
        resolve_model(config.model.path),
        # A frozen denoiser can be in the run's precision; trained weights stay in float32.
        denoiser_dtype=torch.float32 if config.trains == "model" else DTYPES[config.train.precision],
        large_encoder_dtype=LARGE_DTYPES[config.train.precision],
        encoders=False,
        expert=config.model.expert,
        revision=config.model.revision,
        variant=config.model.variant,
        single_file_config=config.model.single_file_config,
    )
    pipeline.set_attention(config.train.attention)
    pipeline.to(device)
    return pipeline


def extent(config: RunConfig, pipeline: TrainablePipeline) -> tuple[tuple[int, int], int | None]:
    """The size that is trained, (height, width) in pixels, and of clips how many frames.

    Raises:
        PipelineError: the model cannot take it. UserError: a frame rate where there are no frames.
    """
    size = config.data.size or pipeline.default_size
    frames = config.data.frames or pipeline.default_frames
    pipeline.check_size(*size, frames)
    if config.data.fps is not None and frames is None:
        raise UserError(f"data.fps is for clips, and {pipeline.family} makes images")
    if config.data.buckets and frames is not None:
        raise UserError(f"data.buckets is for images, and {pipeline.family} makes clips")
    return size, frames


def encoders(config: RunConfig, pipeline: TrainablePipeline) -> str:
    """A fingerprint of the model's encoders, of how they run, and of what is kept beside what they make."""
    found = pipelines.encoder_fingerprint(
        resolve_model(config.model.path),
        revision=config.model.revision,
        variant=config.model.variant,
        single_file_config=config.model.single_file_config,
    )
    large = LARGE_DTYPES[config.train.precision]
    if pipeline.large_encoders and large != torch.float32:
        found += f", {' and '.join(pipeline.large_encoders)} in bf16"
    return found + (", with sizes" if pipeline.size_conditioned else "")


def load_data(
    config: RunConfig, accelerator: Accelerator, pipeline: TrainablePipeline, progress: bool
) -> PreferenceDataset:
    """The data, encoded or ready to be; VAE and text encoders are loaded only where something must be encoded."""
    size, frames = extent(config, pipeline)

    def with_encoders() -> TrainablePipeline:
        pipeline.load_encoders()
        return pipeline

    # Of several processes one prepares; the others wait at a file lock, which unlike a barrier has no time limit.
    return open_dataset(
        config.data,
        config.model,
        needs=config.objective.needs,
        pipeline=with_encoders,
        encoder_fingerprint=lambda: encoders(config, pipeline),
        size=size,
        frames=frames,
        cache_root=Path(config.data.cache_dir or Path(config.output_dir).parent / "cache"),
        progress=progress and accelerator.is_main_process,
    )


def prepare_denoiser(config: RunConfig, pipeline: TrainablePipeline) -> None:
    """Switch gradients on for what is trained: an adapter, kept in float32 under autocast, or everything."""
    denoiser = pipeline.denoiser
    torch.manual_seed(config.train.seed)
    if config.lora:
        pipeline.add_lora(
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=config.lora.targets,
        )
        cast_training_params(denoiser, dtype=torch.float32)
    elif config.soft_tokens:
        bos = None
        if config.soft_tokens.start == "bos":
            pipeline.load_encoders()
            bos = pipeline.encode_prompts(["a"])["prompt_embeds"][0, 0]  # causal: it knows nothing of the text after it
        soft_tokens.install(denoiser, config.soft_tokens.count, initial=bos)
    else:
        denoiser.requires_grad_(True)
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()


def save_weights(pipeline: TrainablePipeline, folder: Path, what: str) -> Path:
    """Write the LoRA's or soft tokens' file, or the whole pipeline, complete or not at all; returns what was written.

    what: `RunConfig.trains`.
    """
    temporary = folder.with_name(f"{WRITING}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    name = ""
    if what == "lora":
        name = pipeline.save_lora(temporary).name
    elif what == "soft_tokens":
        name = soft_tokens.save(pipeline.denoiser, temporary / soft_tokens.FILE).name
    else:
        pipeline.load_encoders()
        pipeline.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder / name


def check_output(config: RunConfig) -> None:
    """Refuse an output folder that holds something else, or another run; continue only when told to."""
    output = Path(config.output_dir)
    if output.is_file():
        raise UserError(f"output_dir {output}: this is a file, a folder is needed")
    if not output.is_dir() or all(entry.name.startswith(WRITING) for entry in output.iterdir()):
        return
    if not (output / RUN_FILE).is_file():
        raise UserError(f"output_dir {output}: the folder is not empty and holds no run; choose another")
    steps = checkpoint.all_steps(output)
    if not config.resume:
        state = f"its newest checkpoint is {steps[-1].name}" if steps else "it has no checkpoint yet"
        raise UserError(
            f"output_dir {output}: this folder holds a run already ({state}). "
            "Add resume=true to continue it, or choose another output_dir."
        )
    check_same_run(config, fit_to_data=False)


def check_same_run(config: RunConfig, *, fit_to_data: bool) -> None:
    """Refuse to continue another run than the one in the output folder, if there is one.

    fitted: what the objective left open (null) has been filled in from the data, as it is in a run's own file. Before
    that, an open number may yet become any, and is let pass.
    """
    run_file = Path(config.output_dir) / RUN_FILE
    if not run_file.is_file():
        return
    free = FREE_ON_RESUME + (("train.steps",) if config.optim.schedule in CONSTANT_SCHEDULES else ())
    now = configuration.to_mapping(config)
    if not fit_to_data:
        free += tuple(f"objective.{key}" for key, value in now["objective"].items() if value is None)
    differences = _differences(yaml.safe_load(run_file.read_text()), now, free)
    if differences:
        raise UserError(
            f"output_dir {config.output_dir}: this folder holds another run; keys differ: {'; '.join(differences)}"
        )


def describe(config: RunConfig, pipeline: TrainablePipeline, source: PreferenceDataset) -> str:
    """What is about to run, in a few lines, with the objective's constants spelled out."""
    trained = sum(parameter.numel() for parameter in pipeline.trainable_parameters())
    train = config.train
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in source.counts.items())
    values = configuration.to_mapping(config)["objective"]
    constants = " ".join(f"{key}={value}" for key, value in values.items() if key != "name")
    return "\n".join(
        [
            f"model      {config.model.path} ({pipeline.family}, {pipeline.process.prediction_type})",
            f"data       {config.data.path}: {counts}",
            f"objective  {config.objective.name} ({config.objective.paper}) {constants}",
            f"training   {trained:,} parameters, {train.steps} steps of {train.batch_size} x {train.accumulate} "
            f"groups, {train.precision}, seed {train.seed}",
            f"output     {config.output_dir}",
        ]
    )


def write_atomically(file: Path, text: str) -> None:
    """Replace a small file in one move."""
    temporary = file.with_name(f"{WRITING}{file.name}")
    temporary.write_text(text)
    temporary.replace(file)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str], prefix: str = "") -> list[str]:
    out = []
    for key in sorted({*before, *now}):
        name = f"{prefix}{key}"
        if name in free or (not prefix and key == "output_dir"):
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += _differences(old, new, free, f"{name}.")
        elif old != new:
            out.append(f"{name} ({old!r} there, {new!r} now)")
    return out


__all__ = ["METRICS_FILE", "RunResult", "align"]
