"""Export of a LoRA with the names of other tools."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
    with pytest.raises(PipelineError, match=r"wan cannot be .* 'kohya' names\. Choices: diffusers, comfyui\."):
        export_lora(random_lora(wan, tmp_path / "wan-lora"), tmp_path / "out.safetensors", format="kohya", model=wan)
    weights = load_file(lora)
    torch.save(weights, tmp_path / "lora.bin")
    with pytest.raises(UserError, match=r"lora\.bin: a LoRA in a pickle; only LoRAs in \.safetensors"):
        export_lora(tmp_path / "lora.bin", tmp_path / "out.safetensors", model=sd_path)
    encoder = "text_encoder.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({**weights, encoder.format("A"): torch.ones(2, 16), encoder.format("B"): torch.ones(16, 2)}, lora)
    with pytest.raises(UserError, match=r"2 of its tensors are for what is not loaded here, .* such as 'text_"):
        export_lora(lora, tmp_path / "out.safetensors", model=sd_path)


def test_the_header_names_base_and_strength_and_files_are_as_the_umask_has_it(sd_path: Path, tmp_path: Path) -> None:
    random_lora(sd_path, tmp_path / "run" / "lora", rank=2, alpha=6.0)
    (tmp_path / "run" / "run.yaml").write_text(f"model: {{path: {sd_path}}}\nobjective: {{name: sft}}\n")
    expected = {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "networks.lora",
        "ss_network_dim": "2", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon", "t2i_align.objective": "sft", "t2i_align.base": str(sd_path),
    }  # fmt: skip
    for umask, mode in ((0o022, 0o644), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            file = export_lora(tmp_path / "run", tmp_path / f"{umask}.safetensors", precision="fp16")
        finally:
            os.umask(before)
        assert file.stat().st_mode & 0o777 == mode
    with safe_open(file, framework="pt") as opened:
        assert expected.items() <= opened.metadata().items()
        assert {opened.get_tensor(key).dtype for key in opened.keys() if ".weight" in key} == {torch.float16}  # noqa: SIM118
