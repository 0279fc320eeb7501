"""A small CLIP-style scorer of single sentences about drawn scenes, which `long_prompts.py` trains and decomposes.

A convolutional image tower beside the bundled base's frozen text encoder. Each batch holds scenes and a sentence of
each, and which sentence is true of which scene is known: the loss is SigLIP's (arXiv 2303.15343) with these labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, CLIPTextModel

from reward_scorers.towers import TwoTowers, unit
from reward_scorers.weights import digest
from t2i_align.testbed import base_path
from t2i_align.testbed.captions import write
from t2i_align.testbed.long_captions import facts_of
from t2i_align.testbed.scenes import maybe_degrade, render
from t2i_align.testbed.world import LONG, split_of

WIDTH, DIMENSIONS = 128, 128
SPOILT = 0.3  # share of images that are blurred, faded or mottled


def towers() -> nn.ModuleDict:
    """Fresh: the image tower for [B, 3, 64, 64], what projects the text encoder's output, and the loss's bias."""
    layers: list[nn.Module] = []
    for before, after, kernel in ((3, 32, 5), (32, 48, 3), (48, 96, 3), (96, 128, 3)):
        layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(8, after), nn.GELU()]
    image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.GELU(), nn.Linear(256, DIMENSIONS))
    text = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, DIMENSIONS))
    return nn.ModuleDict({"image": image, "text": text, "bias": nn.Linear(1, 1)})


class SentenceScorer(TwoTowers):
    """`benchmarks/sentence_scorer.py:SentenceScorer:FILE`."""

    name, scale = "sentences", 20.0

    def __init__(self, file: str | None = None) -> None:
        self.model: Any = towers()
        self.version = "untrained"
        if file is not None:
            self.model.load_state_dict(torch.load(file, weights_only=True))
            self.version = digest(Path(file))
        self.model.requires_grad_(file is None)
        self.tokenizer = AutoTokenizer.from_pretrained(base_path("sd"), subfolder="tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(base_path("sd"), subfolder="text_encoder", dtype=torch.float32)
        self.encoder.requires_grad_(False).eval()

    def encode_images(self, inputs: Tensor) -> Tensor:
        return unit(self.model["image"](2 * inputs - 1))

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = self.encoder(**tokens).pooler_output
        return unit(self.model["text"](hidden))


def train(file: Path, steps: int, batch: int = 64, lr: float = 2e-3, seed: int = 0) -> None:
    """Train a scorer on statements of the train split and save it."""
    torch.manual_seed(seed)
    scorer, rng = SentenceScorer(), np.random.default_rng((7, seed))
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        drawn: list[Any] = []
        while len(drawn) < batch:
            scene = LONG.sample(rng)
            statement = LONG.language.describe(scene, rng)
            if split_of(statement) == "train":
                drawn.append((maybe_degrade(render(scene), rng, SPOILT), statement))
        pixels = torch.from_numpy(np.stack([image for image, _ in drawn])).movedim(-1, 1)
        sentences = [one.sentences[rng.integers(len(one.sentences))] for _, one in drawn]
        facts = [one.facts for _, one in drawn]
        true = torch.tensor([[facts_of(sentence) <= known for sentence in sentences] for known in facts]).float()
        texts = scorer.encode_texts([write(sentence, rng) + "." for sentence in sentences])
        logits = scorer.scale * scorer.encode_images(pixels) @ texts.T + scorer.model["bias"].bias
        loss = binary_cross_entropy_with_logits(logits, true, pos_weight=(1 - true).sum() / true.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"scorer, step {step}: loss {loss.item():.3f}, right {((logits > 0) == (true > 0)).float().mean():.3f}",
                flush=True,
            )
    torch.save(scorer.model.state_dict(), file)
