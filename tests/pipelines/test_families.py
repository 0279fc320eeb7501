"""Every family: sampling computes what its genuine diffusers pipeline computes; predictions are in test_check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pipelines
from pipelines import FAMILIES, PipelineError, RectifiedFlow, VariancePreserving
from pipelines.process import resolution_shift
from tests.pipelines.conftest import Load, PathOf
from tests.tiny import example, in_plain_diffusers, randomise_lora, sample_latents

PROMPTS = ["a red circle", "two blue squares"]


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_equals_plain_diffusers(name: str, shared: Load, plain: Callable[[str], Any]) -> None:
    """With a negative prompt (`check` does without); from prompts, from their conditioning, and each on its own."""
    ours, seeds = shared(name), [9, 4]
    negative = "" if ours.distilled_guidance else "x"
    options = {"negative_prompt": [negative] * 2} if negative else {}
    theirs = in_plain_diffusers(plain(name), ours, PROMPTS, seeds, steps=2, guidance=3.0, **options)

    def generate(prompts: Any, seeds: list[int]) -> Tensor:
        return ours.generate(prompts, seeds, steps=2, guidance=3.0, negative_prompt=negative, batch_size=2)

    samples = generate(PROMPTS, seeds)
    torch.testing.assert_close(samples, theirs.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(generate(ours.encode_prompts(PROMPTS), seeds), samples, rtol=0, atol=1e-6)
    torch.testing.assert_close(generate(PROMPTS[1:], seeds[1:]), samples[1:], rtol=1e-4, atol=1e-5)
    assert (samples[0] - samples[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_of_conditioning_are_known_without_encoders(name: str, shared: Load) -> None:
    ours = shared(name)
    encoded, masks = ours.encode_prompts(PROMPTS), ours.conditioning_masks.values()
    assert ours.text_shapes() == {key: tuple(t.shape[1:]) for key, t in encoded.items() if key not in masks}


def test_default_steps_and_guidance_are_the_diffusers_pipelines(shared: Load, plain: Callable[[str], Any]) -> None:
    expected = {
        "sd": (50, 7.5, 8), "sdxl": (50, 5, 8), "sd3": (28, 7, 8), "flux": (28, 3.5, 8),
        "wan": (50, 5, 1), "cogvideox": (50, 6, 1), "ltx": (50, 3, 1),
    }  # fmt: skip
    assert {name: shared(name).sampling() for name in expected} == expected
    theirs = in_plain_diffusers(plain("sd3"), shared("sd3"), PROMPTS[:1], [7], steps=28)
    torch.testing.assert_close(shared("sd3").generate(PROMPTS[:1], [7]), theirs, rtol=0, atol=1e-6)


def test_autocast_covers_text_encoder_and_denoiser(shared: Load, plain: Callable[[str], Any]) -> None:
    ours = shared("sd")
    with torch.autocast("cpu", torch.bfloat16):
        theirs = in_plain_diffusers(plain("sd"), ours, PROMPTS[:1], [1], steps=2, guidance=1.0)
    samples = ours.generate(PROMPTS[:1], [1], steps=2, guidance=1.0, autocast=torch.bfloat16)
    torch.testing.assert_close(samples, theirs.float(), rtol=0, atol=1e-6)
    assert not torch.equal(samples, ours.generate(PROMPTS[:1], [1], steps=2, guidance=1.0))


def test_generate_refuses_what_it_cannot_sample(path: PathOf, fresh: Load) -> None:
    pipeline = fresh("sd")
    with pytest.raises(PipelineError, match="2 prompts but 1 seeds"):
        pipeline.generate(["a", "b"], [1])
    torch.nn.init.constant_(pipeline.denoiser.conv_out.bias, math.nan)
    for batch_size, start in ((2, "2 of 2"), (1, "1 of 1")):
        with pytest.raises(PipelineError, match=rf"{start} images are not finite, as prompt 'a' with seed 5\."):
            pipeline.generate(["a", "b"], [5, 6], steps=1, batch_size=batch_size)
    with pytest.raises(PipelineError, match=r"1 of 1 images are not finite, as number 0 with seed 5\."):
        pipeline.generate(pipeline.encode_prompts(["a"]), [5], steps=1)
    with pytest.raises(PipelineError, match="flux has distilled guidance and takes no negative prompt"):
        fresh("flux").generate(["a fox"], [0], negative_prompt="blurry")
    with pytest.raises(PipelineError, match="loaded without its encoders"):
        pipelines.load(path("sd"), encoders=False).generate(["a"], [0])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_with_checkpointing(name: str, fresh: Load) -> None:
    pipeline = fresh(name)
    inputs = example(pipeline)
    randomise_lora(pipeline)

    def gradients() -> list[Tensor]:
        pipeline.denoiser.zero_grad()
        pipeline.predict(*inputs).square().mean().backward()
        return [parameter.grad.clone() for parameter in pipeline.trainable_parameters()]

    expected = gradients()
    pipeline.denoiser.enable_gradient_checkpointing()
    reached = [bool(gradient.abs().max() > 0) for gradient in expected]
    assert sum(reached) > 0.8 * len(reached)  # the text stream of a last joint block gets no gradient
    for gradient, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("wan", 16, r"4k \+ 1; 13 and 17 fit"),
        ("cogvideox", 13, r"8k \+ 1; 9 and 17 fit"),
        ("cogvideox-1.5", 0, r"8k \+ 1; 1 and 9 fit"),
        ("ltx", 5, r"8k \+ 1; 1 and 9 fit"),
    ],
)
def test_clips_keep_a_length_that_fits_and_the_error_for_others_names_one(
    name: str, frames: int, message: str, shared: Load
) -> None:
    pipeline = shared(name)
    for fitting in (1, 1 + pipeline.frame_multiple):
        clip = torch.zeros(1, fitting, 3, *pipeline.default_size)
        assert pipeline.decode_latents(pipeline.encode_pixels(clip)).shape == clip.shape
    with pytest.raises(PipelineError, match=message):
        pipeline.check_size(*pipeline.default_size, frames)
    with pytest.raises(PipelineError, match="give their number of frames"):
        pipeline.check_size(*pipeline.default_size)
    with pytest.raises(PipelineError, match=r"takes clips \[B, F, 3, H, W\], found \[1, 3, 32, 32\]"):
        pipeline.encode_pixels(torch.zeros(1, 3, 32, 32))
    with pytest.raises(PipelineError, match="makes images, but a clip of 9 frames"):
        shared("flux").check_size(32, 32, 9)


def test_sizes_are_the_checkpoints_own_or_its_familys(fresh: Load) -> None:
    expected = {"flux": (256, 256), "wan": (480, 832), "ltx": (512, 704)}  # FLUX: 128 latents of 2 pixels a side
    for name, size in expected.items():
        pipeline = fresh(name)
        pipeline.denoiser.register_to_config(_default_size=None)
        assert pipeline.default_size == size
    assert fresh("cogvideox").default_size == (32, 32) and fresh("cogvideox").default_frames == 9


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_backends_are_honoured_or_refused(name: str, fresh: Load) -> None:
    pipeline = fresh(name)
    pipeline.set_attention("native")
    sample_latents(pipeline)
    with pytest.raises(PipelineError, match=rf"'sage' is not usable with {name}\. Choices: native"):
        pipeline.set_attention("sage")  # it has no backward pass
    usable = "xformers" in pipeline.attention_backends
    refused = "needs a CUDA GPU|needs the package" if usable else f"not usable with {name}"
    if not torch.cuda.is_available() or not usable:
        with pytest.raises(PipelineError, match=refused):
            pipeline.set_attention("xformers")
    if name in ("flux", "wan"):
        with pytest.raises(PipelineError, match=r"needs a CUDA GPU|cannot be used"):
            pipeline.set_attention("flash")
    if "math" in pipeline.attention_backends:
        latents, times, conditioning = example(pipeline)
        with torch.no_grad():
            fused = pipeline.predict(latents, times, conditioning)
            pipeline.set_attention("math")
            assert torch.allclose(pipeline.predict(latents, times, conditioning), fused, atol=1e-5)
        assert "2_0" not in str(pipeline.denoiser.attn_processors)
        pipeline.set_attention("native")
        assert str(pipeline.denoiser.attn_processors).count("2_0") == len(pipeline.denoiser.attn_processors)


def test_sdxl_depends_on_size_and_crop_and_its_empty_prompt_is_zero(shared: Load) -> None:
    pipeline = shared("sdxl")
    latents, times, conditioning = example(pipeline)
    with torch.no_grad():
        plain = pipeline.predict(latents, times, conditioning)
        same = {**conditioning, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)}
        assert torch.equal(pipeline.predict(latents, times, same), plain)
        cropped = {**conditioning, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32], [64, 32, 16, 0, 32, 32]])}
        changed = (pipeline.predict(latents, times, cropped) - plain).flatten(1).abs().amax(1)
    assert changed[0] < 1e-5 < 1e-4 < changed[1]
    mixed = pipeline.encode_prompts(["", "a fox"])
    for tensor in mixed.values():
        assert not tensor[0].any() and tensor[1].any()


def test_wan_experts_train_on_their_own_span_of_sigmas(path: PathOf, shared: Load) -> None:
    high, low = shared("wan-experts"), pipelines.load(path("wan-experts"), expert="low", encoders=False)
    assert list(low.modules()) == ["transformer_2"] and high.denoiser is high.pipe.transformer
    u = torch.linspace(0, 1 - 1e-6, 1001)
    assert low.process.timesteps(u).min() == 0 and low.process.timesteps(u).max() <= 875
    assert high.process.timesteps(u).min() == 875 and high.process.timesteps(u).max() <= 1000
    low.load_encoders()
    assert torch.equal(sample_latents(low), sample_latents(high))
    with pytest.raises(PipelineError, match="expert 'low' was asked for, but this model has a single denoiser"):
        pipelines.load(path("wan"), expert="low")
    with pytest.raises(PipelineError, match=r"unknown expert 'middle'. Choices: high, low"):
        pipelines.load(path("wan-experts"), expert="middle")


def test_processes_match_the_checkpoints_schedulers(shared: Load) -> None:
    shifts = {"sd3": 3.0, "flux": 1.0, "wan": 3.0, "ltx": 1.0}  # FLUX and LTX shift by resolution, and in sampling only
    for name, shift in shifts.items():
        process = shared(name).process
        assert isinstance(process, RectifiedFlow) and process.shift == shift
    process, scheduler = shared("cogvideox").process, shared("cogvideox").pipe.scheduler
    assert isinstance(process, VariancePreserving) and process.prediction_type == "v_prediction"
    latents, noise, times = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4), torch.tensor([300, 999])
    expected = scheduler.add_noise(latents, noise, times)
    torch.testing.assert_close(process.add_noise(latents, noise, times), expected, rtol=1e-5, atol=1e-6)
    assert process.alphas_cumprod[-1] < 1e-6  # no signal at the last timestep


@pytest.mark.parametrize(("name", "tokens"), [("flux", 64), ("ltx", 8)])
def test_a_shift_by_resolution_equals_the_samplers(name: str, tokens: int, fresh: Load) -> None:
    pipeline = fresh(name)
    assert pipeline.tokens(*pipeline.default_size, pipeline.default_frames) == tokens
    pipeline.shift_timesteps("resolution", *pipeline.default_size, pipeline.default_frames)
    assert isinstance(pipeline.process, RectifiedFlow)
    assert pipeline.process.shift == resolution_shift(pipeline.pipe.scheduler.config, tokens)
    sample_latents(pipeline)
    sigmas = pipeline.pipe.scheduler.sigmas[:2].double()
    with pytest.raises(PipelineError, match="wan has no timestep shift that depends on the resolution"):
        fresh("wan").shift_timesteps("resolution", 32, 32, 9)
    if name == "flux":  # whose sampler starts from 1, 2/3, 1/3
        expected = pipeline.process.timesteps(torch.tensor([1.0, 2 / 3])) / 1000
        torch.testing.assert_close(sigmas.float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tiles_of"),  # 32 pixels and overlapping by a quarter, in each VAE's arguments; LTX's cannot be that small
    [("wan", (32, 32, 24, 24)), ("cogvideox", (32, 32, 0.25, 0.25)), ("ltx", (32, 32, None, 32, 32))],
)
def test_a_tiled_vae_encodes_and_decodes_in_tiles(name: str, tiles_of: tuple[Any, ...], fresh: Load) -> None:
    pipeline = fresh(name)
    pipeline.tile_vae()
    vae = pipeline.pipe.vae
    assert vae.use_tiling and vae.use_slicing
    vae.enable_tiling(*tiles_of)
    tiles: list[Any] = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: tiles.append(inputs[0].shape))
    clip = torch.rand(1, 1, 3, 64, 64)
    latents = pipeline.encode_pixels(clip)
    assert len(tiles) > 1 and max(shape[-1] for shape in tiles) < 64
    assert pipeline.decode_latents(latents).shape == clip.shape


@pytest.mark.parametrize(("name", "exact"), [("wan", True), ("cogvideox", False), ("cogvideox-1.5", False)])
def test_the_first_latent_frames_are_decoded_alone(name: str, exact: bool, fresh: Load) -> None:
    """One is the first frame, for a causal decoder the same as in the whole clip; 1.5 has copies of it before."""
    pipeline = fresh(name)
    latents = pipeline.encode_pixels(torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        whole, first = pipeline.decode(latents), pipeline.decode(latents, 1)
    assert whole.shape[1] == 9 and first.shape == whole[:, :1].shape
    if exact:
        torch.testing.assert_close(first, whole[:, :1], rtol=0, atol=1e-6)
        torch.testing.assert_close(pipeline.decode(latents, 2), whole[:, :5], rtol=0, atol=1e-6)
