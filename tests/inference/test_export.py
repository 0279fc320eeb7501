"""Export of a LoRA with the names of other tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipelines
from pipelines import PipelineError
from t2i_align.errors import UserError
from t2i_align.inference.export import export_lora
from tests.tiny import random_lora, tiny_wan


def test_an_exported_lora_makes_the_same_images(sd_path: Path, tmp_path: Path) -> None:
    """alpha = 3 rank: a file that forgot it would come back at a third of the strength."""
    lora = random_lora(sd_path, tmp_path / "lora", alpha=6.0)
    images = []
    for format in (None, "kohya", "diffusers"):
        file = lora
        if format is not None:
            file = export_lora(lora, tmp_path / "out" / f"{format}.safetensors", format=format, model=sd_path)
        pipeline = pipelines.load(sd_path)
        pipeline.load_lora(file)
        images.append(pipeline.generate(["cat"], [0], steps=2, guidance=1.0))
    torch.testing.assert_close(images[1], images[0])
    torch.testing.assert_close(images[2], images[0])
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "out" / "kohya.safetensors"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["diffusers.safetensors", "kohya.safetensors"]


def test_export_errors_name_the_problem(sd_path: Path, tmp_path: Path) -> None:
    lora = random_lora(sd_path, tmp_path / "lora", alpha=6.0)
    for out, message in ((lora, "exists already"), (tmp_path / "a.pt", "does not end in .safetensors")):
        with pytest.raises(UserError, match=message):
            export_lora(lora, out, model=sd_path)
    with pytest.raises(UserError, match="no base model given"):
        export_lora(lora, tmp_path / "out.safetensors")
    wan = tiny_wan(tmp_path / "wan")
    with pytest.raises(
        PipelineError, match=r"a LoRA of wan cannot be written with 'kohya' names\. Choices: diffusers\."
    ):
        export_lora(random_lora(wan, tmp_path / "wan-lora"), tmp_path / "out.safetensors", model=wan)
