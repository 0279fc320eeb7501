"""Every family: training computes what its genuine diffusers pipeline computes, and what it saves loads there."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipelines
from pipelines import PipelineError, RectifiedFlow, TrainablePipeline, VariancePreserving
from pipelines.process import resolution_shift
from tests.pipelines.test_load import randomise_lora
from tests.tiny import TINY

FAMILIES = ("sd", "sdxl", "sd3", "flux", "wan", "cogvideox", "ltx")
VIDEO = ("wan", "cogvideox", "ltx")
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the tiny checkpoint of this name, written once."""
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: TINY[name](folder / name))


@pytest.fixture(scope="module")
def shared(path: Callable[[str], Path]) -> Callable[[str], TrainablePipeline]:
    """That checkpoint loaded, for tests that leave it as it is."""
    return cache(lambda name: pipelines.load(path(name)))


@pytest.fixture(scope="module")
def plain(path: Callable[[str], Path]) -> Callable[[str], Any]:
    """That checkpoint in plain diffusers."""

    def load(name: str) -> Any:
        without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-no-t5" else {}
        pipe = DiffusionPipeline.from_pretrained(str(path(name)), **without)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return cache(load)


@pytest.fixture
def fresh(shared: Callable[[str], TrainablePipeline]) -> Callable[[str], TrainablePipeline]:
    """The same for tests that change it."""
    return lambda name: copy.deepcopy(shared(name))


def sample(pipeline: TrainablePipeline) -> Tensor:
    """Latents of one sample through the diffusers pipeline, without the VAE's time."""
    return latents_of(pipeline.pipe, pipeline)


def latents_of(pipe: Any, like: TrainablePipeline, **options: Any) -> Tensor:
    height, width = like.default_size
    frames = {"num_frames": like.default_frames} if like.video else {}
    options = {**like.call_options(["a fox"], "", 3.0), **options}
    generator = torch.Generator().manual_seed(3)
    made = pipe(
        **options, height=height, width=width, **frames, num_inference_steps=3, generator=generator,
        output_type="latent",
    )  # fmt: skip
    latents: Tensor = made.frames if like.video else made.images
    return latents


def example(pipeline: TrainablePipeline, count: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noisy latents, different timesteps and conditioning."""
    height, width = pipeline.default_size
    channels = pipeline.vae_config.get("latent_channels") or pipeline.vae_config["z_dim"]
    sides = (height // pipeline.vae_factor, width // pipeline.vae_factor)
    frames = (3,) if pipeline.family != "ltx" else (2,)
    shape = (channels, *(frames if pipeline.video else ()), *sides)
    generator = torch.Generator().manual_seed(1)
    times = pipeline.process.timesteps(torch.tensor([0.3, 0.8]))[:count]
    return torch.randn(count, *shape, generator=generator), times, pipeline.encode_prompts(PROMPTS[:count])


def unpacked(family: str, tensor: Tensor, latent_size: tuple[int, ...]) -> Tensor:
    """What a denoiser is given or gives back, as [B, C, h, w] or [B, C, f, h, w]; written down independently."""
    if family == "flux":
        (height, width), channels = latent_size[-2:], tensor.shape[-1] // 4
        patches = tensor.view(-1, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
    if family == "cogvideox":
        return tensor.transpose(1, 2)
    if family == "ltx":
        return tensor.transpose(1, 2).unflatten(2, latent_size)
    return tensor


@pytest.mark.parametrize("name", TINY)
def test_prediction_equals_what_the_genuine_pipeline_computes(
    name: str, shared: Callable[[str], TrainablePipeline]
) -> None:
    """At every step of a sampling run with guidance off, for the latents and times that its denoiser was given."""
    ours = shared(name)
    seen: list[tuple[Any, ...]] = []
    handle = ours.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True
    )
    height, width = ours.default_size
    frames = {"num_frames": ours.default_frames} if ours.video else {}
    options = ours.call_options(PROMPTS, "", 1.0)
    if ours.family == "flux":
        options["guidance_scale"] = ours.training_guidance
    generator = torch.Generator().manual_seed(0)
    ours.pipe(
        **options, height=height, width=width, **frames, num_inference_steps=3, generator=generator,
        output_type="latent",
    )  # fmt: skip
    handle.remove()
    lowest = 875 if name == "wan-experts" else 0  # below, its other expert steps in
    assert len(seen) == sum(time >= lowest for time in ours.pipe.scheduler.timesteps) > 0
    latent_size = tuple(example(ours)[0].shape[2:])
    conditioning = ours.encode_prompts(PROMPTS)
    with torch.no_grad():
        for args, kwargs, prediction in seen:
            given = args[0] if args else kwargs["hidden_states"]
            timesteps = args[1] if args else kwargs["timestep"]
            timesteps = timesteps.expand(2) if timesteps.ndim < 2 else timesteps[:, 0]  # each token's own are the same
            timesteps = 1000 * timesteps if ours.family == "flux" else timesteps
            mine = ours.predict(unpacked(ours.family, given, latent_size), timesteps, conditioning)
            expected = unpacked(ours.family, prediction, latent_size)
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
            other = {key: value.flip(0) for key, value in conditioning.items()}
            changed = ours.predict(unpacked(ours.family, given, latent_size), timesteps, other)
            assert (changed - mine).abs().max() > 1e-4  # the prompt is heard


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan", "wan-ti2v", "cogvideox", "cogvideox-1.5", "ltx"])
def test_latents_are_normalised_as_the_checkpoint_says_and_decode_inverts(
    name: str, shared: Callable[[str], TrainablePipeline]
) -> None:
    pipeline = shared(name)
    vae, config = pipeline.pipe.vae, pipeline.pipe.vae.config
    height, width = pipeline.default_size
    frames = (pipeline.default_frames,) if pipeline.video else ()
    pixels = torch.rand(1, *frames, 3, height, width, generator=torch.Generator().manual_seed(0))
    inside = (2 * pixels - 1).transpose(1, 2) if pipeline.video else 2 * pixels - 1
    with torch.no_grad():
        raw = vae.encode(inside).latent_dist.mode()
        decoded = vae.decode(raw).sample
    shape = (1, -1, 1, 1, 1)
    if pipeline.family == "wan":
        expected = (raw - torch.tensor(config.latents_mean).view(shape)) / torch.tensor(config.latents_std).view(shape)
    elif pipeline.family == "ltx":
        expected = (raw - vae.latents_mean.view(shape)) / vae.latents_std.view(shape) * config.scaling_factor
    else:
        expected = (raw - (config.get("shift_factor") or 0)) * config.scaling_factor
    if name == "cogvideox-1.5":
        expected = torch.cat([expected[:, :, :1], expected], dim=2)
    latents = pipeline.encode_pixels(pixels)
    torch.testing.assert_close(latents, expected)
    assert latents.shape[1:] == example(pipeline)[0].shape[1:] or name == "cogvideox-1.5"
    decoded = (decoded.transpose(1, 2) if pipeline.video else decoded) / 2 + 0.5
    torch.testing.assert_close(pipeline.decode_latents(latents), decoded.clamp(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES[1:], "sd3-no-t5", "wan-experts"])
def test_generate_equals_plain_diffusers_and_so_does_a_saved_pipeline(
    name: str, shared: Callable[[str], TrainablePipeline], plain: Callable[[str], Any], tmp_path: Path
) -> None:
    ours = shared(name)
    height, width = ours.default_size
    frames = {"num_frames": ours.default_frames} if ours.video else {}
    length = {"max_sequence_length": 16} if name not in ("sd", "sdxl", "sd3-no-t5") else {}
    theirs = plain(name)(
        ["a fox"], guidance_scale=3.0, height=height, width=width, **frames, **length, num_inference_steps=2,
        generator=torch.Generator().manual_seed(9), output_type="pt",
    )  # fmt: skip
    theirs = theirs.frames if ours.video else theirs.images
    made = ours.generate(["a fox"], [9], steps=2, guidance=3.0)
    assert made.shape == (1, *frames.values(), 3, height, width)
    torch.testing.assert_close(made, theirs.float(), rtol=0, atol=1e-6)
    ours.save(tmp_path / "saved")
    again = pipelines.load(tmp_path / "saved")
    assert again.default_size == ours.default_size and again.default_frames == ours.default_frames
    torch.testing.assert_close(sample(again), sample(ours), rtol=0, atol=1e-6)


def test_what_is_not_told_is_left_to_the_diffusers_pipeline(
    shared: Callable[[str], TrainablePipeline], plain: Callable[[str], Any]
) -> None:
    own = {name: (shared(name).default_steps, shared(name).default_guidance) for name in FAMILIES}
    assert own == {"sd": (50, 7.5), "sdxl": (50, 5), "sd3": (28, 7), "flux": (28, 3.5), "wan": (50, 5),
                   "cogvideox": (50, 6), "ltx": (50, 3)}  # fmt: skip
    height, width = shared("sd3").default_size
    theirs = plain("sd3")(PROMPTS[0], height=height, width=width, max_sequence_length=16, output_type="pt",
                          generator=torch.Generator().manual_seed(7)).images  # fmt: skip
    assert torch.equal(shared("sd3").generate(PROMPTS[:1], [7]), theirs)


@pytest.mark.parametrize("name", [*FAMILIES[1:], "wan-low"])
def test_lora_loads_in_plain_diffusers_and_here_with_the_same_samples(
    name: str, path: Callable[[str], Path], fresh: Callable[[str], TrainablePipeline], plain: Callable[[str], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    low = name == "wan-low"
    name = "wan-experts" if low else name

    def start() -> TrainablePipeline:
        return pipelines.load(path(name), expert="low") if low else fresh(name)

    trained, again = start(), start()
    base = sample(trained)
    trained.add_lora(rank=2, alpha=3.0, dropout=0.0, targets="all")
    generator = torch.Generator().manual_seed(5)
    for parameter in trained.trainable_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    expected = sample(trained)
    assert (expected - base).abs().max() > 1e-3
    file = trained.save_lora(tmp_path)
    theirs = plain(name)
    theirs.load_lora_weights(str(tmp_path), **({"load_into_transformer_2": True} if low else {}))
    torch.testing.assert_close(latents_of(theirs, trained), expected, rtol=0, atol=1e-6)
    theirs.unload_lora_weights()
    again.load_lora(file)
    torch.testing.assert_close(sample(again), expected, rtol=0, atol=1e-6)
    again.pipe.unload_lora_weights()
    torch.testing.assert_close(sample(again), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_kohya_file_loads_in_plain_diffusers_at_its_own_strength(
    name: str, fresh: Callable[[str], TrainablePipeline], plain: Callable[[str], Any], tmp_path: Path
) -> None:
    trained = fresh(name)
    randomise_lora(trained, rank=2, alpha=3.0)
    file = trained.save_lora(tmp_path, naming="kohya")
    names = load_file(file)
    assert all(key.startswith("lora_unet_") for key in names)
    assert {float(value) for key, value in names.items() if key.endswith(".alpha")} == {3.0}
    theirs = plain(name)
    theirs.load_lora_weights(str(file))
    torch.testing.assert_close(latents_of(theirs, trained), sample(trained), rtol=0, atol=1e-6)
    theirs.unload_lora_weights()
    again = fresh(name)
    again.load_lora(file)
    torch.testing.assert_close(sample(again), sample(trained), rtol=0, atol=1e-6)


def test_a_lora_has_only_names_that_others_can_read(fresh: Callable[[str], TrainablePipeline], tmp_path: Path) -> None:
    pipeline = fresh("sd3")
    randomise_lora(pipeline)
    with pytest.raises(PipelineError, match=r"LoRA of sd3 cannot be named as 'kohya' has it. Choices: diffusers\."):
        pipeline.save_lora(tmp_path, naming="kohya")


@pytest.mark.parametrize(("of", "onto"), [("sd", "sd3"), ("flux", "wan"), ("sd3", "flux"), ("sd", "sdxl")])
def test_a_lora_of_another_family_is_refused_and_leaves_nothing(
    of: str, onto: str, fresh: Callable[[str], TrainablePipeline], tmp_path: Path
) -> None:
    other, pipeline = fresh(of), fresh(onto)
    randomise_lora(other)
    file = other.save_lora(tmp_path)
    base = sample(pipeline)
    with pytest.raises(PipelineError, match=f"LoRA does not fit {onto}"):
        pipeline.load_lora(file)
    assert torch.equal(sample(pipeline), base)
    randomise_lora(pipeline)  # the way is free for another
    pipeline.load_lora(pipeline.save_lora(tmp_path / "own"))


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_features_are_the_denoisers_own_and_carry_gradients(
    name: str, shared: Callable[[str], TrainablePipeline]
) -> None:
    pipeline = shared(name)
    latents, times, conditioning = example(pipeline)
    found = pipeline.features(latents.requires_grad_(), times, conditioning)
    assert len(found) == 2 and found.isfinite().all()
    found.square().mean().backward()
    assert latents.grad is not None and (latents.grad.flatten(1).abs().amax(1) > 0).all()
    seen: list[Any] = []
    block = pipeline.denoiser.get_submodule(pipeline.feature_block)
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        pipeline.predict(latents, times, conditioning)
    handle.remove()
    parts = seen[0] if isinstance(seen[0], tuple) else seen
    assert any(torch.equal(found, part) for part in parts)


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_gradients_are_the_same_with_checkpointing(name: str, fresh: Callable[[str], TrainablePipeline]) -> None:
    pipeline = fresh(name)
    inputs = example(pipeline)
    randomise_lora(pipeline)

    def gradients() -> list[Tensor]:
        pipeline.denoiser.zero_grad()
        pipeline.predict(*inputs).square().mean().backward()
        return [parameter.grad.clone() for parameter in pipeline.trainable_parameters()]

    expected = gradients()
    pipeline.denoiser.enable_gradient_checkpointing()
    heard = [bool(gradient.abs().max() > 0) for gradient in expected]
    assert sum(heard) > 0.8 * len(heard)  # not all: of the text's attention in the last block some leads nowhere
    for gradient, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [*FAMILIES[1:], "wan-experts"])
def test_without_encoders_a_pipeline_predicts_the_same_and_knows_its_sizes(
    name: str, path: Callable[[str], Path], shared: Callable[[str], TrainablePipeline]
) -> None:
    whole, bare = shared(name), pipelines.load(path(name), encoders=False)
    assert not bare.has_encoders and list(bare.modules()) == [whole.denoiser_name]
    inputs = example(whole)
    with torch.no_grad():
        assert torch.equal(bare.predict(*inputs), whole.predict(*inputs))
    assert bare.default_size == whole.default_size and bare.default_frames == whole.default_frames
    bare.check_size(*bare.default_size, bare.default_frames)
    with pytest.raises(PipelineError, match=r"do not fit .* both sides must be multiples of"):
        bare.check_size(whole.default_size[0] + 1, whole.default_size[1], whole.default_frames)
    denoiser = bare.denoiser
    bare.load_encoders()
    assert bare.has_encoders and bare.denoiser is denoiser and bare.modules().keys() == whole.modules().keys()
    bare.drop_encoders()
    assert not bare.has_encoders and bare.denoiser is denoiser


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("wan", 16, r"4k \+ 1; 13 and 17 fit"),
        ("cogvideox", 13, r"8k \+ 1; 9 and 17 fit"),
        ("cogvideox-1.5", 0, r"8k \+ 1; 1 and 9 fit"),
        ("ltx", 5, r"8k \+ 1; 1 and 9 fit"),
    ],
)
def test_clips_that_do_not_fit_are_told_which_do(
    name: str, frames: int, message: str, shared: Callable[[str], TrainablePipeline]
) -> None:
    pipeline = shared(name)
    with pytest.raises(PipelineError, match=message):
        pipeline.check_size(*pipeline.default_size, frames)
    with pytest.raises(PipelineError, match="say of how many frames"):
        pipeline.check_size(*pipeline.default_size)
    with pytest.raises(PipelineError, match=r"takes clips \[B, F, 3, H, W\], found \[1, 3, 32, 32\]"):
        pipeline.encode_pixels(torch.zeros(1, 3, 32, 32))
    with pytest.raises(PipelineError, match="makes images, but a clip of 9 frames"):
        shared("flux").check_size(32, 32, 9)


@pytest.mark.parametrize("name", VIDEO)
def test_frames_that_fit_come_back_from_the_vae_as_many(name: str, shared: Callable[[str], TrainablePipeline]) -> None:
    pipeline = shared(name)
    for frames in (1, 1 + pipeline.frame_multiple):
        clip = torch.zeros(1, frames, 3, *pipeline.default_size)
        assert pipeline.decode_latents(pipeline.encode_pixels(clip)).shape == clip.shape


def test_sizes_are_the_checkpoints_own_or_its_familys(fresh: Callable[[str], TrainablePipeline]) -> None:
    expected = {"flux": (256, 256), "wan": (480, 832), "ltx": (512, 704)}  # FLUX: 128 latents of 2 pixels a side
    for name, size in expected.items():
        pipeline = fresh(name)
        pipeline.denoiser.register_to_config(_default_size=None)
        assert pipeline.default_size == size
    assert fresh("cogvideox").default_size == (32, 32) and fresh("cogvideox").default_frames == 9


@pytest.mark.parametrize("name", ["sd3", *FAMILIES[3:]])
def test_attention_backends_are_honoured_or_refused(name: str, fresh: Callable[[str], TrainablePipeline]) -> None:
    pipeline = fresh(name)
    pipeline.set_attention("native")
    sample(pipeline)
    with pytest.raises(PipelineError, match=f"'sage' is not usable with {name}"):  # it has no backward pass
        pipeline.set_attention("sage")
    refused = "not usable with cogvideox" if name == "cogvideox" else "needs a CUDA GPU|needs the package"
    if not torch.cuda.is_available() or name == "cogvideox":
        with pytest.raises(PipelineError, match=refused):
            pipeline.set_attention("xformers")
    if name in ("flux", "wan"):
        with pytest.raises(PipelineError, match=r"needs a CUDA GPU|cannot be used"):
            pipeline.set_attention("flash")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_component_is_named_before_anything_loads(
    name: str, path: Callable[[str], Path], tmp_path: Path
) -> None:
    family = pipelines.FAMILIES[name]
    for component in (family.denoiser_name, "scheduler", "vae", "text_encoder", "tokenizer"):
        broken = tmp_path / component
        shutil.copytree(path(name), broken, ignore=lambda _, names, gone=component: [n for n in names if n == gone])
        with pytest.raises(PipelineError, match=f"lacks its component '{component}': there is no such folder"):
            pipelines.load(broken)
        index = json.loads((broken / "model_index.json").read_text())
        del index[component]
        (broken / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(PipelineError, match=f"lacks its component '{component}': model_index.json has none"):
            pipelines.load(broken)


def test_sd3_does_without_its_t5(shared: Callable[[str], TrainablePipeline]) -> None:
    pipeline = shared("sd3-no-t5")
    assert pipeline.has_encoders
    embeddings = pipeline.encode_prompts(["a fox"])["prompt_embeds"]
    assert embeddings.shape == (1, 16 + 256, 32) and not embeddings[:, 16:].any()


def test_sdxl_hears_sizes_and_crops_and_its_empty_prompt_is_zero(shared: Callable[[str], TrainablePipeline]) -> None:
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


def test_wans_experts_train_on_their_own_part_of_the_way(
    path: Callable[[str], Path], shared: Callable[[str], TrainablePipeline]
) -> None:
    high, low = shared("wan-experts"), pipelines.load(path("wan-experts"), expert="low", encoders=False)
    assert list(low.modules()) == ["transformer_2"] and high.denoiser is high.pipe.transformer
    u = torch.linspace(0, 1 - 1e-6, 1001)
    assert low.process.timesteps(u).min() == 0 and low.process.timesteps(u).max() <= 875
    assert high.process.timesteps(u).min() == 875 and high.process.timesteps(u).max() <= 1000
    low.load_encoders()
    assert torch.equal(sample(low), sample(high))
    with pytest.raises(PipelineError, match="expert 'low' was asked for, but this model has a single denoiser"):
        pipelines.load(path("wan"), expert="low")
    with pytest.raises(PipelineError, match=r"unknown expert 'middle'. Choices: high, low"):
        pipelines.load(path("wan-experts"), expert="middle")


def test_processes_are_the_schedulers_own(shared: Callable[[str], TrainablePipeline]) -> None:
    shifts = {"sd3": 3.0, "flux": 1.0, "wan": 3.0, "ltx": 1.0}  # FLUX and LTX shift by resolution, and in sampling only
    for name, shift in shifts.items():
        process = shared(name).process
        assert isinstance(process, RectifiedFlow) and process.shift == shift
    process, scheduler = shared("cogvideox").process, shared("cogvideox").pipe.scheduler
    assert isinstance(process, VariancePreserving) and process.prediction_type == "v_prediction"
    latents, noise, times = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4), torch.tensor([300, 999])
    expected = scheduler.add_noise(latents, noise, times)
    torch.testing.assert_close(process.add_noise(latents, noise, times), expected, rtol=1e-5, atol=1e-6)
    assert process.alphas_cumprod[-1] < 1e-6  # no signal at the end of the way


@pytest.mark.parametrize(("name", "tokens"), [("flux", 64), ("ltx", 8)])
def test_a_shift_by_resolution_is_the_samplers(
    name: str, tokens: int, fresh: Callable[[str], TrainablePipeline]
) -> None:
    pipeline = fresh(name)
    assert pipeline.tokens(*pipeline.default_size, pipeline.default_frames) == tokens
    pipeline.shift_timesteps("resolution", *pipeline.default_size, pipeline.default_frames)
    assert isinstance(pipeline.process, RectifiedFlow)
    assert pipeline.process.shift == resolution_shift(pipeline.pipe.scheduler.config, tokens)
    sample(pipeline)
    sigmas = pipeline.pipe.scheduler.sigmas[:2].double()
    if name == "flux":  # whose sampler starts from 1, 2/3, 1/3
        expected = pipeline.process.timesteps(torch.tensor([1.0, 2 / 3])) / 1000
        torch.testing.assert_close(sigmas.float(), expected, rtol=1e-5, atol=1e-6)


def test_flux_is_told_its_guidance_and_refuses_a_negative_prompt(fresh: Callable[[str], TrainablePipeline]) -> None:
    pipeline = fresh("flux")
    inputs = example(pipeline)
    with torch.no_grad():
        before = pipeline.predict(*inputs)
        pipeline.training_guidance = 1.0
        assert (pipeline.predict(*inputs) - before).abs().max() > 1e-5
    with pytest.raises(PipelineError, match="knows no negative prompt"):
        pipeline.generate(["a fox"], [0], negative_prompt="blurry")


@pytest.mark.parametrize(
    ("name", "tiles_of"),  # 32 pixels and overlapping by a quarter, in each VAE's own words; LTX's cannot be that small
    [("wan", (32, 32, 24, 24)), ("cogvideox", (32, 32, 0.25, 0.25)), ("ltx", (32, 32, None, 32, 32))],
)
def test_a_tiled_vae_encodes_and_decodes_in_tiles(
    name: str, tiles_of: tuple[Any, ...], fresh: Callable[[str], TrainablePipeline]
) -> None:
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


def test_a_file_with_the_denoiser_alone_takes_the_rest_from_its_configuration(
    path: Callable[[str], Path], shared: Callable[[str], TrainablePipeline], tmp_path: Path
) -> None:
    whole = shared("ltx")
    theirs = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    weights = {}
    for key, value in whole.denoiser.state_dict().items():
        for ours, name in theirs.items():
            key = key.replace(ours, name)
        weights[f"model.diffusion_model.{key}"] = value * 1.5
    file = tmp_path / "ltx.safetensors"
    save_file(weights, file)
    loaded = pipelines.load(file, single_file_config=str(path("ltx")))
    for key, value in whole.denoiser.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[key], value * 1.5)
    inputs = example(loaded)
    for key, value in whole.encode_prompts(PROMPTS).items():
        assert torch.equal(inputs[2][key], value)
    clip = torch.zeros(1, 1, 3, 64, 64)
    assert torch.equal(loaded.encode_pixels(clip), whole.encode_pixels(clip))
