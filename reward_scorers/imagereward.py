"""ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder looks at the image by cross-attention, a head rates it.

score = (head(first token) - 0.167) / 1.033, about -2 to 2. The original's package pins libraries of 2023 and does not
run on current ones, so the published checkpoint is put into transformers' own BLIP, whose tensors have other names.
Images take CLIP's preprocessing, prompts are cut at 35 tokens, both as in the original. The encoder sees image and
prompt together, so no text features are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from torchvision.transforms import CenterCrop
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from reward_scorers.base import Scorer
from reward_scorers.heads import RatingHead, rated
from reward_scorers.towers import Preprocess, shortest_side
from reward_scorers.weights import load_checkpoint, load_tokenizer, longer_than

HUB = ("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the training data, from the original
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


def imagereward(argument: str) -> ImageRewardScorer:
    """`imagereward`, `imagereward:/path/ImageReward.pt`, or with BERT's tokenizer: `imagereward:FILE:FOLDER`."""
    checkpoint, _, tokenizer = argument.partition(":")
    return ImageRewardScorer(checkpoint, tokenizer or TOKENIZER)


class ImageRewardScorer(Scorer):
    """(head(BLIP(image, prompt)) - mean) / std.

    Args:
        checkpoint: .pt (loaded with weights_only) or .safetensors; "" is the Hub's, "random" is for tests.
        tokenizer: folder or Hub id of BERT's.
        vision, text: of the two networks' configurations, for tests; the published sizes otherwise.

    Raises:
        ScorerError: a checkpoint that does not fit or is damaged, or no tokenizer there.
    """

    name, token_limit = "imagereward", LENGTH
    differentiable = True

    def __init__(
        self,
        checkpoint: str = "",
        tokenizer: str = TOKENIZER,
        *,
        vision: dict[str, Any] = VISION,
        text: dict[str, Any] = TEXT,
    ) -> None:
        self.model = _Network(vision, text)
        weights = load_checkpoint(self.model, checkpoint, self.name, HUB, target="the network", rename=renamed)
        self.tokenizer = load_tokenizer(tokenizer, self.name)
        side = vision["image_size"]
        self.preprocess = Preprocess(shortest_side(side), CenterCrop(side))
        self.version = f"transformers {transformers.__version__}, weights {weights}"

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        return longer_than(LENGTH, self.tokenizer, prompts)

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(inputs.device)
        return (self.model(inputs, tokens.input_ids, tokens.attention_mask) - MEAN) / STD


class _Network(nn.Module):
    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6))
        config = BlipTextConfig(vocab_size=VOCABULARY, encoder_hidden_size=vision["hidden_size"], **text)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = RatingHead(text["hidden_size"])

    def forward(self, inputs: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ratings [B] before they are normalised."""
        patches = self.vision(pixel_values=inputs).last_hidden_state
        tokens = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=patches)
        return rated(self.head, tokens.last_hidden_state[:, 0])


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
