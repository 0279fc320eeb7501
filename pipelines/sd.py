"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, epsilon- or v-prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipelines.base import Conditioning
from pipelines.lora import ATTENTION, FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class StableDiffusion(TrainablePipeline):
    """SD1.x / SD2.x. The prediction type and the noise table are those of the checkpoint's scheduler."""

    family = "sd"
    pipeline_classes = ("StableDiffusionPipeline",)
    single_file_layouts: ClassVar[tuple[str, ...]] = ("v1", "v2")
    # SD1.5's image filter is left out.
    load_options: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    denoiser_name = "unet"
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    text_options = {**TrainablePipeline.text_options, "num_images_per_prompt": 1}
    lora_presets = {
        "attention": ATTENTION,
        "all": (*ATTENTION, "proj_in", "proj_out", *FEED_FORWARD, "conv1", "conv2", "conv_shortcut"),
    }
    lora_namings = ("diffusers", "kohya", "comfyui")
    attention_backends = ("native", "xformers", "math")
    feature_block = "mid_block"

    def lora_version(self) -> tuple[str, str]:
        v = self.pipe.scheduler.config.get("prediction_type") == "v_prediction"
        if self.denoiser.config.cross_attention_dim == 1024:
            return f"sd_v2{'_v' * v}", f"stable-diffusion-v2-{'768-v' if v else '512'}"
        return "sd_v1", "stable-diffusion-v1"

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The denoiser's arguments, with "prompt_mask" [B, L] (1 where a prompt is read) if the conditioning has it."""
        inputs = {"sample": noisy_latents, "timestep": timesteps}
        inputs |= {"encoder_hidden_states": conditioning["prompt_embeds"]}
        mask = conditioning.get("prompt_mask")
        return inputs if mask is None else {**inputs, "encoder_attention_mask": mask}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.clip_tokens, self.denoiser.config.cross_attention_dim)}

    @contextmanager
    def sampling_inputs(self, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The pipeline has no argument for the prompts' masks, so the denoiser is given them while it samples."""
        inputs = dict(inputs)
        names = [name for name in ("negative_prompt_embeds", "prompt_embeds") if name in inputs]  # guidance's order
        if "prompt_mask" not in inputs:
            yield inputs
            return
        masks = [inputs.pop(name.replace("embeds", "mask")) for name in names]
        longest = max(mask.shape[1] for mask in masks)
        for name, mask in zip(names, masks, strict=True):
            inputs[name] = pad(inputs[name], (0, 0, 0, longest - mask.shape[1]))
        mask = torch.cat([pad(mask, (0, longest - mask.shape[1])) for mask in masks])

        def masked(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "encoder_attention_mask": mask}

        handle = self.denoiser.register_forward_pre_hook(masked, with_kwargs=True, prepend=True)
        try:
            yield inputs
        finally:
            handle.remove()
