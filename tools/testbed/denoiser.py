"""Train the testbed's denoiser with its text encoder on cached latents of drawn scenes.

Two phases under one cosine. First true captions and mostly clean images, so that the base *knows* its
world. Then faults: captions with independent planted errors, degraded images, stray objects. The base
ends as a mixture around what it knows, which is what preference alignment can sharpen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from t2i_align.testbed import captions as image_captions
from t2i_align.testbed.prompts import split_of
from tools.testbed.loop import LoopConfig, fit
from tools.testbed.pools import Pool
from tools.testbed.precision import mixed
from tools.testbed.text import WIDTH, ParseHeads, WordEncoder

# Each is planted on its own with this probability wherever it applies. An ignored background and a wrong
# scale are known from real models and are decided at high noise, where preferences act first; guidance
# takes a part of every planted fault away, so the rates are high. What the base learns last (shapes,
# relations) gets few: it makes faults there of its own accord.
FAULT_RATES = {
    "background": 0.45,
    "size": 0.20,
    "relation": 0.10,
    "exchange": 0.10,
    "count": 0.15,
    "colour": 0.03,
    "shape": 0.03,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Recipe of a denoiser; the defaults are the shipped v base's."""

    steps: int = 7600
    clean_fraction: float = 0.72
    batch: int = 64
    lr: float = 1e-3
    caption_dropout: float = 0.1
    parse_weight: float = 0.1
    faulty_images: tuple[float, float] = (0.1, 0.7)  # share of the batch, in each phase
    fault_rates: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(FAULT_RATES))
    # Shapes are drawn between noise and image, where the loss is small against the noisy steps' irreducible
    # one: this share of the times is logit-normal around `middle`, the rest uniform.
    middle_share: float = 0.7
    middle: tuple[float, float] = (-0.2, 1.0)
    noisiest_share: float = 0.0  # of the times in the noisiest twentieth, where backgrounds are decided
    # Images of large objects only are drawn so many times as often: a shape's word is learned from them first,
    # since a small shape is three latent pixels wide.
    large_weight: float = 3.0
    seed: int = 0


def build_unet(channels: tuple[int, int, int] = (48, 96, 144), **more: Any) -> UNet2DConditionModel:
    """Three levels (16 x 16 to 4 x 4), attention on the two lower ones where it is cheap."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        **{"cross_attention_dim": WIDTH, **more},
    )


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """SD's betas; the v base has zero terminal SNR, which makes its backgrounds free of a gray bias."""
    zero_snr = prediction_type == "v_prediction"
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def draw_captions(
    pool: Pool[Any], index: np.ndarray, rng: np.random.Generator, config: DenoiserConfig, faulty: bool, language: Any
) -> tuple[list[str], list[Any]]:
    """A caption for each image, "" where dropped; statements of dev and test prompts never occur.

    `language` is the module that has the captions of what is in the pool.
    """
    captions, statements = [], []
    for i in index:
        statement = language.describe(pool.drawn[i], rng)
        if faulty:
            for fault, rate in config.fault_rates.items():
                if rng.random() < rate:
                    statement = language.corrupt(statement, fault, rng) or statement
        caption = language.write(statement, rng)
        statement = language.parse(caption)  # in the order of the text
        if rng.random() < config.caption_dropout or split_of(statement) != "train":
            caption = ""
        captions.append(caption)
        statements.append(statement)
    return captions, statements


def draw_batch(
    pools: tuple[Pool[Any], Pool[Any]],
    rng: np.random.Generator,
    config: DenoiserConfig,
    faulty: bool,
    language: Any = image_captions,
) -> tuple[Tensor, list[str], list[Any]]:
    """Latents [B, ...], captions and statements of clean and faulty images in their phase's shares."""
    number = round(config.faulty_images[int(faulty)] * config.batch)
    latents, captions, statements = [], [], []
    for pool, count in zip(pools, (config.batch - number, number), strict=True):
        index = pool.draw(rng, count, config.large_weight)
        latents.append(pool.latents[torch.from_numpy(index)].float())
        some, stated = draw_captions(pool, index, rng, config, faulty, language)
        captions += some
        statements += stated
    return torch.cat(latents), captions, statements


class Denoiser(nn.Module):
    """The UNet, its text encoder and the parse heads as one trainable module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, heads: ParseHeads) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.heads = unet, text_encoder, heads


def train_denoiser(
    out: Path,
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    pools: tuple[Pool[Any], Pool[Any]],
    config: DenoiserConfig,
    *,
    on_checkpoint: Callable[[Denoiser, int], None] | None = None,
    every: int = 500,
) -> Denoiser:
    """Train and return the exponential average, continuing from `out/denoiser.pt` where it exists.

    Args:
        pools: clean and faulty images.
        on_checkpoint: called with the average and the step after each checkpoint (`every` steps).
    """
    # Plain matrix products: at these sizes the fused kernel's backward takes twice as long on a CPU.
    model.unet.set_attn_processor(AttnProcessor())
    to_ids = WordEncoder(tokenizer)
    alphas = build_scheduler("v_prediction").alphas_cumprod.float()

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, 11, step))
        faulty = step >= config.clean_fraction * config.steps
        latents, captions, statements = draw_batch(pools, rng, config, faulty)
        timesteps = draw_timesteps(len(latents), rng, config)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        alpha, sigma = (x[timesteps].sqrt().view(-1, 1, 1, 1) for x in (alphas, 1.0 - alphas))
        with mixed():
            hidden = model.text_encoder(to_ids(captions)).last_hidden_state
            prediction = model.unet(alpha * latents + sigma * noise, timesteps, hidden, return_dict=False)[0]
        captioned = torch.tensor([bool(caption) for caption in captions])
        parse_loss = model.heads.loss(hidden[captioned], ParseHeads.targets(statements)[captioned])
        error = (prediction.float() - (alpha * noise - sigma * latents)).square().mean()
        return {"error": error, "parse": config.parse_weight * parse_loss}

    return fit(
        model, losses, LoopConfig(steps=config.steps, lr=config.lr, every=every), out / "denoiser.pt", on_checkpoint
    )


def draw_timesteps(batch: int, rng: np.random.Generator, config: DenoiserConfig) -> Tensor:
    """Timesteps [batch] in 0..999: stratified uniform, logit-normal and noisiest ones, see `DenoiserConfig`."""
    times = (rng.permutation(batch) + rng.random(batch)) / batch
    middle = rng.random(batch) < config.middle_share
    mean, spread = config.middle
    times[middle] = 1.0 / (1.0 + np.exp(-rng.normal(mean, spread, int(middle.sum()))))
    if config.noisiest_share:
        noisiest = rng.random(batch) < config.noisiest_share
        times[noisiest] = 1.0 - 0.05 * rng.random(int(noisiest.sum()))
    return torch.from_numpy((times * 1000).astype(np.int64)).clamp(max=999)
