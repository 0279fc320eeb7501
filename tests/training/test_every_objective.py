"""Every objective as a whole run on a tiny model: with a LoRA and in full, from data that has what it needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pipelines
from t2i_align import align
from t2i_align.errors import UserError
from t2i_align.inference.generate import sample
from t2i_align.inference.models import adapter_on, resolve_aligned
from t2i_align.objectives import OBJECTIVES
from tests.objectives.toy import SHORT
from tests.reward_scorers.small import write_hf_clip
from tests.runs import image, run_values


@pytest.mark.parametrize("trained", ["lora", "model"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objective_trains_and_saves(name: str, trained: str, sd_path: Path, rankings: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"objective": {"name": name, **SHORT.get(name, {})}, "train__steps": 2}
    if OBJECTIVES[name].needs.scorer:
        changes["objective"]["scorer"] = f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"
    if trained == "model":
        changes |= {"lora": None, "optim__lr": 1e-5}
    result = align(run_values(sd_path, rankings, tmp_path / "run", **changes), progress=False)
    assert result.steps == 2 and math.isfinite(result.metrics["loss"]) and result.metrics["update_norm"] > 0
    if trained == "lora":
        weights = load_file(result.weights)
        assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_B" in key or "lora.up" in key)
    else:
        base, tuned = (pipelines.load(path).denoiser.state_dict() for path in (sd_path, result.weights))
        assert any(not torch.equal(tuned[key], tensor) for key, tensor in base.items())


def test_soft_tokens_alone_are_trained_saved_and_resumed(sd_path: Path, rankings: Path, tmp_path: Path) -> None:
    values = run_values(
        sd_path, rankings, tmp_path / "run", objective={"name": "softrepa"}, lora=None, soft_tokens={"count": 2}
    )
    result = align(values, progress=False)
    assert result.weights == tmp_path / "run" / "soft_tokens" / "soft_tokens.safetensors"
    aligned = resolve_aligned(tmp_path / "run")
    assert aligned.kind == "soft_tokens" and set(load_file(aligned.path)) == {"tokens", "times"}
    pipeline = pipelines.load(sd_path)
    options: dict[str, Any] = {"steps": 2, "guidance": 1.0}
    (before,) = sample(pipeline, ["prompt 1"], [0], **options)
    with adapter_on(pipeline, aligned):
        (inside,) = sample(pipeline, ["prompt 1"], [0], **options)
    (after,) = sample(pipeline, ["prompt 1"], [0], **options)
    assert before.tobytes() == after.tobytes() != inside.tobytes()
    resumed = align(values | {"resume": True, "train": values["train"] | {"steps": 6}}, progress=False)
    assert resumed.steps == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dcpo", "'captions'.*t2i-align caption"),
        ("tdpo", "'negative_caption'.*t2i-align perturb"),
        ("smpo", "'scores'.*t2i-align relabel"),
    ],
)
def test_missing_column_is_refused_with_the_command_that_makes_it(
    name: str, message: str, sd_path: Path, tmp_path: Path
) -> None:
    for side in (0, 1):
        image(side).save(tmp_path / f"{side}.png")
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "p", "chosen": "0.png", "rejected": "1.png"}) + "\n")
    with pytest.raises(UserError, match=message):
        align(run_values(sd_path, data, tmp_path / "run", objective={"name": name}), progress=False)
    assert not (tmp_path / "run").exists()


def test_single_samples_are_refused_for_pairs_and_lists(sd_path: Path, tmp_path: Path) -> None:
    image(0).save(tmp_path / "0.png")
    data = tmp_path / "likes.jsonl"
    data.write_text(json.dumps({"prompt": "p", "images": ["0.png"], "scores": [1]}) + "\n")
    for name in ("diffusion_dpo", "rankdpo", "lpo", "mapo"):
        with pytest.raises(UserError, match="compares 2 candidates of a prompt, but the groups here have"):
            align(run_values(sd_path, data, tmp_path / name, objective={"name": name}), progress=False)
