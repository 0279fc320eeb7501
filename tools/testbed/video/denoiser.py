"""Train the video base's transformer with its text encoder on cached latents of drawn clips.

In two phases, as the image bases: true captions and clean clips first, so that the base knows its world; then
wrong directions, speeds and backgrounds, and clips with faults, which preference alignment can mend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5EncoderModel

from pipelines import RectifiedFlow
from t2i_align.testbed import clip_captions as captions
from t2i_align.testbed.clips import FRAMES, Clip
from t2i_align.testbed.scenes import SIDE
from tools.testbed.denoiser import DenoiserConfig, draw_batch, draw_timesteps
from tools.testbed.loop import LoopConfig, fit
from tools.testbed.muon import Muon
from tools.testbed.pools import Pool
from tools.testbed.text import WIDTH
from tools.testbed.video.text import ParseHeads, encode_text
from tools.testbed.video.vae import CHANNELS

FLOW_SHIFT = 3.0  # Wan's own for its smaller images
FAULT_RATES = {"path": 0.25, "speed": 0.25, "background": 0.35, "size": 0.2, "colour": 0.03, "shape": 0.03}
RECIPE = DenoiserConfig(
    steps=2600,
    clean_fraction=0.75,
    batch=64,
    lr=3e-3,
    faulty_images=(0.0, 0.6),
    fault_rates=FAULT_RATES,
    middle=(0.2, 1.0),
)


def build_transformer(width: int = 192, layers: int = 6) -> WanTransformer3DModel:
    """Wan's transformer on 3 x 4 x 4 tokens; its configuration says for what size of clips it was made."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=width // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=128,
        ffn_dim=3 * width,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    transformer.register_to_config(_default_size=(FRAMES, SIDE, SIDE))
    return transformer


def build_scheduler() -> UniPCMultistepScheduler:
    """What Wan ships: UniPC of second order on flow sigmas. It starts anew in every call: batches do not mix."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, solver_order=2
    )


class VideoDenoiser(nn.Module):
    """The transformer, its text encoder and the parse heads as one trainable module."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel, heads: ParseHeads) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.heads = transformer, text_encoder, heads


def train_denoiser(
    out: Path,
    model: VideoDenoiser,
    tokenizer: T5Tokenizer,
    pools: tuple[Pool[Clip], Pool[Clip]],
    config: DenoiserConfig,
    *,
    on_checkpoint: Callable[[VideoDenoiser, int], None] | None = None,
    every: int = 600,
) -> VideoDenoiser:
    """Train and return the exponential average, continuing from `out/denoiser.pt` where it exists.

    Args:
        pools: clean and faulty clips.
        on_checkpoint: called with the average and the step after each checkpoint (`every` steps).
    """
    process = RectifiedFlow()

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, 11, step))
        faulty = step >= config.clean_fraction * config.steps
        latents, texts, statements = draw_batch(pools, rng, config, faulty, captions)
        timesteps = draw_timesteps(len(latents), rng, config) + torch.from_numpy(rng.random(len(latents), np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        hidden, last = encode_text(model.text_encoder, tokenizer, texts)
        noisy = process.add_noise(latents, noise, timesteps)
        prediction = model.transformer(noisy, timesteps, hidden, return_dict=False)[0]
        captioned = torch.tensor([bool(text) for text in texts])
        parse_loss = model.heads.loss(last[captioned], ParseHeads.targets(statements)[captioned])
        error = (prediction - process.target(latents, noise, timesteps)).square().mean()
        return {"error": error, "parse": config.parse_weight * parse_loss}

    loop = LoopConfig(steps=config.steps, lr=config.lr, every=every)
    return fit(model, losses, loop, out / "denoiser.pt", on_checkpoint, Muon(model.parameters(), config.lr))
