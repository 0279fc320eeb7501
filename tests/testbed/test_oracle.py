"""The oracles against scenes and clips whose truth is known, and as scorers.

Their templates share the renderer: this validates them on renders.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reward_scorers import ScorerError
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers
from t2i_align.testbed import captions, clips
from t2i_align.testbed.clips import DIRECTIONS, FRAMES, TURNS
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import DEGRADATIONS, degrade, render, sample_scene, to_uint8
from t2i_align.testbed.world import CLIPS, IMAGES
from tools.testbed import faults

SETTINGS = {  # seed and number of samples, what corrupts a statement, and how a scene or clip is drawn
    IMAGES: (11, 300, captions.corrupt, render),
    CLIPS: (1, 40, faults.corrupt, lambda clip: faults.render_clip(clip.scenes)),
}
FAULTS = [*((IMAGES, fault) for fault in captions.FAULTS), *((CLIPS, fault) for fault in faults.CAPTION_FAULTS)]


def judge(world, samples, prompts):
    pixels = torch.from_numpy(to_uint8(np.asarray(samples))).float() / 255
    return world.oracle().judge(pixels.movedim(-1, -3), prompts)


@pytest.fixture(scope="module")
def cases():
    """By world: scenes or clips, statements, captions, clean renders, and the verdict on them."""

    def case(world):
        seed, number, _, draw = SETTINGS[world]
        rng = np.random.default_rng(seed)
        drawn = [world.sample(rng) for _ in range(number)]
        statements = [world.language.describe(item, rng) for item in drawn]
        texts, pixels = [world.language.write(s, rng) for s in statements], np.stack([draw(item) for item in drawn])
        verdict = judge(world, pixels, texts)
        return SimpleNamespace(drawn=drawn, statements=statements, texts=texts, pixels=pixels, verdict=verdict)

    return {world: case(world) for world in SETTINGS}


@pytest.mark.parametrize("world", SETTINGS)
def test_clean_renders_are_faithful_and_good(cases, world):
    verdict = cases[world].verdict
    assert (verdict.strict == 1).mean() >= 0.99 and verdict.quality.min() > 0.97
    np.testing.assert_allclose(verdict.reward, 0.6 * verdict.faithfulness + 0.4 * verdict.quality)
    for name in {"relation", "background"} & verdict.attributes.keys():
        stated = [getattr(statement, name) is not None for statement in cases[world].statements]
        np.testing.assert_array_equal(~np.isnan(verdict.attributes[name]), stated)


@pytest.mark.parametrize(("world", "fault"), FAULTS)
def test_a_planted_fault_lowers_its_attribute_alone(cases, world, fault):
    """Of two objects of a clip only the one that moves is described wrongly: half of the attribute holds."""
    rng, corrupt = np.random.default_rng(12), SETTINGS[world][2]
    wrong = {i: bad for i, s in enumerate(cases[world].statements) if (bad := corrupt(s, fault, rng)) is not None}
    texts = [world.language.write(statement, rng) for statement in wrong.values()]
    verdict = judge(world, cases[world].pixels[list(wrong)], texts)
    assert len(wrong) > 12
    assert (verdict.faithfulness < 1).all() and not verdict.strict.any()
    # Exchanged colours: the shapes stay where the caption says, so the colours are what is wrong.
    target = "colour" if fault == "exchange" else fault
    lowered = {name: (np.nan_to_num(values, nan=1.0) < 1).mean() for name, values in verdict.attributes.items()}
    assert lowered.pop(target) >= 0.99
    assert max(lowered.values()) <= 0.01, lowered


@pytest.mark.parametrize("world", SETTINGS)
@pytest.mark.parametrize("how", DEGRADATIONS)
def test_degradations_lower_quality_alone(cases, world, how):
    def spoil(sample, seed):  # all frames of a clip alike
        frames = sample.reshape(-1, 64, 64, 3)
        return np.stack([degrade(f, np.random.default_rng(seed), how) for f in frames]).reshape(sample.shape)

    case, number = cases[world], 100 if world is IMAGES else 12
    spoiled = judge(world, [spoil(pixels, i) for i, pixels in enumerate(case.pixels[:number])], case.texts[:number])
    assert (spoiled.quality < case.verdict.quality[:number] - 0.05).mean() >= 0.99
    assert spoiled.faithfulness.mean() > 0.98
    if world is CLIPS:
        assert spoiled.temporal.mean() > 0.97


def test_a_stray_object_spoils_the_count_alone():
    rng = np.random.default_rng(13)
    scenes = [sample_scene(rng, stray=True) for _ in range(100)]
    texts = [captions.write(captions.describe(s, rng), rng) for s in scenes]
    holds = {n: np.nanmean(v) for n, v in judge(IMAGES, [render(s) for s in scenes], texts).attributes.items()}
    assert holds.pop("count") <= 0.01 and min(holds.values()) >= 0.99


def test_verdicts_depend_neither_on_the_batch_nor_on_the_size(cases):
    case = cases[IMAGES]
    one = judge(IMAGES, case.pixels[66:67], case.texts[66:67])
    assert case.verdict.reward[66] == one.reward[0] and case.verdict.views[66] == one.views[0]
    larger = torch.from_numpy(case.pixels[:40]).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(larger, (192, 192), mode="bilinear")
    assert Oracle().judge(larger, case.texts[:40]).strict.mean() >= 0.95


@pytest.mark.parametrize(
    ("world", "shape", "text"),
    [(IMAGES, (1, 3, 64, 64), "a red circle"), (CLIPS, (1, 9, 3, 64, 64), "a red circle moving to the left")],
)
def test_an_empty_sample_has_no_merit(world, shape, text):
    verdict = world.oracle().judge(torch.full(shape, 0.5), [text])
    assert verdict.faithfulness == verdict.quality == verdict.reward == 0


@pytest.mark.parametrize(
    ("world", "shape", "value", "prompt", "message"),
    [
        (IMAGES, (1, 3, 64, 32), 0.5, "a red circle", "square"),
        (IMAGES, (1, 64, 64, 3), 0.5, "a red circle", "square"),
        (IMAGES, (1, 3, 64, 64), 2.0, "a red circle", "0, 1"),
        (IMAGES, (1, 3, 64, 64), float("nan"), "a red circle", "finite"),
        (IMAGES, (2, 3, 64, 64), 0.5, "a red circle", "2 images but 1 prompts"),
        (IMAGES, (1, 3, 64, 64), 0.5, "a photo of a cat", "a photo of a cat"),
        (CLIPS, (1, 4, 3, 64, 64), 0.5, "a red circle moving to the left", "5 frames or more"),
        (CLIPS, (2, 9, 3, 64, 64), 0.5, "a red circle moving to the left", "2 clips but 1 prompts"),
    ],
)
def test_bad_input_is_named(world, shape, value, prompt, message):
    with pytest.raises(ValueError, match=message):
        world.oracle().judge(torch.full(shape, value), [prompt])


@pytest.mark.parametrize("kind", faults.TIME_FAULTS)
def test_faults_in_time_lower_the_quality_of_their_frames_alone(cases, kind):
    case, rng, drawn, segments = cases[CLIPS], np.random.default_rng(4), [], []
    for clip in case.drawn:
        try:
            scenes, segment = faults.spoil(clip, rng, kind)
        except ValueError:  # no room for a jump
            scenes, segment = clip.scenes, range(0)
        drawn.append(faults.to_clip(scenes, rng) / 255)
        segments.append([f in segment for f in range(FRAMES)])
    segments = np.array(segments)
    assert segments.any(axis=1).sum() > 30
    verdict = judge(CLIPS, drawn, case.texts)
    np.testing.assert_array_equal(verdict.faithfulness, case.verdict.faithfulness)
    np.testing.assert_allclose(verdict.image, case.verdict.image, atol=0.1)
    assert verdict.frames[~segments].min() > 0.9 and verdict.frames[segments].max() < 0.8


def test_the_image_scorer_gives_the_oracles_numbers_and_parts(cases):
    texts, images = cases[IMAGES].texts, cases[IMAGES].pixels
    scorer, prompts = build_scorers("oracle")[0], texts[:12]
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


def test_the_clip_scorer_sees_whole_clips(cases):
    texts, verdict = cases[CLIPS].texts[:4], cases[CLIPS].verdict
    pixels = torch.from_numpy(to_uint8(cases[CLIPS].pixels[:4])).movedim(-1, -3).float() / 255
    scorer = build_scorers("motion_oracle")[0]
    total, parts = scorer.judge(pixels, texts)
    np.testing.assert_allclose(total.numpy(), verdict.reward[:4], rtol=1e-6)
    np.testing.assert_allclose(scorer.score(pixels, texts).numpy(), verdict.reward[:4], rtol=1e-6)
    assert {"faithfulness", "quality", "temporal", "path", "speed"} <= parts.keys()
    np.testing.assert_allclose(scorer.frame_scores(pixels, texts).numpy(), verdict.frames[:4], rtol=1e-6)
    backwards = scorer.judge(pixels.flip(1), texts)[1]["path"]
    ways = [clips.parse(text).parts[0].path for text in texts]
    assert [bool(p < 1) for p in backwards] == [way in DIRECTIONS or way in TURNS for way in ways]
    with pytest.raises(ScorerError, match=r"expected clips \[B, F, 3, H, W\]"):
        scorer.score(pixels[:, 0], texts)
    with pytest.raises(ScorerError, match=r"prompts\[0\].*a red circle"):
        scorer.check_prompts(["a red circle"])
