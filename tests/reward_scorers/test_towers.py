"""HPSv2, PickScore, the aesthetic predictor and one's own CLIP: equal to the originals' recipes; weights that fit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import reward_scorers
from reward_scorers import Scorer, ScorerError
from reward_scorers.aesthetic import AestheticScorer
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.hpsv2 import HPSv2Scorer
from reward_scorers.towers import CLIP_MEAN, CLIP_STD
from tests.tiny import byte_tokenizer

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a red circle", "ein grüner Würfel auf blauem Grund", "猫の写真 🐈", "a very long prompt " * 60, "cat"]
MODES = ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA"]
SIZES = [(64, 64), (224, 224), (31, 97), (300, 121), (1, 1), (640, 480)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def hundred() -> tuple[list[Image.Image], list[str]]:
    """More than 100 images of all sizes and modes, with prompts in turn."""
    images = [noise(size, seed).convert(mode) for seed in range(3) for size in SIZES for mode in MODES]
    return images, [PROMPTS[row % len(PROMPTS)] for row in range(len(images))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("towers")
    (folder / "tiny-towers.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return "tiny-towers"


@pytest.fixture(scope="module")
def weights(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the form in which HPSv2 is published: a pickle with the tensors under state_dict."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip.create_model(tiny).state_dict(), "epoch": 1}, file)
    return file


@pytest.fixture(scope="module")
def hpsv2(tiny: str, weights: Path) -> HPSv2Scorer:
    return HPSv2Scorer("2.1", str(weights), model=tiny)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_clip(tmp_path_factory.mktemp("hf") / "clip")


@pytest.fixture(scope="module")
def pickscore(hf_folder: Path) -> HFClipScorer:
    scorer = reward_scorers.build(f"pickscore:{hf_folder}")
    assert isinstance(scorer, HFClipScorer)
    return scorer


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


def hps_input(image: Image.Image, side: int) -> torch.Tensor:
    """HPSv2's transform as its source states it: to floats, the long side fitted, the rest padded, normalised."""
    x = TF.to_tensor(image.convert("RGB"))
    scale = side / max(x.shape[-2:])
    if scale != 1.0:
        h, w = (round(length * scale) for length in x.shape[-2:])
        x = TF.resize(x, [h, w], InterpolationMode.BICUBIC, antialias=True)
        ph, pw = side - h, side - w
        x = TF.pad(x, [pw // 2, ph // 2, pw - pw // 2, ph - ph // 2], fill=0)
    return TF.normalize(x, CLIP_MEAN, CLIP_STD)


def test_hpsv2_equals_the_packages_recipe_one_image_at_a_time(tiny: str, weights: Path, hpsv2: HPSv2Scorer) -> None:
    model, tokenizer = open_clip.create_model(tiny), open_clip.get_tokenizer(tiny)
    model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    model.eval()
    images, prompts = hundred()
    expected = []
    with torch.no_grad():
        for pil_image, prompt in zip(images, prompts, strict=True):
            image, text, _ = model(hps_input(pil_image, 64)[None], tokenizer([prompt]))
            expected.append((image @ text.T).item())
    scores = hpsv2.score_images(images, prompts)
    assert len(images) >= 100 and scores.std() > 0.01
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_hpsv2_takes_one_path_for_images_and_tensors(hpsv2: HPSv2Scorer) -> None:
    for size in SIZES:
        image = noise(size)
        pixels = TF.to_tensor(image)[None]
        torch.testing.assert_close(hpsv2.score(pixels, ["x"]), hpsv2.score_images([image], ["x"]), atol=1e-6, rtol=0)


def test_a_image_too_thin_keeps_a_pixel(hpsv2: HPSv2Scorer) -> None:
    """1000 x 1 would be round(64 / 1000) = 0 pixels high."""
    assert hpsv2.score_images([noise((1000, 1))], ["x"]).isfinite().all()


def test_pickscore_equals_the_published_recipe(hf_folder: Path, pickscore: HFClipScorer) -> None:
    """The model card's: PIL processor, unit features, exp(logit_scale) * (text @ image)."""
    model = CLIPModel.from_pretrained(hf_folder).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(hf_folder), byte_tokenizer(length=77)
    images, prompts = hundred()
    expected = []
    with torch.no_grad():
        for pil_image, prompt in zip(images, prompts, strict=True):
            image = processor(images=pil_image, return_tensors="pt")
            text = tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            out = model(**text, **image)
            expected.append((model.logit_scale.exp() * (out.text_embeds @ out.image_embeds.T)).item())
    scores = pickscore.score_images(images, prompts)
    assert len(images) >= 100 and scores.std() > 0.1
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)  # 1e-6 in cosine
    print(f"largest difference in score {(scores - torch.tensor(expected)).abs().max():.2e}")


def test_the_aesthetic_predictor_equals_the_originals_recipe(tiny: str, tmp_path: Path) -> None:
    """OpenAI's transform, features to unit length, then the published stack of layers."""
    torch.manual_seed(1)
    clip = open_clip.create_model(tiny).eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    widths = (32, 1024, 128, 64, 16, 1)
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    drops = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    layers = nn.Sequential(linear[0], drops[0], linear[1], drops[1], linear[2], drops[2], *linear[3:]).eval()
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "head.pth")
    transform = T.Compose(
        [
            T.Resize(64, InterpolationMode.BICUBIC),
            T.CenterCrop(64),
            lambda image: image.convert("RGB"),
            T.ToTensor(),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    scorer = reward_scorers.build(f"aesthetic:{tmp_path}/head.pth:{tiny}:{tmp_path}/clip.safetensors")
    images, prompts = hundred()
    with torch.no_grad():
        features = [clip.encode_image(transform(pil_image)[None]) for pil_image in images]
        expected = torch.cat([layers(f / f.norm(dim=-1, keepdim=True)) for f in features]).squeeze(-1)
    scores = scorer.score_images(images, prompts)
    assert scores.std() > 1e-4
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    with pytest.raises(ScorerError, match=r"linear.pth does not fit features of 32: 10 keys missing \(0.weight"):
        reward_scorers.build(f"aesthetic:{tmp_path}/linear.pth:{tiny}:{tmp_path}/clip.safetensors")


@pytest.fixture(scope="module")
def aesthetic(tiny: str, weights: Path) -> AestheticScorer:
    torch.manual_seed(0)
    return AestheticScorer("random", tiny, str(weights))


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "aesthetic"])
def test_gradients_reach_the_pixels(name: str, request: pytest.FixtureRequest) -> None:
    """Central differences in float64 along a random direction, on a size that is resized, cropped or padded."""
    scorer: Scorer = request.getfixturevalue(name)
    nets = [module for module in (getattr(scorer, "model", None), getattr(scorer, "head", None)) if module is not None]
    nets += [scorer.clip.model] if isinstance(scorer, AestheticScorer) else []
    steps: Callable = scorer.clip.preprocess if isinstance(scorer, AestheticScorer) else scorer.preprocess  # type: ignore[attr-defined]

    def value(x: torch.Tensor) -> torch.Tensor:
        if isinstance(scorer, AestheticScorer):
            return scorer._rated(steps(x)).sum()
        return scorer._cosine(steps(x), ["a cat", "a dog"]).sum()  # type: ignore[attr-defined]

    try:
        for net in nets:
            net.double()
        scorer.__dict__.pop("_kept_texts", None)
        torch.manual_seed(0)
        pixels = (0.25 + 0.5 * torch.rand(2, 3, 80, 100, dtype=torch.float64)).requires_grad_()
        direction = torch.randn_like(pixels)
        (gradient,) = torch.autograd.grad(value(pixels), pixels)
        step = 1e-5
        with torch.no_grad():
            numeric = (value(pixels + step * direction) - value(pixels - step * direction)) / (2 * step)
        assert numeric.abs() > 1e-7
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-9)
    finally:
        for net in nets:
            net.float()
        scorer.__dict__.pop("_kept_texts", None)


@pytest.mark.parametrize("name", ["pickscore", "aesthetic"])
def test_tensor_and_image_paths_differ_by_less_than_the_documented_bound(name: str, request) -> None:
    """PIL rounds to 8 bits after the resize; white noise, enlarged or shrunk, is the worst case for it."""
    scorer = request.getfixturevalue(name)
    worst, scores = 0.0, []
    for size in [(64, 64), (100, 100), (224, 224), (300, 120), (32, 32), (640, 480)]:
        for seed in range(4):
            image = noise(size, seed)
            pair = scorer.score_images([image], ["x"]), scorer.score(TF.to_tensor(image)[None], ["x"])
            worst = max(worst, (pair[0] - pair[1]).abs().item())
            scores.append(pair[0].item())
    print(f"{name}: tensor against PIL at most {worst / np.std(scores):.3f} of the scores' spread")
    assert worst <= 0.1 * np.std(scores)


def test_a_checkpoint_that_does_not_fit_is_refused(tiny: str, weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)["state_dict"]

    def refused(match: str, content: object, name: str = "bad.pt") -> None:
        torch.save(content, tmp_path / name)
        with pytest.raises(ScorerError, match=match):
            HPSv2Scorer("2.0", str(tmp_path / name), model=tiny)

    refused(r"1 keys missing \(visual.proj\)", {key: value for key, value in state.items() if key != "visual.proj"})
    refused("1 tensors hold NaN", {**state, "visual.proj": state["visual.proj"] * float("nan")})
    refused("tensors are of torch.int8, not floating-point", {k: (10 * v).to(torch.int8) for k, v in state.items()})
    refused("expected named tensors, found list", [1, 2])
    refused("expected named tensors, found dict", {0: state["visual.proj"]})
    refused("more than tensors", {"state_dict": state, "args": Path("x")})  # weights_only refuses the class
    refused("is the checkpoint of the other version; 2.0 is HPS_v2_compressed.pt", state, "HPS_v2.1_compressed.pt")
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(ScorerError, match="not a readable checkpoint"):
        HPSv2Scorer("2.1", str(tmp_path / "cut.pt"), model=tiny)
    with pytest.raises(ScorerError, match=r"hpsv2.1: .*none.pt: no such file"):
        reward_scorers.build(f"hpsv2.1:{tmp_path}/none.pt")


def test_transformers_never_fills_a_tower_at_random(hf_folder: Path, tmp_path: Path) -> None:
    bad = write_hf_clip(tmp_path / "bad")
    state = load_file(bad / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "visual_projection" not in k}, bad / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ScorerError, match=r"lacks 1 weights \(visual_projection.weight\)"):
        reward_scorers.build(f"hf-clip:{bad}")
    save_file(state, bad / "model.safetensors", {"format": "pt"})
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ScorerError, match="could not be loaded"):
        reward_scorers.build(f"hf-clip:{bad}")
    for change, match in (
        ({"vision_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(64)}, r"has 1 weights without a place"),
        ({"visual_projection.weight": torch.full((16, 32), torch.nan)}, "1 tensors hold NaN"),
    ):
        save_file({**state, **change}, bad / "model.safetensors", {"format": "pt"})
        with pytest.raises(ScorerError, match=match):
            reward_scorers.build(f"hf-clip:{bad}")
    save_file(state, bad / "model.safetensors", {"format": "pt"})
    (bad / "tokenizer.json").unlink()  # transformers then makes a tokenizer that knows no word
    with pytest.raises(ScorerError, match=r"the tokenizer of .*: no vocabulary there"):
        reward_scorers.build(f"hf-clip:{bad}")
    config = json.loads((hf_folder / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(ScorerError, match="of type 'siglip', expected 'clip'"):
        reward_scorers.build(f"hf-clip:{bad}")
    with pytest.raises(ScorerError, match=r"pickscore: /no/such/folder: no such folder"):
        reward_scorers.build("pickscore:/no/such/folder")
    with pytest.raises(ScorerError, match="needs a folder or Hub id"):
        reward_scorers.build("hf-clip")


def test_preprocessing_that_is_not_clips_is_refused(tmp_path: Path) -> None:
    folder = write_hf_clip(tmp_path / "clip")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "do_center_crop": False}))
    with pytest.raises(ScorerError, match="expected CLIP's preprocessing"):
        reward_scorers.build(f"hf-clip:{folder}")
    file.write_text("[1]")
    with pytest.raises(ScorerError, match="the preprocessing cannot be read"):
        reward_scorers.build(f"hf-clip:{folder}")


def test_names_and_versions_are_told_apart(weights: Path, tiny: str, hf_folder: Path, hpsv2, pickscore) -> None:
    assert (hpsv2.name, pickscore.name) == ("hpsv2.1", "pickscore")
    assert reward_scorers.build(f"hf-clip:{hf_folder}").name == "hf-clip:clip"
    assert "weights sha256 " in hpsv2.version and "sha256 " in pickscore.version
