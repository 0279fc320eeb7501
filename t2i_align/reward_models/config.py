"""The configuration of `t2i-align train-scorer`: plain dataclasses, as a run's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from t2i_align.config import LoraConfig, OptimConfig, build, with_overrides
from t2i_align.errors import UserError
from t2i_align.reward_models.losses import LOSSES

Tune = Literal["full", "lora", "linear", "pal", "users"]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Preferences to learn. path: as `data.path` of a run. test: another source, held out whole.

    holdout_prompts, holdout_users: shares that are held out; no prompt (in any spelling of case and spaces) and no user
    is on both sides. holdout_seed: selects which; for the same seed and share, `data split` holds out the same prompts.
    limit: only the first so many groups.
    """

    path: str = "testbed:pairs"
    format: str = "auto"
    annotations: list[str] = field(default_factory=list)
    test: str | None = None
    holdout_prompts: float = 0.1
    holdout_users: float = 0.0
    holdout_seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        for key in ("holdout_prompts", "holdout_users"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"data.{key} must be in [0, 1), found {getattr(self, key)!r}")


@dataclass(frozen=True, kw_only=True)
class PalConfig:
    """PAL's shape (arXiv 2406.08469); see `reward_scorers.heads.PAL`."""

    prototypes: int = 2
    latent: int = 64
    hidden: int = 256
    source: Literal["points", "prompt"] = "points"
    score: Literal["distance", "angle"] = "distance"

    def __post_init__(self) -> None:
        _at_least_one(self, "pal", "prototypes", "latent", "hidden")


@dataclass(frozen=True, kw_only=True)
class ScorerTrainConfig:
    """The loop. One step sees batch_size x processes groups. balance: each prompt or user counts the same."""

    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    balance: Literal["none", "prompt", "user"] = "prompt"

    def __post_init__(self) -> None:
        _at_least_one(self, "train", "steps", "batch_size")


@dataclass(frozen=True, kw_only=True)
class ScorerLogConfig:
    """metrics.jsonl is always written. checkpoint_every: so many steps."""

    every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _at_least_one(self, "log", "every", "checkpoint_every", "keep_checkpoints")


def _at_least_one(config: object, group: str, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < 1:
            raise UserError(f"{group}.{key} must be at least 1, found {getattr(config, key)!r}")


@dataclass(frozen=True, kw_only=True)
class ScorerRun:
    """One training of a preference model.

    model: spec of a CLIP-style scorer to begin with, for `full` and `lora` an `hf-clip:` one; for `users` the folder of
    a trained PAL, to which it adds the users of this data, from their few pairs.
    tune: all weights, LoRA, a linear head or PAL on frozen features, or PAL's new users alone.
    loss: pickscore, hpsv2, imagereward or btt, which alone learns from ties what they say of distances.
    """

    output_dir: str
    model: str
    tune: Tune = "lora"
    loss: str = "pickscore"
    name: str | None = None
    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    pal: PalConfig = field(default_factory=PalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: ScorerTrainConfig = field(default_factory=ScorerTrainConfig)
    log: ScorerLogConfig = field(default_factory=ScorerLogConfig)
    resume: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}, found {self.loss!r}")
        if self.tune in ("full", "lora") and not self.model.startswith("hf-clip:"):
            raise UserError(
                f"tune: {self.tune} trains a transformers CLIP: model must be hf-clip:..., not {self.model!r}"
            )
        if self.optim.ema is not None:
            raise UserError("optim.ema: scorers are trained without averaged weights; leave it null")


def load(path: str | Path, overrides: Sequence[str] = ()) -> ScorerRun:
    """Read a YAML file and apply `key=value` overrides."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return build(ScorerRun, with_overrides(values, overrides), where="")
