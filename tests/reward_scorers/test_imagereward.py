"""ImageReward in transformers' BLIP: the published checkpoint's names, its two inputs, its limits.

Equality with the original's own code is checked in tests/reward_scorers/test_originals.py, which fetches it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers import BertTokenizer

from reward_scorers import ScorerError
from reward_scorers.imagereward import LENGTH, RENAMED, UNUSED, ImageRewardScorer, _Network, renamed

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = _Network(VISION, TEXT)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.head[-1].weight.data /= 20  # scores as large as the published ones, a few units
    file = tmp_path_factory.mktemp("imagereward") / "ImageReward.pt"
    torch.save(published(network), file)
    return file


@pytest.fixture(scope="module")
def scorer(checkpoint: Path, tokenizer: Path) -> ImageRewardScorer:
    return ImageRewardScorer(str(checkpoint), str(tokenizer), vision=VISION, text=TEXT)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_the_published_names_all_find_their_place(checkpoint: Path) -> None:
    state = renamed(torch.load(checkpoint, weights_only=True))
    own = _Network(VISION, TEXT).state_dict()
    assert {key for key in state if not key.endswith("position_ids")} == set(own)
    assert len(RENAMED) == 10


def test_images_and_prompts_both_count(scorer: ImageRewardScorer) -> None:
    images = [noise((40, 60), 1), noise((40, 60), 2)]
    one = scorer.score_images(images, ["a cat", "a cat"])
    other = scorer.score_images(images, ["a dog in a box", "a cat"])
    assert (one[0] - one[1]).abs() > 1e-4 and (one[0] - other[0]).abs() > 1e-4 and one[1] == other[1]


def test_a_batch_is_what_single_images_are_and_long_prompts_are_cut(scorer: ImageRewardScorer) -> None:
    images = [noise((20 + i, 50 - i), i).convert(mode) for i, mode in enumerate(["RGB", "L", "RGBA", "CMYK", "1"])]
    prompts = ["a", "b " * 100, "猫", "c d", "e"]
    single = [scorer.score_images([p], [t]).item() for p, t in zip(images, prompts, strict=True)]
    torch.testing.assert_close(scorer.score_images(images, prompts), torch.tensor(single), atol=1e-5, rtol=1e-5)
    cut = "b " * (LENGTH - 2)
    assert scorer.score_images(images[:1], [prompts[1]]) == scorer.score_images(images[:1], [cut])


def test_gradients_reach_the_pixels(scorer: ImageRewardScorer) -> None:
    """Central differences along a random direction, in float64."""
    scorer.model.double()
    try:
        torch.manual_seed(0)
        pixels = (0.3 + 0.4 * torch.rand(1, 3, 40, 50, dtype=torch.float64)).requires_grad_()
        direction = torch.randn_like(pixels)

        def value(x: Tensor) -> Tensor:
            return scorer._rated(scorer.preprocess(x), ["a cat"]).sum()

        (gradient,) = torch.autograd.grad(value(pixels), pixels)
        with torch.no_grad():
            numeric = (value(pixels + 1e-5 * direction) - value(pixels - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-8)
        assert numeric.abs() > 1e-6
    finally:
        scorer.model.float()


def test_tensors_and_images_agree(scorer: ImageRewardScorer) -> None:
    image = noise((32, 32))  # nothing is resized, so nothing is rounded
    pair = scorer.score_images([image], ["a"]), scorer.score(TF.to_tensor(image)[None], ["a"])
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


def test_checkpoints_that_do_not_fit_are_refused(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state.pop("mlp.layers.7.bias")
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(ScorerError, match=r"short.pt does not fit: 1 keys missing \(head.7.bias\)"):
        ImageRewardScorer(str(tmp_path / "short.pt"), str(tokenizer), vision=VISION, text=TEXT)
    with pytest.raises(ScorerError, match="the tokenizer of"):
        ImageRewardScorer(str(checkpoint), str(tmp_path / "nowhere"), vision=VISION, text=TEXT)
