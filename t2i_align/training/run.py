"""One run from its configuration: check, load, prepare, train, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

import pipelines
from pipelines import PipelineError, TrainablePipeline
from t2i_align import config as configuration
from t2i_align.conditioning.adapter import TRAINED
from t2i_align.config import RunConfig
from t2i_align.data.loader import PreferenceDataset, open_dataset
from t2i_align.data.prompts import PromptDataset, open_prompts
from t2i_align.errors import UserError
from t2i_align.inference.models import checkpoint_options, open_model
from t2i_align.inference.options import PRECISIONS
from t2i_align.training.checkpoint import writing
from t2i_align.training.loop import Loop, make_optimizer
from t2i_align.training.output import check_same_run, open_run, write_settings
from t2i_align.training.reference import build_reference
from t2i_align.training.rewards import Rewarder, differentiable_scorer
from t2i_align.training.trainer import Alignment
from t2i_align.training.validation import Validation
from t2i_align.utils.settings import with_overrides

LARGE_DTYPES = {**PRECISIONS, "fp16": torch.bfloat16}  # large text encoders such as T5-XXL overflow half precision
# Keys in which a continuation may differ from its run. Batch sizes may be exchanged for each other and for processes:
# the loop checks that a step takes as many groups as before.
FREE_ON_RESUME = (
    "resume", "log", "validation", "health", "data.workers", "data.cache_dir", "data.encode_batch",
    "train.batch_size", "train.accumulate",
)  # fmt: skip
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")  # only these do not depend on how many steps there are


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
        config: path of a YAML file such as those under configs/, a RunConfig, or the same as nested values.
        overrides: `key=value` changes to the configuration: train.steps=200 objective.beta=500 lora=null ...
        progress: show progress bars.

    Raises:
        UserError, pipelines.PipelineError: input that cannot be used, before long work starts.
    """
    if isinstance(config, (str, Path)):
        config = configuration.load(config, overrides)
    elif isinstance(config, Mapping):
        config = configuration.from_mapping(with_overrides(config, overrides))
    check_machine(config)
    settings = configuration.to_mapping(config)
    free = FREE_ON_RESUME + (("train.steps",) if config.optim.schedule in CONSTANT_SCHEDULES else ())
    unset = [f"objective.{key}" for key, value in settings["objective"].items() if value is None]
    with open_run(config, settings, free=[*free, *unset], trackers=config.log.trackers) as accelerator:
        return _align(config, accelerator, free, progress)


def _align(config: RunConfig, accelerator: Accelerator, free: Sequence[str], progress: bool) -> RunResult:
    validate = Validation(config, accelerator) if config.validation.every else None
    spec = getattr(config.objective, "scorer", None)
    scorer = differentiable_scorer(spec).to(accelerator.device) if spec else None
    pipeline = load_model(config, accelerator.device)
    prepare_denoiser(config, pipeline)
    source = load_data(config, accelerator, pipeline, progress)
    config = replace(config, objective=config.objective.fit_to_data(source.stats))
    output, settings = Path(config.output_dir), configuration.to_mapping(config)
    if accelerator.is_main_process:
        check_same_run(output, settings, free)  # again: what the objective left unset is now estimated from the data
    if config.validation.every or scorer:
        pipeline.load_encoders()
    elif config.data.cache and not config.data.stream:
        pipeline.drop_encoders()
    adapted = config.lora is not None and config.lora.init is not None
    reference = build_reference(config.train, pipeline, needed=config.objective.needs.reference, adapted=adapted)
    if config.train.compile:
        pipeline.denoiser.compile()  # in place, so that policy and adapter-off reference are the same compiled module
    rewarder = Rewarder(pipeline, scorer) if scorer else None
    task = Alignment(config, accelerator, reference, source, validate, rewarder)
    loop = Loop(task, accelerator, config, progress)
    if accelerator.is_main_process:
        write_settings(output, settings)
        print(describe(config, pipeline, source))
    if config.log.trackers:
        accelerator.init_trackers(config.log.project)
    metrics = loop.run()
    weights = output / config.trains
    if accelerator.is_main_process:
        with loop.weights.using(loop.weights.result), writing(weights) as temporary:
            written = TRAINED[config.trains].save(pipeline, temporary)
        weights /= written.relative_to(temporary)
    accelerator.wait_for_everyone()  # gloo aborts when one process leaves while another still talks
    return RunResult(output_dir=output, weights=weights, steps=loop.step, metrics=metrics)


def check_machine(config: RunConfig) -> None:
    """Raise UserError for a precision that this machine cannot train in, or a package that is not installed."""
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision 'fp16' needs a CUDA GPU; use 'bf16' or 'fp32'")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.log.trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers {tracker!r} is not installed: pip install {tracker}")
    make_optimizer(config.optim, [torch.nn.Parameter(torch.zeros(1))])


def load_model(config: RunConfig, device: torch.device) -> TrainablePipeline:
    """The pipeline on its device, without VAE and text encoders.

    Raises:
        PipelineError: the model cannot take the size that is trained, or its predictions imply no image at the last
            timestep. UserError: an option of clips for images, or
            of images for clips.
    """
    pipeline = open_model(
        config.model,
        # A frozen denoiser can be in the run's precision; trained weights stay in float32.
        denoiser_dtype=torch.float32 if config.trains == "model" else PRECISIONS[config.train.precision],
        large_encoder_dtype=LARGE_DTYPES[config.train.precision],
        encoders=False,
    )
    pipeline.set_attention(config.train.attention)
    size, frames = _size_and_frames(config, pipeline)
    pipeline.check_size(*size, frames)
    if config.data.fps is not None and frames is None:
        raise UserError(f"data.fps is for clips, and {pipeline.family} makes images")
    if config.data.buckets and frames is not None:
        raise UserError(f"data.buckets is for images, and {pipeline.family} makes clips")
    pipeline.shift_timesteps(config.train.timestep_shift, *size, frames)
    process = pipeline.process
    alpha, _ = process.alpha_sigma(process.timesteps(torch.tensor([1 - 2**-24])))
    if process.prediction_type == "epsilon" and alpha < 1e-3:
        raise PipelineError(
            f"{config.model.path}: its scheduler has no signal at the last timestep (rescale_betas_zero_snr) and "
            "prediction type 'epsilon', which then implies no image; expected 'v_prediction'"
        )
    return pipeline.to(device)


def load_data(
    config: RunConfig, accelerator: Accelerator, pipeline: TrainablePipeline, progress: bool
) -> PreferenceDataset:
    """The data, encoded or ready to be; VAE and text encoders are loaded only where something must be encoded."""
    size, frames = _size_and_frames(config, pipeline)
    if config.objective.needs.scorer:
        shape = (*size, *([frames] if frames else []))
        return PromptDataset(open_prompts(config.data), pipeline.load_encoders(), config.objective.needs, shape)
    return open_dataset(
        config.data,
        config.model,
        needs=config.objective.needs,
        pipeline=pipeline.load_encoders,
        encoder_fingerprint=lambda: _encoders(config, pipeline),
        size=size,
        frames=frames,
        cache_root=Path(config.data.cache_dir or Path(config.output_dir).parent / "cache"),
        progress=progress and accelerator.is_main_process,
    )


def _size_and_frames(config: RunConfig, pipeline: TrainablePipeline) -> tuple[tuple[int, int], int | None]:
    """The size that is trained, (height, width) in pixels, and of clips how many frames."""
    return config.data.size or pipeline.default_size, config.data.frames or pipeline.default_frames


def _encoders(config: RunConfig, pipeline: TrainablePipeline) -> str:
    """A fingerprint of the model's encoders, their precision, and what is stored beside their output."""
    model = checkpoint_options(config.model)
    del model["expert"], model["prediction_type"]  # experts share their encoders
    parts = [pipelines.encoder_fingerprint(**model)]
    if config.model.segments:
        parts.append(f"segments {config.model.segments}")
    if pipeline.large_encoders and LARGE_DTYPES[config.train.precision] != torch.float32:
        parts.append(f"{' and '.join(pipeline.large_encoders)} in bf16")
    return ", ".join([*parts, "with sizes"] if pipeline.size_conditioned else parts)


def prepare_denoiser(config: RunConfig, pipeline: TrainablePipeline) -> None:
    """Make trainable what the run trains, with fresh weights of its seed."""
    torch.manual_seed(config.train.seed)
    TRAINED[config.trains].install(pipeline, config)
    if config.train.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.denoiser.train()


def describe(config: RunConfig, pipeline: TrainablePipeline, source: PreferenceDataset) -> str:
    """What is about to run, in a few lines, with the objective's constants spelled out."""
    trained = sum(parameter.numel() for parameter in pipeline.trainable_parameters())
    train = config.train
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in source.counts.items())
    values = configuration.to_mapping(config)["objective"]
    constants = " ".join(f"{key}={value}" for key, value in values.items() if key != "name")
    steps = f"{train.steps} steps of {train.batch_size} x {train.accumulate} groups"
    return f"""\
model      {config.model.path} ({pipeline.family}, {pipeline.process.prediction_type})
data       {config.data.path}: {counts}
objective  {config.objective.name} ({config.objective.paper}) {constants}
training   {trained:,} parameters, {steps}, {train.precision}, seed {train.seed}
output     {config.output_dir}"""
