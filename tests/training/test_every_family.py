"""Every family as a whole run: trained with a LoRA and in full, saved, loaded back in plain diffusers, resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

import pipelines
from pipelines import TrainablePipeline
from t2i_align import align
from t2i_align.data.media import save_clip
from t2i_align.errors import UserError
from tests import tiny
from tests.runs import jsonl_pairs, run_values

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.tiny_sd,
    "sd21": lambda folder: tiny.tiny_sd(folder, prediction_type="v_prediction"),
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny.tiny_sd3,
    "flux": tiny.tiny_flux,
    "wan": tiny.tiny_wan,
    "cogvideox": tiny.tiny_cogvideox,
    "ltx": tiny.tiny_ltx,
}
CLIPS = ("wan", "cogvideox", "ltx")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            made[name] = BUILDERS[name](tmp_path_factory.mktemp("models") / name)
        return made[name]

    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of images."""
    return jsonl_pairs(tmp_path_factory.mktemp("images"), count=6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of clips of 17 frames, which every tiny video model can cut to its own number."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for i in range(6):
        names = [f"{i}_{side}.mp4" for side in ("good", "bad")]
        for k, name in enumerate(names):
            generator = torch.Generator().manual_seed(2 * i + k)
            blocks = torch.rand(17, 3, 4, 4, generator=generator)
            save_clip(blocks.repeat_interleave(16, 2).repeat_interleave(16, 3), folder / name, 8)
        lines.append({"prompt": f"prompt {i % 3}", "chosen": names[0], "rejected": names[1]})
    file = folder / "clips.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def sample(pipeline: TrainablePipeline) -> Tensor:
    return pipeline.generate(["prompt 1"], [3], steps=2, guidance=3.0)


def in_plain_diffusers(family: TrainablePipeline, folder: Path, lora: Path | None) -> Tensor:
    """The same sample by someone who knows nothing of this toolkit."""
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder))
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    height, width = family.default_size
    size = {"height": height, "width": width, **({"num_frames": family.default_frames} if family.video else {})}
    output = pipe(
        **family.call_options(["prompt 1"], "", 3.0),
        **size,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(3)],
        output_type="pt",
    )
    return (output.frames if family.video else output.images).float().cpu().clamp(0, 1)


@pytest.mark.parametrize("trained", ["lora", "model"])
@pytest.mark.parametrize("objective", ["diffusion_dpo", "sft"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_it_trains_resumes_and_is_the_same_in_plain_diffusers(
    name: str, objective: str, trained: str, models: Any, images: Path, clips: Path, tmp_path: Path
) -> None:
    model, data = models(name), clips if name in CLIPS else images
    changes: dict[str, Any] = {
        "objective": {"name": objective, **({"beta": 100.0} if objective == "diffusion_dpo" else {})},
        "data__cache_dir": str(model.parent / f"{name}-cache"),
        "lora": {"rank": 2, "alpha": 4.0, "targets": "all"} if trained == "lora" else None,
        "optim__lr": 1e-2 if trained == "lora" else 1e-3,
        "optim__warmup_steps": 0,
        "train__batch_size": 2,
        "train__caption_dropout": 0.3,
        "train__gradient_checkpointing": True,
        "health__max_error_rise": None,
    }
    through = align(run_values(model, data, tmp_path / "through", train__steps=3, **changes), progress=False)
    assert through.steps == 3 and math.isfinite(through.metrics["loss"]) and through.metrics["update_norm"] > 0
    align(run_values(model, data, tmp_path / "halves", train__steps=2, **changes), progress=False)
    halves = run_values(model, data, tmp_path / "halves", train__steps=3, **changes)
    resumed = align(halves | {"resume": True}, progress=False)
    for mine, theirs in zip(files(resumed.weights), files(through.weights), strict=True):
        one, other = load_file(mine), load_file(theirs)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    ours = pipelines.load(through.weights if trained == "model" else model)
    base = sample(pipelines.load(model))
    if trained == "lora":
        ours.load_lora(through.weights)
    made = sample(ours)
    assert (made - base).abs().max() > 1e-4
    folder, lora = (model, through.weights) if trained == "lora" else (through.weights, None)
    torch.testing.assert_close(in_plain_diffusers(ours, folder, lora), made, rtol=0, atol=1e-6)


def files(weights: Path) -> list[Path]:
    """A LoRA's file, or all weights of a saved pipeline."""
    return [weights] if weights.is_file() else sorted(weights.rglob("*.safetensors"))


@pytest.mark.parametrize(("model", "data"), [("sd", "clips"), ("wan", "images")])
def test_images_for_a_video_model_and_clips_for_a_image_model_are_refused(
    model: str, data: str, models: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(data)
    with pytest.raises(UserError, match=r"video|clip"):
        align(run_values(models(model), source, tmp_path / "run"), progress=False)
