"""The SD family: what training computes is what the genuine diffusers pipeline computes, and every way of loading."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines import pipeline_utils
from huggingface_hub.utils import filter_repo_objects

import pipelines
from pipelines import PipelineError
from t2i_align.training.reference import adapters_off, build_reference
from tests.single_file import write_single_file

PROMPTS = ["a red circle", "two blue squares", ""]


def randomise_lora(pipeline: pipelines.TrainablePipeline, rank: int = 2, alpha: float = 3.0) -> None:
    """A LoRA whose B is not zero, so that it changes the model."""
    pipeline.add_lora(rank=rank, alpha=alpha, dropout=0.0, targets="attention")
    generator = torch.Generator().manual_seed(5)
    for parameter in pipeline.trainable_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize("fixture", ["sd_path", "sd_v_path"])
def test_prediction_and_encoding_equal_the_diffusers_pipeline(fixture: str, request: pytest.FixtureRequest) -> None:
    """One call of the pipeline with guidance off passes exactly our kwargs to the UNet."""
    path = request.getfixturevalue(fixture)
    ours, theirs = pipelines.load(path), StableDiffusionPipeline.from_pretrained(str(path))
    seen = []
    theirs.unet.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((*args, kwargs["encoder_hidden_states"], out[0])),
        with_kwargs=True,
    )
    theirs(PROMPTS, num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 3
    for latents, timestep, _, prediction in seen:
        mine = ours.predict(latents, timestep.expand(3), ours.encode_prompts(PROMPTS))
        torch.testing.assert_close(mine, prediction, rtol=1e-5, atol=1e-5)
    assert ours.process.prediction_type == theirs.scheduler.config.prediction_type


def test_latents_are_scaled_as_the_checkpoint_says_and_decode_inverts(sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    pixels = torch.rand(2, 3, 32, 32)
    latents = pipeline.encode_pixels(pixels)
    vae = pipeline.pipe.vae
    raw = vae.encode(2 * pixels - 1).latent_dist.mode()
    torch.testing.assert_close(latents, raw * vae.config.scaling_factor)
    expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline.decode_latents(latents), expected, rtol=1e-4, atol=1e-5)


def test_a_image_depends_on_its_own_prompt_and_seed_alone(sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    together = pipeline.generate(PROMPTS, [1, 2, 3], steps=3, batch_size=3)
    apart = pipeline.generate(PROMPTS[1:2], [2], steps=3)
    torch.testing.assert_close(together[1:2], apart, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_generate_equals_plain_diffusers(sd_path: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(str(sd_path))(
        "x", num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(9), output_type="pt"
    ).images
    assert torch.equal(pipelines.load(sd_path).generate(["x"], [9], steps=4, guidance=3.0), theirs.float())


def test_lora_file_loads_in_plain_diffusers_with_the_same_images(sd_path: Path, tmp_path: Path) -> None:
    trained = pipelines.load(sd_path)
    base = trained.generate(["x"], [4], steps=3)
    randomise_lora(trained)
    expected = trained.generate(["x"], [4], steps=3)
    assert (expected - base).abs().max() > 1e-3
    file = trained.save_lora(tmp_path / "lora")
    plain = StableDiffusionPipeline.from_pretrained(str(sd_path))
    plain.load_lora_weights(str(file.parent))
    theirs = plain(
        "x", num_inference_steps=3, guidance_scale=7.5, negative_prompt="", generator=torch.Generator().manual_seed(4),
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(theirs, expected, rtol=0, atol=0)
    fresh = pipelines.load(sd_path)
    fresh.load_lora(file)
    assert torch.equal(fresh.generate(["x"], [4], steps=3), expected)


def test_adapters_off_is_the_base_model_and_leaves_gradients_alone(sd_path: Path) -> None:
    base, tuned = pipelines.load(sd_path), pipelines.load(sd_path)
    randomise_lora(tuned)
    latents, times, conditioning = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), base.encode_prompts(["a", "b"])
    expected = base.predict(latents, times, conditioning)
    device = torch.device("cpu")
    for kind in ("adapter_off", "copy", "offloaded_copy"):
        reference = build_reference(kind, tuned, device, lora=True)
        out = reference(latents, times, conditioning)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert not out.requires_grad
    policy = tuned.predict(latents, times, conditioning)
    assert (policy - expected).abs().max() > 1e-4
    # The toggle between a forward pass and its backward pass must not lose the gradient.
    with pytest.raises(RuntimeError, match="boom"), adapters_off(tuned.denoiser):
        raise RuntimeError("boom")
    policy.sum().backward()
    assert all(p.grad is not None for p in tuned.trainable_parameters())
    assert torch.equal(tuned.predict(latents, times, conditioning), policy)


def test_full_copy_does_not_follow_the_policy(sd_path: Path) -> None:
    tuned = pipelines.load(sd_path)
    reference = build_reference("auto", tuned, torch.device("cpu"), lora=False)
    args = (torch.randn(1, 4, 16, 16), torch.tensor([100]), tuned.encode_prompts(["a"]))
    before = reference(*args)
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.mul_(1.1)
    assert torch.equal(reference(*args), before)
    assert not torch.allclose(tuned.predict(*args), before)


def test_single_file_checkpoint_loads_as_its_folder_does(sd_path: Path, tmp_path: Path) -> None:
    file = write_single_file(sd_path, tmp_path / "model.safetensors")
    loaded = pipelines.load(file, single_file_config=str(sd_path))
    expected = pipelines.load(sd_path).generate(["x"], [1], steps=3)
    torch.testing.assert_close(loaded.generate(["x"], [1], steps=3), expected, rtol=1e-5, atol=1e-5)


def test_encoders_can_be_left_out_and_brought_back(sd_path: Path, tmp_path: Path) -> None:
    pipeline = pipelines.load(sd_path, encoders=False)
    assert not pipeline.has_encoders and pipeline.default_size == (32, 32)
    with pytest.raises(PipelineError, match="without its encoders"):
        pipeline.save(tmp_path / "no")
    pipeline.load_encoders()
    pipeline.save(tmp_path / "yes")
    expected = pipelines.load(sd_path).generate(["x"], [1], steps=2)
    assert torch.equal(pipelines.load(tmp_path / "yes").generate(["x"], [1], steps=2), expected)


def test_fingerprint_is_of_the_encoders_not_of_the_denoiser(sd_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd_path, tmp_path / "copy"))
    assert pipelines.encoder_fingerprint(copy) == pipelines.encoder_fingerprint(sd_path)
    (copy / "unet" / "config.json").write_text((copy / "unet" / "config.json").read_text() + " ")
    assert pipelines.encoder_fingerprint(copy) == pipelines.encoder_fingerprint(sd_path)
    weights = next((copy / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert pipelines.encoder_fingerprint(copy) != pipelines.encoder_fingerprint(sd_path)


def test_fingerprint_is_of_the_variant_that_is_loaded(sd_path: Path, tmp_path: Path) -> None:
    """Half-precision weights beside the others are another model when they are asked for, and nothing when not."""
    plain = pipelines.encoder_fingerprint(sd_path)
    copy = Path(shutil.copytree(sd_path, tmp_path / "copy"))
    assert pipelines.encoder_fingerprint(copy, variant="fp16") == plain  # diffusers takes what there is
    pipelines.load(sd_path).pipe.vae.half().save_pretrained(str(tmp_path / "half"), variant="fp16")
    shutil.copy(next((tmp_path / "half").glob("*.fp16.safetensors")), copy / "vae")
    assert pipelines.encoder_fingerprint(copy) == plain
    half = pipelines.encoder_fingerprint(copy, variant="fp16")
    assert half != plain
    next((copy / "vae").glob("*_model.safetensors")).unlink()
    assert pipelines.encoder_fingerprint(copy, variant="fp16") == half


def test_fingerprint_of_a_single_file_is_with_its_configuration(sd_path: Path, tmp_path: Path) -> None:
    file = write_single_file(sd_path, tmp_path / "model.safetensors")
    copy = Path(shutil.copytree(sd_path, tmp_path / "copy"))
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()  # a configuration needs none
    before = pipelines.encoder_fingerprint(file, single_file_config=str(copy))
    assert before == pipelines.encoder_fingerprint(file, single_file_config=str(sd_path))
    assert before != pipelines.encoder_fingerprint(file)
    vae = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**vae, "scaling_factor": 0.5}))
    assert pipelines.encoder_fingerprint(file, single_file_config=str(copy)) != before


def test_fingerprint_of_a_hub_model_fetches_its_encoders_alone(sd_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers would ask the Hub for, of a repository with both variants of everything."""
    files = [file.relative_to(sd_path).as_posix() for file in sd_path.rglob("*") if file.is_file()]
    files += [file.replace(".safetensors", ".fp16.safetensors") for file in files if file.endswith(".safetensors")]
    asked: set[str] = set()

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        asked.update(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(sd_path)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "main", raising=False)
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda *_, **__: str(sd_path / "model_index.json"))
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot)
    index = json.loads((sd_path / "model_index.json").read_text())
    monkeypatch.setattr(importlib.import_module("pipelines.load"), "_model_index", lambda *_: index)
    assert pipelines.encoder_fingerprint("fox/sd", variant="fp16") == pipelines.encoder_fingerprint(sd_path)
    weights = sorted(file for file in asked if file.endswith(".safetensors"))
    assert weights == ["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]


def damaged(sd_path: Path, tmp_path: Path, what: str) -> Path:
    folder = Path(shutil.copytree(sd_path, tmp_path / "damaged"))
    index = json.loads((folder / "model_index.json").read_text())
    if what == "family":
        index["_class_name"] = "KandinskyPipeline"
    elif what == "component":
        shutil.rmtree(folder / "unet")
    elif what == "index":
        (folder / "model_index.json").unlink()
        return folder
    elif what == "weights":
        weights = next((folder / "unet").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("family", "'KandinskyPipeline' are not known.*StableDiffusionPipeline"),
        ("component", "lacks its component 'unet'"),
        ("index", "no model_index.json"),
        ("weights", "could not be loaded"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_says_why(sd_path: Path, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        pipelines.load(damaged(sd_path, tmp_path, what))


def test_wrong_paths_sizes_and_options_say_what_is_expected(sd_path: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no such file or folder"):
        pipelines.load(tmp_path / "nothing")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"not a checkpoint")
    with pytest.raises(PipelineError, match="not a readable checkpoint"):
        pipelines.load(junk)
    pipeline = pipelines.load(sd_path)
    with pytest.raises(PipelineError, match=r"33 x 32.*multiples of 2"):
        pipeline.check_size(33, 32)
    with pytest.raises(PipelineError, match=r"'flash' is not usable with sd. Choices: native, xformers"):
        pipeline.set_attention("flash")
    with pytest.raises(PipelineError, match="needs a CUDA GPU"):
        pipeline.set_attention("xformers")
    with pytest.raises(PipelineError, match="'to_x' matches no module"):
        pipeline.lora_targets(["to_q", "to_x"])
    with pytest.raises(PipelineError, match=r"unknown LoRA targets 'everything'. Choices for sd: all, attention"):
        pipeline.lora_targets("everything")
    with pytest.raises(PipelineError, match="2 prompts but 1 seeds"):
        pipeline.generate(["a", "b"], [1])


def test_images_that_are_not_finite_are_refused_with_prompt_and_seed(sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    torch.nn.init.constant_(pipeline.denoiser.conv_out.bias, math.nan)
    with pytest.raises(PipelineError, match=r"2 of 2 images are not finite, as prompt 'a' with seed 5\."):
        pipeline.generate(["a", "b"], [5, 6], steps=1)
