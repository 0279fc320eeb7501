"""The published scorers on small random weights: equal to the originals' recipes, gradients, both paths, precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from transformers import CLIPImageProcessorPil, CLIPModel

import reward_scorers
from reward_scorers import Scorer
from reward_scorers.combine import Combination, Combined, Member
from reward_scorers.imagereward import LENGTH, RENAMED, _Network, renamed
from reward_scorers.images import to_rgb
from reward_scorers.towers import CLIP_MEAN, CLIP_STD
from tests.reward_scorers.small import NAME, SIZES, TEXT, VISION, hundred, noise, small_scorers
from tests.tiny import byte_tokenizer

ALL = ["clip", "hpsv2", "pickscore", "aesthetic", "imagereward"]
Recipe = Callable[[Image.Image, str], Tensor]  # an RGB image and a prompt, as the original scores them


def clip_recipe(folder: Path) -> Recipe:
    """open_clip's own transform and forward."""
    model, _, transform = open_clip.create_model_and_transforms(NAME, pretrained=str(folder / "weights.pt"))
    tokenizer = open_clip.get_tokenizer(NAME)
    model.eval()

    def recipe(image: Image.Image, prompt: str) -> Tensor:
        features, text, _ = model(transform(image)[None], tokenizer([prompt]))
        return 100 * features @ text.T

    return recipe


def hpsv2_recipe(folder: Path) -> Recipe:
    """The transform as its source states it: to floats, the long side fitted, the rest padded, normalised."""
    model, tokenizer = open_clip.create_model(NAME), open_clip.get_tokenizer(NAME)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True)["state_dict"])
    model.eval()

    def recipe(image: Image.Image, prompt: str) -> Tensor:
        x = TF.to_tensor(image)
        scale = 64 / max(x.shape[-2:])
        if scale != 1.0:
            h, w = (round(length * scale) for length in x.shape[-2:])
            x = TF.resize(x, [h, w], InterpolationMode.BICUBIC, antialias=True)
            ph, pw = 64 - h, 64 - w
            x = TF.pad(x, [pw // 2, ph // 2, pw - pw // 2, ph - ph // 2], fill=0)
        features, text, _ = model(TF.normalize(x, CLIP_MEAN, CLIP_STD)[None], tokenizer([prompt]))
        return features @ text.T

    return recipe


def pickscore_recipe(folder: Path) -> Recipe:
    """The model card's: PIL processor, unit features, exp(logit_scale) * (text @ image)."""
    model = CLIPModel.from_pretrained(folder / "hf").eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder / "hf"), byte_tokenizer(length=77)

    def recipe(image: Image.Image, prompt: str) -> Tensor:
        text = tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        out = model(**text, **processor(images=image, return_tensors="pt"))
        return model.logit_scale.exp() * (out.text_embeds @ out.image_embeds.T)

    return recipe


@pytest.mark.parametrize(
    ("name", "recipe", "atol"),
    [("clip", clip_recipe, 1e-4), ("hpsv2", hpsv2_recipe, 1e-5), ("pickscore", pickscore_recipe, 1e-4)],
)  # 1e-6 in cosine, that of HPSv2 1e-5
def test_equals_the_original_one_image_at_a_time(
    name: str, recipe: Callable[[Path], Recipe], atol: float, scorers: dict[str, Scorer], folder: Path
) -> None:
    images, prompts = hundred()
    original = recipe(folder)
    with torch.no_grad():
        expected = [original(to_rgb(image), prompt).item() for image, prompt in zip(images, prompts, strict=True)]
    scores = scorers[name].score_images(images, prompts)
    assert len(images) >= 100 and scores.std() > 100 * atol and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=atol, rtol=0)
    print(f"{name}: largest difference in score {(scores - torch.tensor(expected)).abs().max():.2e}")


def test_the_aesthetic_predictor_equals_the_originals_recipe(scorers: dict[str, Scorer], tmp_path: Path) -> None:
    """OpenAI's transform, features to unit length, then the published stack of layers."""
    torch.manual_seed(1)
    clip = open_clip.create_model(NAME).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise((32, 1024, 128, 64, 16, 1))]
    drops = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    layers = nn.Sequential(linear[0], drops[0], linear[1], drops[1], linear[2], drops[2], *linear[3:]).eval()
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "head.pth")
    resize = T.Resize(64, InterpolationMode.BICUBIC)
    transform = T.Compose([resize, T.CenterCrop(64), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])
    scorer = reward_scorers.build(f"aesthetic:{tmp_path}/head.pth:{NAME}:{tmp_path}/clip.pt")
    images, prompts = hundred()
    with torch.no_grad():
        features = [clip.encode_image(transform(to_rgb(image))[None]) for image in images]
        expected = torch.cat([layers(f / f.norm(dim=-1, keepdim=True)) for f in features]).squeeze(-1)
    scores = scorer.score_images(images, prompts)
    assert scores.std() > 1e-4
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_imagereward_renames_every_published_tensor(folder: Path, scorers: dict[str, Scorer]) -> None:
    """Equality with the original's own code is checked in test_originals.py, which fetches it."""
    state = renamed(torch.load(folder / "ImageReward.pt", weights_only=True))
    assert {key for key in state if not key.endswith("position_ids")} == set(_Network(VISION, TEXT).state_dict())
    assert len(RENAMED) == 10


def test_imagereward_sees_image_and_prompt_and_cuts_at_its_length(scorers: dict[str, Scorer]) -> None:
    images, scorer = [noise((40, 60), 1), noise((40, 60), 2)], scorers["imagereward"]
    one = scorer.score_images(images, ["a cat", "a cat"])
    other = scorer.score_images(images, ["a dog in a box", "a cat"])
    assert (one[0] - one[1]).abs() > 1e-4 and (one[0] - other[0]).abs() > 1e-4 and one[1] == other[1]
    whole, cut = ([("b " * count)] * 2 for count in (100, LENGTH - 2))
    assert torch.equal(scorer.score_images(images, whole), scorer.score_images(images, cut))


@pytest.mark.parametrize(("name", "fits", "longer"), [
    ("clip", "cat " * 75, "cat " * 76), ("hpsv2", "cat " * 75, "cat " * 76), ("pickscore", "c" * 75, "c" * 76),
    ("imagereward", "c " * (LENGTH - 2), "c " * (LENGTH - 1)), ("aesthetic", "cat " * 200, ""),
])  # fmt: skip
def test_prompts_that_are_cut_are_noted_once(
    name: str, fits: str, longer: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the encoder's length, with its two marks, they are whole. Ratings of images read none."""
    scorer, image = small_scorers(folder)[name], noise((64, 64))
    scorer.score_images([image, image], [fits, "cat"])
    assert not scorer.cut
    if longer:
        limit = LENGTH if name == "imagereward" else 77
        both = Combined(Combination(rule="min", scorers=[Member(scorer=scorer)]))
        for _ in range(2):
            both.score_images([image] * 3, [longer, fits, longer + "dog"])
        assert scorer.cut == both.cut == {longer, longer + "dog"} and scorer.token_limit == limit
        (line,) = (r.getMessage() for r in caplog.records if r.name == "reward_scorers.base")
        assert line.startswith(f"{scorer.name}: prompts of more than {limit} tokens are cut, such as '{longer[:20]}")


@pytest.mark.parametrize("name", ALL)
def test_a_batch_equals_its_images_one_at_a_time(name: str, scorers: dict[str, Scorer]) -> None:
    images, prompts = (values[:40:3] for values in hundred())
    single = [scorers[name].score_images([i], [p]).item() for i, p in zip(images, prompts, strict=True)]
    batch = scorers[name].score_images(images, prompts)
    torch.testing.assert_close(batch, torch.tensor(single), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_pixels(name: str, scorers: dict[str, Scorer]) -> None:
    """Central differences in float64 along a random direction, on a size that is resized, cropped or padded."""
    scorer = scorers[name]
    modules = [part for net in scorer.networks for part in (net.networks if isinstance(net, Scorer) else [net])]
    try:
        for module in modules:
            module.double()  # type: ignore[union-attr]
        torch.manual_seed(0)
        pixels = (0.25 + 0.5 * torch.rand(2, 3, 80, 100, dtype=torch.float64)).requires_grad_()
        direction, step = torch.randn_like(pixels), 1e-5
        (gradient,) = torch.autograd.grad(scorer.score(pixels, ["a cat", "a dog"]).sum(), pixels)
        with torch.no_grad():
            up, down = (scorer.score(pixels + sign * step * direction, ["a cat", "a dog"]).sum() for sign in (1, -1))
        numeric = (up - down) / (2 * step)
        assert numeric.abs() > 1e-7 and numeric.dtype == torch.float64
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-8)
    finally:
        for module in modules:
            module.float()  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "bound"), [("clip", None), ("pickscore", 0.1), ("aesthetic", 0.1)])
def test_tensors_and_images_differ_by_less_than_the_documented_bound(name: str, bound: float, scorers) -> None:
    """PIL rounds to 8 bits after the resize; white noise, enlarged or shrunk, is the worst case for it.

    Of CLIP at most 0.1 of its score, of the others at most that share of the scores' spread.
    """
    worst, scores = 0.0, []
    for size in [(64, 64), (100, 100), (224, 224), (300, 120), (32, 32), (640, 480)]:
        for seed in range(4):
            image = noise(size, seed)
            pair = scorers[name].score_images([image], ["x"]), scorers[name].score(TF.to_tensor(image)[None], ["x"])
            worst = max(worst, (pair[0] - pair[1]).abs().item())
            scores.append(pair[0].item())
    print(f"{name}: tensor against PIL {worst:.4f}, at most {worst / np.std(scores):.3f} of the scores' spread")
    assert worst <= (0.1 if bound is None else bound * np.std(scores))


@pytest.mark.parametrize(("name", "sizes"), [("hpsv2", [*SIZES, (1000, 1)]), ("imagereward", [(32, 32)])])
def test_tensors_and_images_agree_where_nothing_is_rounded(name: str, sizes: list[tuple[int, int]], scorers) -> None:
    """HPSv2 resizes floats, and keeps a pixel of 64 / 1000; ImageReward's input of 32 x 32 is not resized."""
    for size in sizes:
        image = noise(size)
        pair = scorers[name].score(TF.to_tensor(image)[None], ["a"]), scorers[name].score_images([image], ["a"])
        torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


def test_each_prompt_goes_through_the_text_tower_once(folder: Path, scorers, monkeypatch) -> None:
    scorer = reward_scorers.build(f"clip:{NAME}:{folder / 'weights.pt'}")
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
    assert seen == [2, 1, 3, 1]  # not the features that autocast rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ratings_of_heads_keep_their_digits_under_autocast(dtype: torch.dtype, scorers: dict[str, Scorer]) -> None:
    """Of 24 images no two are rated alike, and in nearly the same order as in float32."""
    scorer, images, prompts = scorers["aesthetic"], [noise((64, 64), seed) for seed in range(24)], ["x"] * 24
    exact = scorer.score_images(images, prompts)
    with torch.autocast("cpu", dtype):
        rounded = scorer.score_images(images, prompts)
        assert scorer.recorded_version == f"{scorer.version}, {str(dtype)[6:]} autocast, decoder 2"
    assert rounded.dtype == torch.float32 and len(rounded.unique()) == 24
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.99
