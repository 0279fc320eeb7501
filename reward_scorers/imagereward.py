"""ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder looks at the image by cross-attention, a head rates it.

score = (head(first token) - 0.167) / 1.033, about -2 to 2. The original's package pins libraries of 2023 and does not
run on current ones, so the published checkpoint is put into transformers' own BLIP, whose tensors have other names.
Images take CLIP's preprocessing, prompts are cut at 35 tokens, both as in the original. The encoder sees image and
prompt together, so no text features are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from reward_scorers.base import Judgement, Scorer
from reward_scorers.registry import register
from reward_scorers.towers import CLIP_MEAN, CLIP_STD, in_threads, rated
from reward_scorers.weights import digest, fit, from_hub, load_tokenizer, read_state

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the training data, from the original
WIDTHS, PLACES = (1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)  # the head's linear layers and their places among dropouts
VOCABULARY = 30524  # BERT's, and BLIP's two tokens of its own

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 16}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}

# From the checkpoint's names to transformers'; the projections served BLIP's pretraining only.
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj", "vision.embeddings.patch_embedding"),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..*)\.attn\.", r"\1.self_attn."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
)


@register("imagereward")
def from_spec(argument: str) -> ImageRewardScorer:
    """`imagereward`, `imagereward:/path/ImageReward.pt`, or with BERT's tokenizer: `imagereward:FILE:FOLDER`."""
    checkpoint, _, tokenizer = argument.partition(":")
    return ImageRewardScorer(checkpoint or None, tokenizer or TOKENIZER)


class ImageRewardScorer(Scorer):
    """(head(BLIP(image, prompt)) - mean) / std.

    Args:
        checkpoint: .pt (loaded with weights_only) or .safetensors; None is the Hub's, "random" is for tests.
        tokenizer: folder or Hub id of BERT's.
        vision, text: of the two networks' configurations, for tests; the published sizes otherwise.

    Raises:
        ScorerError: a checkpoint that does not fit or is damaged, or no tokenizer there.
    """

    name = "imagereward"
    differentiable = True

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer: str = TOKENIZER,
        *,
        vision: dict[str, Any] = VISION,
        text: dict[str, Any] = TEXT,
    ) -> None:
        path = Path(checkpoint) if checkpoint else from_hub(REPOSITORY, FILE, self.name)
        state = None if checkpoint == "random" else read_state(path, self.name)
        self.tokenizer = load_tokenizer(tokenizer, self.name)
        self.model = _Network(vision, text).eval().requires_grad_(False)
        told = "random"
        if state is not None:
            fit(self.model, renamed(state), f"imagereward: {path} does not fit")
            told = f"sha256 {digest(path)}"
        self.side = vision["image_size"]
        self.version = f"transformers {transformers.__version__}, weights {told}"

    def to(self, device: torch.device | str) -> ImageRewardScorer:
        """Move the networks. Returns itself."""
        self.model.to(device)
        return self

    def transform(self, image: Image.Image) -> Tensor:
        """The original's steps: resized as it is, then RGB."""
        return self._normalised(F.to_tensor(self._cut(image).convert("RGB")))

    def preprocess(self, pixels: Tensor) -> Tensor:
        """The same, differentiably."""
        return self._normalised(self._cut(pixels).clamp(0, 1))

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._rated(self.preprocess(pixels.float().to(self.model.device)), prompts)

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        return self._rated(torch.stack(in_threads(self.transform, images)).to(self.model.device), prompts), {}

    def _rated(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self.model.device)
        return (self.model(inputs, tokens.input_ids, tokens.attention_mask) - MEAN) / STD

    def _cut(self, image: Any) -> Any:
        resized = F.resize(image, [self.side], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(resized, [self.side, self.side])

    def _normalised(self, pixels: Tensor) -> Tensor:
        return F.normalize(pixels, list(CLIP_MEAN), list(CLIP_STD))


class _Network(nn.Module):
    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6))
        config = BlipTextConfig(vocab_size=VOCABULARY, encoder_hidden_size=vision["hidden_size"], **text)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = nn.Sequential()
        for place, wide, narrow in zip(PLACES, (text["hidden_size"], *WIDTHS), WIDTHS, strict=False):
            self.head.add_module(str(place), nn.Linear(wide, narrow))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, inputs: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ratings [B] before they are normalised."""
        seen = self.vision(pixel_values=inputs).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        return rated(self.head, read.last_hidden_state[:, 0]).squeeze(-1)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint under transformers' names."""
    out = {}
    for key, value in state.items():
        if key.startswith(UNUSED):
            continue
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out
