"""Micro-conditioning: each image's size and crop, from the file to SDXL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import RectifiedFlow
from pipelines.sdxl import StableDiffusionXL
from t2i_align import align
from t2i_align.data.batch import Batch, Conditioning
from t2i_align.data.loader import time_ids
from t2i_align.data.media import to_pixels
from t2i_align.diffusion.inversion import guided
from t2i_align.diffusion.noising import candidates_conditioning, drop_captions
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives import OBJECTIVES
from t2i_align.objectives.base import DataStats, Requirements
from tests.data.test_examples import StandIn
from tests.pipelines.conftest import PathOf, first_batch, opened
from tests.runs import image, run_values

# (height, width) of three images of one prompt, and their time ids at 8 x 8
SIZES = {"a.png": (8, 16), "b.png": (12, 8), "c.png": (16, 16)}
TIME_IDS = {"a.png": [8, 16, 0, 4, 8, 8], "b.png": [12, 8, 2, 0, 8, 8], "c.png": [16, 16, 0, 0, 8, 8]}


class Sized(StandIn):
    size_conditioned = True


def write_rankings(folder: Path, count: int = 4) -> Path:
    """Groups of three images of three sizes, of which c is best and b worst."""
    for name, (height, width) in SIZES.items():
        image(height, 16).resize((width, height)).save(folder / name)
    lines = [{
        "prompt": f"prompt {i}", "images": list(SIZES), "scores": [0.5, 0.1, 0.9],
        "captions": [f"caption {i} {k}" for k in range(3)], "negative_caption": f"wrong {i}",
    } for i in range(count)]  # fmt: skip
    file = folder / "rankings.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_crop_is_in_pixels_of_the_scaled_image() -> None:
    """800 x 600 covers 512 x 512 at 512/600: 682.67 x 512, of which (682.67 - 512) / 2 = 85.3 are cut on the left;
    50 x 100 is enlarged by 64/50 to 64 x 128, of which 32 rows are cut above; 500 x 1000 fits 128 x 256 as a whole."""
    assert time_ids((600, 800), 512, 512) == [600, 800, 0, 85, 512, 512]
    assert time_ids((100, 50), 64, 64) == [100, 50, 32, 0, 64, 64]
    assert time_ids((1000, 500), 256, 128) == [1000, 500, 0, 0, 256, 128]


def test_time_ids_describe_the_crop() -> None:
    whole = image(3, 12).resize((20, 12))
    _, _, top, left, height, width = time_ids((12, 20), 12, 12)
    cut = whole.crop((left, top, left + width, top + height))
    assert torch.equal(to_pixels(whole, 12, 12), to_pixels(cut, 12, 12))


def test_a_rotated_image_has_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying down
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "images": ["a.jpg"], "scores": [1]}))
    batch = first_batch(opened(tmp_path, tmp_path / "a.jsonl", Sized(), (8, 8), needs=Requirements()), 2)
    assert batch.sizes is not None and batch.sizes.tolist() == [[[16, 8, 4, 0, 8, 8]]] * 2


@pytest.mark.parametrize("cache", [True, False])
def test_cache_and_on_the_fly_give_the_same_sizes(tmp_path: Path, cache: bool) -> None:
    data = write_rankings(tmp_path)
    order = [TIME_IDS[name] for name in ("c.png", "a.png", "b.png")]
    every = first_batch(opened(tmp_path, data, Sized(), (8, 8), needs=Requirements(lists=True), cache=cache), 2)
    assert every.sizes is not None and every.sizes.dtype == torch.float32 and every.sizes.tolist() == [order, order]
    pair = first_batch(opened(tmp_path, data, Sized(), (8, 8), needs=Requirements(candidates=2), cache=cache), 2)
    assert pair.sizes is not None and pair.sizes.tolist() == [[order[0], order[2]]] * 2
    unconditioned = opened(tmp_path, data, StandIn(), (8, 8), needs=Requirements(lists=True), cache=cache)
    assert first_batch(unconditioned, 2).sizes is None


def sized_batch(groups: int = 3, k: int = 2) -> Batch:
    """Candidate n has latents of n throughout, and a size of n, so that one identifies the other."""
    number = torch.arange(float(groups * k)).view(groups, k)

    def text(*shape: int) -> Conditioning:
        generator = torch.Generator().manual_seed(len(shape))
        return {"embeds": torch.randn(*shape, 5, generator=generator)}

    return Batch(
        keys=tuple("abc"[:groups]),
        latents=number.view(groups, k, 1, 1, 1).expand(-1, -1, 2, 4, 4).clone(),
        scores=torch.arange(k - 1.0, -1, -1).expand(groups, k).clone(),
        conditioning=text(groups),
        columns={
            "captions": text(groups, k),
            "negative_caption": text(groups),
            "segment_scores": torch.arange(k - 1.0, -1, -1).expand(groups, k)[..., None],
            "segment_seconds": (1.0,) * groups,
        },
        sizes=number.unsqueeze(-1).expand(-1, -1, 6).clone(),
        empty={"embeds": torch.zeros(1, 5)},
        state={"eta": torch.tensor(0.9), "beta": torch.tensor(1.0)},
    )


def without_captions(batch: Batch) -> Batch:
    return replace(batch, columns={name: values for name, values in batch.columns.items() if name != "captions"})


class Noiseless(RectifiedFlow):
    """Noise leaves the latents as they are, so that a model sees which candidate it is given."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents.clone()

    def step(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, to_timesteps: Tensor) -> Tensor:
        return noisy_latents + 0 * model_pred


@pytest.mark.parametrize("name", sorted(name for name, cls in OBJECTIVES.items() if not cls.needs.scorer))
def test_every_objective_passes_each_candidate_its_own_size(name: str) -> None:
    calls = []
    scale = torch.ones((), requires_grad=True)

    def model(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        sizes = conditioning["time_ids"]
        assert sizes.shape == (len(noisy), 6)
        assert torch.equal(sizes[:, 0], noisy.mean((1, 2, 3)).round())
        calls.append(len(noisy))
        return 1e-4 * noisy * scale * conditioning["embeds"].mean()  # little, as inversion follows it

    model.features = model  # type: ignore[attr-defined]  # what NCP asks of its reference
    objective = OBJECTIVES[name]().fit_to_data(DataStats(score_range=(0.0, 1.0)))
    batch = sized_batch()
    if "captions" not in objective.needs.columns:
        batch = without_captions(batch)
    if name == "ncp_dpo":  # its posterior steps past add_noise
        objective = replace(objective, renoise="uniform")
    loss, _ = objective.step(model, model, batch, SampleRNG(0, batch.keys, Noiseless()))
    loss.sum().backward()
    assert calls and scale.grad is not None


def test_the_empty_prompt_keeps_the_images_sizes() -> None:
    """Guided or with its caption dropped, an image keeps the size that it has."""
    seen = []

    def model(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(conditioning)
        return noisy

    batch = without_captions(sized_batch())
    conditioning = candidates_conditioning(batch)
    guided(model, conditioning, batch.empty, 3.0)(batch.latents.flatten(0, 1), torch.zeros(6))
    assert len(seen) == 2 and all(torch.equal(each["time_ids"], conditioning["time_ids"]) for each in seen)
    assert sorted(float(each["embeds"].abs().sum()) == 0 for each in seen) == [False, True]
    assert batch.empty is not None
    dropped = drop_captions(batch, batch.empty, SampleRNG(0, batch.keys, Noiseless()), 1.0)
    assert dropped.conditioning["embeds"].abs().sum() == 0
    assert torch.equal(candidates_conditioning(dropped)["time_ids"], conditioning["time_ids"])


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_passes_the_sizes_to_sdxl(
    cache: bool, path: PathOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 32 x 32, 8 x 16 is enlarged by 4 to 32 x 64: 16 columns are cut; 12 x 8 to 48 x 32: 8 rows are cut."""
    time_ids_seen: list[list[float]] = []
    predict = StableDiffusionXL.predict

    def spied(self: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: Any = None) -> Tensor:
        time_ids_seen.extend(conditioning["time_ids"].tolist())
        return predict(self, noisy, timesteps, conditioning, denoiser)

    monkeypatch.setattr(StableDiffusionXL, "predict", spied)
    changes = {"data__cache": cache, "train__steps": 2, "objective": {"name": "rankdpo"}}
    values = run_values(path("sdxl"), write_rankings(tmp_path), tmp_path / "run", **changes)
    assert align(values, progress=False).steps == 2
    assert {tuple(row) for row in time_ids_seen} == {
        (8, 16, 0, 16, 32, 32), (12, 8, 8, 0, 32, 32), (16, 16, 0, 0, 32, 32)
    }  # fmt: skip
