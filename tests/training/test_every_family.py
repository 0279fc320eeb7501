"""Every family as a whole run: trained with a LoRA and in full, saved, loaded back in plain diffusers, resumed."""

from __future__ import annotations

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
from pipelines import FAMILIES, TrainablePipeline
from t2i_align import align
from tests.runs import jsonl_clips, jsonl_pairs, metrics, run_in_two_processes, run_values
from tests.tiny import in_plain_diffusers, tiny_flux

NAMES = [*FAMILIES, "sd-v"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs of images, and of clips of 17 frames, which every tiny video model can cut to its own number."""
    folder = tmp_path_factory.mktemp("data")
    return jsonl_pairs(folder / "images", count=6), jsonl_clips(folder / "clips", frames=17)


def sample(pipeline: TrainablePipeline) -> Tensor:
    return pipeline.generate(["prompt 1"], [3], steps=2, guidance=3.0)


@pytest.mark.parametrize("trained", ["lora", "model"])
@pytest.mark.parametrize("objective", ["diffusion_dpo", "sft"])
@pytest.mark.parametrize("name", NAMES)
def test_run_resumes_exactly_and_samples_the_same_in_plain_diffusers(
    name: str, objective: str, trained: str, path: Callable[[str], Path], data: tuple[Path, Path], tmp_path: Path
) -> None:
    images, clips = data
    model, pairs = path(name), clips if name in FAMILIES and FAMILIES[name].video else images
    changes: dict[str, Any] = {
        "objective": {"name": objective, **({"beta": 100.0} if objective == "diffusion_dpo" else {})},
        "data__cache": trained == "lora",
        "data__cache_dir": str(model.parent / f"{name}-cache"),
        "lora": {"rank": 2, "alpha": 4.0, "targets": "all"} if trained == "lora" else None,
        "optim__lr": 1e-2 if trained == "lora" else 1e-3,
        "optim__warmup_steps": 0,
        "train__batch_size": 2,
        "train__caption_dropout": 0.3,
        "train__gradient_checkpointing": True,
        "health__max_error_rise": None,
    }
    through = align(run_values(model, pairs, tmp_path / "through", train__steps=3, **changes), progress=False)
    assert through.steps == 3 and math.isfinite(through.metrics["loss"]) and through.metrics["update_norm"] > 0
    align(run_values(model, pairs, tmp_path / "halves", train__steps=2, **changes), progress=False)
    halves = run_values(model, pairs, tmp_path / "halves", train__steps=3, **changes)
    resumed = align(halves | {"resume": True}, progress=False)
    for mine, theirs in zip(files(resumed.weights), files(through.weights), strict=True):
        one, other = load_file(mine), load_file(theirs)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    ours = pipelines.load(through.weights if trained == "model" else model)
    base = sample(pipelines.load(model))
    if trained == "lora":
        ours.load_lora(through.weights)
    samples = sample(ours)
    assert (samples - base).abs().max() > 1e-4
    plain = DiffusionPipeline.from_pretrained(str(model if trained == "lora" else through.weights))
    if trained == "lora":
        plain.load_lora_weights(str(through.weights.parent), weight_name=through.weights.name)
    theirs = in_plain_diffusers(plain, ours, ["prompt 1"], [3], steps=2, guidance=3.0)
    torch.testing.assert_close(theirs.clamp(0, 1), samples, rtol=0, atol=1e-6)


def files(weights: Path) -> list[Path]:
    """A LoRA's file, or all weights of a saved pipeline."""
    return [weights] if weights.is_file() else sorted(weights.rglob("*.safetensors"))


def test_a_joint_block_whose_text_ends_there_trains_in_two_processes(data: tuple[Path, Path], tmp_path: Path) -> None:
    """As Qwen-Image's last one does: DDP would wait for gradients of the layers that write the text's stream."""
    model = tiny_flux(tmp_path / "model", singles=0)
    changes: dict[str, Any] = {"lora": {"rank": 2, "alpha": 4.0, "targets": "all"}, "train__steps": 2}
    both = run_values(model, data[0], tmp_path / "both", train__batch_size=1, **changes)
    run_in_two_processes(both, tmp_path)
    align(run_values(model, data[0], tmp_path / "one", train__batch_size=2, **changes), progress=False)
    trained = load_file(tmp_path / "both" / "lora" / "pytorch_lora_weights.safetensors")
    modules = {key.split(".lora_")[0].rpartition("transformer_blocks.0.")[2] for key in trained}
    assert {"attn.to_q", "attn.add_k_proj", "ff.net.2"} <= modules
    assert not {"attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"} & modules
    for two, one in zip(metrics(tmp_path / "both"), metrics(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
