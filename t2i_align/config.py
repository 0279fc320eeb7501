"""A run as plain dataclasses: dataclasses <-> YAML <-> `key=value` on the command line.

A typo in a key answers with the keys there are; a value of the wrong type says which key and what was expected.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from t2i_align import objectives
from t2i_align.errors import UserError, unknown
from t2i_align.objectives.base import Objective

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model. `path`: diffusers folder, single file, Hub id, or `testbed:sd` for a bundled one.

    expert: which denoiser is meant where a model has one for `high` and one for `low` noise (null: high).
    """

    path: str = "testbed:sd"
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    expert: Literal["high", "low"] | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preference data. `path`: a source that a reader knows, a prepared cache, or `testbed:pairs`.

    format: the reader's name, or `auto` to find it. resolution: in pixels, the side of a square or [height, width]
    (null: the model's own). frames: of a clip, for models that make clips (null: the model's own). fps: frames a second
    to take them at, which should be the model's (null: each clip's frames as they come).
    annotations: files with captions, scores or users for a source's groups, by id. cache: encode once before training
    (`false`: encode each batch on the fly). cache_dir: where (null: beside the run's output). limit: use only the
    first so many groups. buckets: crop to the nearest of several aspect ratios of that area (`false`: to a square).
    stream: for what does not fit on disk: keep only so many rows of it there, among which they are shuffled, and encode
    on the fly (null: no).
    """

    path: str = "testbed:pairs"
    format: str = "auto"
    annotations: list[str] = field(default_factory=list)
    resolution: int | tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    cache: bool = True
    cache_dir: str | None = None
    limit: int | None = None
    buckets: bool = False
    stream: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for key in ("frames", "limit", "stream"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"data.{key}", "at least 1 or null", value)
        _require(self.size is None or min(self.size) >= 1, "data.resolution", "at least 1 or null", self.resolution)
        _require(self.fps is None or 0 < self.fps < math.inf, "data.fps", "positive or null", self.fps)
        _require(self.workers >= 0, "data.workers", "0 or more", self.workers)
        _require(self.cache or not self.buckets, "data.buckets", "false without data.cache", self.buckets)
        whole = self.stream is None or not (self.limit or self.annotations or self.buckets)
        _require(whole, "data.stream", "null with data.limit, data.annotations or data.buckets", self.stream)
        _expand_home(self, "path", "annotations", "cache_dir")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None is the model's own."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685). targets: a preset's name (`attention`, `all`) or a list of module-name endings."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "attention"

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        _require(0 < self.alpha < math.inf, "lora.alpha", "positive", self.alpha)
        _require(0 <= self.dropout < 1, "lora.dropout", "in [0, 1)", self.dropout)
        _require(len(self.targets) > 0, "lora.targets", "a preset's name or at least one ending", self.targets)


@dataclass(frozen=True, kw_only=True)
class SoftTokensConfig:
    """Trained vectors among the prompt's, beside a frozen denoiser (arXiv 2503.08250). count: how many.

    start: `bos` copies the start token, which changes the images least, or `random`.
    """

    count: int = 4
    start: Literal["bos", "random"] = "bos"

    def __post_init__(self) -> None:
        _require(self.count >= 1, "soft_tokens.count", "at least 1", self.count)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. schedule: a name of diffusers' `get_scheduler`. ema: decay of averaged weights."""

    lr: float = 1e-4
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    schedule: str = "constant_with_warmup"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ema: float | None = None

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", "positive", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "two numbers in [0, 1)", list(self.betas))
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", "0 or more", self.weight_decay)
        _require(self.max_grad_norm > 0, "optim.max_grad_norm", "positive", self.max_grad_norm)
        _require(self.warmup_steps >= 0, "optim.warmup_steps", "0 or more", self.warmup_steps)
        _require(self.ema is None or 0 < self.ema < 1, "optim.ema", "in (0, 1) or null", self.ema)


@dataclass(frozen=True, kw_only=True)
class ReferenceUpdateConfig:
    """A reference that follows the policy (arXiv 2505.18736): a hard copy of it every so many steps.

    max_drift: where a copy's mean error on winners would exceed the base model's by this much or more, the reference
    stays what it is for good. The paper's best: 0.005 for SD1.5, 0.002 for SDXL, every 16 to 64 steps.
    """

    every: int = 32
    max_drift: float = 0.005

    def __post_init__(self) -> None:
        _require(self.every >= 1, "train.reference_update.every", "at least 1", self.every)
        _require(self.max_drift > 0, "train.reference_update.max_drift", "positive", self.max_drift)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Batch sizes count groups: one optimiser step sees batch_size x accumulate x processes groups.

    reference: `auto` is the adapter switched off for LoRA and a frozen copy for full fine-tuning.
    reference_update: null keeps the reference what the model was before training.
    timestep_shift: of a flow model's training times (arXiv 2403.03206, eq. 23): `model` takes the checkpoint's own,
    `resolution` its sampler's for samples of this size, or a number, 1 being none.
    timestep_sampling: `geometric` prefers high noise; of arXiv 2505.18736, to be used with `reference_update`.
    caption_dropout: share of groups trained with the empty prompt, decided once a group.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    reference: Literal["auto", "adapter_off", "copy", "offloaded_copy"] = "auto"
    reference_update: ReferenceUpdateConfig | None = None
    timestep_sampling: Literal["uniform", "logit_normal", "geometric"] = "uniform"
    timestep_shift: float | Literal["model", "resolution"] = "model"
    caption_dropout: float = 0.0
    gradient_checkpointing: bool = False
    attention: str = "native"
    compile: bool = False

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate"):
            _require(getattr(self, key) >= 1, f"train.{key}", "at least 1", getattr(self, key))
        _require(0 <= self.seed < 2**63, "train.seed", "in [0, 2^63)", self.seed)
        shift = self.timestep_shift
        holds = isinstance(shift, str) or 0 < shift < math.inf
        _require(holds, "train.timestep_shift", "'model', 'resolution' or a positive number", shift)
        _require(0 <= self.caption_dropout <= 1, "train.caption_dropout", "in [0, 1]", self.caption_dropout)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Images and held-out scores on the way, every so many steps (0: never).

    prompts: a text file with one prompt per line, or `testbed:dev`. count: so many of them. batch_size: samples at a
    time (null: 8 images or 1 clip). guidance: null is that of the model's diffusers pipeline.
    """

    every: int = 0
    prompts: str = "testbed:dev"
    count: int = 16
    batch_size: int | None = None
    scorers: list[str] = field(default_factory=list)
    steps: int = 20
    guidance: float | None = None
    seed: int = 1000

    def __post_init__(self) -> None:
        _require(self.every >= 0, "validation.every", "0 (never) or more", self.every)
        for key in ("count", "batch_size", "steps"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"validation.{key}", "at least 1", value)
        _require(self.guidance is None or 0 <= self.guidance < math.inf, "validation.guidance", "0 or more",
                 self.guidance)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a run has diverged, and how often it is mended: it goes back to its last good checkpoint and continues with
    half the learning rate.

    A loss or gradient that is not finite is divergence. So are winners that the policy denoises worse and worse (their
    error rises together with the losers'): max_error_rise is how far their mean error since the last logged line may
    exceed the reference's, as a share of it; null does not look. rollbacks: after so many the run stops.
    """

    max_error_rise: float | None = 0.5
    rollbacks: int = 2

    def __post_init__(self) -> None:
        rise = self.max_error_rise
        _require(rise is None or rise > 0, "health.max_error_rise", "positive or null", rise)
        _require(self.rollbacks >= 0, "health.rollbacks", "0 or more", self.rollbacks)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """metrics.jsonl is always written; `trackers` adds tensorboard or wandb. checkpoints: every so many steps."""

    every: int = 10
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    project: str = "t2i-align"
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for key in ("every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, key) >= 1, f"log.{key}", "at least 1", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run. `lora: null` trains all the denoiser's weights, or `soft_tokens` where these are given."""

    objective: Objective
    output_dir: str
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    soft_tokens: SoftTokensConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    resume: bool = False

    def __post_init__(self) -> None:
        _expand_home(self, "output_dir")
        if self.soft_tokens and self.lora:
            raise UserError("soft_tokens and lora are alternatives: with soft_tokens, set lora=null")
        if self.soft_tokens and self.objective.needs.reference:
            raise UserError(f"soft_tokens serve objectives without a reference; {self.objective.name} has one")
        if self.objective.needs.features and self.train.reference_update:
            raise UserError(
                f"train.reference_update: {self.objective.name} compares in the features of the model before training"
            )

    @property
    def trains(self) -> Literal["lora", "soft_tokens", "model"]:
        """What is trained and saved."""
        return "lora" if self.lora else "soft_tokens" if self.soft_tokens else "model"


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (dots reach inside: `objective.beta=2000`)."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return from_mapping(with_overrides(values, overrides))


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with each `a.b=value` applied; values are read as YAML."""
    out = _copy(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r}: an override has the form key=value, such as train.steps=200")
        *parents, last = key.split(".")
        node = out
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                bare = node is out and parent == "objective" and isinstance(node.get(parent), str)
                node[parent] = {"name": node[parent]} if bare else {}
            node = node[parent]
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is not valid YAML: {error}") from error
    return out


def from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """Plain nested values to a RunConfig, each key and type checked."""
    return build(RunConfig, values, where="")


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The run as plain values, as YAML holds it; `from_mapping` gives the same run back."""
    out = dataclasses.asdict(config)
    out["objective"] = {"name": config.objective.name, **out["objective"]}
    out["optim"]["betas"] = list(out["optim"]["betas"])
    if isinstance(out["data"]["resolution"], tuple):
        out["data"]["resolution"] = list(out["data"]["resolution"])
    return out


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """One dataclass from plain values: unknown and missing keys, then types, then the class's own checks."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'configuration'}: expected a mapping of keys, found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown(f"key in {where}" if where else "key", str(key), fields)
    hints = get_type_hints(cls)
    nested, plain = {}, {}
    for key, value in values.items():
        inner = _dataclass_in(hints[key])
        if key == "objective":
            nested[key] = build_objective(value)
        elif inner is not None and value is not None:
            nested[key] = build(inner, value, where=f"{where}.{key}" if where else key)
        else:
            plain[key] = _typed(hints[key], value, f"{where}.{key}" if where else key)
    for key, f in fields.items():
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key {f'{where}.{key}' if where else key!r}")
    return cls(**nested, **plain)


def build_objective(values: Any) -> Objective:
    """An objective from `{name: …, hyper-parameters …}` or from its bare name."""
    values = {"name": values} if isinstance(values, str) else values
    if not isinstance(values, Mapping) or "name" not in values:
        raise UserError(f"objective: expected a name and its hyper-parameters, found {values!r}")
    cls = objectives.get(values["name"])
    return build(cls, {key: value for key, value in values.items() if key != "name"}, where="objective")


def _typed(hint: Any, value: Any, key: str) -> Any:
    """`value` checked against, and where sensible converted to, a type annotation (5e-6 in YAML is a string)."""
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    if value is None and hint not in (Any, None) and type(None) not in get_args(hint):  # jsonargparse passes null
        raise UserError(f"{key}: expected {expected}, found null")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except jsonargparse.ArgumentError as error:
        if get_origin(hint) is Literal:
            raise unknown(f"value for {key}:", str(value), map(str, get_args(hint))) from error
        raise UserError(f"{key}: expected {expected}, found {value!r}") from error


def _dataclass_in(hint: Any) -> type | None:
    for candidate in (hint, *getattr(hint, "__args__", ())):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _expand_home(config: object, *keys: str) -> None:
    """`~` is the shell's; in `key=~/value` and in YAML it arrives as it is."""
    for key in keys:
        if (value := getattr(config, key)) is not None:
            expanded = list(map(os.path.expanduser, value)) if isinstance(value, list) else os.path.expanduser(value)
            object.__setattr__(config, key, expanded)  # frozen for everybody else


def _require(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise UserError(f"{key} must be {expected}, found {found!r}")
