"""Images to a folder: what is written, what is never overwritten, and that an evaluation sees the same images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import pipelines
from t2i_align.config import ModelConfig
from t2i_align.errors import UserError
from t2i_align.inference.generate import generate, sample, sample_seed, to_images
from t2i_align.inference.resolve import (
    Aligned,
    resolve_adapter,
    resolve_aligned,
    resolve_base,
    resolve_model,
    resolve_prompts,
)

FAST = {"steps": 2, "guidance": 2.0, "progress": False}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def test_each_image_has_its_line_and_is_the_pipelines_own(sd_path: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffcat\n\n  sun \r\n", encoding="utf-8")
    file = generate(sd_path, prompts, tmp_path / "out", prompt=["dog"], per_prompt=2, seed=3, batch_size=4, **FAST)
    rows = lines(file)
    assert [row["prompt"] for row in rows] == ["cat", "cat", "sun", "sun", "dog", "dog"]
    assert [row["seed"] for row in rows] == [sample_seed(3, i, k) for i in range(3) for k in range(2)]
    assert rows[0]["model"] == str(sd_path) and rows[0]["lora"] is None and rows[0]["steps"] == 2
    assert rows[0]["revision"] is None and rows[0]["negative_prompt"] == ""
    pixels = pipelines.load(sd_path).generate(
        [row["prompt"] for row in rows], [row["seed"] for row in rows], steps=2, guidance=2.0, batch_size=4
    )
    for row, image in zip(rows, pixels, strict=True):
        saved = np.asarray(Image.open(tmp_path / "out" / row["file"]))
        assert saved.shape == (32, 32, 3)
        np.testing.assert_array_equal(saved, (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert len(list((tmp_path / "out").iterdir())) == 7


def test_an_existing_folder_is_kept_unless_forced(sd_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(sd_path, ["cat", "dog"], out, **FAST)
    (out / "notes.txt").write_text("mine")
    before = (out / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        generate(sd_path, ["sun"], out, **FAST)
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "misfit.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        generate(sd_path, ["sun"], out, lora=tmp_path / "misfit.safetensors", force=True, **FAST)
    assert (out / "samples.jsonl").read_bytes() == before and (out / "00001.png").is_file()
    generate(sd_path, ["sun"], out, force=True, **FAST)
    assert sorted(file.name for file in out.iterdir()) == ["00000.png", "notes.txt", "samples.jsonl"]


def test_force_touches_nothing_in_a_folder_of_somebody_elses(sd_path: Path, tmp_path: Path) -> None:
    (tmp_path / "12345.png").write_bytes(b"a photograph")
    generate(sd_path, ["sun"], tmp_path, force=True, **FAST)
    assert (tmp_path / "12345.png").read_bytes() == b"a photograph"


def test_a_lora_at_half_strength_lies_between(sd_path: Path, tmp_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    pipeline.add_lora(rank=2, alpha=2.0, dropout=0.0, targets="attention")
    torch.manual_seed(0)
    for parameter in pipeline.trainable_parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    pipeline.save_lora(tmp_path / "lora")

    def image(name: str, **options: object) -> np.ndarray:
        generate(sd_path, ["cat"], tmp_path / name, **options, **FAST)
        return np.asarray(Image.open(tmp_path / name / "00000.png")).astype(float)

    none, half, full = (
        image("none"),
        image("half", lora=tmp_path / "lora", lora_scale=0.5),
        image("full", lora=tmp_path / "lora"),
    )
    assert 0 < np.abs(half - none).mean() < np.abs(full - none).mean()
    row = lines(tmp_path / "half" / "samples.jsonl")[0]
    assert row["lora"] == str(tmp_path / "lora") and row["lora_scale"] == 0.5


def test_a_negative_prompt_is_the_pipelines_own_and_is_listed(sd_path: Path, tmp_path: Path) -> None:
    file = generate(sd_path, ["cat"], tmp_path / "out", negative_prompt="dog", **FAST)
    options = {"steps": 2, "guidance": 2.0, "negative_prompt": "dog"}
    expected = to_images(pipelines.load(sd_path).generate(["cat"], [sample_seed(0, 0, 0)], **options))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "00000.png")), np.asarray(expected))
    generate(sd_path, ["cat"], tmp_path / "plain", **FAST)
    assert Image.open(tmp_path / "plain" / "00000.png").tobytes() != expected.tobytes()
    assert lines(file)[0]["negative_prompt"] == "dog"


def test_revision_variant_and_configuration_reach_the_loader(
    sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, seen = pipelines.load, {}

    def recorded(path: str, **options: Any) -> pipelines.TrainablePipeline:
        seen.update(options)
        return load(path)

    monkeypatch.setattr(pipelines, "load", recorded)
    wanted = {"revision": "r1", "variant": "fp16", "single_file_config": "a config"}
    file = generate(sd_path, ["cat"], tmp_path / "out", **wanted, **FAST)
    assert wanted.items() <= seen.items()
    assert lines(file)[0]["revision"] == "r1"


def test_too_little_memory_names_the_option() -> None:
    def generate(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(UserError, match=r"32 images at a time; lower batch_size \(--batch-size\)"):
        sample(SimpleNamespace(generate=generate), ["cat"], [0], batch_size=32)


def test_rounding_is_diffusers_own() -> None:
    """0.998 · 255 = 254.49 → 254 and 0.9981 · 255 = 254.52 → 255: rounded, not cut off."""
    pixels = torch.full((1, 3, 1, 2), 0.998)
    pixels[..., 1] = 0.9981
    assert np.asarray(to_images(pixels)[0])[0, :, 0].tolist() == [254, 255]


def test_bad_input_is_named(sd_path: Path, tmp_path: Path) -> None:
    cases = [
        ({"model": tmp_path / "nowhere"}, "no such model"),
        ({"prompts": None}, "no prompts"),
        ({"prompts": "missing.txt"}, "missing.txt: no such prompt file"),
        ({"lora": sd_path}, "whole model, not a LoRA"),
        ({"lora": tmp_path / "nothing"}, "nothing: no such LoRA: no such file or folder"),
        ({"device": "cdua"}, "device 'cdua' cannot be used: "),
        ({"per_prompt": 0}, "per_prompt must be"),
        ({"steps": 1.5}, "steps must be"),
        ({"precision": "int4"}, "unknown precision"),
    ]
    for change, match in cases:
        with pytest.raises(UserError, match=match):
            generate(**{"model": sd_path, "prompts": ["a"], "out": tmp_path / "out", **FAST, **change})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["./foxs", "~/foxs", "/foxs", "a/b/foxs", "runs/foxs", "foxs"])
def test_a_mistyped_path_is_not_taken_for_a_hub_id(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.cached_file", lambda *arguments: pytest.fail("the Hub was asked"))
    for resolve, what in ((resolve_model, "model"), (resolve_aligned, "model"), (resolve_adapter, "LoRA")):
        with pytest.raises(UserError, match=f"{text}: no such {what}: no such file or folder"):
            resolve(text)
    assert resolve_model("somebody/foxs") == "somebody/foxs"


def test_a_hub_id_is_told_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {("somebody/model", "model_index.json"), ("somebody/lora", "pytorch_lora_weights.safetensors")}

    def cached_file(repository: str, name: str) -> str:
        if (repository, name) in there:
            return str(tmp_path / name)
        raise OSError(f"{repository} does not appear to have a file named {name}.\nMore of it.")

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert resolve_aligned("somebody/model") == Aligned("model", "somebody/model")
    assert resolve_adapter("somebody/lora") == Aligned("lora", str(tmp_path / "pytorch_lora_weights.safetensors"))
    with pytest.raises(UserError, match="somebody/model: this is a whole model, not a LoRA"):
        resolve_adapter("somebody/model")
    with pytest.raises(UserError, match=r"somebody/foxs: no such LoRA: .*does not appear to have .*safetensors\.$"):
        resolve_adapter("somebody/foxs")


def test_the_base_of_a_training_run_is_known_with_its_revision(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "lora").mkdir(parents=True)
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, run / "lora" / "weights.safetensors")
    loose = Aligned("lora", str(run / "lora" / "weights.safetensors"))
    with pytest.raises(UserError, match="no base model told"):
        resolve_base(None, loose)
    (run / "run.yaml").write_text("model: {path: somebody/base, revision: r1, variant: fp16}\nsteps: 7\n")
    own = ModelConfig(path="somebody/base", revision="r1", variant="fp16")
    for aligned in (run, run / "lora", run / "lora" / "weights.safetensors"):
        found = resolve_aligned(aligned)
        assert resolve_base(None, found) == resolve_base("somebody/base", found, revision=None) == own
        told = resolve_base("somebody/base", found, revision="main", variant=None)
        assert told == ModelConfig(path="somebody/base", revision="main", variant="fp16")
        assert resolve_base("somebody/other", found) == ModelConfig(path="somebody/other")
    assert resolve_base("somebody/base", revision="r2") == ModelConfig(path="somebody/base", revision="r2")


def test_prompts_keep_unusual_characters_within_a_line(tmp_path: Path) -> None:
    """Only a line break ends a prompt; Unicode's other separators are text."""
    file = tmp_path / "prompts.txt"
    file.write_text("a\u2028b\x0bc\n猫 🐈\n", encoding="utf-8")
    assert resolve_prompts(file) == ["a\u2028b\x0bc", "猫 🐈"]


def test_hpsv2s_benchmark_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, name: str, subfolder: str, repo_type: str) -> str:
        assert (repository, subfolder, repo_type) == ("zhwang/HPDv2", "benchmark", "dataset")
        if name != "photo.json":
            raise ConnectionError("no connection")
        (tmp_path / name).write_text('["a cat", "\\u732b"]')
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert resolve_prompts("hpsv2:photo") == ["a cat", "猫"]
    with pytest.raises(UserError, match="hpsv2:anime: could not be fetched: no connection"):
        resolve_prompts("hpsv2:anime")
    with pytest.raises(UserError, match=r"unknown style 'foto'. Did you mean 'photo'"):
        resolve_prompts("hpsv2:foto")


def test_a_folder_with_both_or_several_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"2 LoRA files here; name one: a.safetensors, b.safetensors"):
        resolve_aligned(tmp_path)
    assert resolve_aligned(tmp_path / "a.safetensors").kind == "lora"
    save_file({"model.diffusion_model.weight": torch.zeros(1)}, tmp_path / "single.safetensors")
    assert resolve_aligned(tmp_path / "single.safetensors").kind == "model"
    for name in ("lora", "model"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="holds lora/ and model/"):
        resolve_aligned(tmp_path / "run")
