"""Z-Image as a model family from outside the package: `--plugin zimage.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pipelines
from pipelines import Conditioning, TrainablePipeline


@pipelines.register
class ZImage(TrainablePipeline):
    """Z-Image (arXiv 2511.22699): a Qwen3 text encoder, one stream of image and text tokens, rectified flow.

    Its transformer takes lists of samples, runs through time the other way, and predicts x - noise.
    """

    family = "zimage"
    pipeline_classes = ("ZImagePipeline",)
    encoder_names = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    conditioning_masks = {"prompt_embeds": "prompt_mask"}
    flow = True
    unguided = 0.0
    lora_presets = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
    }
    trained_size = (1024, 1024)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        with torch.no_grad():
            embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        return {
            "prompt_embeds": nn.utils.rnn.pad_sequence(embeds, batch_first=True),
            "prompt_mask": nn.utils.rnn.pad_sequence(
                [row.new_ones(len(row)) for row in embeds], batch_first=True
            ).bool(),
        }

    def call_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        rows = zip(conditioning["prompt_embeds"], conditioning["prompt_mask"], strict=True)
        return {"prompt_embeds": [embeds[mask.bool()] for embeds, mask in rows]}

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {
            "x": list(noisy_latents.unsqueeze(2)),
            "t": (1000 - timesteps) / 1000,
            "cap_feats": self.call_inputs(conditioning)["prompt_embeds"],
        }

    def unpack(self, output: Any, noisy_latents: Tensor) -> Tensor:
        return -torch.stack(list(output)).squeeze(2)

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae_factor
