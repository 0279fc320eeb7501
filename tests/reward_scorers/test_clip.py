"""The CLIP scorer against open_clip's own forward, its two input paths, and checkpoints that do not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import reward_scorers
from reward_scorers import ScorerError
from reward_scorers.clip import ClipScorer

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a red circle", "ein grüner Würfel auf blauem Grund", "猫の写真 🐈", "a very long prompt " * 60, "cat"]
MODES = ["RGB", "RGBA", "L", "P", "CMYK", "1"]
SIZES = [(64, 64), (224, 224), (31, 97), (300, 120), (1, 1), (640, 480)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small CLIP that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return "tiny-clip"


@pytest.fixture(scope="module")
def weights(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    save_file(open_clip.create_model(tiny).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def scorer(tiny: str, weights: Path) -> ClipScorer:
    built = reward_scorers.build(f"clip:{tiny}:{weights}")
    assert isinstance(built, ClipScorer)
    return built


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_equals_open_clip_on_100_images_of_every_size_and_mode(tiny: str, weights: Path, scorer) -> None:
    model, _, transform = open_clip.create_model_and_transforms(tiny, pretrained=str(weights))
    model.eval()
    images = [noise(size, seed).convert(mode) for seed in range(3) for size in SIZES for mode in MODES]
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(len(images))]
    assert len(images) >= 100
    expected, tokenizer = [], open_clip.get_tokenizer(tiny)
    with torch.no_grad():
        for pil_image, prompt in zip(images, prompts, strict=True):
            image, text, _ = model(transform(pil_image)[None], tokenizer([prompt]))
            expected.append(100 * (image @ text.T).item())
    scores = scorer.score_images(images, prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)  # 1e-6 in cosine
    assert scores.std() > 1  # not a constant


def test_tensor_and_image_paths_differ_by_less_than_the_documented_bound(scorer) -> None:
    """PIL rounds to 8 bits after the resize; white noise, enlarged or shrunk, is the worst case for it."""
    worst = 0.0
    for size in [(64, 64), (100, 100), (224, 224), (300, 120), (32, 32), (640, 480)]:
        for seed in range(4):
            image = noise(size, seed)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
            pair = scorer.score_images([image], ["a cat"]), scorer.score(pixels, ["a cat"])
            worst = max(worst, (pair[0] - pair[1]).abs().item())
    print(f"tensor against PIL: {worst:.4f}")
    assert worst <= 0.1


def test_gradients_reach_the_pixels(tiny: str, weights: Path) -> None:
    """Central differences in float64 along a random direction, on a size that is resized and cropped."""
    scorer = reward_scorers.build(f"clip:{tiny}:{weights}")
    scorer.model.double()
    torch.manual_seed(0)
    pixels = (0.25 + 0.5 * torch.rand(2, 3, 80, 100, dtype=torch.float64)).requires_grad_()
    direction = torch.randn_like(pixels)

    def value(x: torch.Tensor) -> torch.Tensor:
        return scorer._cosine(scorer.preprocess(x), ["a cat", "a dog"]).sum()

    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    step = 1e-5
    with torch.no_grad():
        numeric = (value(pixels + step * direction) - value(pixels - step * direction)) / (2 * step)
    assert numeric.abs() > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


def test_public_score_carries_gradients_and_video_is_the_mean_over_frames(scorer) -> None:
    clips = torch.rand(2, 3, 3, 64, 64, requires_grad=True)
    scores = scorer.score(clips, ["a cat", "a dog"])
    frames = torch.stack([scorer.score(clips[:, f], ["a cat", "a dog"]) for f in range(3)]).mean(0)
    torch.testing.assert_close(scores, frames, atol=1e-4, rtol=0)
    scores.sum().backward()
    assert clips.grad is not None and clips.grad.abs().sum() > 0


def test_each_prompt_goes_through_the_text_tower_once(tiny: str, weights: Path, monkeypatch) -> None:
    scorer = reward_scorers.build(f"clip:{tiny}:{weights}")
    encode, seen = scorer.model.encode_text, []
    monkeypatch.setattr(scorer.model, "encode_text", lambda text, **kw: seen.append(len(text)) or encode(text, **kw))
    pixels = torch.rand(3, 3, 64, 64)
    first = scorer.score(pixels, ["a", "b", "a"])
    assert torch.equal(first, scorer.score(pixels, ["a", "b", "a"]))
    scorer.score(pixels, ["c", "b", "a"])
    assert seen == [2, 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = scorer.score(pixels, ["a", "b", "d"])
    assert seen == [2, 1, 3] and not torch.equal(rounded, first)
    assert torch.equal(scorer.score(pixels, ["a", "b", "a"]), first)
    scorer.score(pixels, ["d", "d", "d"])
    assert seen == [2, 1, 3, 1]  # not what autocast left of it


def test_weights_that_do_not_fit_are_refused(tiny: str, weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(weights)

    def refused(change: dict[str, torch.Tensor], match: str, suffix: str = ".safetensors") -> None:
        file = tmp_path / f"bad{suffix}"
        save_file(change, file) if suffix == ".safetensors" else torch.save(change, file)
        with pytest.raises(ScorerError, match=match):
            reward_scorers.build(f"clip:{tiny}:{file}")

    short = {key: value for key, value in state.items() if key != "visual.proj"}
    refused(short, r"1 keys missing \(visual.proj\), 0 unknown")
    refused(short, "1 keys missing", ".pt")
    refused({**state, "extra": torch.zeros(1)}, r"1 unknown \(extra\)")
    # open_clip itself would silently interpolate these to the model's grid.
    refused({**state, "visual.positional_embedding": torch.zeros(5, 64)}, r"positional_embedding is \[5, 64\]")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ScorerError, match="not a readable checkpoint"):
        reward_scorers.build(f"clip:{tiny}:{tmp_path / 'cut.safetensors'}")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "training.pt")
    reward_scorers.build(f"clip:{tiny}:{tmp_path / 'training.pt'}")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("clib", "unknown scorer 'clib'. Did you mean 'clip'"),
        ("clip:ViT-B-23:random", "Nearest: .*ViT-B-32"),
        ("clip:ViT-B-32", "needs weights.*laion400m_e32"),
        ("clip:ViT-B-32:/no/such/file.pt", "no weights file and no tag"),
        ("clip:ViT-B-32:openai", "belong to 'ViT-B-32-quickgelu'"),
        ("clip:local-dir:/no/such/folder", "could not be loaded"),
    ],
)
def test_bad_specs_are_named(spec: str, match: str) -> None:
    with pytest.raises(ScorerError, match=match):
        reward_scorers.build(spec)


def test_identity_is_recorded(tiny: str, weights: Path, scorer) -> None:
    assert scorer.name == "clip:tiny-clip:clip.safetensors"
    assert f"weights sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}" in scorer.version
    assert "random" in reward_scorers.build(f"clip:{tiny}:random").version


def test_a_folders_weights_are_told_by_their_content(weights: Path, tmp_path: Path) -> None:
    """The same weights in two folders have one digest; with one number changed they have another."""

    def version(name: str, change: float) -> str:
        folder = tmp_path / name
        folder.mkdir()
        state = load_file(weights)
        state["text_projection"][0, 0] += change
        save_file(state, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
        return reward_scorers.build(f"clip:local-dir:{folder}").version.rpartition("sha256 ")[2]

    assert version("one", 0.0) == version("same", 0.0) != version("other", 0.1)
