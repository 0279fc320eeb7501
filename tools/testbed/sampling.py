"""Assemble the testbed's parts into a genuine `StableDiffusionPipeline` and sample from it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import pipelines
from t2i_align.testbed import base_path
from tools.testbed.denoiser import build_scheduler
from tools.testbed.precision import has_bf16

# DDIM steps and classifier-free guidance of every figure about the testbed. No guidance: training changes the
# prediction under a caption, and guidance would mix it with the one without, which no preference pair has taught.
STEPS, GUIDANCE = 20, 1.0


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    prediction_type: str,
) -> StableDiffusionPipeline:
    """A pipeline without safety checker (the world holds nothing to check) or image encoder."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: DiffusionPipeline, path: Path) -> None:
    """Save in half precision as safetensors, to a temporary name first; replaces what was there.

    The pipeline itself is left as it was.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    kept = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    for file in (temporary / "model_index.json", *temporary.glob("*/config.json")):  # not where it was loaded from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    pipeline.to(dtype=torch.float32)
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def model_folder(text: str) -> Path:
    """The folder of a base from what the command line was given: a folder, or `testbed:sd` or the like.

    Raises:
        argparse.ArgumentTypeError: neither; argparse shows its message.
    """
    if text.startswith("testbed:"):
        try:
            return base_path(text.removeprefix("testbed:"))
        except (ValueError, FileNotFoundError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder of a diffusers pipeline")
    return folder


def load(path: str | Path) -> Any:
    """Load a pipeline in float32 without progress bars."""
    return pipelines.load(path).pipe


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 64,
    bf16: bool = True,
) -> Tensor:
    """Images [B, 3, 64, 64] in [0, 1]; the noise of each depends on its own seed only.

    Raises:
        PipelineError: not as many seeds as prompts.
    """
    autocast = torch.bfloat16 if bf16 and has_bf16() else None
    return pipelines.wrap(pipeline).generate(
        prompts, seeds, steps=steps, guidance=guidance, batch_size=batch, autocast=autocast
    )
