"""A tiny model, a scorer and data for the files here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.outside.tiny_zimage import tiny_zimage
from tests.runs import image
from tests.tiny import letter_tokenizer


@pytest.fixture(scope="session")
def zimage_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zimage(tmp_path_factory.mktemp("outside") / "zimage")


@pytest.fixture(scope="session")
def siglip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP of random weights for 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("outside") / "siglip"
    torch.manual_seed(0)
    tokenizer = letter_tokenizer(16)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    """Six lines of the format in votes.py."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(6):
        image(2 * i).save(folder / f"{i}a.png")
        image(2 * i + 1).save(folder / f"{i}b.png")
        lines.append(f"prompt {i}{' and more' * (i % 3)}\t{i}a.png\t{i}b.png\t{i}\t2.5\n")
    (folder / "pairs.votes").write_text("".join(lines))
    return folder / "pairs.votes"
