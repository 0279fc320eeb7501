"""Write a diffusers Stable Diffusion as a single file, with the names that its first authors' code uses."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}  # fmt: skip


def write_single_file(folder: Path, file: Path) -> Path:
    """Convert the pipeline in `folder` (one layer a block) and write it to `file` (.safetensors)."""
    pipe = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    tensors = {f"model.diffusion_model.{_unet_key(pipe.unet, k)}": v for k, v in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    tensors |= {f"first_stage_model.{_vae_key(k, blocks)}": _conv(k, v) for k, v in pipe.vae.state_dict().items()}
    for key, value in pipe.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{key}"] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return file


def _unet_key(unet, key: str) -> str:
    stride = unet.config.layers_per_block + 1
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            key = theirs + key.removeprefix(ours)
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
        side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        root = "input_blocks" if side == "down" else "output_blocks"
        first = block * stride + (1 if side == "down" else 0)
        if part == "downsamplers":
            return f"{root}.{first + stride - 1}.0.op.{rest.removeprefix('conv.')}"
        if part == "upsamplers":
            after_attention = hasattr(unet.up_blocks[block], "attentions")
            return f"{root}.{first + stride - 1}.{2 if after_attention else 1}.{rest}"
        key = f"{root}.{first + layer}.{0 if part == 'resnets' else 1}.{rest}"
    if "transformer_blocks" not in key:
        for ours, theirs in RESNET.items():
            key = re.sub(rf"\.{ours}\.", f".{theirs}.", key)
    return key


def _vae_key(key: str, blocks: int) -> str:
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{blocks - 1 - int(m[1])}.", key)
    for ours, theirs in VAE_NAMES.items():
        key = key.replace(f"{ours}.", f"{theirs}.")
    return key


def _conv(key: str, value: Tensor) -> Tensor:
    """The authors' attention projections are 1 x 1 convolutions."""
    is_projection = re.search(r"\.(to_q|to_k|to_v|to_out\.0)\.weight$", key)
    return value[:, :, None, None] if is_projection else value
