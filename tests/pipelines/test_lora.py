"""LoRA of every family: what is saved here loads in plain diffusers, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pipelines
from pipelines import FAMILIES, PipelineError
from tests.pipelines.conftest import Load, PathOf
from tests.tiny import randomise_lora, sample_latents


@pytest.mark.parametrize(
    ("name", "naming"),
    [*((name, "diffusers") for name in (*FAMILIES, "wan-experts")), ("sd", "kohya"), ("sdxl", "kohya")],
)
def test_a_saved_lora_gives_the_same_samples_in_plain_diffusers_and_here(
    name: str, naming: str, path: PathOf, fresh: Load,
    plain: Callable[[str], Any], tmp_path: Path,
) -> None:  # fmt: skip
    """alpha = 1.5 rank: a file that lost alpha would come back at another strength. Of two experts, the second."""
    low = name == "wan-experts"
    trained, again = (pipelines.load(path(name), expert="low") if low else fresh(name) for _ in range(2))
    base = sample_latents(trained)
    randomise_lora(trained, rank=2, alpha=3.0, targets="all" if naming == "diffusers" else "attention")
    expected = sample_latents(trained)
    assert (expected - base).abs().max() > 1e-3
    file = trained.save_lora(tmp_path, naming=naming)
    if naming == "kohya":
        weights = load_file(file)
        assert all(key.startswith("lora_unet_") for key in weights)
        assert {float(value) for key, value in weights.items() if key.endswith(".alpha")} == {3.0}
    theirs = plain(name)
    theirs.load_lora_weights(str(file), **({"load_into_transformer_2": True} if low else {}))
    torch.testing.assert_close(sample_latents(trained, theirs), expected, rtol=0, atol=1e-6)
    theirs.unload_lora_weights()
    again.load_lora(file)
    torch.testing.assert_close(sample_latents(again), expected, rtol=0, atol=1e-6)
    again.pipe.unload_lora_weights()
    torch.testing.assert_close(sample_latents(again), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("of", "onto"), [("sd", "sd3"), ("flux", "wan"), ("sd3", "flux"), ("sd", "sdxl")])
def test_a_lora_of_another_family_is_refused_and_leaves_nothing(
    of: str, onto: str, fresh: Load, tmp_path: Path
) -> None:
    other, pipeline = fresh(of), fresh(onto)
    randomise_lora(other)
    file = other.save_lora(tmp_path)
    base = sample_latents(pipeline)
    with pytest.raises(PipelineError, match=f"LoRA does not fit {onto}"):
        pipeline.load_lora(file)
    assert torch.equal(sample_latents(pipeline), base)
    randomise_lora(pipeline)  # another can be added
    pipeline.load_lora(pipeline.save_lora(tmp_path / "own"))


def test_unknown_targets_are_named(shared: Load) -> None:
    with pytest.raises(PipelineError, match="'to_x' matches no module"):
        shared("sd").lora_targets(["to_q", "to_x"])
    with pytest.raises(PipelineError, match=r"unknown LoRA targets 'everything'. Choices for sd: all, attention"):
        shared("sd").lora_targets("everything")
