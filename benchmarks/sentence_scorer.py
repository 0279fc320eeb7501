"""A small CLIP-style scorer of single sentences about drawn scenes, which `long_prompts.py` trains and decomposes.

A convolutional image tower, and a text tower over the words and the bundled base's frozen text encoder. Each batch
holds scenes and a sentence of each; which sentence is true of which scene is known, so CLIP's loss (arXiv 2103.00020)
takes all true ones as right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel

from reward_scorers.towers import TwoTowers, unit
from reward_scorers.weights import digest
from t2i_align.testbed import base_path
from t2i_align.testbed.captions import Statement, clean, write
from t2i_align.testbed.long_captions import facts_of
from t2i_align.testbed.scenes import maybe_degrade, render
from t2i_align.testbed.world import LONG, split_of

WIDTH, DIMENSIONS, VOCABULARY = 128, 128, 1024
SPOILT = 0.3  # share of images that are blurred, faded or mottled


class Text(nn.Module):
    """Token ids [B, L] to features [B, D]: how often each token occurs, and the text encoder's pooled output [B, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum", padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(2 * WIDTH, 256), nn.GELU(), nn.Linear(256, DIMENSIONS))

    def forward(self, ids: Tensor, pooled: Tensor) -> Tensor:
        features: Tensor = self.layers(torch.cat([self.words(ids), pooled], dim=-1))
        return features


def towers() -> nn.ModuleDict:
    """Fresh: the image tower for [B, 3, 64, 64], and the text tower."""
    layers: list[nn.Module] = []
    for before, after, kernel, stride in ((3, 48, 8, 4), (48, 96, 3, 2), (96, 128, 3, 2)):
        layers += [nn.Conv2d(before, after, kernel, stride, padding=(kernel - 1) // 2)]
        layers += [nn.GroupNorm(8, after), nn.GELU()]
    image = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(256), nn.GELU(), nn.Linear(256, DIMENSIONS))
    image(torch.zeros(1, 3, 64, 64))
    return nn.ModuleDict({"image": image, "text": Text()})


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
        return unit(self.model["text"](*self.read(prompts)))

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, 0 for no word, and the frozen encoder's output; a sentence's full stop is no part of it."""
        texts = [clean(prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens.input_ids.masked_fill(tokens.input_ids == self.tokenizer.eos_token_id, 0)
        return ids, self.encoder(**tokens).pooler_output


def train(file: Path, steps: int, scenes: int = 1536, batch: int = 64, lr: float = 1e-3, seed: int = 0) -> None:
    """Train a scorer on drawn scenes of the train split and save it."""
    torch.manual_seed(seed)
    scorer, rng = SentenceScorer(), np.random.default_rng((7, seed))
    drawn: list[Any] = []
    while len(drawn) < scenes:
        scene = LONG.sample(rng)
        statement = LONG.language.describe(scene, rng)
        if split_of(statement) == "train":
            drawn.append((maybe_degrade(render(scene), rng, SPOILT), statement))
    pixels = torch.from_numpy(np.stack([image for image, _ in drawn])).movedim(-1, 1)
    facts = {fact: number for number, fact in enumerate({fact for _, one in drawn for fact in one.facts})}

    def known(sets: Sequence[frozenset[Statement]]) -> Tensor:
        rows = torch.zeros(len(sets), len(facts))
        for row, one in zip(rows, sets, strict=True):
            row[[facts[fact] for fact in one]] = 1
        return rows

    of_scene = known([one.facts for _, one in drawn])
    sentences = [sentence for _, one in drawn for sentence in one.sentences]
    owner = np.repeat(np.arange(scenes), [len(one.sentences) for _, one in drawn])
    of_sentence = known([facts_of(sentence) for sentence in sentences])
    texts = [write(sentence, rng) for sentence in sentences]
    parts = [scorer.read(texts[start : start + 256]) for start in range(0, len(texts), 256)]
    ids, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = rng.choice(len(sentences), batch, replace=False)
        images = of_scene[owner[rows]]
        true = (images @ of_sentence[rows].T == of_sentence[rows].sum(1)).float()
        features = unit(scorer.model["text"](ids[rows], pooled[rows]))
        logits = scorer.scale * scorer.encode_images(pixels[owner[rows]]) @ features.T
        right = logits.masked_fill(true == 0, -torch.inf)
        loss = (logits.logsumexp(0) - right.logsumexp(0)).mean() + (logits.logsumexp(1) - right.logsumexp(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            above = (logits[true > 0][:, None] > logits[true == 0][None]).float().mean()
            print(f"scorer, step {step}: loss {loss.item():.3f}, true above untrue {above:.3f}", flush=True)
    torch.save(scorer.model.state_dict(), file)
