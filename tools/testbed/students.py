"""The bases that `distill` makes from the v base: their networks, and which of them are trained.

Stable Diffusion's student keeps the teacher's text encoder. The others read the penultimate layer of theirs, so they
get the teacher's with one more layer, which begins as the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

import pipelines
from pipelines.base import Family
from t2i_align.testbed.scenes import SIDE, sample_scene
from t2i_align.testbed.world import IMAGES
from tools.testbed.networks import build, build_word_tokenizer, image_words

CAPTIONS = 400  # of 28 tokens each, which a map of 128 x 192 is fitted to


class Student:
    """A base in the making. `trained` holds the components of the pipeline that learn; everything else is frozen.

    Attributes:
        block: of a transformer, the one whose tokens learn the teacher's features.
    """

    def __init__(self, pipeline: Any, *trained: str, block: nn.Module | None = None) -> None:
        self.family = pipelines.wrap(pipeline)
        self.process = self.family.process
        self.trained = nn.ModuleDict({name: getattr(pipeline, name) for name in trained}).requires_grad_(True)
        self.block = block

    def start_from(self, pipeline: Any) -> None:
        """Take the weights of what is trained from another pipeline of its kind."""
        for name, module in self.trained.items():
            module.load_state_dict(getattr(pipeline, name).state_dict())

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        """The student's native prediction [B, 4, 16, 16]. Unlike `encode_texts`, gradients reach text encoders."""
        conditioning = Family.encode_texts.__wrapped__(self.family, captions)  # type: ignore[attr-defined]
        if self.family.size_conditioned:
            conditioning["time_ids"] = _random_sizes(len(noisy), rng)
        return self.family.predict(noisy, timesteps, conditioning)

    def assemble(self, trained: nn.ModuleDict) -> Any:
        """The pipeline with other weights of what is trained."""
        return _with_parts(self.family.pipe, **{name: trained[name] for name in self.trained})


def guided_student(teacher: StableDiffusionPipeline) -> Student:
    """`testbed:sd` itself, for what its teacher predicts under guidance; the text encoder stays."""
    return Student(_with_parts(teacher, unet=copy.deepcopy(teacher.unet)), "unet")


def epsilon_student(teacher: StableDiffusionPipeline) -> Student:
    """`testbed:sd-eps`: epsilon-prediction under SD's own betas. The UNet starts from the teacher's weights."""
    parts = {"unet": build("sd-eps", "denoiser"), "scheduler": build("sd-eps", "scheduler")}
    parts["unet"].load_state_dict(teacher.unet.state_dict())
    return Student(_with_parts(teacher, **parts), "unet")


def sdxl_student(teacher: StableDiffusionPipeline) -> Student:
    """`testbed:sdxl`: the teacher's UNet with a second text encoder and SDXL's sizes, v-prediction.

    The UNet starts from the teacher's weights, and reads from both encoders what is nearest to what the teacher reads.
    """
    unet = build("sdxl", "denoiser")
    _zero(unet.add_embedding.linear_2)  # added to the embedding of time
    pipeline = StableDiffusionXLPipeline(
        vae=teacher.vae,
        text_encoder=_deeper_encoder("sdxl", teacher),
        text_encoder_2=build("sdxl", "text_encoder_2", teacher.tokenizer),
        tokenizer=teacher.tokenizer,
        tokenizer_2=teacher.tokenizer,
        unet=unet,
        scheduler=build("sd", "scheduler"),
        force_zeros_for_empty_prompt=False,  # the empty caption is what guidance leads away from
        add_watermarker=False,
    )
    known, read = teacher.unet.state_dict(), _text_map(teacher, pipeline)
    for name, parameter in unet.state_dict().items():
        if name in known and parameter.shape != known[name].shape:  # keys and values of cross-attention
            known[name] = known[name] @ read
    unet.load_state_dict(known, strict=False)  # what is missing is the embedding of sizes
    return Student(pipeline, "unet", "text_encoder_2")


def sd3_student(teacher: StableDiffusionPipeline) -> Student:
    """`testbed:sd3`: a joint transformer with all three text encoders, rectified flow."""
    words = build_word_tokenizer(image_words())
    teacher.vae.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        vae=teacher.vae,
        text_encoder=_deeper_encoder("sd3", teacher),
        text_encoder_2=build("sd3", "text_encoder_2", teacher.tokenizer),
        text_encoder_3=build("sd3", "text_encoder_3", words),
        tokenizer=teacher.tokenizer,
        tokenizer_2=teacher.tokenizer,
        tokenizer_3=words,
        transformer=build("sd3", "denoiser"),
        scheduler=build("sd3", "scheduler"),
    )
    block = pipeline.transformer.transformer_blocks[3]  # the fourth of six
    return Student(pipeline, "transformer", "text_encoder_2", "text_encoder_3", block=block)


STUDENTS: dict[str, Callable[[StableDiffusionPipeline], Student]] = {
    "sd": guided_student,
    "sd-eps": epsilon_student,
    "sdxl": sdxl_student,
    "sd3": sd3_student,
}


def _with_parts(pipeline: Any, **parts: Any) -> Any:
    """A pipeline that shares all other components."""
    other = copy.copy(pipeline)
    other.register_modules(**parts)
    return other


@torch.no_grad()
def _text_map(teacher: StableDiffusionPipeline, pipeline: StableDiffusionXLPipeline) -> Tensor:
    """The linear map [128, 192], by least squares over captions, from the hidden states that SDXL attends to, of its
    encoders' penultimate layers, to the teacher's, which went through a last normalisation."""
    rng = np.random.default_rng(0)
    language = IMAGES.language
    captions = [language.write(language.describe(sample_scene(rng), rng), rng) for _ in range(CAPTIONS)]
    wide, narrow = (
        pipelines.wrap(pipe).encode_prompts(captions)["prompt_embeds"].flatten(0, 1) for pipe in (pipeline, teacher)
    )
    return torch.linalg.lstsq(wide.double(), narrow.double()).solution.T.float()


def _deeper_encoder(base: str, teacher: StableDiffusionPipeline) -> Any:
    """A text encoder whose penultimate layer is the teacher's last one; the layer after it is the identity.

    A projection, where the class has one, is the identity too.
    """
    deeper = build(base, "text_encoder", teacher.tokenizer)
    inner = getattr(deeper, "text_model", deeper)  # the class without projection has no level of its own
    inner.load_state_dict(teacher.text_encoder.state_dict(), strict=False)
    last = inner.encoder.layers[-1]
    _zero(last.self_attn.out_proj)
    _zero(last.mlp.fc2)
    if deeper is not inner:
        nn.init.eye_(deeper.text_projection.weight)
    return deeper.eval()


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _random_sizes(count: int, rng: np.random.Generator) -> Tensor:
    """Random original sizes and crops for SDXL, [B, 6]: the scenes look the same whatever these are."""
    original = rng.integers(SIDE, 4 * SIDE, (count, 1)).repeat(2, axis=1)
    crop = rng.integers(0, SIDE // 2, (count, 2)) * (original > 2 * SIDE)
    return torch.from_numpy(np.concatenate([original, crop, np.full((count, 2), SIDE)], 1)).float()
