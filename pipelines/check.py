"""Whether a family feeds its genuine diffusers pipeline as that pipeline feeds itself, and what is trained reaches it.

    print(pipelines.check(pipelines.load("my_model")))

The genuine pipeline samples a few steps; what its scheduler was given at each of them is compared with `predict`, and
its images with `decode_latents` and `generate`. The pipeline is left as it was.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning
from pipelines.denoiser import all_trained, reached
from pipelines.genuine import PROMPTS, SEEDS, STEPS, Sampled, Step, close, difference, genuine, plain
from pipelines.pipeline import TrainablePipeline

LORA: dict[str, Any] = {
    "rank": 2,
    "alpha": 3.0,
    "dropout": 0.0,
}  # alpha / rank is not 1: a file that lost it would show


class Wrong(Exception):
    """What a check has found."""


@dataclass(frozen=True)
class Report:
    """What was checked of a family. findings: by the check's name "" where it passed, or what is wrong."""

    family: str
    findings: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not any(self.findings.values())

    def __str__(self) -> str:
        width = max(map(len, self.findings))
        lines = [f"{name:<{width}}  {'FAILED: ' + wrong if wrong else 'ok'}" for name, wrong in self.findings.items()]
        return "\n".join([f"family {self.family}: {'all checks passed' if self.ok else 'checks FAILED'}", *lines])


def check(pipeline: TrainablePipeline, *, whole: bool = True) -> Report:
    """Check a family on one of its checkpoints, loaded with its encoders.

    Args:
        whole: also write the whole model to a temporary folder and load it from there.
    """
    findings: dict[str, str] = {}
    training = pipeline.denoiser.training
    pipeline.denoiser.eval()
    logging.disable(logging.WARNING)  # tokenizers', of the long text
    try:
        sampled = genuine(pipeline)
        for name, run in CHECKS.items():
            if name == "whole model" and not whole:
                continue
            try:
                run(pipeline, sampled)
                findings[name] = ""
            except Wrong as wrong:
                findings[name] = str(wrong)
            except Exception as error:  # a family's own code may raise anything
                findings[name] = f"{type(error).__name__}: {error}"
    except Exception as error:
        findings["sampling"] = f"the genuine pipeline cannot be called: {type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)
        pipeline.denoiser.train(training)
    return Report(pipeline.family, findings)


# What is checked ------------------------------------------------------------------------------------------------------


def prediction(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """`predict` gives the scheduler of the genuine pipeline what that pipeline gives it."""
    if not sampled.steps:
        raise Wrong("the genuine pipeline did not call the denoiser that is trained")
    for step in sampled.steps:
        with torch.no_grad():
            mine = pipeline.predict(step.noisy, step.timesteps, sampled.conditioning)
        if mine.shape != step.noisy.shape:
            raise Wrong(f"`predict` returns {list(mine.shape)} for latents of {list(step.noisy.shape)}; see `unpack`")
        if close(pipeline, mine, step.prediction):
            continue
        with torch.no_grad():
            mirrored = pipeline.predict(step.noisy, 1000 - step.timesteps, sampled.conditioning)
        for sign, other, reason in (
            (
                -1,
                mine,
                "has the wrong sign: the genuine pipeline negates the denoiser's output, or does not; see `unpack`",
            ),
            (1, mirrored, "runs through time the other way: the denoiser expects 1000 - t; see `denoiser_inputs`"),
            (
                -1,
                mirrored,
                "has the wrong sign and runs through time the other way: see `unpack` and `denoiser_inputs`",
            ),
        ):
            if close(pipeline, sign * other, step.prediction):
                raise Wrong(f"`predict` {reason}")
        raise Wrong(
            f"`predict` at t = {float(step.timesteps[0]):.4g} differs from the genuine pipeline's prediction by up to "
            f"{difference(mine, step.prediction):.2g} of its largest value; see `denoiser_inputs` and `unpack`"
        )


def denoiser(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """`predict` runs the denoiser that it is given: a wrapped one, or the reference's copy."""
    stand_in = StandIn(pipeline.denoiser)
    step = sampled.steps[0]
    with torch.no_grad():
        pipeline.predict(step.noisy, step.timesteps, sampled.conditioning, denoiser=stand_in)
    if not stand_in.called:
        raise Wrong("`predict` ignores its argument `denoiser` and runs the pipeline's own: a reference or a wrapped "
                    "network would not be used")  # fmt: skip


class StandIn(nn.Module):
    """The denoiser as a wrapper has it: to be called, and nothing else. called: whether it was."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.called = inner, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.inner(*args, **kwargs)


def decoding(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """`decode_latents` makes of the last latents the images that the genuine pipeline returns."""
    pixels = pipeline.decode_latents(sampled.latents)
    if not close(pipeline, pixels.cpu(), sampled.pixels.float().cpu().clamp(0, 1), at_least=1.0):
        raise Wrong(
            "`decode_latents` of the genuine pipeline's last latents differs from its images by up to "
            f"{difference(pixels.cpu(), sampled.pixels.float().cpu().clamp(0, 1), 1.0):.2g}: the VAE's scale, shift, "
            "mean or std is another; see `normalisation`, or the layout of latents is; see `unpack`"
        )


def encoding(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """`encode_pixels` is what `decode_latents` inverts, as far as the VAE does."""
    vae = pipeline.pipe.vae
    pixels = torch.rand(sampled.pixels.shape, generator=torch.Generator().manual_seed(0)).to(pipeline.device)[:1]
    inside = (2 * pixels - 1).to(vae.dtype)
    with torch.no_grad():
        raw = vae.encode(inside.transpose(1, 2) if pipeline.video else inside)
        latents = raw.latent_dist.mode() if hasattr(raw, "latent_dist") else raw.latent
        decoded = pipeline.run_decoder(latents)
    decoded = ((decoded.transpose(1, 2) if pipeline.video else decoded).float() / 2 + 0.5).clamp(0, 1)
    mine = pipeline.decode_latents(pipeline.encode_pixels(pixels))
    if not close(pipeline, mine, decoded, at_least=1.0):
        raise Wrong(
            "`decode_latents` of `encode_pixels` differs from what the VAE makes of its own latents by up to "
            f"{difference(mine, decoded, 1.0):.2g}: the scale or shift of encoding is not that of decoding"
        )


def texts(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """Texts of any length, also none; a prediction depends on its own prompt and not on its neighbours' length."""
    step = sampled.steps[0]
    prompts = ["", PROMPTS[1]]
    together = pipeline.encode_prompts(prompts)
    for name, tensor in together.items():
        if len(tensor) != len(prompts):
            raise Wrong(f"conditioning {name!r} of {len(prompts)} prompts is {list(tensor.shape)}: not batch-first")
    for name, mask in pipeline.conditioning_masks.items():
        if name in together and mask not in together:
            raise Wrong(f"`conditioning_masks` names {mask!r} as the mask of {name!r}, but `encode_prompts` returns "
                        f"{', '.join(together)}")  # fmt: skip
    pipeline.encode_prompts([" ".join(["word"] * 2000)])
    with torch.no_grad():
        both = pipeline.predict(step.noisy, step.timesteps, together)
        for row, prompt in enumerate(prompts):
            rows = slice(row, row + 1)
            alone = pipeline.predict(step.noisy[rows], step.timesteps[rows], pipeline.encode_prompts([prompt]))
            if not close(pipeline, both[rows], alone):
                raise Wrong(
                    f"the prediction for prompt {prompt!r} beside a longer one differs by up to "
                    f"{difference(both[rows], alone):.2g} from the one alone: padding is not masked"
                )
    if close(pipeline, both, step_with(pipeline, step, {k: v.flip(0) for k, v in together.items()})):
        raise Wrong("the prediction does not depend on the prompt")


def generating(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """`generate` gives the genuine pipeline's images, without guidance and with it."""
    for guidance in (1.0,) if pipeline.distilled_guidance else (1.0, 3.0):
        asked = getattr(pipeline, "training_guidance", guidance) if pipeline.distilled_guidance else guidance
        mine = pipeline.generate(PROMPTS, SEEDS, steps=STEPS, guidance=asked, batch_size=len(PROMPTS))
        theirs = plain(pipeline, "pt", guidance=guidance).float().cpu().clamp(0, 1)
        if not close(pipeline, mine, theirs, at_least=1.0):
            raise Wrong(f"`generate` at guidance {asked:g} differs from the genuine pipeline's images by up to "
                        f"{difference(mine, theirs, 1.0):.2g}")  # fmt: skip


def gradients(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """What the genuine pipeline's call of the denoiser depends on, `predict` depends on with gradients."""
    step = sampled.steps[0]
    args, kwargs = sampled.call
    names = {parameter: name for name, parameter in pipeline.denoiser.named_parameters()}
    with all_trained(pipeline.denoiser):
        wanted = reached(pipeline.denoiser(*args, **kwargs)[0])
        found = reached(pipeline.predict(step.noisy, step.timesteps, sampled.conditioning))
    if missing := sorted(names[parameter] for parameter in names.keys() & (wanted - found)):
        shown = ", ".join(missing[:3])
        raise Wrong(f"no gradient of `predict` reaches {len(missing)} of {len(names)} tensors, as {shown}")
    unreached = {name for parameter, name in names.items() if parameter not in found}
    for preset in pipeline.lora_presets:
        for ending in pipeline.lora_presets[preset]:
            matched = matching(pipeline.denoiser, ending)
            if matched and all(f"{name}.weight" in unreached for name in matched):
                raise Wrong(f"lora_presets[{preset!r}]: no gradient reaches any module that {ending!r} matches, as "
                            f"{matched[0]}")  # fmt: skip


def lora(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """A LoRA of each preset is written, loads in the genuine pipeline, and gives the same samples there."""
    before, step = plain(pipeline, "latent"), sampled.steps[0]
    unreached = pipeline.unreached(step.noisy, step.timesteps, sampled.conditioning)
    for preset, endings in pipeline.lora_presets.items():
        for ending in endings:
            if not matching(pipeline.denoiser, ending):
                raise Wrong(f"lora_presets[{preset!r}]: {ending!r} matches no module of the denoiser")
        try:
            pipeline.add_lora(**LORA, targets=preset, without=unreached)
            generator = torch.Generator().manual_seed(5)
            for parameter in pipeline.trainable_parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
            trained = plain(pipeline, "latent")
            with tempfile.TemporaryDirectory() as folder:
                file = pipeline.save_lora(folder)
                pipeline.denoiser.unload_lora()
                pipeline.load_lora(file)  # through diffusers
            again = plain(pipeline, "latent")
        finally:
            if getattr(pipeline.denoiser, "peft_config", None):
                pipeline.denoiser.unload_lora()
        if close(pipeline, trained, before):
            raise Wrong(f"a LoRA on {preset!r} changes nothing")
        if not close(pipeline, again, trained):
            raise Wrong(f"a LoRA on {preset!r} that was saved gives other samples in plain diffusers: its names or its "
                        "strength are lost")  # fmt: skip
    if not close(pipeline, plain(pipeline, "latent"), before):
        raise Wrong("the model is another one after its LoRA was removed")


def whole_model(pipeline: TrainablePipeline, sampled: Sampled) -> None:
    """The whole pipeline is saved, and loads in plain diffusers as the same model."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save(folder)
        absent = [name for name in pipeline.optional_encoders if getattr(pipeline.pipe, name) is None]
        again = type(pipeline.pipe).from_pretrained(folder, **pipeline.load_options, **dict.fromkeys(absent))
    again.set_progress_bar_config(disable=True)
    again = again.to(pipeline.device, pipeline.denoiser.dtype)
    if not close(pipeline, plain(pipeline, "latent", again), plain(pipeline, "latent")):
        raise Wrong("the saved pipeline gives other samples in plain diffusers")


CHECKS: dict[str, Callable[[TrainablePipeline, Sampled], None]] = {
    "prediction": prediction,
    "denoiser": denoiser,
    "decoding": decoding,
    "encoding": encoding,
    "texts": texts,
    "generate": generating,
    "gradients": gradients,
    "LoRA": lora,
    "whole model": whole_model,
}


# How it is measured ---------------------------------------------------------------------------------------------------


def step_with(pipeline: TrainablePipeline, step: Step, conditioning: Conditioning) -> Tensor:
    """The prediction under another conditioning."""
    with torch.no_grad():
        return pipeline.predict(step.noisy, step.timesteps, conditioning)


def matching(network: nn.Module, ending: str) -> list[str]:
    """Names of the modules that a LoRA's ending matches."""
    return [name for name, _ in network.named_modules() if name == ending or name.endswith(f".{ending}")]
