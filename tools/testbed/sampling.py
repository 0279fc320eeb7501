"""Save and sample bases; options that the commands share."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from t2i_align.inference.options import cpu_computes_bf16
from t2i_align.testbed import base_path
from t2i_align.utils.files import atomic_folder, write_json

# DDIM steps and classifier-free guidance of every figure about the testbed. No guidance: training changes the
# prediction under a caption, and guidance would mix it with the one without, which no preference pair has taught.
STEPS, GUIDANCE = 20, 1.0


def output_options(p: argparse.ArgumentParser, what: str) -> None:
    """--out (`what` describes it) and --force, which every command that has them checks first."""
    p.add_argument("--out", type=Path, required=True, help=what)
    p.add_argument("--force", action="store_true", help="replace --out where it exists")


def recipe_options(p: argparse.ArgumentParser, work: str) -> None:
    """--work, with the command's own default, and changes to the recipe."""
    p.add_argument("--work", type=Path, default=Path(work), help="folder of checkpoints and latents")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as denoiser.steps=100, see bases.yaml")


def model_folder(text: str) -> Path:
    """The folder of a base from a command-line argument: a folder, or `testbed:sd` or the like.

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


def save(pipeline: DiffusionPipeline, path: Path) -> None:
    """Save in half precision as safetensors, atomically; replaces what was there. The pipeline is left as it was."""
    with atomic_folder(path) as folder:
        copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
        for file in (folder / "model_index.json", *folder.glob("*/config.json")):  # not where it was loaded from
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)
            write_json(file, dict(sorted(config.items())))


def sample(
    family: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """Images [B, 3, 64, 64] or clips [B, 9, 3, 64, 64] in [0, 1]; the noise of each depends on its own seed only.

    Raises:
        PipelineError: another number of seeds than prompts.
    """
    autocast = torch.bfloat16 if cpu_computes_bf16() else None
    samples: Tensor = family.generate(prompts, seeds, steps=steps, guidance=guidance, batch_size=64, autocast=autocast)
    return samples
