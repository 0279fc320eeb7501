"""Trainable scorers: a whole CLIP, or a head on features that are computed once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reward_scorers import build
from reward_scorers.heads import PAL
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.images import in_threads
from reward_scorers.towers import TwoTowers, unit
from reward_scorers.trained import CLIP, HEAD, LAYOUT, load_head, make_head, read_metadata
from t2i_align.config import LoraConfig
from t2i_align.errors import UserError
from t2i_align.reward_models.config import ScorerRun
from t2i_align.reward_models.preferences import Preferences
from t2i_align.utils.files import atomic_file

EMBED_BATCH = 64  # images
LORA_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection", "text_projection"],
}


class Policy(Protocol):
    """A network, how a batch of preferences reaches it, and how it becomes a scorer.

    metadata: what `trained:FOLDER` needs beside the weights.
    """

    metadata: dict[str, Any]

    @property
    def network(self) -> nn.Module:
        """What is trained: inputs of `batch` to scores [N]."""

    def batch(self, preferences: Preferences, rows: Sequence[int]) -> dict[str, Any]:
        """What `network` is called with for the candidates of these groups, one after another."""

    def save(self, folder: Path) -> None:
        """Write the weights as `trained:` reads them."""


def begin(
    run: ScorerRun,
    sources: Sequence[Preferences],
    users: Sequence[str],
    *,
    cache: Path,
    device: torch.device,
    progress: bool,
) -> Policy:
    """The policy with its initial weights.

    Args:
        sources: all preferences that it will score. users: those that are trained on.
        cache: folder for features.

    Raises:
        UserError, ScorerError: a model that cannot be used.
    """
    metadata: dict[str, Any] = {"layout": LAYOUT, "kind": "clip", "users": []}
    if run.tune == "users":
        folder, metadata = read_metadata(Path(run.model).expanduser())
        if metadata["kind"] != "pal":
            raise UserError(f"model: {run.model} is of the kind {metadata['kind']!r}; only PAL has users")
    metadata["name"] = run.name or Path(run.output_dir).name
    base = build(metadata.get("base", run.model)).to(device)
    if run.tune in ("full", "lora"):
        assert isinstance(base, HFClipScorer)
        return WholeClip(base, run.lora if run.tune == "lora" else None, metadata)
    if not isinstance(base, TwoTowers):
        raise UserError(f"model: {run.model}: {run.tune} needs a CLIP-style scorer's features")
    features = {source.fingerprint: features_of(base, source, cache, progress) for source in sources}
    if run.tune == "users":
        new = [user for user in users if user not in metadata["users"]]
        if not new:
            raise UserError(f"{run.data.path}: the scorer {run.model} knows all of its users")
        head, _ = load_head(folder, metadata)
        add_users(head, len(new))
        metadata["users"] = [*metadata["users"], *new]
    else:
        width, weights = features[sources[0].fingerprint][1].shape[-1], base.version.rpartition(", ")[2]
        metadata |= {"kind": run.tune, "base": _absolute(run.model), "base_weights": weights, "width": width}
        if run.tune == "pal":
            metadata |= {"users": list(users), "pal": dataclasses.asdict(run.pal)}
        head = make_head(metadata)
    return FrozenFeatures(head.to(device), features, metadata)


class WholeClip(nn.Module):
    """A transformers CLIP, all of it or LoRA on it; images are decoded for each batch."""

    def __init__(self, scorer: HFClipScorer, lora: LoraConfig | None, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.scorer, self.metadata, model = scorer, metadata, scorer.model
        model.requires_grad_(lora is None)
        if lora is not None:
            import peft

            targets = LORA_TARGETS.get(lora.targets, lora.targets) if isinstance(lora.targets, str) else lora.targets
            options: dict[str, Any] = {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
            try:
                model = peft.get_peft_model(model, peft.LoraConfig(r=lora.rank, target_modules=targets, **options))
            except ValueError as error:
                choices = f"Choices: {', '.join(LORA_TARGETS)}, or a list of module-name endings"
                raise UserError(
                    f"lora.targets: {lora.targets!r} fits no module of the model ({error}). {choices}"
                ) from error
        self.lora, self.model = lora is not None, model

    @property
    def network(self) -> nn.Module:
        return self

    def forward(self, pixel_values: Tensor, owner: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [N] of images [N, 3, H, W] with the prompts [G, L] that `owner` [N] points to."""
        images = unit(self.model.get_image_features(pixel_values=pixel_values).pooler_output)
        texts = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.model.logit_scale.exp() * (images * unit(texts)[owner]).sum(-1)

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
        model = self.model.merge_and_unload() if self.lora else self.model
        model.save_pretrained(folder / CLIP)
        self.scorer.save_processor(folder / CLIP)


Features = tuple[Sequence[Tensor], Tensor]  # unit features of each group's images [k, D], and of all prompts [G, D]


class FrozenFeatures:
    """A head on features of preferences, by their fingerprint. metadata["users"]: in the order of PAL's rows."""

    def __init__(self, head: nn.Module, features: Mapping[str, Features], metadata: dict[str, Any]) -> None:
        self.network, self.features, self.metadata = head, features, metadata
        self.places = {user: place for place, user in enumerate(metadata["users"])}

    def batch(self, preferences: Preferences, rows: Sequence[int]) -> dict[str, Any]:
        images, texts = self.features[preferences.fingerprint]
        counts = torch.tensor([len(preferences.labels[row]) for row in rows])
        users = torch.tensor([self.places.get(preferences.users[row], -1) for row in rows])
        return {
            "images": torch.cat([images[row] for row in rows]),
            "texts": texts[list(rows)].repeat_interleave(counts, 0),
            "users": users.repeat_interleave(counts),
        }

    def save(self, folder: Path) -> None:
        state = {key: value.cpu().contiguous() for key, value in self.network.state_dict().items()}
        save_file(state, folder / HEAD)


@torch.no_grad()
def features_of(base: TwoTowers, preferences: Preferences, cache: Path, progress: bool) -> Features:
    """Compute features, or read them from the folder `cache`, where they are named after base and preferences."""
    key = hashlib.sha256(f"{base.name} {base.version} {preferences.fingerprint}".encode()).hexdigest()[:16]
    file = cache / f"features-{key}.safetensors"
    if not file.exists():
        images = []
        for _, batch in preferences.batches(EMBED_BATCH, "features", progress):
            inputs = torch.stack(in_threads(base.preprocess, batch)).to(base.device)
            images.append(base.encode_images(inputs).float().cpu())
        texts = base.text_features(preferences.prompts).float().cpu()
        with atomic_file(file) as temporary:
            save_file({"images": torch.cat(images), "texts": texts}, temporary)
    stored = load_file(file)
    return stored["images"].split([len(label) for label in preferences.labels]), stored["texts"]


def add_users(head: nn.Module, count: int) -> None:
    """Add rows of PAL's w, at the mean of the known users', and leave nothing else to train."""
    assert isinstance(head, PAL)
    head.requires_grad_(False)
    known, start = len(head.w), head.w.mean(0, keepdim=True).repeat(count, 1)
    head.w = nn.Parameter(torch.cat([head.w.detach(), start]))
    head.w.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:known]), gradient[known:]]))


def _absolute(spec: str) -> str:
    """A spec whose path, if it ends in one, does not depend on the working directory."""
    kind, _, rest = spec.rpartition(":")
    return f"{kind}:{Path(rest).expanduser().absolute()}" if kind and Path(rest).expanduser().exists() else spec
