"""The configuration of a run: its sections, from YAML and `key=value`.

Importing this module and checking a configuration need no torch: an objective's own module is imported last, once
every other key is valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import to_jsonable_python

from t2i_align import objectives, plugins
from t2i_align.conditioning.config import PersonalConfig, SegmentsConfig
from t2i_align.errors import UserError

from t2i_align.utils.settings import (  # isort: skip
    Bool, Count, Decay, Float, Int, Limit, NonNegative, Positive, Share, UserPath, Whole, build,
    load_as, read_mapping, settings, with_overrides,
)  # fmt: skip

if TYPE_CHECKING:
    from t2i_align.objectives.base import Objective
else:
    Objective = Annotated[Any, BeforeValidator(lambda value: _named(value))]

Spec = Annotated[str, AfterValidator(plugins.located)]  # a name, or the place of something from outside
Plugin = Annotated[str, AfterValidator(plugins.required)]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@settings
class ModelConfig:
    """The base model. `path`: diffusers folder, single file, Hub id, or `testbed:sd` for a bundled one.

    expert: the denoiser to train where a model has one for `high` and one for `low` noise (null: high).
    prediction_type: what the denoiser predicts, where its files do not say it (single files) or are wrong.
    segments: encode prompts in segments, so that none is cut off (null: as the model's own pipeline does).
    """

    path: str = "testbed:sd"
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    expert: Literal["high", "low"] | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    segments: SegmentsConfig | None = None


@settings
class DataConfig:
    """Preference data. `path`: a source that a reader knows, a prepared cache, or `testbed:pairs`.

    format: the reader's name, or `auto` to find it. resolution: in pixels, the side of a square or [height, width]
    (null: the model's own). frames, fps: of a clip, for models that make clips (null: the model's own frame count, each
    clip's frame rate). annotations: files with captions, scores or users for a source's groups, by id. cache: encode
    once before training (`false`: encode each batch on the fly). cache_dir: where (null: beside the run's output).
    limit: use only the first so many groups. buckets: crop to the nearest of several aspect ratios of that area
    (`false`: to a square). stream: for what does not fit on disk: hold so many rows of a shard in memory, shuffle
    among these, and encode on the fly (null: no). encode_batch: images or texts that are encoded at once for the cache.
    """

    path: UserPath = "testbed:pairs"
    format: Spec = "auto"
    annotations: list[UserPath] = field(default_factory=list)
    resolution: Annotated[
        Count | tuple[Count, Count] | None, Field(description="a side or [height, width] of at least 1 pixel, or null")
    ] = None
    frames: Count | None = None
    fps: Positive | None = None
    cache: Bool = True
    cache_dir: UserPath | None = None
    limit: Count | None = None
    buckets: Bool = False
    stream: Count | None = None
    workers: Whole = 0
    encode_batch: Count = 8

    def __post_init__(self) -> None:
        if self.buckets and not self.cache:
            raise UserError("data.buckets must be false without data.cache, found True")
        if self.stream and (self.limit or self.annotations or self.buckets):
            raise UserError(
                f"data.stream must be null with data.limit, data.annotations or data.buckets, found {self.stream}"
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None is the model's own."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


@settings
class LoraConfig:
    """LoRA (arXiv 2106.09685). targets: a preset's name (`attention`, `all`) or a list of module-name endings.

    init: a saved LoRA of that rank and those modules to start from, as after SFT; its weights are then the reference.
    """

    rank: Count = 16
    alpha: Positive = 16.0
    dropout: Decay = 0.0
    targets: Annotated[
        Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)],
        Field(description="a preset's name or a list of at least one module-name ending"),
    ] = "attention"
    init: UserPath | None = None


@settings
class SoftTokensConfig:
    """Trained vectors among the prompt's, beside a frozen denoiser (arXiv 2503.08250). count: how many.

    start: `bos` copies the start token, which changes the images least, or `random`.
    """

    count: Count = 4
    start: Literal["bos", "random"] = "bos"


@settings
class OptimConfig:
    """AdamW and its schedule. schedule: a name of diffusers' `get_scheduler`. ema: decay of averaged weights."""

    lr: Positive = 1e-4
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: Annotated[tuple[Decay, Decay], Field(description="two numbers in [0, 1)")] = (0.9, 0.999)
    weight_decay: NonNegative = 1e-2
    schedule: Schedule = "constant_with_warmup"
    warmup_steps: Whole = 0
    max_grad_norm: Limit = 1.0
    ema: Annotated[Float, Field(gt=0, lt=1, description="a number in (0, 1)")] | None = None

    def __post_init__(self) -> None:
        if self.schedule == "constant" and self.warmup_steps:
            raise UserError(
                f"optim.schedule 'constant' takes no warm-up, found optim.warmup_steps={self.warmup_steps}; "
                "use 'constant_with_warmup'"
            )


@settings
class ReferenceUpdateConfig:
    """A reference that follows the policy (arXiv 2505.18736): a hard copy of it every so many steps.

    max_drift: once a copy's mean error on winners would exceed the base model's by this much or more, the reference is
    frozen permanently. The paper's best: 0.005 for SD1.5, 0.002 for SDXL, every 16 to 64 steps.
    """

    every: Count = 32
    max_drift: Limit = 0.005


@settings
class TrainConfig:
    """The loop. Batch sizes count groups: one optimiser step sees batch_size x accumulate x processes groups.

    precision: `tf32` is float32 with matrix products that NVIDIA GPUs since Ampere round to TF32, several times faster.
    reference: `auto` is the adapter switched off for LoRA and a frozen copy for full fine-tuning.
    reference_update: null keeps the model before training as the reference.
    timestep_shift: of a flow model's training times (arXiv 2403.03206, eq. 23): `model` takes the checkpoint's own,
    `resolution` its sampler's for samples of this size, or a number, 1 being none.
    timestep_sampling: `geometric` prefers high noise; of arXiv 2505.18736, to be used with `reference_update`.
    caption_dropout: share of groups trained with the empty prompt, decided once per group.
    store_reference: keep the reference's errors in the cache's folder, for other runs on the same noise.
    """

    steps: Count = 1000
    batch_size: Count = 8
    accumulate: Count = 1
    precision: Precision = "fp32"
    seed: Annotated[Int, Field(ge=0, lt=2**63, description="a whole number in [0, 2^63)")] = 0
    reference: Literal["auto", "adapter_off", "copy", "offloaded_copy"] = "auto"
    reference_update: ReferenceUpdateConfig | None = None
    store_reference: Bool = False
    timestep_sampling: Literal["uniform", "logit_normal", "geometric"] = "uniform"
    timestep_shift: Annotated[
        Positive | Literal["model", "resolution"], Field(description="'model', 'resolution' or a positive number")
    ] = "model"
    caption_dropout: Share = 0.0
    gradient_checkpointing: Bool = False
    attention: str = "native"
    compile: Bool = False


@settings
class ValidationConfig:
    """Images and held-out scores during training, every so many steps (0: never).

    prompts: a file of prompts, or `testbed:dev`. count: how many of them. batch_size: samples at a time (null: 8 images
    or 1 clip). guidance: null is that of the model's diffusers pipeline. patience: the run ends once the first scorer's
    mean has not risen for so many validations, and keeps the weights of its best one (null: all steps are trained).
    """

    every: Whole = 0
    prompts: str = "testbed:dev"
    count: Count = 16
    batch_size: Count | None = None
    scorers: list[Spec] = field(default_factory=list)
    steps: Count = 20
    guidance: NonNegative | None = None
    seed: Int = 1000
    patience: Count | None = None

    def __post_init__(self) -> None:
        if self.patience and not (self.every and self.scorers):
            raise UserError("validation.patience needs validation.every and a scorer in validation.scorers to watch")


@settings
class HealthConfig:
    """Divergence detection and rollback to the last good checkpoint, with half the learning rate from there.

    A loss or gradient that is not finite is divergence. So are winners that the policy denoises worse and worse (their
    error rises together with the losers'): max_error_rise is how far their mean error since the last logged line may
    exceed the reference's (without a reference, the initial model's), as a share of it (null: not checked). rollbacks:
    after so many the run stops. max_drift: the run ends where the mean squared difference between the policy's and the
    reference's predictions (`drift`) exceeds it (null: not checked).
    """

    max_error_rise: Limit | None = 0.5
    max_drift: Limit | None = None
    rollbacks: Whole = 2


@settings
class LogConfig:
    """metrics.jsonl is always written; `trackers` adds tensorboard or wandb. every, checkpoint_every: in steps."""

    every: Count = 10
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    project: str = "t2i-align"
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2


@settings
class RunConfig:
    """One complete run. `lora: null` trains all the denoiser's weights, or `soft_tokens` or `personal` where given.

    plugins: Python files and modules that run first; what they register is known by its name (see `plugins`).
    """

    plugins: list[Plugin] = field(default_factory=list)  # first: the other keys may name what these register
    objective: Objective
    output_dir: UserPath
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    soft_tokens: SoftTokensConfig | None = None
    personal: PersonalConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    resume: Bool = False

    def __post_init__(self) -> None:
        if isinstance(self.objective, Mapping):
            name, values = self.objective["name"], {k: v for k, v in self.objective.items() if k != "name"}
            object.__setattr__(self, "objective", build(objectives.get(name), values, where="objective"))
        reference, needs = self.train.reference, self.objective.needs
        if needs.reference and reference == "adapter_off" and not (self.lora or self.personal):
            raise UserError("train.reference 'adapter_off' needs a LoRA; use 'copy' or 'offloaded_copy' without one")
        if self.train.reference_update and not needs.reference:
            raise UserError(f"train.reference_update: {self.objective.name} asks no reference that could be updated")
        if self.train.reference_update and self.lora and reference not in ("auto", "adapter_off"):
            raise UserError(
                f"train.reference {reference!r} with train.reference_update: under a LoRA use 'auto', which is free"
            )
        if self.lora and self.lora.init and needs.reference and reference != "auto":
            raise UserError(f"train.reference {reference!r} with lora.init: use 'auto', a copy of that LoRA")
        if self.personal:
            self.personal.check(self)
        if self.soft_tokens and self.lora:
            raise UserError("soft_tokens and lora are alternatives: with soft_tokens, set lora=null")
        if self.soft_tokens and self.objective.needs.reference:
            raise UserError(f"soft_tokens serve objectives without a reference; {self.objective.name} has one")
        if self.health.max_drift is not None and not self.objective.needs.reference:
            raise UserError(
                f"health.max_drift: {self.objective.name} measures no drift from a reference"
                + "; set objective.drift=true" * hasattr(self.objective, "drift")
            )
        if self.objective.needs.features and self.train.reference_update:
            raise UserError(
                f"train.reference_update: {self.objective.name} compares in the features of the model before training"
            )

    @property
    def trains(self) -> Literal["personal", "lora", "soft_tokens", "model"]:
        """What is trained and saved; `personal` with a LoRA if there is one."""
        return "personal" if self.personal else "lora" if self.lora else "soft_tokens" if self.soft_tokens else "model"


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (dots reach inside: `objective.beta=2000`)."""
    return load_as(RunConfig, path, overrides)


def changed(
    config: RunConfig | Mapping[str, Any] | str | Path | None, given: Mapping[str, Any], overrides: Sequence[str]
) -> RunConfig:
    """A run from a file, a RunConfig or nested values, with these keys replaced and `key=value` overrides."""
    if isinstance(config, RunConfig):
        if not given and not overrides:
            return config
        values = {**to_mapping(config), "objective": config.objective}
    else:
        values = read_mapping(config) if isinstance(config, str | Path) else dict(config or {})
    values |= given
    objective = values.get("objective")
    if hasattr(objective, "step") and any(override.startswith("objective.") for override in overrides):
        cls = objective if isinstance(objective, type) else type(objective)
        values["objective"] = {"name": cls, **({} if cls is objective else vars(objective))}
    return from_mapping(with_overrides(values, overrides))


def from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """Plain nested values to a RunConfig, each key and type checked."""
    return build(RunConfig, values)


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The run as plain values, as YAML holds it; `from_mapping` gives the same run back."""
    cls = type(config.objective)
    name = plugins.place_of(cls) or cls.name
    objective = {"name": name, **vars(config.objective)}  # by field, also of a plain dataclass
    return to_jsonable_python({**vars(config), "objective": objective})


def _named(objective: Any) -> Any:
    """`{name: ..., hyper-parameters ...}` of an objective that exists, from that or its bare name."""
    values = {"name": objective} if isinstance(objective, str | type) else objective
    if isinstance(values, Mapping):
        if "name" not in values:
            raise UserError("objective.name: missing key")
        objectives.check(values["name"])
    elif not hasattr(values, "step"):
        raise UserError(f"objective must be a name or a mapping of keys, found {objective!r}")
    else:
        objectives.check(type(values))
    return values
