"""Trainable scorers: a whole CLIP, or a head on features that are computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.images import in_threads
from reward_scorers.towers import TwoTowers, unit
from t2i_align.config import LoraConfig
from t2i_align.reward_models.preferences import Preferences
from t2i_align.utils.files import atomic_file

EMBED_BATCH = 64  # images
LORA_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection", "text_projection"],
}


class Policy(Protocol):
    """A network and how a batch of preferences reaches it."""

    network: nn.Module

    def batch(self, preferences: Preferences, rows: Sequence[int]) -> dict[str, Any]:
        """What `network` is called with for the candidates of these groups, one after another."""


class WholeClip(Policy):
    """A transformers CLIP, all of it or LoRA on it; images are decoded for each batch."""

    def __init__(self, scorer: HFClipScorer, lora: LoraConfig | None) -> None:
        self.scorer, model = scorer, scorer.model
        model.requires_grad_(lora is None)
        if lora is not None:
            import peft

            targets = LORA_TARGETS.get(lora.targets, lora.targets) if isinstance(lora.targets, str) else lora.targets
            options: dict[str, Any] = {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
            config = peft.LoraConfig(r=lora.rank, target_modules=targets, **options)
            model = peft.get_peft_model(model, config)
        self.lora = lora is not None
        self.network = _Scores(model)

    def batch(self, preferences: Preferences, rows: Sequence[int]) -> dict[str, Any]:
        images = [image for row in rows for image in preferences.images(row)]
        counts = [len(preferences.labels[row]) for row in rows]
        tokens = self.scorer.tokens([preferences.prompts[row] for row in rows])
        return {
            "pixel_values": torch.stack(in_threads(self.scorer.preprocess, images)),
            "owner": torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)),
            **tokens,
        }

    def save(self, folder: Path) -> None:
        """The model with LoRA merged into it, its tokenizer and preprocessing, as transformers loads them."""
        model = self.network.model
        model = model.merge_and_unload() if self.lora else model
        model.save_pretrained(folder)
        self.scorer.save_processor(folder)


class _Scores(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor, owner: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [N] of images [N, 3, H, W] with the prompts [G, L] that `owner` [N] points to."""
        images = unit(self.model.get_image_features(pixel_values=pixel_values).pooler_output)
        texts = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        cosines = (images * unit(texts)[owner]).sum(-1)
        return self.model.logit_scale.exp() * cosines


class FrozenFeatures(Policy):
    """A head on features. users: their names in the order of PAL's rows."""

    def __init__(self, head: nn.Module, features: Features, users: Sequence[str]) -> None:
        self.network, self.features = head, features
        self.places = {user: place for place, user in enumerate(users)}

    def batch(self, preferences: Preferences, rows: Sequence[int]) -> dict[str, Any]:
        counts = torch.tensor([len(preferences.labels[row]) for row in rows])
        users = torch.tensor([self.places.get(preferences.users[row], -1) for row in rows])
        texts = torch.stack([self.features.texts[row] for row in rows])
        return {
            "images": torch.cat([self.features.images[row] for row in rows]),
            "texts": texts.repeat_interleave(counts, 0),
            "users": users.repeat_interleave(counts),
        }


class Features:
    """Unit features of all groups: images [k, D] and texts [D], by row."""

    def __init__(self, images: list[Tensor], texts: Tensor) -> None:
        self.images, self.texts = images, texts

    @property
    def width(self) -> int:
        return self.texts.shape[-1]

    @classmethod
    @torch.no_grad()
    def of(cls, base: TwoTowers, preferences: Preferences, cache: Path, progress: bool = True) -> Features:
        """Compute them, or read them from the folder `cache`, where they are named after base and preferences."""
        key = hashlib.sha256(f"{base.name} {base.version} {preferences.fingerprint}".encode()).hexdigest()[:16]
        file = cache / f"features-{key}.safetensors"
        counts = [len(label) for label in preferences.labels]
        if not file.exists():
            images = []
            for _, batch in preferences.batches(EMBED_BATCH, "features", progress):
                inputs = torch.stack(in_threads(base.preprocess, batch)).to(base.device)
                images.append(base.encode_images(inputs).float().cpu())
            texts = base.text_features(preferences.prompts).float().cpu()
            with atomic_file(file) as temporary:
                save_file({"images": torch.cat(images), "texts": texts}, temporary)
        stored = load_file(file)
        return cls(list(stored["images"].split(counts)), stored["texts"])
