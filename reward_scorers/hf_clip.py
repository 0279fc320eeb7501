"""CLIP through transformers: PickScore (arXiv 2305.01569), and any checkpoint of one's own.

score = exp(logit_scale) · cos(image, text), as PickScore's published recipe computes it before its softmax over a
prompt's images: around 20 for ordinary images. PIL images take the steps of transformers' PIL processor, with
which the scores were published; since version 5 transformers itself resizes tensors, which moves a score a little.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, CLIPModel

from reward_scorers.base import ScorerError
from reward_scorers.registry import register
from reward_scorers.towers import CLIP_MEAN, CLIP_STD, Preprocess, TwoTowers, unit
from reward_scorers.weights import check_local, from_hub, identity, load_pretrained, load_tokenizer

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # its tokenizer and preprocessing, as published
BICUBIC = 3


@register("pickscore")
def pickscore(argument: str) -> HFClipScorer:
    """`pickscore`, or `pickscore:/folder` with the model, and in it or else on the Hub its tokenizer."""
    path = argument or PICKSCORE
    own = (Path(path) / "tokenizer_config.json").is_file()
    return HFClipScorer(path, processor=path if own else PICKSCORE_PROCESSOR, name="pickscore")


@register("hf-clip")
def hf_clip(argument: str) -> HFClipScorer:
    """`hf-clip:FOLDER` or `hf-clip:owner/name`: a CLIPModel with its tokenizer and its preprocessor_config.json."""
    if not argument:
        raise ScorerError("hf-clip: needs a folder or Hub id: hf-clip:owner/name")
    return HFClipScorer(argument)


class HFClipScorer(TwoTowers):
    """exp(logit_scale) · cos(image, text).

    Args:
        path: folder or Hub id of a CLIPModel.
        processor: where its tokenizer and preprocessing are; None: there as well.
        name: recorded with scores; None: from the path.

    Raises:
        ScorerError: no such model, another architecture, weights missing, or preprocessing that is not CLIP's.
    """

    def __init__(self, path: str, processor: str | None = None, name: str | None = None) -> None:
        self.name = name or f"hf-clip:{Path(path).name if Path(path).exists() else path}"
        _check_kind(path, self.name)
        self.model: Any = load_pretrained(CLIPModel.from_pretrained, path, self.name, dtype="float32")
        self.model.eval().requires_grad_(False)
        self.version = f"transformers {transformers.__version__}, {identity(self.model)}"
        self.scale = float(self.model.logit_scale.exp())
        self.tokenizer = load_tokenizer(processor or path, self.name)
        self.length = self.model.config.text_config.max_position_embeddings
        self.steps = _steps(processor or path, self.model.config.vision_config.image_size, self.name)

    def transform(self, image: Image.Image) -> Tensor:
        """The steps of transformers' PIL processor."""
        return self.steps.image(image)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """The same, differentiably."""
        return self.steps.pixels(pixels)

    def encode_images(self, inputs: Tensor) -> Tensor:
        return unit(self.model.get_image_features(pixel_values=inputs).pooler_output)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = {name: tensor.to(self.device) for name, tensor in self.tokens(prompts).items()}
        return unit(self.model.get_text_features(**tokens).pooler_output)

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L] of prompts, cut where they are too long."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer and the preprocessing beside a model that was trained from this one."""
        self.tokenizer.save_pretrained(folder)
        side, resize = self.steps.side, self.steps.resize or self.steps.side
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": resize},
            "crop_size": {"height": side, "width": side},
            "image_mean": list(self.steps.mean),
            "image_std": list(self.steps.std),
            "resample": BICUBIC,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _check_kind(path: str, who: str) -> None:
    check_local(path, who)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except Exception as error:  # no such folder, no config.json, no connection
        reason = str(error).strip().partition("\n")[0]
        raise ScorerError(f"{who}: {path!r} could not be loaded: {reason}") from error
    if kind != "clip":
        raise ScorerError(f"{who}: {path!r} is a model of type {kind!r}, expected 'clip'")


def _steps(path: str, side: int, who: str) -> Preprocess:
    """The preprocessing that preprocessor_config.json describes."""
    local = Path(path) / "preprocessor_config.json"
    file = local if Path(path).is_dir() else from_hub(path, local.name, who)
    try:
        settings = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ScorerError(f"{who}: {file}: the preprocessing cannot be read: {error}") from error
    resize, crop = settings.get("size", side), settings.get("crop_size", side)
    if isinstance(resize, dict):
        resize = resize.get("shortest_edge")
    crop = crop.get("height") if isinstance(crop, dict) else crop
    usual = all(settings.get(f"do_{step}", True) for step in ("resize", "center_crop", "rescale", "normalize"))
    if not usual or crop != side or not isinstance(resize, int) or settings.get("resample", BICUBIC) != BICUBIC:
        raise ScorerError(
            f"{who}: {file}: expected CLIP's preprocessing (shortest edge resized, bicubic, centre cut out at {side}), "
            f"found {settings}"
        )
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    return Preprocess(side, tuple(mean), tuple(std), resize=resize)
