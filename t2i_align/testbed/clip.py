"""A tiny CLIP of the testbed: it learns from drawn pictures which caption belongs to which.

A genuine transformers CLIP, 64 x 64 pixels in patches of 8, whose text tower begins as the bundled base's text encoder,
which can read the captions. Each batch holds captions with a picture of each, and one of a caption with one attribute
wrong; the loss is CLIP's (arXiv 2103.00020), with the wrong pictures as further negatives of every caption. So it has
never seen a preference, nor a prompt of dev or test: `t2i-align train-scorer` fine-tunes it on preferences.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, get_cosine_schedule_with_warmup

from t2i_align.testbed import base_path
from t2i_align.testbed.captions import FAULTS, Statement, corrupt, describe, draw_for, write
from t2i_align.testbed.prompts import split_of
from t2i_align.testbed.scenes import SIDE, degrade, render, sample_scene
from t2i_align.testbed.text import WordEncoder, build_tokenizer

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # flat pictures of full colours, not photographs
WIDTH, LAYERS, PATCH, PROJECTION = 128, 3, 8, 128


def build_clip(seed: int = 0) -> CLIPModel:
    """The model before it has learnt anything but to read."""
    torch.manual_seed(seed)
    text = CLIPTextModel.from_pretrained(base_path("sd"), subfolder="text_encoder", dtype="float32")
    vision: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    vision |= {"num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=PROJECTION))
    state = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
    model.text_model.load_state_dict({key: value.float() for key, value in state.items()})
    return model


def save_clip(model: CLIPModel, folder: Path) -> None:
    """As `hf-clip:FOLDER` reads it."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    settings: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": square,
    }
    settings |= {"image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def draw_statement(rng: np.random.Generator) -> Statement:
    """A random statement of the train split."""
    while True:
        statement = describe(sample_scene(rng), rng, p_size=0.6, p_background=0.8)
        if split_of(statement) == "train":
            return statement


def draw_wrong(statement: Statement, rng: np.random.Generator) -> Statement:
    """The statement with one attribute wrong."""
    while True:
        wrong = corrupt(statement, str(rng.choice(FAULTS)), rng)
        if wrong is not None:
            return wrong


def draw_picture(statement: Statement, rng: np.random.Generator, degraded: float = 0.0) -> np.ndarray:
    """A picture [64, 64, 3] of which the statement is true, degraded with this probability."""
    pixels = render(draw_for(statement, rng))
    return degrade(pixels, rng) if rng.random() < degraded else pixels


def to_input(pictures: list[np.ndarray]) -> Tensor:
    """[N, 3, 64, 64] as the model takes them."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def contrastive_loss(model: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss of B captions and 2B pictures, of which the first B belong to them and the others to nobody."""
    count = len(ids)
    mask = torch.ones_like(ids)
    texts = F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * texts @ images.T
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2


def pretrain(steps: int, batch: int, lr: float, seed: int = 0, seconds: float | None = None) -> CLIPModel:
    """Train from nothing; `seconds` ends it early, with the schedule where it is."""
    model, words = build_clip(seed), WordEncoder(build_tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    start = time.monotonic()
    with tqdm(total=steps, desc="clip") as bar:
        for step in range(steps):
            rng = np.random.default_rng((seed, step))
            statements = [draw_statement(rng) for _ in range(batch)]
            pictures = [draw_picture(s, rng, 0.3) for s in statements]
            pictures += [draw_picture(draw_wrong(s, rng), rng, 0.3) for s in statements]
            loss = contrastive_loss(model, to_input(pictures), words([write(s, rng) for s in statements]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix(loss=f"{float(loss):.3f}")
            if seconds is not None and time.monotonic() - start > seconds:
                break
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    """Train a tiny CLIP and save it."""
    p = argparse.ArgumentParser(prog="t2i-align testbed clip", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder for the model")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=64, help="captions a step; twice as many pictures")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args(argv)
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; choose another folder")
    torch.set_num_threads(args.threads)
    save_clip(pretrain(args.steps, args.batch, args.lr, args.seed), args.out)
    print(f"written to {args.out}; a scorer: hf-clip:{args.out}")
