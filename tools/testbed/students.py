"""The bases that `distill` makes from the v base: their networks, what is trained, and how they predict.

Stable Diffusion's students keep the teacher's text encoder. The others read the penultimate layer of theirs, so
they get the teacher's with one more layer, which begins as the identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from pipelines import ForwardProcess, RectifiedFlow, VariancePreserving
from t2i_align.testbed.scenes import SIDE
from tools.testbed.sd import assemble, build_scheduler, build_unet
from tools.testbed.text import WIDTH, WordEncoder, build_clip_text, build_word_tokenizer, words

SECOND_WIDTH = 64  # of the second text encoder
FLOW_SHIFT = 2.0  # of SD3's sampler: most of a scene is decided while it is still noisy


class Student(ABC):
    """A base in the making around a teacher's autoencoder, tokenizer and text encoder.

    `trained` holds the networks that learn, by component name; everything else is frozen.
    """

    def __init__(self, teacher: StableDiffusionPipeline) -> None:
        self.vae: AutoencoderKL = teacher.vae
        self.tokenizer: CLIPTokenizer = teacher.tokenizer
        self.text_encoder: CLIPTextModel = teacher.text_encoder
        self.trained = self.build(teacher)

    @abstractmethod
    def build(self, teacher: StableDiffusionPipeline) -> nn.ModuleDict:
        """The networks that learn."""

    @property
    @abstractmethod
    def process(self) -> ForwardProcess:
        """How its latents become noise."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        """The student's native prediction, [B, 4, 16, 16]; `rng` for what else it should see at random."""

    @abstractmethod
    def assemble(self, trained: nn.ModuleDict) -> Any:
        """The diffusers pipeline around trained networks."""


class EpsilonStudent(Student):
    """`testbed:sd-eps`: a smaller UNet, epsilon-prediction under SD's own betas."""

    channels = (32, 64, 112)

    @property
    def process(self) -> ForwardProcess:
        return VariancePreserving(build_scheduler("epsilon").alphas_cumprod, "epsilon")

    def build(self, teacher: StableDiffusionPipeline) -> nn.ModuleDict:
        self.to_ids = WordEncoder(self.tokenizer)
        return nn.ModuleDict({"unet": build_unet(self.channels)})

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        with torch.no_grad():
            hidden = self.text_encoder(self.to_ids(captions)).last_hidden_state
        prediction: Tensor = self.trained["unet"](noisy, timesteps, hidden, return_dict=False)[0]
        return prediction

    def assemble(self, trained: nn.ModuleDict) -> StableDiffusionPipeline:
        return assemble(self.vae, self.text_encoder, self.tokenizer, cast(Any, trained["unet"]), "epsilon")


class SDXLStudent(Student):
    """`testbed:sdxl`: the teacher's UNet with a second text encoder and SDXL's sizes, v-prediction.

    The UNet starts from the teacher's weights; what reads the second encoder starts from zero.
    """

    @property
    def process(self) -> ForwardProcess:
        return VariancePreserving(build_scheduler("v_prediction").alphas_cumprod, "v_prediction")

    def build(self, teacher: StableDiffusionPipeline) -> nn.ModuleDict:
        self.first = _with_a_layer(CLIPTextModel, self.text_encoder)
        unet = build_unet(
            cross_attention_dim=WIDTH + SECOND_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + SECOND_WIDTH,
        )
        known = teacher.unet.state_dict()
        for name, parameter in unet.state_dict().items():
            if name in known:
                wide = torch.zeros_like(parameter)
                wide[tuple(slice(side) for side in known[name].shape)] = known[name]
                known[name] = wide
        unet.load_state_dict(known, strict=False)  # what is missing is the embedding of sizes
        # It is added to the embedding of time, so it starts from zero too.
        nn.init.zeros_(unet.add_embedding.linear_2.weight)
        nn.init.zeros_(unet.add_embedding.linear_2.bias)
        second = _second_encoder(self.tokenizer)
        return nn.ModuleDict({"unet": unet, "text_encoder_2": second})

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.trained["text_encoder_2"](ids, output_hidden_states=True)
        prediction: Tensor = self.trained["unet"](
            noisy,
            timesteps,
            torch.cat([first, second.hidden_states[-2]], -1),
            added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": _sizes(len(noisy), rng)},
            return_dict=False,
        )[0]
        return prediction

    def assemble(self, trained: nn.ModuleDict) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.first,
            text_encoder_2=trained["text_encoder_2"],
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer,
            unet=trained["unet"],
            scheduler=build_scheduler("v_prediction"),
            force_zeros_for_empty_prompt=False,  # the empty caption is what guidance leads away from
            add_watermarker=False,
        )


class SD3Student(Student):
    """`testbed:sd3`: a joint transformer of 64 image tokens with all three text encoders, rectified flow."""

    width, heads, layers = 160, 5, 6

    @property
    def process(self) -> ForwardProcess:
        return RectifiedFlow()

    def build(self, teacher: StableDiffusionPipeline) -> nn.ModuleDict:
        self.first = _with_a_layer(CLIPTextModelWithProjection, self.text_encoder)
        self.words = build_word_tokenizer(words())
        joint = WIDTH + SECOND_WIDTH
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=self.layers,
            attention_head_dim=self.width // self.heads,
            num_attention_heads=self.heads,
            joint_attention_dim=joint,
            caption_projection_dim=self.width,
            pooled_projection_dim=joint,
            out_channels=4,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(self.words),
                d_model=joint,
                d_kv=32,
                d_ff=2 * joint,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=self.words.pad_token_id,
                eos_token_id=self.words.eos_token_id,
            )
        )
        parts = {
            "transformer": transformer,
            "text_encoder_2": _second_encoder(self.tokenizer),
            "text_encoder_3": encoder,
        }
        return nn.ModuleDict(parts)

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            first = self.first(ids, output_hidden_states=True)
        second = self.trained["text_encoder_2"](ids, output_hidden_states=True)
        word_ids = self.words(captions, padding="max_length", return_tensors="pt").input_ids
        clips = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        prediction: Tensor = self.trained["transformer"](
            noisy,
            torch.cat([clips, self.trained["text_encoder_3"](word_ids)[0]], 1),
            torch.cat([first.text_embeds, second.text_embeds], -1),
            timesteps,
            return_dict=False,
        )[0]
        return prediction

    def assemble(self, trained: nn.ModuleDict) -> StableDiffusion3Pipeline:
        self.vae.register_to_config(shift_factor=0.0)
        return StableDiffusion3Pipeline(
            vae=self.vae,
            text_encoder=self.first,
            text_encoder_2=trained["text_encoder_2"],
            text_encoder_3=trained["text_encoder_3"],
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer,
            tokenizer_3=self.words,
            transformer=trained["transformer"],
            scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        )


STUDENTS: dict[str, type[Student]] = {"sd-eps": EpsilonStudent, "sdxl": SDXLStudent, "sd3": SD3Student}


def _with_a_layer(cls: type[nn.Module], encoder: CLIPTextModel) -> Any:
    """A frozen text encoder whose penultimate layer is `encoder`'s last one; the layer after it is the identity.

    A projection, where the class has one, is the identity too.
    """
    config = encoder.config.to_dict()
    layers = config["num_hidden_layers"]
    longer = cls(CLIPTextConfig(**{**config, "num_hidden_layers": layers + 1}))
    inner: Any = getattr(longer, "text_model", longer)  # the class without projection has no level of its own
    inner.load_state_dict(encoder.state_dict(), strict=False)
    last = inner.encoder.layers[layers]
    for part in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    if longer is not inner:
        nn.init.eye_(cast(Any, longer).text_projection.weight)
    return longer.eval().requires_grad_(False)


def _sizes(count: int, rng: np.random.Generator) -> Tensor:
    """Random original sizes and crops for SDXL, [B, 6]: the scenes look the same whatever these are."""
    original = rng.integers(SIDE, 4 * SIDE, (count, 1)).repeat(2, axis=1)
    crop = rng.integers(0, SIDE // 2, (count, 2)) * (original > 2 * SIDE)
    return torch.from_numpy(np.concatenate([original, crop, np.full((count, 2), SIDE)], 1)).float()


def _second_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return build_clip_text(tokenizer, CLIPTextModelWithProjection, width=SECOND_WIDTH, layers=2)
