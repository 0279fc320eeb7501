"""Tiny models of the genuine classes with random weights, for tests of mechanics rather than of quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import pipelines
from pipelines import TrainablePipeline

SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def byte_tokenizer(length: int = 16) -> transformers.CLIPTokenizer:
    """A genuine CLIP tokenizer over single bytes: every string has tokens, none needs a download."""
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length, pad_token="<|endoftext|>")


def letter_tokenizer(length: int = 16) -> transformers.T5Tokenizer:
    """A genuine T5 tokenizer over printable ASCII."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def clip_encoder(projected: bool = False) -> transformers.CLIPTextModel:
    tokenizer = byte_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **tokens, hidden_size=16,
        intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5_encoder(model: type = transformers.T5EncoderModel, config: type = transformers.T5Config) -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return model(config(vocab_size=len(letter_tokenizer()), **sizes))


def image_vae(**options: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def saved(pipe: diffusers.DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(str(folder))
    return folder


def tiny_sd(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a Stable Diffusion of some 50 k parameters, 32 x 32 pixels, 16 x 16 latents; returns the folder."""
    torch.manual_seed(seed)
    scheduler = diffusers.DDIMScheduler(
        **SD_NOISE, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        text_encoder=clip_encoder(), vae=image_vae(), tokenizer=byte_tokenizer(), unet=unet(cross_attention_dim=16),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return saved(pipe, folder)


def tiny_sdxl(folder: Path) -> Path:
    """SDXL for 32 x 32 pixels: two CLIPs of width 16, sizes and crops embedded in 8 numbers each."""
    torch.manual_seed(0)
    denoiser = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=0.13025), text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(projected=True), tokenizer=byte_tokenizer(), tokenizer_2=byte_tokenizer(),
        unet=denoiser, scheduler=diffusers.DDIMScheduler(**SD_NOISE, set_alpha_to_one=False, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip
    return saved(pipe, folder)


def tiny_sd3(folder: Path, t5: bool = True) -> Path:
    """SD3 for 32 x 32 pixels."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(projected=True), text_encoder_2=clip_encoder(projected=True),
        text_encoder_3=t5_encoder() if t5 else None, tokenizer=byte_tokenizer(), tokenizer_2=byte_tokenizer(),
        tokenizer_3=letter_tokenizer() if t5 else None, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return saved(pipe, folder)


def tiny_flux(folder: Path, guidance: bool = True, singles: int = 2) -> Path:
    """FLUX.1 for 32 x 32 pixels; guidance: distilled into it, as dev has it. singles: blocks after the joint one."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=singles, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    transformer.register_to_config(_default_size=(32, 32))
    pipe = diffusers.FluxPipeline(
        vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(), text_encoder_2=t5_encoder(), tokenizer=byte_tokenizer(),
        tokenizer_2=letter_tokenizer(), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
    return saved(pipe, folder)


def tiny_wan(folder: Path, experts: bool = False, expand_timesteps: bool = False, residual: bool = False) -> Path:
    """Wan for clips of 9 frames of 32 x 32 pixels; residual: with Wan 2.2's VAE, which packs 2 x 2 pixels first."""
    torch.manual_seed(0)

    def transformer() -> diffusers.WanTransformer3DModel:
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        model.register_to_config(_default_size=(9, 32, 32))
        return model

    packed = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[-0.7, 0.1, 0.3, -0.2],
        latents_std=[2.8, 1.4, 0.5, 1.1], **packed if residual else {},
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=letter_tokenizer(), text_encoder=t5_encoder(transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=vae, transformer=transformer(), transformer_2=transformer() if experts else None, scheduler=scheduler,
        boundary_ratio=0.875 if experts else None, expand_timesteps=expand_timesteps,
    )  # fmt: skip
    return saved(pipe, folder)


def tiny_cogvideox(folder: Path, version: str = "1.0-2b") -> Path:
    """CogVideoX for clips of 9 frames of 32 x 32 pixels; version: 1.0-2b, 1.0-5b (rotary positions) or 1.5-5b."""
    torch.manual_seed(0)
    rotary = {"use_rotary_positional_embeddings": version != "1.0-2b"}
    later = {"patch_size_t": 2, "patch_bias": False} if version == "1.5-5b" else {}
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
    )  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=16,
        **rotary, **later,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **SD_NOISE, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=letter_tokenizer(), text_encoder=t5_encoder(), vae=vae, transformer=transformer, scheduler=scheduler,
    )  # fmt: skip
    return saved(pipe, folder)


def tiny_ltx(folder: Path, timestep_conditioning: bool = False) -> Path:
    """LTX-Video for clips of 9 frames of 64 x 64 pixels; its VAE compresses as the real one does."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )  # fmt: skip
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    transformer.register_to_config(_default_size=(9, 64, 64))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=t5_encoder(), tokenizer=letter_tokenizer(), transformer=transformer,
    )  # fmt: skip
    return saved(pipe, folder)


# Every family, and every kind of checkpoint within one that is fed differently.
TINY: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_sd,
    "sd-v": lambda folder: tiny_sd(folder, "v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3-no-t5": lambda folder: tiny_sd3(folder, t5=False),
    "flux": tiny_flux,
    "flux-schnell": lambda folder: tiny_flux(folder, guidance=False),
    "wan": tiny_wan,
    "wan-experts": lambda folder: tiny_wan(folder, experts=True),
    "wan-ti2v": lambda folder: tiny_wan(folder, expand_timesteps=True, residual=True),
    "cogvideox": tiny_cogvideox,
    "cogvideox-5b": lambda folder: tiny_cogvideox(folder, "1.0-5b"),
    "cogvideox-1.5": lambda folder: tiny_cogvideox(folder, "1.5-5b"),
    "ltx": tiny_ltx,
    "ltx-0.9.1": lambda folder: tiny_ltx(folder, timestep_conditioning=True),
}


def in_plain_diffusers(
    pipe: Any, like: TrainablePipeline, prompts: Sequence[str], seeds: Sequence[int], *, steps: int,
    guidance: float | None = None, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """Samples of a diffusers pipeline that is called with text, at the size of `like` and its tokenizers' length."""
    size = dict(zip(("height", "width"), like.default_size, strict=True))
    if like.video:
        size["num_frames"] = like.default_frames
    if any(isinstance(part, transformers.T5Tokenizer) for part in pipe.components.values()):
        size["max_sequence_length"] = 16
    if guidance is not None:
        options["guidance_scale"] = guidance - 1 + like.unguided
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"num_inference_steps": steps, "generator": generators, "output_type": "pt", **size, **options}
    output = pipe(list(prompts), **arguments)
    return output.frames if like.video else output.images


def randomise_lora(pipeline: TrainablePipeline, rank: int = 2, alpha: float = 3.0, targets: str = "attention") -> None:
    """A LoRA whose B is not zero, so that it changes the model."""
    pipeline.add_lora(rank=rank, alpha=alpha, dropout=0.0, targets=targets)
    generator = torch.Generator().manual_seed(5)
    for parameter in pipeline.trainable_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def random_lora(model: Path, folder: Path, **options: Any) -> Path:
    """A saved LoRA that changes every image of the model; returns its file."""
    pipeline = pipelines.load(model)
    randomise_lora(pipeline, **options)
    return pipeline.save_lora(folder)


def sample_latents(pipeline: TrainablePipeline, pipe: Any = None) -> torch.Tensor:
    """Latents of one sample in plain diffusers, without the VAE's time; pipe: another than the pipeline's own."""
    options = {"steps": 3, "guidance": 3.0, "output_type": "latent"}
    return in_plain_diffusers(pipe or pipeline.pipe, pipeline, ["a fox"], [3], **options)


def example(pipeline: TrainablePipeline) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Noisy latents, timesteps and conditioning of two samples."""
    height, width = pipeline.default_size
    channels = pipeline.vae_config.get("latent_channels") or pipeline.vae_config["z_dim"]
    sides = (height // pipeline.vae_factor, width // pipeline.vae_factor)
    frames = (3,) if pipeline.family != "ltx" else (2,)
    shape = (channels, *(frames if pipeline.video else ()), *sides)
    generator = torch.Generator().manual_seed(1)
    times = pipeline.process.timesteps(torch.tensor([0.3, 0.8]))
    return (
        torch.randn(2, *shape, generator=generator),
        times,
        pipeline.encode_prompts(["a red circle", "two blue squares"]),
    )
