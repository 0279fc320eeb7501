"""Real-size denoisers with random weights: pairs per second, peak memory and model FLOP utilisation.

    python benchmarks/families.py                    # SDXL and SD3 at 1024 x 1024, bf16, LoRA; needs a GPU
    python benchmarks/families.py --tiny --steps 3   # small denoisers, to test the script on a CPU

Speed and memory do not depend on the weights, so they are random and nothing is downloaded. A step is that of training
from a cache: policy and reference see the pair in one batch, backward, clipping, AdamW. Model FLOP utilisation counts
the forward passes and the policy's backward pass once (without recomputation by checkpointing), relative to the GPU's
dense bf16 peak.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode

import pipelines
from t2i_align.config import TrainConfig
from t2i_align.data.batch import Batch
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives import DiffusionDPO
from t2i_align.training.reference import build_reference

RESULTS = Path(__file__).parent / "results"
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "L40S": 362e12,
}  # dense bf16
VAE = {"block_out_channels": (1, 1, 1, 1), "scaling_factor": 1.0}  # only the factor 8 matters here

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
TINY_SDXL = {"block_out_channels": (32, 32, 32), "transformer_layers_per_block": 1, "attention_head_dim": 2}
TINY_SD3 = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}


def build(name: str, tiny: bool, dtype: torch.dtype, device: torch.device) -> pipelines.TrainablePipeline:
    """A family around a denoiser with random weights; encoders and autoencoder are left out."""
    nothing: dict[str, Any] = {"vae": None, "text_encoder": None, "text_encoder_2": None, "tokenizer": None}
    nothing["tokenizer_2"] = None
    torch.manual_seed(0)
    with torch.device(device):
        if name == "sdxl":
            unet = UNet2DConditionModel(**{**SDXL, **(TINY_SDXL if tiny else {})}).to(dtype)
            pipe: Any = StableDiffusionXLPipeline(
                unet=unet, scheduler=DDIMScheduler(), add_watermarker=False, **nothing
            )
            return pipelines.FAMILIES["sdxl"](pipe, name, VAE)
        transformer = SD3Transformer2DModel(**{**SD3, **(TINY_SD3 if tiny else {})}).to(dtype)
    nothing |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **nothing
    )
    return pipelines.FAMILIES["sd3"](pipe, name, VAE)


def batch_of(name: str, pairs: int, side: int, device: torch.device) -> Batch:
    """Random latents and embeddings of the sizes that real encoders give."""
    channels, tokens, width, pooled = (4, 77, 2048, 1280) if name == "sdxl" else (16, 77 + 256, 4096, 2048)
    return Batch(
        keys=tuple(f"0/{i}" for i in range(pairs)),
        latents=torch.randn(pairs, 2, channels, side // 8, side // 8, device=device),
        scores=torch.tensor([[1.0, 0.0]], device=device).expand(pairs, -1),
        conditioning={
            "prompt_embeds": torch.randn(pairs, tokens, width, device=device),
            "pooled_prompt_embeds": torch.randn(pairs, pooled, device=device),
        },
    )


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds per step, FLOP per step and peak memory (GiB) of Diffusion-DPO with a LoRA."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = build(name, options.tiny, dtype, device)
    pipeline.add_lora(rank=16, alpha=16, dropout=0.0, targets="attention")
    for parameter in pipeline.trainable_parameters():
        parameter.data = parameter.data.float()
    if options.checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.denoiser.train()
    reference = build_reference(TrainConfig(), pipeline)
    parameters = list(pipeline.trainable_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    objective, batch = DiffusionDPO(beta=2000), batch_of(name, options.pairs, options.side, device)

    def step(number: int) -> None:
        keys = tuple(f"{number}/{i}" for i in range(options.pairs))
        rng = SampleRNG(0, keys, pipeline.process, "uniform", device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = objective.step(pipeline.predict, reference, batch, rng)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    flop = flop_of(pipeline, batch, reference, objective, dtype, device)
    if options.compile:
        pipeline.denoiser.compile()
    for number in range(2):
        step(number)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(options.steps):
        started = _now(device)
        step(number)
        seconds.append(_now(device) - started)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"seconds": statistics.median(seconds), "flop": flop, "memory": memory}


def flop_of(
    pipeline: pipelines.TrainablePipeline,
    batch: Batch,
    reference: Any,
    objective: DiffusionDPO,
    dtype: Any,
    device: Any,
) -> float:
    """FLOP of a step: those of one pair times the number of pairs, counted without checkpointing and compilation."""
    one = Batch(
        keys=batch.keys[:1],
        latents=batch.latents[:1],
        scores=batch.scores[:1],
        conditioning={key: tensor[:1] for key, tensor in batch.conditioning.items()},
    )
    checkpointing = getattr(pipeline.denoiser, "is_gradient_checkpointing", False)
    pipeline.denoiser.disable_gradient_checkpointing()
    rng = SampleRNG(0, one.keys, pipeline.process, "uniform", device)
    with FlopCounterMode(display=False) as counter, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss, _ = objective.step(pipeline.predict, reference, one, rng)
        loss.mean().backward()
    pipeline.denoiser.zero_grad(set_to_none=True)
    if checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    return float(counter.get_total_flops()) * len(batch.keys)


def main() -> int:
    """Measure each family and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=["sdxl", "sd3"], default=["sdxl", "sd3"])
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step")
    parser.add_argument("--side", type=int, help="side of the images in pixels (default: 1024, tiny: 64)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small denoisers, to test this script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    options.side = options.side or (64 if options.tiny else 1024)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    peak = next((value for key, value in PEAKS.items() if key in card), None)
    lines = [
        "# Training steps of real-size families",
        "",
        f"{card}, torch {torch.__version__}, Diffusion-DPO, LoRA rank 16, {options.side} px, {options.pairs} pairs "
        f"per step, checkpointing {options.checkpointing}, compile {options.compile}, tiny {options.tiny}; "
        f"median of {options.steps} steps.",
        "",
        "| family | seconds per step | pairs/s | peak memory, GiB | TFLOP per step | FLOP utilisation |",
        "|---|---|---|---|---|---|",
    ]
    for name in options.families:
        measured = measure(name, options, device)
        seconds = measured["seconds"]
        used = f"{measured['flop'] / seconds / peak:.1%}" if peak else "unknown peak"
        lines.append(
            f"| {name} | {seconds:.3f} | {options.pairs / seconds:.2f} | {measured['memory']:.1f} | "
            f"{measured['flop'] / 1e12:.3g} | {used} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if not options.tiny:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"families_{device.type}.md").write_text(text)
    return 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
