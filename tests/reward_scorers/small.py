"""Small networks of the genuine classes, images of all sizes and modes, and one small scorer of each kind."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from reward_scorers import Scorer, build
from reward_scorers.clip import HPSv2Scorer
from reward_scorers.imagereward import UNUSED, ImageRewardScorer, _Network
from tests.tiny import byte_tokenizer

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NAME = "tiny-clip"  # by which open_clip knows TINY
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["a red circle", "ein grüner Würfel auf blauem Grund", "猫の写真 🐈", "a very long prompt " * 60, "cat"]
MODES = ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA"]
SIZES = [(64, 64), (224, 224), (31, 97), (300, 121), (1, 1), (640, 480)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@cache
def hundred() -> tuple[list[Image.Image], list[str]]:
    """More than 100 images of all sizes and modes, with prompts in turn."""
    images = [noise(size, seed).convert(mode) for seed in range(3) for size in SIZES for mode in MODES]
    return images, [PROMPTS[row % len(PROMPTS)] for row in range(len(images))]


def write_open_clip(folder: Path) -> Path:
    """Make TINY known to open_clip, with either activation; its weights as HPSv2 is published: under state_dict."""
    for name, activation in ((NAME, {}), (f"{NAME}-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps({**TINY, **activation}))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    file = folder / "weights.pt"
    torch.save({"state_dict": open_clip.create_model(NAME).state_dict(), "epoch": 1}, file)
    return file


def write_hf_clip(folder: Path) -> Path:
    """A small random CLIPModel with a tokenizer of bytes and the published preprocessing at 64 pixels."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(length=77)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPConfig(
        text_config={**shared, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **special},
        vision_config={**shared, "image_size": 64, "patch_size": 16},
        projection_dim=16,
        logit_scale_init_value=4.6052,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def write_imagereward(folder: Path) -> tuple[Path, Path]:
    """A checkpoint under the published names with scores of a few units, and the folder of a small BERT tokenizer."""
    torch.manual_seed(0)
    network = _Network(VISION, TEXT)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.head[-1].weight.data /= 20
    torch.save(published(network), folder / "ImageReward.pt")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder / "ImageReward.pt", folder


def published(network: _Network) -> dict[str, Tensor]:
    """A network's tensors under the names that the published checkpoint gives them, written out by hand."""
    out = {}
    for key, value in network.state_dict().items():
        name = key.replace("text.", "blip.text_encoder.", 1) if key.startswith("text.") else key
        name = name.replace("head.", "mlp.layers.", 1) if name.startswith("head.") else name
        if name.startswith("vision."):
            for ours, theirs in (
                ("vision.embeddings.class_embedding", "cls_token"),
                ("vision.embeddings.position_embedding", "pos_embed"),
                ("vision.embeddings.patch_embedding", "patch_embed.proj"),
                ("vision.post_layernorm", "norm"),
                ("vision.encoder.layers", "blocks"),
                ("self_attn.projection", "attn.proj"),
                ("self_attn", "attn"),
                ("layer_norm", "norm"),
            ):
                name = name.replace(ours, theirs)
            name = f"blip.visual_encoder.{name}"
        out[name] = value
    extra = {f"{prefix}weight": torch.zeros(2, 2) for prefix in UNUSED}
    return {**out, **extra, "blip.text_encoder.embeddings.position_ids": torch.arange(4)}


def small_scorers(folder: Path) -> dict[str, Scorer]:
    """One scorer of each published kind on random weights, by name."""
    weights, (checkpoint, tokenizer) = write_open_clip(folder), write_imagereward(folder)
    return {
        "clip": build(f"clip:{NAME}:{weights}"),
        "hpsv2": HPSv2Scorer("2.1", str(weights), model=NAME),
        "pickscore": build(f"pickscore:{write_hf_clip(folder / 'hf')}"),
        "aesthetic": build(f"aesthetic:random:{NAME}:{weights}"),
        "imagereward": ImageRewardScorer(str(checkpoint), str(tokenizer), vision=VISION, text=TEXT),
    }
