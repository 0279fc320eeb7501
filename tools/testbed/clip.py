"""A tiny CLIP of the testbed: it learns from drawn images which caption belongs to which.

A genuine transformers CLIP, 64 x 64 pixels in patches of 8, whose text tower begins as the bundled base's text encoder,
which can read the captions. The vision tower is first pretrained on per-patch labels, through heads that are thrown
away. (CLIP's loss alone learns colours, and no shape in 1,500 steps.) Then each batch holds captions with an image of
each, and one of a caption with one attribute wrong; the loss is CLIP's (arXiv 2103.00020), with the wrong images as
further negatives of every caption. So it has never seen a preference, nor a prompt of dev or test: `t2i-align
train-scorer` fine-tunes it on preferences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from t2i_align.testbed import base_path
from t2i_align.testbed.captions import draw_for, draw_image, draw_wrong, write
from t2i_align.testbed.scenes import COLOURS, RADII, SHAPES, SIDE, Scene, maybe_degrade, render, signed_distance
from t2i_align.testbed.world import IMAGES, draw_statement
from t2i_align.utils.files import write_json
from tools.testbed.base import ClassHeads
from tools.testbed.loop import LoopConfig, fit
from tools.testbed.networks import BASES, build_tokenizer, to_ids
from tools.testbed.sampling import output_options

VISION, PREPROCESSOR = BASES["clip"]["vision"], BASES["clip"]["preprocessor"]
WIDTH, PATCH = VISION["hidden_size"], VISION["patch_size"]
PROJECTION = 128
SPOILT = 0.3  # share of images that are blurred, faded or mottled
NEAR = 3.0  # pixels from a patch's centre to the outline of the object that it is labelled with
LABELS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(RADII)}  # of a patch


def build_clip(seed: int = 0) -> CLIPModel:
    """A fresh vision tower beside the bundled base's text encoder."""
    torch.manual_seed(seed)
    text = CLIPTextModel.from_pretrained(base_path("sd"), subfolder="text_encoder", dtype="float32")
    model = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=VISION, projection_dim=PROJECTION))
    model.text_model.load_state_dict(text.state_dict())
    return model


def save_clip(model: CLIPModel, folder: Path) -> None:
    """As `hf-clip:FOLDER` reads it."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def to_input(images: list[np.ndarray]) -> Tensor:
    """[N, 3, 64, 64] as the model takes them."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(PREPROCESSOR[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (pixels - mean) / std


def contrastive_loss(model: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss of B captions and 2B images, of which only the first B belong to them."""
    count = len(ids)
    mask = torch.ones_like(ids)
    texts = F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * texts @ images.T
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2


def patch_labels(scene: Scene) -> np.ndarray:
    """Classes [3, 8, 8] of the object that is nearest to each patch's centre, 0 where none is within NEAR pixels."""
    centres = (np.arange(SIDE // PATCH) + 0.5) * PATCH
    classes = np.zeros((len(LABELS), len(centres), len(centres)), np.int64)
    nearest = np.full(classes.shape[1:], NEAR)
    for item in scene.objects:
        distance = signed_distance(item.shape, centres[None, :] - item.x, centres[:, None] - item.y, item.radius)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        for row, (attribute, names) in zip(classes, LABELS.items(), strict=True):
            row[closer] = names.index(getattr(item, attribute)) + 1
    return classes


def pretrain(look: int, steps: int, batch: int, lr: float, seed: int = 0) -> CLIPModel:
    """Train from nothing: `look` steps of the vision tower alone, then `steps` of both."""
    model, tokenizer = build_clip(seed), build_tokenizer()
    heads = ClassHeads([tuple(len(names) + 1 for names in LABELS.values())], WIDTH)

    def see(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, 0, step))
        scenes = [draw_for(draw_statement(IMAGES, rng), rng) for _ in range(batch)]
        images = to_input([maybe_degrade(render(scene), rng, SPOILT) for scene in scenes])
        patches = model.vision_model(pixel_values=images).last_hidden_state[:, 1:].flatten(0, 1)
        labels = np.stack([patch_labels(scene) for scene in scenes]).transpose(0, 2, 3, 1).reshape(len(patches), -1)
        return {"loss": heads.loss(patches[:, None], torch.from_numpy(labels))}

    def match(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, 1, step))
        statements = [draw_statement(IMAGES, rng) for _ in range(batch)]
        images = [draw_image(s, rng, SPOILT) for s in statements]
        images += [draw_image(draw_wrong(s, rng), rng, SPOILT) for s in statements]
        ids = to_ids(tokenizer, [write(s, rng) for s in statements])
        return {"loss": contrastive_loss(model, to_input(images), ids)}

    looking = nn.ModuleDict({"vision": model.vision_model, "heads": heads})
    fit(looking, see, LoopConfig(steps=look, lr=2 * lr, warmup=20, muon=True))
    return fit(model, match, LoopConfig(steps=steps, lr=lr, warmup=20, muon=True)).eval()


def options(p: argparse.ArgumentParser, video: bool) -> None:
    output_options(p, "folder for the model")
    p.add_argument("--look", type=int, default=500, help="steps in which the vision tower learns to look")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--batch", type=int, default=64, help="captions per step; twice as many images")
    p.add_argument("--lr", type=float, default=2.5e-3)
    p.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Train a tiny CLIP and save it."""
    save_clip(pretrain(args.look, args.steps, args.batch, args.lr, args.seed), args.out)
    print(f"written to {args.out}; a scorer: hf-clip:{args.out}")
