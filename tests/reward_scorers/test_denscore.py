"""The decomposed score: its equation, its parts, where the common direction comes from, and its gradient."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from reward_scorers import ScorerError, build
from reward_scorers.denscore import Denscore, common_direction, text_features
from reward_scorers.towers import TwoTowers
from tests.reward_scorers.small import write_hf_clip

PROMPTS = ["A red cat sits. It looks left! A dog sleeps.", "Ein Haus; ein Baum.", "猫。犬。", "a lamp"]
PROMPTS += ["One. Two. Three. Four."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def towers(folder: Path) -> TwoTowers:
    scorer = build(f"hf-clip:{folder}")
    assert isinstance(scorer, TwoTowers)
    return scorer


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(len(PROMPTS), 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_score_is_the_papers(towers: TwoTowers, pixels: Tensor) -> None:
    text = torch.stack([
        towers.encode_texts(sentences).mean(0)
        for sentences in (
            ["A red cat sits.", "It looks left!", "A dog sleeps."], ["Ein Haus;", "ein Baum."], ["猫。", "犬。"],
            ["a lamp"], ["One.", "Two.", "Three.", "Four."],
        )
    ])  # fmt: skip
    torch.testing.assert_close(text_features(towers, PROMPTS), text)
    image = towers.encode_images(towers.preprocess(pixels))
    common = normalize(text.mean(0), dim=0)
    reweighted = text - 0.7 * (text @ common).unsqueeze(1) * common
    score, parts = Denscore(towers).judge(pixels, PROMPTS)
    torch.testing.assert_close(score, 100 * (reweighted * image).sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(score, parts["relevant"] + 0.3 * parts["irrelevant"])


def test_omega_one_keeps_everything_and_a_batch_of_one_keeps_omega(towers: TwoTowers, pixels: Tensor) -> None:
    whole = 100 * (text_features(towers, PROMPTS) * towers.encode_images(towers.preprocess(pixels))).sum(1)
    torch.testing.assert_close(Denscore(towers, omega=1.0).score(pixels, PROMPTS), whole, rtol=1e-4, atol=1e-3)
    alone = Denscore(towers, omega=0.25).score(pixels[:1], PROMPTS[:1])
    torch.testing.assert_close(alone, 0.25 * whole[:1], rtol=1e-4, atol=1e-3)


def test_direction_of_a_corpus_is_kept_beside_it(folder: Path, pixels: Tensor, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (tmp_path / "score.yaml").write_text(f"scorer: hf-clip:{folder}\nomega: 0.5\ndirection: corpus.txt\n")
    first, again = (build(f"denscore:{tmp_path / 'score.yaml'}") for _ in range(2))
    assert isinstance(first, Denscore) and first.direction is not None and first.version == again.version
    torch.testing.assert_close(first.direction, normalize(text_features(first.scorer, PROMPTS).mean(0), dim=0))
    one = torch.cat([first.score(pixels[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    torch.testing.assert_close(first.score(pixels, PROMPTS), one)  # unlike a batch's own direction
    (kept,) = tmp_path.glob("corpus.txt.*.safetensors")
    kept.write_bytes(b"damaged")
    assert torch.equal(common_direction(first.scorer, tmp_path / "corpus.txt"), first.direction)
    (tmp_path / "corpus.txt").write_text("another corpus")
    assert build(f"denscore:{tmp_path / 'score.yaml'}").version != first.version


def test_where_the_direction_cannot_be_kept_it_is_computed(
    towers: TwoTowers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    written = common_direction(towers, tmp_path / "corpus.txt")
    (kept,) = tmp_path.glob("corpus.txt.*")
    kept.unlink()

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)  # also for root, whom no file mode stops
    assert torch.equal(common_direction(towers, tmp_path / "corpus.txt"), written)
    assert "V is not kept" in caplog.text and "Permission denied" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.txt"]


def test_average_of_batches(towers: TwoTowers, pixels: Tensor) -> None:
    scorer = Denscore(towers, decay=0.9)
    scorer.score(pixels[:2], PROMPTS[:2])
    scorer.score(pixels[2:], PROMPTS[2:])
    first, second = (text_features(towers, part).mean(0) for part in (PROMPTS[:2], PROMPTS[2:]))
    assert scorer.mean is not None
    torch.testing.assert_close(scorer.mean, 0.9 * first + 0.1 * second)


def test_gradient_reaches_the_pixels(towers: TwoTowers, pixels: Tensor) -> None:
    inputs = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Denscore(towers).score(inputs, PROMPTS).sum(), inputs)
    assert gradient.flatten(1).abs().sum(1).min() > 0


def test_what_is_no_denscore_is_refused(folder: Path, tmp_path: Path) -> None:
    for spec, message in (
        ("denscore:aesthetic:random:ViT-B-32:random", "expected a CLIP-style scorer"),
        ("denscore", "expected a CLIP-style scorer"),
        (f"denscore:{tmp_path}/none.yaml", "none.yaml: cannot be read: No such file"),
    ):
        with pytest.raises(ScorerError, match=message):
            build(spec)
    for content, message in (
        (f"scorer: hf-clip:{folder}\nomega: 2\n", "omega"),
        (f"scorer: hf-clip:{folder}\ndirection: nothing.txt\n", "nothing.txt: no readable text file"),
        ("omega: 0.3", "scorer"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ScorerError, match=message):
            build(f"denscore:{tmp_path / 'bad.yaml'}")
