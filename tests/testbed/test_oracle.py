"""The oracles against scenes and clips whose truth is known, and as scorers.

Their templates share the renderer: this validates them on renders.
"""

import numpy as np
import pytest
import torch

from reward_scorers import ScorerError
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers
from t2i_align.testbed import clip_captions
from t2i_align.testbed.captions import FAULTS, CaptionError, corrupt, describe, write
from t2i_align.testbed.clip_oracle import ClipOracle
from t2i_align.testbed.clips import DIRECTIONS, FRAMES, TURNS, sample_clip
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import DEGRADATIONS, degrade, render, sample_scene, to_uint8
from tools.testbed import faults
from tools.testbed.faults import render_clip, spoil, to_clip

NUMBER = 300


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(NUMBER)]
    statements = [describe(scene, rng) for scene in scenes]
    images = np.stack([render(scene) for scene in scenes])
    return scenes, statements, [write(statement, rng) for statement in statements], images


def judge(images, prompts):
    quantised = to_uint8(np.asarray(images)).astype(np.float32) / 255
    return Oracle().judge(torch.from_numpy(quantised).permute(0, 3, 1, 2), prompts)


def test_clean_renders_are_faithful_and_good(world):
    _, statements, captions, images = world
    verdict = judge(images, captions)
    assert (verdict.strict == 1).mean() >= 0.99
    assert verdict.quality.min() > 0.97
    np.testing.assert_allclose(verdict.reward, 0.6 * verdict.faithfulness + 0.4 * verdict.quality)
    stated = np.array([statement.relation is not None for statement in statements])
    assert (np.isnan(verdict.attributes["relation"]) == ~stated).all()
    stated = np.array([statement.background is not None for statement in statements])
    assert (np.isnan(verdict.attributes["background"]) == ~stated).all()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_lowers_its_attribute_alone(world, fault):
    _, statements, _, images = world
    rng = np.random.default_rng(12)
    wrong = [(i, corrupt(statement, fault, rng)) for i, statement in enumerate(statements)]
    wrong = [(i, statement) for i, statement in wrong if statement is not None]
    verdict = judge(images[[i for i, _ in wrong]], [write(statement, rng) for _, statement in wrong])
    assert len(wrong) > 50
    assert (verdict.faithfulness < 1).all() and (verdict.strict == 0).all()
    # Exchanged colours: the shapes stay where the caption says, so the colours are what is wrong.
    target = "colour" if fault == "exchange" else fault
    lowered = {name: np.nan_to_num(verdict.attributes[name], nan=1.0) < 1 for name in Oracle.attributes}
    assert lowered[target].mean() >= 0.99
    for name in Oracle.attributes:
        if name != target:
            assert lowered[name].mean() <= 0.01, name


def test_a_stray_object_spoils_the_count_alone(world):
    rng = np.random.default_rng(13)
    scenes = [sample_scene(rng, stray=True) for _ in range(100)]
    verdict = judge([render(s) for s in scenes], [write(describe(s, rng), rng) for s in scenes])
    assert (verdict.attributes["count"] == 0).mean() >= 0.99
    for name in Oracle.attributes:
        if name != "count":
            assert np.nanmean(verdict.attributes[name]) >= 0.99, name


@pytest.mark.parametrize("how", DEGRADATIONS)
def test_degradations_lower_quality_and_only_quality(world, how):
    _, _, captions, images = world
    rng = np.random.default_rng(14)
    clean = judge(images, captions)
    spoiled = judge([degrade(p, rng, how) for p in images], captions)
    assert (spoiled.quality < clean.quality - 0.05).mean() >= 0.99
    assert spoiled.faithfulness.mean() > 0.985


def test_verdicts_do_not_depend_on_the_batch(world):
    _, _, captions, images = world
    whole, one = judge(images[:70], captions[:70]), judge(images[66:67], captions[66:67])
    assert whole.reward[66] == one.reward[0] and whole.views[66] == one.views[0]


def test_other_sizes_are_resized(world):
    _, _, captions, images = world
    pixels = torch.from_numpy(images[:40]).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(pixels, (192, 192), mode="bilinear")
    assert Oracle().judge(larger, captions[:40]).strict.mean() >= 0.95


def test_an_empty_image_has_no_merit():
    verdict = judge(np.full((1, 64, 64, 3), 0.5, np.float32), ["a red circle"])
    assert verdict.faithfulness[0] == 0 and verdict.quality[0] == 0 and verdict.reward[0] == 0


@pytest.mark.parametrize(
    ("shape", "value", "prompts", "message"),
    [
        ((1, 3, 64, 32), 0.5, ["a red circle"], "square"),
        ((1, 64, 64, 3), 0.5, ["a red circle"], "square"),
        ((1, 3, 64, 64), 2.0, ["a red circle"], "0, 1"),
        ((1, 3, 64, 64), float("nan"), ["a red circle"], "finite"),
        ((2, 3, 64, 64), 0.5, ["a red circle"], "2 images but 1 prompts"),
    ],
)
def test_bad_input_is_named(shape, value, prompts, message):
    with pytest.raises(ValueError, match=message):
        Oracle().judge(torch.full(shape, value), prompts)


def test_foreign_prompts_are_named():
    with pytest.raises(CaptionError, match="a photo of a cat"):
        Oracle().judge(torch.zeros(1, 3, 64, 64), ["a photo of a cat"])


# Clips --------------------------------------------------------------------------------------------------------------


def pixels_of(clips):
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255


@pytest.fixture(scope="module")
def clip_world():
    """Forty clips, true prompts, their statements, and the verdict on clean renders."""
    rng = np.random.default_rng(1)
    clips = [sample_clip(rng) for _ in range(40)]
    statements = [clip_captions.describe(clip, rng) for clip in clips]
    texts = [clip_captions.write(statement, rng) for statement in statements]
    verdict = ClipOracle().judge(pixels_of([to_clip(clip.scenes, rng) for clip in clips]), texts)
    return clips, statements, texts, verdict


def test_clean_clips_are_right_and_good(clip_world):
    *_, verdict = clip_world
    assert (verdict.faithfulness == 1).mean() >= 0.99
    assert verdict.quality.min() > 0.97 and verdict.frames.shape == (40, FRAMES)


@pytest.mark.parametrize("kind", faults.TIME_FAULTS)
def test_faults_in_time_lower_the_quality_of_their_frames_alone(clip_world, kind):
    clips, _, texts, clean = clip_world
    rng = np.random.default_rng(4)
    drawn, segments = [], []
    for clip in clips:
        try:
            scenes, segment = spoil(clip, rng, kind)
        except ValueError:  # no room for a jump
            scenes, segment = clip.scenes, range(0)
        drawn.append(to_clip(scenes, rng))
        segments.append(segment)
    assert sum(len(segment) > 0 for segment in segments) > 30
    verdict = ClipOracle().judge(pixels_of(drawn), texts)
    np.testing.assert_array_equal(verdict.faithfulness, clean.faithfulness)
    np.testing.assert_allclose(verdict.image, clean.image, atol=0.1)
    for quality, segment in zip(verdict.frames, segments, strict=True):
        inside = [f in segment for f in range(FRAMES)]
        assert quality[np.logical_not(inside)].min() > 0.9
        assert not segment or quality[inside].max() < 0.8


@pytest.mark.parametrize("how", DEGRADATIONS)
def test_faults_of_images_lower_their_quality_alone(clip_world, how):
    clips, _, texts, clean = clip_world
    drawn = [
        np.stack([degrade(frame, np.random.default_rng(i), how) for frame in render_clip(clip.scenes)]).clip(0, 1)
        for i, clip in enumerate(clips[:12])
    ]
    verdict = ClipOracle().judge(torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3), texts[:12])
    assert (verdict.quality < clean.quality[:12] - 0.1).all()
    assert verdict.temporal.mean() > 0.97
    assert (verdict.faithfulness == clean.faithfulness[:12]).mean() > 0.9


@pytest.mark.parametrize("fault", faults.CAPTION_FAULTS)
def test_a_wrong_caption_fails_in_that_attribute_alone(clip_world, fault):
    clips, statements, _, _ = clip_world
    rng = np.random.default_rng(5)
    wrong = [(clip, bad) for clip, s in zip(clips, statements, strict=True) if (bad := faults.corrupt(s, fault, rng))][
        :12
    ]
    pixels = pixels_of([to_clip(clip.scenes, rng) for clip, _ in wrong])
    verdict = ClipOracle().judge(pixels, [clip_captions.write(bad, rng) for _, bad in wrong])
    for name, values in verdict.attributes.items():
        stated = values[~np.isnan(values)]
        # Of two objects only the one that moves is described wrongly: half of the attribute holds.
        assert (stated < 1).all() if name == fault else (stated == 1).all(), name
    assert not verdict.strict.any()


def test_unjudgeable_clips_are_errors():
    text = ["a red circle moving to the left"]
    with pytest.raises(ValueError, match="5 frames or more"):
        ClipOracle().judge(torch.zeros(1, 4, 3, 64, 64), text)
    with pytest.raises(ValueError, match="2 clips but 1 prompts"):
        ClipOracle().judge(torch.zeros(2, 9, 3, 64, 64), text)
    verdict = ClipOracle().judge(torch.ones(1, 9, 3, 64, 64), text)
    assert verdict.faithfulness == 0 and verdict.quality == 0


def test_the_image_scorer_gives_the_oracles_numbers_and_parts(world):
    _, _, captions, images = world
    scorer, prompts = build_scorers("oracle")[0], captions[:12]
    pixels = torch.from_numpy(np.asarray(images[:12], dtype=np.float32)).permute(0, 3, 1, 2)
    verdict = Oracle().judge(pixels, prompts)
    total, parts = scorer.judge(pixels, prompts)
    assert (scorer.name, scorer.version, scorer.differentiable) == ("oracle", Oracle.version, False)
    assert parts.keys() == {"faithfulness", "quality", "strict", *verdict.attributes} and total.dtype == torch.float32
    expected = {"quality": verdict.quality, "relation": verdict.attributes["relation"]}
    for scores, truth in ((total, verdict.reward), (scorer.score(pixels, prompts), verdict.reward),
                          *((parts[name], values) for name, values in expected.items())):  # fmt: skip
        np.testing.assert_allclose(scores.numpy(), truth, rtol=1e-6)
    assert parts["relation"].isnan().any() and not parts["relation"].isnan().all()
    assert total.mean() > scorer.score(pixels, [*prompts[1:], prompts[0]]).mean() + 0.1  # another prompt scores lower


def test_foreign_prompts_sizes_and_arguments_of_the_image_scorer_are_named():
    scorer = build_scorers(["oracle"])[0]
    with pytest.raises(ScorerError, match=r"prompts\[1\].*a photo of a cat"):
        scorer.check_prompts(["a red circle", "a photo of a cat"])
    with pytest.raises(ScorerError, match=r"prompts\[0\].*a photo of a cat"):
        scorer.score(torch.rand(1, 3, 64, 64), ["a photo of a cat"])
    with pytest.raises(ScorerError, match="expected square images, found 65 x 64"):
        scorer.score(torch.rand(1, 3, 64, 65), ["a red circle"])
    with pytest.raises(UserError, match="takes no argument"):
        build_scorers(["oracle:v2"])


def test_the_clip_scorer_sees_whole_clips(clip_world):
    clips, _, texts, verdict = clip_world
    scorer = build_scorers("motion_oracle")[0]
    pixels = pixels_of([to_clip(clip.scenes, np.random.default_rng(0)) for clip in clips[:4]])
    total, parts = scorer.judge(pixels, texts[:4])
    np.testing.assert_allclose(total.numpy(), verdict.reward[:4], rtol=1e-6)
    np.testing.assert_allclose(scorer.score(pixels, texts[:4]).numpy(), verdict.reward[:4], rtol=1e-6)
    assert {"faithfulness", "quality", "temporal", "path", "speed"} <= parts.keys()
    assert scorer.frame_scores(pixels, texts[:4]).shape == (4, FRAMES)
    backwards = scorer.judge(pixels.flip(1), texts[:4])[1]["path"]
    ways = [clip_captions.parse(text).parts[0].path for text in texts[:4]]
    assert [bool(p < 1) for p in backwards] == [way in DIRECTIONS or way in TURNS for way in ways]
    with pytest.raises(ScorerError, match=r"expected clips \[B, F, 3, H, W\]"):
        scorer.score(pixels[:, 0], texts[:4])
    with pytest.raises(ScorerError, match=r"prompts\[0\].*a red circle"):
        scorer.check_prompts(["a red circle"])
