"""One run from its configuration: check, load, prepare, train, save."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

import pipelines
from pipelines import PipelineError, TrainablePipeline
from pipelines.offload import stream
from t2i_align import config as configuration
from t2i_align.conditioning import personal, segments
from t2i_align.conditioning.adapter import ADAPTERS, TRAINED
from t2i_align.config import RunConfig
from t2i_align.data.loader import PreferenceDataset, PreparedDataset
from t2i_align.data.memory import Data, encoders_digest, source_path, with_root
from t2i_align.data.opening import check_source, open_dataset
from t2i_align.data.prompts import PromptDataset, open_prompts
from t2i_align.data.users import add_users
from t2i_align.diffusion.noising import random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.inference.models import checkpoint_options, open_model, resolve_model
from t2i_align.inference.options import PRECISIONS
from t2i_align.objectives.base import Objective, Requirements
from t2i_align.planning.plan import memory_warning
from t2i_align.plugins import load_installed
from t2i_align.training.held_out import held_out_data, warn_of_overlap
from t2i_align.training.loop import Loop
from t2i_align.training.monitor import Callbacks
from t2i_align.training.optimizer import check_machine
from t2i_align.training.output import check_same_run, open_run, write_settings
from t2i_align.training.reference import build_reference
from t2i_align.training.report import write_report
from t2i_align.training.result import RunResult
from t2i_align.training.rewards import Rewarder, differentiable_scorer
from t2i_align.training.sharding import shard
from t2i_align.training.stored_errors import check_stored, open_errors
from t2i_align.training.trainer import Alignment
from t2i_align.training.validation import Validation
from t2i_align.utils.logging import silent

LARGE_DTYPES = {**PRECISIONS, "fp16": torch.bfloat16}  # large text encoders such as T5-XXL overflow half precision
# Keys in which a continuation may differ from its run. Batch sizes may be exchanged for each other and for processes:
# the loop checks that a step takes as many groups as before.
FREE_ON_RESUME = (
    "resume", "plugins", "log", "validation", "health", "data.workers", "data.cache_dir", "data.encode_batch",
    "train.batch_size", "train.accumulate", "train.shard", "train.offload",
)  # fmt: skip
MANY_PASSES = 30  # over the data
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")  # only these do not depend on how many steps there are


@silent
def align(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    objective: Objective | type[Objective] | str | None = None,
    model: TrainablePipeline | DiffusionPipeline | str | Path | None = None,
    data: Data | None = None,
    output_dir: str | Path | None = None,
    on_step: Callable[[int, dict[str, float]], object] | None = None,
    on_validate: Callable[[int, dict[str, float], Tensor], object] | None = None,
    on_save: Callable[[int, Path], object] | None = None,
    progress: bool = True,
) -> RunResult:
    """Align a diffusion model with preferences.

        align("configs/sd15_diffusion_dpo_lora.yaml", ["data.path=my_pairs.jsonl"])
        align(objective=DiffusionDPO(beta=500), model=pipeline, data=rows, output_dir="runs/mine")

    Args:
        config: path of a YAML file such as those under configs/, a RunConfig, or the same as nested values.
        overrides: `key=value` changes to all that: train.steps=200 objective.beta=500 lora=null ...
        objective: instance, class or name, in place of the configuration's.
        model: loaded pipeline, which carries the trained weights afterwards, or a path.
        data: path, keys of a dataset spec, or rows with PIL images (see `data.memory.source_path`).
        output_dir: folder of the run.
        on_step, on_validate, on_save: see `Callbacks`.
        progress: print what runs, and show progress bars.

    Raises:
        UserError, pipelines.PipelineError: input that cannot be used, before long work starts.
    """
    pipeline = None if model is None or isinstance(model, str | Path) else model
    if isinstance(pipeline, DiffusionPipeline):
        pipeline = pipelines.wrap(pipeline)
    given: dict[str, Any] = {"objective": objective, "output_dir": output_dir and str(output_dir)}
    if model is not None:
        given["model"] = {"path": str(model) if pipeline is None else pipeline.source}
    run = configuration.changed(config, {key: value for key, value in given.items() if value is not None}, overrides)
    if data is not None:
        run = replace(run, data=replace(run.data, path=source_path(data, cache_root(run))))
    check_machine(run)
    check_stored(run)
    callbacks = Callbacks(on_step=on_step, on_validate=on_validate, on_save=on_save)
    settings = configuration.to_mapping(run)
    free = FREE_ON_RESUME + (("train.steps",) if run.optim.schedule in CONSTANT_SCHEDULES else ())
    unset = [f"objective.{key}" for key, value in settings["objective"].items() if value is None]
    with open_run(run, settings, free=[*free, *unset]) as accelerator:
        return _align(run, accelerator, free, pipeline, callbacks, progress)


def _align(
    config: RunConfig,
    accelerator: Accelerator,
    free: Sequence[str],
    loaded: TrainablePipeline | None,
    callbacks: Callbacks,
    progress: bool,
) -> RunResult:
    sampled = config.validation.every and config.validation.count
    validate = Validation(config, accelerator, callbacks.on_validate) if sampled else None
    spec = getattr(config.objective, "scorer", None)
    scorer = differentiable_scorer(spec).to(accelerator.device) if spec else None
    if loaded is None and not Path(resolve_model(config.model.path)).exists():
        check_data(config)  # before gigabytes are downloaded for it
    if accelerator.is_main_process and loaded is None and not config.resume and (text := memory_warning(config)):
        print(f"warning    {text}")
    pipeline = load_model(config, accelerator.device, loaded)
    guidance = getattr(config.objective, "guidance", 1.0)
    if scorer and pipeline.distilled_guidance and guidance != 1:
        raise UserError(
            f"objective.guidance must be 1 for {pipeline.family}, which has its guidance distilled, found {guidance:g}"
        )
    source = load_data(config, accelerator, pipeline, progress, in_memory=loaded is not None)
    held_out = None
    if (other := held_out_data(config)) is not None:
        held_out = load_data(replace(config, data=other), accelerator, pipeline, progress, in_memory=loaded is not None)
        warn_of_overlap(source, held_out)
    if validate and config.validation.prompts is None:
        validate.use(source.some_prompts(config.validation.count))
    unreached = prepare_denoiser(config, pipeline, source, accelerator)
    config = replace(config, objective=config.objective.fit_to_data(source.stats))
    output, settings = Path(config.output_dir), configuration.to_mapping(config)
    if accelerator.is_main_process:
        check_same_run(output, settings, free)  # again: what the objective left unset is now estimated from the data
    if validate or scorer:
        pipeline.load_encoders()
    elif config.data.cache and not config.data.stream and loaded is None:
        pipeline.drop_encoders()
    adapted = config.lora is not None and config.lora.init is not None
    reference = build_reference(
        config.train, pipeline, needed=config.objective.needs.reference, adapted=adapted,
        shard=partial(shard, accelerator),
    )  # fmt: skip
    if config.train.compile:
        pipeline.denoiser.compile()  # in place, so that policy and adapter-off reference are the same compiled module
    rewarder = Rewarder(pipeline, scorer, getattr(config.objective, "latent_frames", None)) if scorer else None
    errors = None
    if config.train.store_reference:
        errors = open_errors(config, cache_root(config), reference, source.fingerprint)
    task = Alignment(config, accelerator, reference, source, validate, rewarder, errors, held_out)
    loop = Loop(task, accelerator, config, progress, callbacks, settings)
    if accelerator.is_main_process:
        write_settings(output, settings)
        loop.progress.say(describe(config, pipeline, source, unreached, accelerator.num_processes, held_out))
        if errors is not None:
            loop.progress.say(f"reference  {errors.describe()}")
    with errors or nullcontext():
        metrics = loop.run()
    if task.best:
        task.best.restore()
    weights = None
    with task.exporting(whole=True):
        if accelerator.is_main_process:
            weights = task.export(output, whole=True)
            write_report(output)
    accelerator.wait_for_everyone()  # gloo aborts when one process leaves while another still talks
    return RunResult(output_dir=output, weights=weights or output / config.trains, steps=loop.step, metrics=metrics)


def check_data(config: RunConfig) -> None:
    """Look at the data without a model. Raises UserError as `load_data` does."""
    for data in filter(None, (config.data, held_out_data(config))):
        data = with_root(data, cache_root(config))
        if config.objective.needs.scorer:
            open_prompts(data)
        else:
            check_source(data, needs_of(config))


def needs_of(config: RunConfig) -> Requirements:
    """What the run needs of its data."""
    needs = config.objective.needs
    return replace(needs, columns=(*needs.columns, "user")) if config.personal else needs


def cache_root(config: RunConfig) -> Path:
    """The folder of the caches of encoded data."""
    return Path(config.data.cache_dir or Path(config.output_dir).parent / "cache")


def load_model(config: RunConfig, device: torch.device, loaded: TrainablePipeline | None = None) -> TrainablePipeline:
    """The pipeline on its device, without VAE and text encoders; or the one that is loaded.

    Raises:
        PipelineError: the model cannot take the size that is trained, or its predictions imply no image at the last
            timestep. UserError: an option of clips for images, or
            of images for clips.
    """
    load_installed()
    if loaded is not None and any(adapter.installed(loaded) for adapter in ADAPTERS.values()):
        raise UserError(f"model {loaded.source}: it carries an adapter already; remove it, or load the model anew")
    if config.model.quantize and not config.lora:
        raise UserError("model.quantize needs a LoRA: weights in fewer bits cannot be trained themselves")
    pipeline = loaded or open_model(
        config.model,
        # A frozen denoiser can be in the run's precision; trained weights stay in float32.
        denoiser_dtype=torch.float32 if config.trains == "model" else PRECISIONS[config.train.precision],
        large_encoder_dtype=LARGE_DTYPES[config.train.precision],
        encoders=False,
    )
    if config.lora:
        pipeline.lora_targets(config.lora.targets)
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
    pipeline.offloads_encoders = config.train.offload is not None
    if config.train.offload == "base":
        stream(pipeline.denoiser, device)
    return pipeline.to(device)


def load_data(
    config: RunConfig, accelerator: Accelerator, pipeline: TrainablePipeline, progress: bool, in_memory: bool = False
) -> PreferenceDataset:
    """The data, encoded or ready to be; VAE and text encoders are loaded only where something must be encoded."""
    config = replace(config, data=with_root(config.data, cache_root(config)))
    size, frames = _size_and_frames(config, pipeline)
    if config.objective.needs.scorer:
        shape = (*size, *([frames] if frames else []))
        return PromptDataset(open_prompts(config.data), pipeline.load_encoders(), config.objective.needs, shape)
    source = open_dataset(
        config.data,
        config.model,
        needs=needs_of(config),
        pipeline=pipeline.load_encoders,
        encoder_fingerprint=lambda: encoders_digest(pipeline) if in_memory else _encoders(config, pipeline),
        size=size,
        frames=frames,
        cache_root=cache_root(config),
        progress=progress and accelerator.is_main_process,
    )
    if config.personal is None:
        return source
    assert isinstance(source, PreparedDataset), "checked by the configuration"
    main = accelerator.is_main_process
    with accelerator.main_process_first():  # it embeds the users for all
        return add_users(source, config, cache_root(config) / "users", accelerator.device, progress and main)


def _size_and_frames(config: RunConfig, pipeline: TrainablePipeline) -> tuple[tuple[int, int], int | None]:
    """The size that is trained, (height, width) in pixels, and of clips how many frames."""
    return config.data.size or pipeline.default_size, config.data.frames or pipeline.default_frames


def _encoders(config: RunConfig, pipeline: TrainablePipeline) -> str:
    """A fingerprint of the model's encoders, their precision, and what is stored beside their output."""
    model = checkpoint_options(config.model)
    del model["expert"], model["prediction_type"], model["quantize"]  # experts share their encoders
    parts = [pipelines.encoder_fingerprint(**model)]
    if segmented := segments.fingerprint(pipeline):
        parts.append(segmented)
    if pipeline.large_encoders and LARGE_DTYPES[config.train.precision] != torch.float32:
        parts.append(f"{' and '.join(pipeline.large_encoders)} in bf16")
    return ", ".join([*parts, "with sizes"] if pipeline.size_conditioned else parts)


def prepare_denoiser(
    config: RunConfig, pipeline: TrainablePipeline, source: PreferenceDataset, accelerator: Accelerator
) -> set[str]:
    """Make trainable what the run trains, with fresh weights of its seed.

    Returns the names of the denoiser's parameters that are left out, as no gradient reaches them.
    """
    train, device = config.train, accelerator.device
    unreached = set[str]()
    if config.trains != "soft_tokens":
        batch = source.to_batch(next(source.loader(seed=train.seed, start_step=0, batch_size=1)), device).take([0])
        noised = random_noise(batch, SampleRNG(train.seed, batch.keys, pipeline.process, device=device))
        with accelerator.autocast():
            unreached = pipeline.unreached(noised.latents, noised.timesteps, noised.conditioning)
    torch.manual_seed(train.seed)
    users = source.users if isinstance(source, PreparedDataset) else None
    TRAINED[config.trains].install(pipeline, config, unreached, users.embedding if users else None)
    if train.offload == "base":
        pipeline.denoiser.to(device)  # beside weights in CPU memory an adapter is made there
    if users is not None and users.config.pretrain:
        users.pretrain(getattr(pipeline.denoiser, personal.NAME).encoder)
    if train.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.denoiser.train()
    return unreached


def describe(
    config: RunConfig,
    pipeline: TrainablePipeline,
    source: PreferenceDataset,
    unreached: Collection[str] = (),
    processes: int = 1,
    held_out: PreferenceDataset | None = None,
) -> str:
    """What is about to run, in a few lines, with the objective's constants and the passes over the data spelled out."""
    trained = sum(parameter.numel() for parameter in pipeline.trainable_parameters())
    train = config.train
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in source.counts.items())
    values = configuration.to_mapping(config)["objective"]
    constants = " ".join(f"{key}={value}" for key, value in values.items() if key != "name")
    paper = f" ({config.objective.paper})" if config.objective.paper else ""
    groups = source.counts.get("groups")  # not known of a stream from the Hub
    passes = train.steps * train.batch_size * train.accumulate * processes / groups if groups else 0
    steps = f"{train.steps} steps of {train.batch_size} x {train.accumulate} groups"
    steps += f" ({passes:.3g} passes over the data)" if groups else ""
    warning = "fewer train.steps or more data; validation.data with other pairs shows when that begins"
    many = passes > MANY_PASSES and not isinstance(source, PromptDataset)
    note = f"\nwarning    {passes:.0f} passes learn the groups by heart: {warning}" if many else ""
    if 0 < train.steps <= (warm := config.optim.warmup_steps):
        note += f"\nwarning    optim.lr is not reached: optim.warmup_steps={warm}, train.steps={train.steps}"
    watched = f"\nheld out   {config.validation.data}: {held_out.counts['groups']} groups" if held_out else ""
    left_out = f", without {len(unreached)} that get no gradient, as {min(unreached)}" if unreached else ""
    return f"""\
model      {config.model.path} ({pipeline.family}, {pipeline.process.prediction_type})
data       {config.data.path}: {counts}
objective  {config.objective.name}{paper} {constants}
training   {trained:,} parameters{left_out}, {steps}, {train.precision}, seed {train.seed}
output     {config.output_dir}{watched}{note}"""
