"""The configuration of `t2i-align train-scorer`: its sections, read as those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

from t2i_align.config import LoraConfig, Plugin
from t2i_align.errors import UserError
from t2i_align.training.sections import LogConfig, OptimConfig, Precision, Spec
from t2i_align.utils.settings import Bool, Count, Decay, Int, UserPath, load_as, settings

Tune = Literal["full", "lora", "linear", "pal", "users"]
Loss = Literal["pickscore", "hpsv2", "imagereward", "btt"]  # the functions of `losses`


@settings
class PreferenceConfig:
    """Preferences to learn. path: as `data.path` of a run. test: another source, held out whole.

    holdout_prompts, holdout_users: shares that are held out; no prompt (in any spelling of case and spaces) and no user
    is on both sides. holdout_seed: selects which; for the same seed and share, `data split` holds out the same prompts.
    limit: only the first so many groups.
    """

    path: UserPath = "testbed:pairs"
    format: Spec = "auto"
    annotations: list[UserPath] = field(default_factory=list)
    test: UserPath | None = None
    holdout_prompts: Decay = 0.1
    holdout_users: Decay = 0.0
    holdout_seed: Int = 0
    limit: Count | None = None


@settings
class PalConfig:
    """PAL's shape (arXiv 2406.08469); see `reward_scorers.heads.PAL`."""

    prototypes: Count = 2
    latent: Count = 64
    hidden: Count = 256
    source: Literal["points", "prompt"] = "points"
    score: Literal["distance", "angle"] = "distance"


@settings
class ScorerTrainConfig:
    """The loop. One step sees batch_size x processes groups. balance: each prompt or user counts the same."""

    steps: Count = 1000
    batch_size: Count = 32
    seed: Int = 0
    precision: Precision = "fp32"
    balance: Literal["none", "prompt", "user"] = "prompt"


@settings
class ScorerRun:
    """One training of a preference model.

    model: spec of a CLIP-style scorer to begin with, for `full` and `lora` an `hf-clip:` one; for `users` the folder of
    a trained PAL, to which it adds the users of this data, from their few pairs.
    tune: all weights, LoRA, a linear head or PAL on frozen features, or PAL's new users alone.
    plugins: Python files and modules that run first, as those of a run.
    loss: pickscore, hpsv2, imagereward or btt, which alone learns how close tied images are.
    """

    plugins: list[Plugin] = field(default_factory=list)
    output_dir: UserPath
    model: Spec
    tune: Tune = "lora"
    loss: Loss = "pickscore"
    name: str | None = None
    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    pal: PalConfig = field(default_factory=PalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: ScorerTrainConfig = field(default_factory=ScorerTrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    resume: Bool = False

    def __post_init__(self) -> None:
        if self.tune in ("full", "lora") and not self.model.startswith("hf-clip:"):
            raise UserError(
                f"tune: {self.tune} trains a transformers CLIP: model must be hf-clip:..., not {self.model!r}"
            )
        if self.lora.init is not None:
            raise UserError("lora.init: scorers start from `model`; leave it null")
        if self.optim.ema is not None:
            raise UserError("optim.ema: scorers are trained without averaged weights; leave it null")
        if self.log.keep_weights is not None:
            raise UserError(
                "log.keep_weights: a scorer's checkpoints are kept with log.keep_checkpoints; leave it null"
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> ScorerRun:
    """Read a YAML file and apply `key=value` overrides."""
    return load_as(ScorerRun, path, overrides)
