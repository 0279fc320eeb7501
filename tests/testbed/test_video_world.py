"""The world in motion: clips, their faults and captions, the prompts' splits, and the oracle that judges them."""

import numpy as np
import pytest
import torch

from reward_scorers import ScorerError
from t2i_align.data.media import load_clip, save_clip
from t2i_align.inference.scorers import build_scorers
from t2i_align.testbed import prompts
from t2i_align.testbed.captions import CaptionError
from t2i_align.testbed.clip_captions import FAULTS, corrupt, describe, parse, write
from t2i_align.testbed.clip_oracle import ClipOracle
from t2i_align.testbed.clips import (
    DIRECTIONS,
    FRAMES,
    PATHS,
    SPEEDS,
    TIME_FAULTS,
    TURNS,
    draw_offsets,
    render_clip,
    sample_clip,
    spoil,
    to_clip,
)
from t2i_align.testbed.prompts import split_of
from t2i_align.testbed.scenes import DEGRADATIONS, SIDE, degrade


def pixels_of(clips):
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255


@pytest.fixture(scope="module")
def world():
    """Forty clips, true prompts, their statements, and the verdict on clean renders."""
    rng = np.random.default_rng(1)
    clips = [sample_clip(rng) for _ in range(40)]
    statements = [describe(clip, rng) for clip in clips]
    texts = [write(statement, rng) for statement in statements]
    verdict = ClipOracle().judge(pixels_of([to_clip(clip.scenes, rng) for clip in clips]), texts)
    return clips, statements, texts, verdict


def test_clips_depend_on_the_generator_only():
    one, two = (sample_clip(np.random.default_rng(9)) for _ in range(2))
    assert one == two != sample_clip(np.random.default_rng(10))
    frames = [to_clip(one.scenes, np.random.default_rng(1), degraded=True) for _ in range(2)]
    assert np.array_equal(*frames) and frames[0].shape == (FRAMES, SIDE, SIDE, 3) and frames[0].dtype == np.uint8
    assert spoil(one, np.random.default_rng(2)) == spoil(one, np.random.default_rng(2))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_has_its_speed_and_direction(path):
    """Steps along a straight path are as long as the speed; a chord of a circle is at most 3 % shorter than its arc."""
    offsets = draw_offsets(path, 3.0 if path != "still" else 0.0, np.random.default_rng(0))
    steps = np.diff(offsets, axis=0)
    if path == "still":
        assert not offsets.any()
        return
    np.testing.assert_allclose(np.hypot(*steps.T), 3.0, rtol=0.03)
    if path in DIRECTIONS:
        np.testing.assert_allclose(steps, np.tile(3.0 * np.array(DIRECTIONS[path]), (FRAMES - 1, 1)), atol=1e-9)
    elif path in TURNS:  # y points down, so a positive cross product turns clockwise
        cross = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
        assert (np.sign(cross) == TURNS[path]).all()


def test_objects_stay_inside_and_apart():
    rng = np.random.default_rng(0)
    pairs = 0
    for _ in range(150):
        clip = sample_clip(rng)
        pairs += len(clip.movers) == 2
        for scene in clip.scenes:
            boxes = [item.box for item in scene.objects]
            assert all(min(box) >= 1 - 1e-9 and max(box) <= SIDE - 1 + 1e-9 for box in boxes)
            if len(boxes) == 2:
                (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes
                assert max(l2 - r1, l1 - r2, t2 - b1, t1 - b2) >= 3.0
    assert pairs > 10


def test_captions_round_trip():
    rng = np.random.default_rng(2)
    for _ in range(500):
        statement = describe(sample_clip(rng), rng)
        caption = write(statement, rng)
        assert parse(caption) == statement.canonical(), caption


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of a cat",
        "a red circle",
        "a red circle standing quickly still",
        "two red circles moving to the left",
        "on a white background, a red circle moving to the left on a black background",
    ],
)
def test_foreign_captions_are_quoted(caption):
    with pytest.raises(CaptionError, match=caption):
        parse(caption)


def test_a_corrupted_caption_differs_in_one_thing(world):
    _, statements, _, _ = world
    rng = np.random.default_rng(3)
    seen = set()
    for statement in statements:
        for fault in FAULTS:
            wrong = corrupt(statement, fault, rng)
            if wrong is None:
                continue
            seen.add(fault)
            (a, *_), (b, *_) = statement.parts, wrong.parts
            changed = {
                "path": a.path != b.path,
                "speed": a.speed != b.speed,
                "background": statement.background != wrong.background,
                **{name: getattr(a.phrase, name) != getattr(b.phrase, name) for name in ("size", "colour", "shape")},
            }
            assert [name for name, differs in changed.items() if differs] == [fault]
    assert seen == set(FAULTS)
    with pytest.raises(ValueError, match="path, speed"):
        corrupt(statements[0], "count", rng)


def test_prompts_of_the_splits():
    meanings = {split: {parse(p).canonical() for p in prompts(f"video-{split}")} for split in ("train", "dev", "test")}
    assert {split: len(found) for split, found in meanings.items()} == {"train": 2048, "dev": 160, "test": 320}
    for split, found in meanings.items():
        assert all(split_of(statement) == split for statement in found)
    assert prompts("video-dev") == prompts("video-dev")
    with pytest.raises(ValueError, match="video-train, video-dev"):
        prompts("video-all")


def test_clean_clips_are_right_and_good(world):
    *_, verdict = world
    assert (verdict.faithfulness == 1).mean() >= 0.99
    assert verdict.quality.min() > 0.97 and verdict.frames.shape == (40, FRAMES)


@pytest.mark.parametrize("kind", TIME_FAULTS)
def test_faults_of_time_lower_the_quality_of_their_frames_alone(world, kind):
    clips, _, texts, clean = world
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
def test_faults_of_images_lower_their_quality_alone(world, how):
    clips, _, texts, clean = world
    drawn = [
        np.stack([degrade(frame, np.random.default_rng(i), how) for frame in render_clip(clip.scenes)]).clip(0, 1)
        for i, clip in enumerate(clips[:12])
    ]
    verdict = ClipOracle().judge(torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3), texts[:12])
    assert (verdict.quality < clean.quality[:12] - 0.1).all()
    assert verdict.temporal.mean() > 0.97
    assert (verdict.faithfulness == clean.faithfulness[:12]).mean() > 0.9


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_caption_fails_in_that_attribute_alone(world, fault):
    clips, statements, _, _ = world
    rng = np.random.default_rng(5)
    wrong = [(clip, bad) for clip, s in zip(clips, statements, strict=True) if (bad := corrupt(s, fault, rng))][:12]
    pixels = pixels_of([to_clip(clip.scenes, rng) for clip, _ in wrong])
    verdict = ClipOracle().judge(pixels, [write(bad, rng) for _, bad in wrong])
    for name, values in verdict.attributes.items():
        stated = values[~np.isnan(values)]
        # Of two objects only the one that moves is described wrongly: half of the attribute holds.
        assert (stated < 1).all() if name == fault else (stated == 1).all(), name
    assert not verdict.strict.any()


def test_what_the_oracle_cannot_judge_is_an_error():
    text = ["a red circle moving to the left"]
    with pytest.raises(ValueError, match="5 frames or more"):
        ClipOracle().judge(torch.zeros(1, 4, 3, 64, 64), text)
    with pytest.raises(ValueError, match="2 clips but 1 prompts"):
        ClipOracle().judge(torch.zeros(2, 9, 3, 64, 64), text)
    verdict = ClipOracle().judge(torch.ones(1, 9, 3, 64, 64), text)
    assert verdict.faithfulness == 0 and verdict.quality == 0


def test_the_scorer_sees_whole_clips(world):
    clips, _, texts, verdict = world
    scorer = build_scorers("motion_oracle")[0]
    pixels = pixels_of([to_clip(clip.scenes, np.random.default_rng(0)) for clip in clips[:4]])
    total, parts = scorer.judge(pixels, texts[:4])
    np.testing.assert_allclose(total.numpy(), verdict.reward[:4], rtol=1e-6)
    np.testing.assert_allclose(scorer.score(pixels, texts[:4]).numpy(), verdict.reward[:4], rtol=1e-6)
    assert {"faithfulness", "quality", "temporal", "path", "speed"} <= parts.keys()
    assert scorer.frame_scores(pixels, texts[:4]).shape == (4, FRAMES)
    backwards = scorer.parts(pixels.flip(1), texts[:4])["path"]
    ways = [parse(text).parts[0].path for text in texts[:4]]
    assert [bool(p < 1) for p in backwards] == [way in DIRECTIONS or way in TURNS for way in ways]
    with pytest.raises(ScorerError, match=r"expected clips \[B, F, 3, H, W\]"):
        scorer.score(pixels[:, 0], texts[:4])
    with pytest.raises(ScorerError, match=r"prompts\[0\].*a red circle"):
        scorer.check_prompts(["a red circle"])


def test_lossless_clips_come_back_as_they_were(tmp_path):
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (FRAMES, 3, SIDE, SIDE), np.uint8))
    save_clip(clip, tmp_path / "clip.mp4", 8, lossless=True)
    loaded = load_clip(tmp_path / "clip.mp4", FRAMES, SIDE, SIDE)
    assert torch.equal((loaded * 255).round().byte(), clip)


def test_speeds_are_well_apart():
    assert SPEEDS["quickly"][0] >= 2 * SPEEDS["slowly"][1]
