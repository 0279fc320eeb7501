"""SigLIP (arXiv 2303.15343) as a scorer: `siglip.py:siglip:google/siglip-base-patch16-224`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor
from torchvision import transforms as T

from reward_scorers import Preprocess, TwoTowers, register, unit


@register("siglip")
class SigLIP(TwoTowers):
    """exp(scale) · cos(image, text) + bias, the logit that SigLIP was trained with. path: folder or Hub id."""

    def __init__(self, path: str) -> None:
        self.name, self.version = "siglip", f"transformers {transformers.__version__}, {path}"
        self.model: Any = transformers.SiglipModel.from_pretrained(path)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        self.scale = float(self.model.logit_scale.exp())
        side = self.model.config.vision_config.image_size
        self.preprocess = Preprocess(T.Resize((side, side), antialias=True), mean=[0.5] * 3, std=[0.5] * 3)

    def encode_images(self, inputs: Tensor) -> Tensor:
        return unit(self.model.get_image_features(pixel_values=inputs).pooler_output)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return unit(self.model.get_text_features(input_ids=tokens.input_ids.to(self.device)).pooler_output)

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().rate(inputs, prompts) + self.model.logit_bias.item()
