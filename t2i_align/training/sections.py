"""The sections of a run that say how it trains, what it watches and what it writes."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from t2i_align import plugins
from t2i_align.errors import UserError
from t2i_align.utils.settings import (
    Bool,
    Count,
    Decay,
    Float,
    Int,
    Limit,
    NonNegative,
    Positive,
    Share,
    UserPath,
    Whole,
    settings,
)  # fmt: skip

Spec = Annotated[str, AfterValidator(plugins.located)]  # a name, or the place of something from outside
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@settings
class OptimConfig:
    """The optimiser and its schedule.

    optimizer: `adafactor` has no betas; `prodigy` finds the learning rate itself, and lr=1 is its factor; `lion` wants
    a third to a tenth of AdamW's. schedule: a name of diffusers' `get_scheduler`. ema: decay of averaged weights.
    """

    lr: Positive = 1e-4
    optimizer: Literal["adamw", "adamw8bit", "adamw8bit_torchao", "adafactor", "prodigy", "lion"] = "adamw"
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
    offload: what lies in CPU memory and passes through the device layer by layer: VAE and text encoders (`encoders`),
    or also the frozen denoiser under a LoRA (`base`).
    shard: divide weights, gradients and optimiser states among the processes (FSDP2).
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
    offload: Literal["encoders", "base"] | None = None
    shard: Bool = False


@settings
class ValidationConfig:
    """Samples, their scores, and held-out preferences during training, every so many steps (0: never).

    prompts: a file of prompts (null: some of the run's own). count: how many of them; 0 draws no samples. batch_size:
    samples at a time (null: 8 images or 1 clip). guidance: null is that of the model's diffusers pipeline.
    patience: the run ends once the first scorer's mean has not risen for so many validations, and keeps the weights of
    its best one (null: all steps are trained).
    data: preferences that are not trained on, a source as `data.path` is; their loss, accuracy and margin are logged.
    pairs: on how many of these, each with noise of its own; where there are fewer, they come again with other noise.
    """

    every: Whole = 0
    prompts: str | None = None
    count: Whole = 16
    batch_size: Count | None = None
    scorers: list[Spec] = field(default_factory=list)
    steps: Count = 20
    guidance: NonNegative | None = None
    seed: Int = 1000
    data: UserPath | None = None
    pairs: Count = 64
    patience: Count | None = None

    def __post_init__(self) -> None:
        if self.patience and not (self.every and self.scorers):
            raise UserError("validation.patience needs validation.every and a scorer in validation.scorers to watch")
        if self.data is not None and not self.every:
            raise UserError("validation.data is measured every validation.every steps, which is 0; set that, too")


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
    """metrics.jsonl is always written; `trackers` adds tensorboard or wandb. every, checkpoint_every: in steps.

    keep_weights: keep what is trained every so many steps, in `weights/` (null: only in the kept checkpoints).
    """

    every: Count = 10
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    project: str = "t2i-align"
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    keep_weights: Count | None = None
