"""The configuration of a run: its sections, from YAML and `key=value`.

Importing this module and checking a configuration need no torch: an objective's own module is imported last, once
every other key is valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import to_jsonable_python

from t2i_align import objectives, plugins
from t2i_align.conditioning.config import PersonalConfig, SegmentsConfig
from t2i_align.errors import UserError
from t2i_align.training.sections import (
    HealthConfig,
    LogConfig,
    OptimConfig,
    Spec,
    TrainConfig,
    ValidationConfig,
)  # fmt: skip

from t2i_align.utils.settings import (  # isort: skip
    Bool, Count, Decay, Positive, UserPath, Whole, build,
    load_as, read_mapping, settings, with_overrides,
)  # fmt: skip

if TYPE_CHECKING:
    from t2i_align.objectives.base import Objective
else:
    Objective = Annotated[Any, BeforeValidator(lambda value: _named(value))]

Plugin = Annotated[str, AfterValidator(plugins.required)]


@settings
class ModelConfig:
    """The base model. `path`: diffusers folder, single file, Hub id, or `testbed:sd` for a bundled one.

    expert: the denoiser to train where a model has one for `high` and one for `low` noise (null: high).
    prediction_type: what the denoiser predicts, where its files do not say it (single files) or are wrong.
    segments: encode prompts in segments, so that none is cut off (null: as the model's own pipeline does).
    quantize: how the frozen weights under a LoRA are stored (null: in the run's precision; see `pipelines.quantize`).
    """

    path: str = "testbed:sd"
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    expert: Literal["high", "low"] | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    segments: SegmentsConfig | None = None
    quantize: Literal["int8", "fp8", "nf4"] | None = None


@settings
class DataConfig:
    """Preference data. `path`: a source that a reader knows, a prepared cache, or `testbed:pairs`.

    root: the folder that a table's paths are relative to or lie in (null: the table's own).
    format: the reader's name, or `auto` to find it. resolution: in pixels, the side of a square or [height, width]
    (null: the model's own). frames, fps: of a clip, for models that make clips (null: the model's own frame count, each
    clip's frame rate). annotations: files with captions, scores or users for a source's groups, by id. cache: encode
    once before training (`false`: encode each batch on the fly). cache_dir: where (null: beside the run's output).
    limit: use only the first so many groups. buckets: crop to the nearest of several aspect ratios of that area
    (`false`: to a square). flip: train on each group mirrored as well. stream: for what does not fit on disk: hold so
    many rows of a shard in memory, shuffle among these, and encode on the fly (null: no). encode_batch: images or texts
    that are encoded at once for the cache.
    """

    path: UserPath = "testbed:pairs"
    root: UserPath | None = None
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
    flip: Bool = False
    stream: Count | None = None
    workers: Whole = 0
    encode_batch: Count = 8

    def __post_init__(self) -> None:
        if (self.buckets or self.flip) and not self.cache:
            raise UserError(
                f"data.{'buckets' if self.buckets else 'flip'} must be false without data.cache, found True"
            )
        if self.stream and (self.limit or self.annotations or self.buckets or self.flip):
            raise UserError(
                "data.stream must be null with data.limit, data.annotations, data.buckets or data.flip, found "
                f"{self.stream}"
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None is the model's own."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


@settings
class LoraConfig:
    """LoRA (arXiv 2106.09685). targets: a preset's name (`attention`, `all`) or a list of module-name endings.

    init: a saved LoRA of that rank and those modules to start from, as after SFT; its weights are then the reference.
    dora: train the weights' magnitudes apart from their directions (DoRA, arXiv 2402.09353). save_precision: of the
    file's tensors; bf16 and fp16 halve it.
    """

    rank: Count = 16
    alpha: Positive = 16.0
    dropout: Decay = 0.0
    targets: Annotated[
        Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)],
        Field(description="a preset's name or a list of at least one module-name ending"),
    ] = "attention"
    init: UserPath | None = None
    dora: Bool = False
    save_precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        if self.dora and self.init is not None:
            raise UserError("lora.dora: starts from the model's own magnitudes; leave lora.init null")


@settings
class SoftTokensConfig:
    """Trained vectors among the prompt's, beside a frozen denoiser (arXiv 2503.08250). count: how many.

    start: `bos` copies the start token, which changes the images least, or `random`.
    """

    count: Count = 4
    start: Literal["bos", "random"] = "bos"


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
            cls = objectives.get(name)
            try:
                object.__setattr__(self, "objective", build(cls, values, where="objective"))
            except UserError as error:
                if values.keys() <= {f.name for f in fields(cls)}:  # type: ignore[arg-type]
                    raise
                advice = f"For {cls.name} with its defaults in a file of another method, write objective={cls.name}"
                raise UserError(f"{error}\n{advice} instead of objective.name={cls.name}.") from None
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
        for section in (self.personal, self.model.segments):
            if section:
                section.check(self)
        if self.soft_tokens and self.lora:
            raise UserError("soft_tokens and lora are alternatives: with soft_tokens, set lora=null")
        if self.soft_tokens and self.objective.needs.reference:
            raise UserError(f"soft_tokens serve objectives without a reference; {self.objective.name} has one")
        if self.objective.needs.scorer and self.validation.data:
            raise UserError(f"validation.data: {self.objective.name} learns from prompts; leave it null")
        if self.health.max_drift is not None and not self.objective.needs.reference:
            raise UserError(
                f"health.max_drift: {self.objective.name} measures no drift from a reference"
                + "; set objective.drift=true" * hasattr(self.objective, "drift")
            )
        if self.train.offload:
            self._check_offload()
        if self.objective.needs.features and self.train.reference_update:
            raise UserError(
                f"train.reference_update: {self.objective.name} compares in the features of the model before training"
            )

    def _check_offload(self) -> None:
        train = self.train
        if self.objective.needs.scorer:
            raise UserError(f"train.offload: the gradient of {self.objective.name} passes the VAE; leave it null")
        kept = "autograd would keep a copy of each layer until the backward pass"
        for key, (found, why) in {
            "lora=null": (self.lora is None, "weights that are trained stay on the device"),
            "train.gradient_checkpointing=false": (not train.gradient_checkpointing, kept),
            "lora.dora": (self.lora is not None and self.lora.dora, "it reads the weights beside their layers"),
            "model.quantize": (self.model.quantize is not None, "choose one of the two"),
            "train.compile": (train.compile, "compiled code keeps its weights where they are"),
            "train.shard": (train.shard, "choose one of the two"),
            f"train.reference={train.reference}": ("copy" in train.reference, "use 'auto', the LoRA switched off"),
        }.items():
            if found and train.offload == "base":
                raise UserError(f"train.offload=base does not work with {key}: {why}")

    @property
    def trains(self) -> Literal["personal", "t5", "lora", "soft_tokens", "model"]:
        """What is trained and saved; `personal` and `t5` with a LoRA if there is one."""
        if self.model.segments and self.model.segments.trains:
            return "t5"
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
