"""The drawn worlds: what scenes and clips look like, and that every draw gives the same bits as ever."""

import hashlib

import numpy as np
import pytest
import torch

from t2i_align.data.media import MediaSize, load, save_clip
from t2i_align.testbed import base_path, clips
from t2i_align.testbed import prompts as split_prompts
from t2i_align.testbed.captions import FAULTS, corrupt, describe, write
from t2i_align.testbed.clips import DIRECTIONS, FRAMES, PATHS, TURNS, draw_offsets, sample_clip
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import KINDS, SIDE, degrade, relation_between, render, sample_scene, to_uint8
from tools.testbed.annotators import Annotator
from tools.testbed.faults import spoil, to_clip


@pytest.mark.parametrize("kind", [*KINDS, "clip"])
@pytest.mark.parametrize("stray", [False, True])
def test_objects_stay_inside_and_apart_and_pairs_stand_in_their_relation(kind, stray):
    rng = np.random.default_rng(0)
    drawn = [sample_clip(rng) if kind == "clip" else sample_scene(rng, kind, stray=stray) for _ in range(40)]
    for scene in (scene for item in drawn for scene in (item.scenes if kind == "clip" else [item])):
        boxes = [item.box for item in scene.objects]
        for i, (l1, t1, r1, b1) in enumerate(boxes):
            assert min(l1, t1) >= 1 - 1e-9 and max(r1, b1) <= SIDE - 1 + 1e-9
            assert all(max(l2 - r1, l1 - r2, t2 - b1, t1 - b2) >= 3.0 for l2, t2, r2, b2 in boxes[:i])
        if kind == "pair":
            a, b = scene.stated_objects
            assert relation_between(a.x - b.x, a.y - b.y) == scene.relation
    assert kind != "clip" or any(len(clip.movers) == 2 for clip in drawn)


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


@pytest.mark.parametrize(
    ("call", "choices"),
    [
        (lambda rng: sample_scene(rng, "crowd"), "single, pair"),
        (lambda rng: degrade(np.zeros((64, 64, 3), np.float32), rng, "rotate"), "blur, fade, mottle"),
        (lambda rng: base_path("flux"), "the bases are sd, sd-eps, sdxl, sd3, wan"),
        (lambda rng: split_prompts("validation"), "train, dev, test, video-train, video-dev"),
    ],
)
def test_unknown_names_are_errors(call, choices):
    with pytest.raises(ValueError, match=choices):
        call(np.random.default_rng(0))


def test_lossless_clips_come_back_as_they_were(tmp_path):
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (FRAMES, 3, SIDE, SIDE), np.uint8))
    save_clip(clip, tmp_path / "clip.mp4", 8, lossless=True)
    loaded = load(tmp_path / "clip.mp4", MediaSize(SIDE, SIDE, FRAMES)).pixels
    assert torch.equal((loaded * 255).round().byte(), clip)


# The same bits ------------------------------------------------------------------------------------------------------
# The bundled pairs and prompts and every recorded figure depend on these draws, so refactoring must not change them.


def drawn_images(rng):
    scenes = [sample_scene(rng, stray=i % 5 == 4) for i in range(20)]
    yield from (to_uint8(degrade(render(scene), rng)) for scene in scenes)


def drawn_captions(rng):
    for _ in range(100):
        statement = describe(sample_scene(rng), rng)
        yield write(statement, rng)
        yield from (write(wrong, rng) for fault in FAULTS if (wrong := corrupt(statement, fault, rng)))


def drawn_clips(rng):
    for i in range(6):
        clip = sample_clip(rng)
        yield clips.write(clips.describe(clip, rng), rng)
        yield to_clip(spoil(clip, rng)[0] if i % 2 else clip.scenes, rng, degraded=i % 3 == 0)


def drawn_votes(rng):
    scenes = [sample_scene(rng) for _ in range(40)]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
    spoilt = torch.stack([torch.from_numpy(degrade(render(scene), rng)).permute(2, 0, 1) for scene in scenes])
    captions = [write(describe(scene, rng), rng) for scene in scenes]
    first, second = (Oracle().judge(pixels.clamp(0, 1), captions) for pixels in (images, spoilt))
    yield from (verdict.reward.round(4) for verdict in (first, second))
    for annotator in (Annotator(flip=0.2), Annotator(temperature=0.1)):
        yield annotator.label(first, second, rng)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (drawn_images, "337617a14d34d56b"),
        (drawn_captions, "e46ba9e893663ea6"),
        (drawn_clips, "4619f5992e14e767"),
        (drawn_votes, "e227d1b6120bc747"),
    ],
)
def test_draws_give_the_same_bits_as_ever(draw, expected):
    digest = hashlib.sha256()
    for value in draw(np.random.default_rng(7)):
        digest.update(value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes())
    assert digest.hexdigest()[:16] == expected


def test_prompts_are_the_same_as_ever():
    texts = "\n".join(text for split in ("train", "dev", "test", "video-train") for text in split_prompts(split))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "b15b0636872b934b"
