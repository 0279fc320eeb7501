"""Images to a folder: what is written, and what is never overwritten."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import pipelines
from t2i_align.errors import UserError
from t2i_align.inference.generate import generate, sample, sample_seed
from tests.tiny import random_lora

FAST = {"steps": 2, "guidance": 2.0, "progress": False}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def test_each_image_has_its_line_and_equals_the_pipelines(sd_path: Path, tmp_path: Path) -> None:
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
    hidden = out / ".part-one" / "notes.txt"  # named nearly as the folder of one of several processes
    hidden.parent.mkdir(parents=True)
    hidden.write_text("mine")
    generate(sd_path, ["cat", "dog"], out, **FAST)
    assert hidden.read_text() == "mine"
    shutil.rmtree(hidden.parent)
    (out / "notes.txt").write_text("mine")
    before = (out / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        generate(sd_path, ["sun"], out, **FAST)
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "misfit.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        generate(sd_path, ["sun"], out, lora=tmp_path / "misfit.safetensors", force=True, **FAST)
    assert (out / "samples.jsonl").read_bytes() == before and (out / "00001.png").is_file()
    for name in ("20240101.png", "12345_holiday.png"):
        (out / name).write_bytes(b"a photograph")
    (out / "00001.png").rename(out / "00002.png")  # as if a kill had kept it out of the list
    generate(sd_path, ["sun"], out, force=True, **FAST)
    kept = ["12345_holiday.png", "20240101.png", "notes.txt"]
    assert sorted(file.name for file in out.iterdir()) == ["00000.png", *kept, "samples.jsonl"]


def test_an_interrupted_run_is_continued_and_another_one_is_not(sd_path: Path, tmp_path: Path) -> None:
    """Killed after two of four images, with a third that is not listed yet and half a line."""
    options = {"per_prompt": 2, "batch_size": 2, **FAST}
    whole = generate(sd_path, ["cat", "dog"], tmp_path / "whole", **options).parent
    out = shutil.copytree(whole, tmp_path / "out")
    listed = (out / "samples.jsonl").read_text().split("\n")
    (out / "samples.jsonl").write_text("\n".join([*listed[:2], listed[2][:20]]))
    (out / "00003.png").unlink()
    before = (out / "00000.png").stat().st_mtime_ns
    for changes in ({"seed": 1}, {"steps": 3}, {"height": 64, "width": 64}, {"negative_prompt": "x"}):
        with pytest.raises(UserError, match=rf"beginning of a run with another {next(iter(changes))}"):
            generate(sd_path, ["cat", "dog"], out, **{**options, **changes})
    generate(sd_path, ["cat", "dog"], out, **options)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    for file in whole.glob("*.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(out / file.name)), np.asarray(Image.open(file)))
    assert (out / "00000.png").stat().st_mtime_ns == before
    (out / "samples.jsonl").write_text("\n".join(listed[:3]) + "\n")
    os.truncate(out / "00000.png", 40)
    for _ in range(2):
        with pytest.raises(UserError, match=r"of which 00000\.png is missing or cut"):
            generate(sd_path, ["cat", "dog"], out, **options)
        (out / "00000.png").unlink(missing_ok=True)


def test_images_are_written_beside_the_sampling(sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def save(image: Image.Image, file: Path) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        if file.name == "00001.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        image.save(file)

    monkeypatch.setattr("t2i_align.inference.generate.save_image", save)
    with pytest.raises(OSError, match="No space left"):
        generate(sd_path, ["cat", "dog", "sun"], tmp_path / "out", batch_size=1, **FAST)
    assert threads == [False, False] and len(lines(tmp_path / "out" / "samples.jsonl")) == 1


def test_lora_scale_lies_between_base_and_lora(sd_path: Path, tmp_path: Path) -> None:
    random_lora(sd_path, tmp_path / "lora", alpha=6.0)

    def image(name: str, **options: object) -> np.ndarray:
        generate(sd_path, ["cat"], tmp_path / name, **options, **FAST)
        return np.asarray(Image.open(tmp_path / name / "00000.png")).astype(float)

    none, full = image("none"), image("full", lora=tmp_path / "lora")
    half = image("half", lora=tmp_path / "lora", lora_scale=0.5)
    assert 0 < np.abs(half - none).mean() < np.abs(full - none).mean()
    row = lines(tmp_path / "half" / "samples.jsonl")[0]
    assert row["lora"] == str(tmp_path / "lora") and row["lora_scale"] == 0.5


def test_a_negative_prompt_reaches_the_pipeline_and_is_listed(sd_path: Path, tmp_path: Path) -> None:
    file = generate(sd_path, ["cat"], tmp_path / "out", negative_prompt="dog", **FAST)
    options = {"steps": 2, "guidance": 2.0, "negative_prompt": "dog"}
    expected = sample(pipelines.load(sd_path), ["cat"], [sample_seed(0, 0, 0)], **options)[0]
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


def test_out_of_memory_error_names_the_option() -> None:
    def generate(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(UserError, match=r"CUDA out of memory at batch size 32; lower batch_size \(--batch-size\)"):
        sample(SimpleNamespace(generate=generate), ["cat"], [0], batch_size=32)


def test_pixels_are_rounded_to_bytes_as_in_diffusers() -> None:
    """0.998 · 255 = 254.49 → 254 and 0.9981 · 255 = 254.52 → 255: rounded, not cut off."""
    pixels = torch.full((1, 3, 1, 2), 0.998)
    pixels[..., 1] = 0.9981
    pipeline = SimpleNamespace(generate=lambda *arguments, **options: pixels)
    assert np.asarray(sample(pipeline, ["cat"], [0], batch_size=1)[0])[0, :, 0].tolist() == [254, 255]


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
        ({"frames": 0}, "frames must be"),
        *(({"fps": fps}, "fps must be a number of frames a second above 0") for fps in (0, -8, math.nan, math.inf)),
        ({"precision": "int4"}, "unknown precision"),
    ]
    for change, match in cases:
        with pytest.raises(UserError, match=match):
            generate(**{"model": sd_path, "prompts": ["a"], "out": tmp_path / "out", **FAST, **change})
    assert not (tmp_path / "out").exists()
