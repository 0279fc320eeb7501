"""A tiny CLIP of the testbed: it learns from drawn images which caption belongs to which.

A genuine transformers CLIP, 64 x 64 pixels in patches of 8, whose text tower begins as the bundled base's text encoder,
which can read the captions. The vision tower is first pretrained on per-patch labels, through heads that are thrown
away. (CLIP's loss alone finds colours, and no shape in 1,500
steps.) Then each batch holds captions with an image of each, and one of a caption with one attribute wrong; the loss
is CLIP's (arXiv 2103.00020), with the wrong images as further negatives of every caption. So it has never seen a
preference, nor a prompt of dev or test: `t2i-align train-scorer` fine-tunes it on preferences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from t2i_align.testbed import base_path
from t2i_align.testbed.captions import draw_for, draw_image, draw_wrong, write
from t2i_align.testbed.prompts import draw_statement
from t2i_align.testbed.scenes import COLOURS, RADII, SHAPES, SIDE, Scene, maybe_degrade, render, signed_distance
from t2i_align.testbed.world import IMAGES
from tools.testbed.loop import LoopConfig, fit
from tools.testbed.sampling import output_arguments, start
from tools.testbed.text import WordEncoder, build_tokenizer

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # flat images of full colours, not photographs
WIDTH, LAYERS, PATCH, PROJECTION = 128, 3, 8, 128
SPOILT = 0.3  # share of images that are blurred, faded or mottled
NEAR = 3.0  # pixels from a patch's centre to the outline of the object that it is labelled with


def build_clip(seed: int = 0) -> CLIPModel:
    """A fresh vision tower beside the bundled base's text encoder."""
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


def to_input(images: list[np.ndarray]) -> Tensor:
    """[N, 3, 64, 64] as the model takes them."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def contrastive_loss(model: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss of B captions and 2B images, of which only the first B belong to them."""
    count = len(ids)
    mask = torch.ones_like(ids)
    texts = F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * texts @ images.T
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2


class PatchHeads(nn.Module):
    """Reads colour, shape and size of what each patch shows, 0 for nothing; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(names) + 1) for names in (COLOURS, SHAPES, RADII))

    def loss(self, patches: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Cross-entropy of patches [B, 64, WIDTH]."""
        classes = torch.from_numpy(np.stack([self.targets(scene) for scene in scenes])).flatten(2)
        each = zip(self.heads, classes.unbind(1), strict=True)
        return torch.stack(
            [F.cross_entropy(head(patches).flatten(0, 1), truth.flatten()) for head, truth in each]
        ).sum()

    @staticmethod
    def targets(scene: Scene) -> np.ndarray:
        """Classes [3, 8, 8] of the object that is nearest to each patch's centre, if it is within NEAR pixels."""
        centres = (np.arange(SIDE // PATCH) + 0.5) * PATCH
        names = (list(COLOURS), list(SHAPES), list(RADII))
        classes = np.zeros((3, len(centres), len(centres)), np.int64)
        nearest = np.full(classes.shape[1:], NEAR)
        for item in scene.objects:
            distance = signed_distance(item.shape, centres[None, :] - item.x, centres[:, None] - item.y, item.radius)
            closer = distance < nearest
            nearest[closer] = distance[closer]
            for row, known, name in zip(classes, names, (item.colour, item.shape, item.size), strict=True):
                row[closer] = known.index(name) + 1
        return classes


def pretrain(look: int, steps: int, batch: int, lr: float, seed: int = 0) -> CLIPModel:
    """Train from nothing: `look` steps of the vision tower alone, then `steps` of both."""
    model, words, heads = build_clip(seed), WordEncoder(build_tokenizer()), PatchHeads()

    def see(rng: np.random.Generator) -> Tensor:
        scenes = [draw_for(draw_statement(IMAGES, rng), rng) for _ in range(batch)]
        images = to_input([maybe_degrade(render(scene), rng, SPOILT) for scene in scenes])
        return heads.loss(model.vision_model(pixel_values=images).last_hidden_state[:, 1:], scenes)

    def match(rng: np.random.Generator) -> Tensor:
        statements = [draw_statement(IMAGES, rng) for _ in range(batch)]
        images = [draw_image(s, rng, SPOILT) for s in statements]
        images += [draw_image(draw_wrong(s, rng), rng, SPOILT) for s in statements]
        return contrastive_loss(model, to_input(images), words([write(s, rng) for s in statements]))

    looking = nn.ModuleDict({"vision": model.vision_model, "heads": heads})
    fit(looking, _losses(see, (seed, 0)), LoopConfig(steps=look, lr=2 * lr, warmup=20, muon=True))
    return fit(model, _losses(match, (seed, 1)), LoopConfig(steps=steps, lr=lr, warmup=20, muon=True)).eval()


def _losses(
    loss_of: Callable[[np.random.Generator], Tensor], seed: tuple[int, int]
) -> Callable[[int], dict[str, Tensor]]:
    return lambda step: {"loss": loss_of(np.random.default_rng((*seed, step)))}


def main(argv: list[str] | None = None) -> None:
    """Train a tiny CLIP and save it."""
    p = argparse.ArgumentParser(prog="python -m tools.testbed clip", description=__doc__.split("\n")[0])
    output_arguments(p, "folder for the model")
    p.add_argument("--look", type=int, default=500, help="steps in which the vision tower learns to look")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--batch", type=int, default=64, help="captions per step; twice as many images")
    p.add_argument("--lr", type=float, default=2.5e-3)
    args = p.parse_args(argv)
    start(args)
    save_clip(pretrain(args.look, args.steps, args.batch, args.lr, args.seed), args.out)
    print(f"written to {args.out}; a scorer: hf-clip:{args.out}")
