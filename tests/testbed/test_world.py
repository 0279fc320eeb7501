"""The drawn world: scenes, captions, prompts' splits."""

import numpy as np
import pytest

from t2i_align.testbed import base_path
from t2i_align.testbed import prompts as split_prompts
from t2i_align.testbed.captions import (
    FAULTS,
    CaptionError,
    Phrase,
    Statement,
    corrupt,
    describe,
    draw_for,
    parse,
    write,
)
from t2i_align.testbed.prompts import make_prompts, split_of
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, KINDS, degrade, relation_between, render, sample_scene
from t2i_align.testbed.world import IMAGES


def test_render_draws_the_colour_on_the_background():
    """At an object's centre is its colour, in an empty corner the background."""
    scene = sample_scene(np.random.default_rng(3), "single")
    pixels = render(scene)
    item = scene.objects[0]
    centre = pixels[int(item.y), int(item.x)]
    np.testing.assert_allclose(centre, COLOURS[item.colour], atol=1e-6)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, BACKGROUNDS[scene.background], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stray", [False, True])
def test_objects_never_touch(kind, stray):
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = sample_scene(rng, kind, stray=stray)
        boxes = [item.box for item in scene.objects]
        for i, (l1, t1, r1, b1) in enumerate(boxes):
            assert min(l1, t1) >= 0 and max(r1, b1) <= 64
            for l2, t2, r2, b2 in boxes[:i]:
                assert max(l2 - r1, l1 - r2, t2 - b1, t1 - b2) >= 3.0


def test_pairs_stand_in_their_relation():
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = sample_scene(rng, "pair")
        a, b = scene.objects
        assert relation_between(a.x - b.x, a.y - b.y) == scene.relation


def test_scenes_depend_on_the_generator_only():
    one, two = (sample_scene(np.random.default_rng(9)) for _ in range(2))
    assert one == two != sample_scene(np.random.default_rng(10))


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="single, pair"):
        sample_scene(np.random.default_rng(0), "crowd")
    with pytest.raises(ValueError, match="blur, fade, mottle"):
        degrade(np.zeros((64, 64, 3), np.float32), np.random.default_rng(0), "rotate")
    with pytest.raises(ValueError, match="the bases are sd, sd-eps, sdxl, sd3, wan"):
        base_path("flux")
    with pytest.raises(ValueError, match="train, dev, test"):
        split_prompts("validation")


def test_captions_round_trip():
    """2,000 random statements in random phrasings are read back as they were meant."""
    rng = np.random.default_rng(2)
    for _ in range(2000):
        statement = describe(sample_scene(rng), rng)
        caption = write(statement, rng)
        assert parse(caption).canonical() == statement.canonical(), caption


@pytest.mark.parametrize(
    ("caption", "statement"),
    [
        ("an orange circle", Statement((Phrase("circle", "orange"),))),
        (
            "above a red square there is a large pink cross on a gray background",
            Statement((Phrase("cross", "pink", "large"), Phrase("square", "red")), "above", "gray"),
        ),
        (
            "on a white background, on the right a blue square, on the left a small red circle",
            Statement((Phrase("square", "blue"), Phrase("circle", "red", "small")), "right", "white"),
        ),
        ("there are three small cyan crosses", Statement((Phrase("cross", "cyan", "small", 3),))),
    ],
)
def test_parse_by_hand(caption, statement):
    assert parse(caption) == statement


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a photo of a cat",
        "a red circles",
        "an red circle",
        "on the left a red circle, on the left a blue square",
        "a red circle on a white background on a black background",
    ],
)
def test_foreign_captions_are_quoted_in_the_error(caption):
    with pytest.raises(CaptionError) as error:
        parse(caption)
    assert caption in str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_corruption_changes_the_meaning(fault):
    rng = np.random.default_rng(5)
    changed = 0
    for _ in range(200):
        statement = describe(sample_scene(rng), rng)
        wrong = corrupt(statement, fault, rng)
        if wrong is not None:
            assert wrong.canonical() != statement.canonical()
            assert parse(write(wrong, rng)).canonical() == wrong.canonical()
            changed += 1
    assert changed > 30


def test_splits_are_disjoint_in_meaning_and_match_the_files():
    meanings = {split: {parse(p).canonical() for p in split_prompts(split)} for split in IMAGES.sizes}
    for split, number in IMAGES.sizes.items():
        assert len(meanings[split]) == number == len(split_prompts(split))
        assert all(split_of(statement) == split for statement in meanings[split])
    assert not meanings["train"] & meanings["test"] and not meanings["dev"] & meanings["test"]
    assert split_prompts("dev")[:20] == make_prompts(IMAGES, "dev", 20)
    assert split_prompts("test")[:20] == make_prompts(IMAGES, "test", 20)


def test_scenes_drawn_for_a_statement_make_it_true():
    rng = np.random.default_rng(6)
    for _ in range(200):
        statement = describe(sample_scene(rng), rng)
        scene = draw_for(statement, rng)
        described = describe(scene, rng, p_size=1.0, p_background=1.0)
        assert scene.relation == statement.relation and described.count == statement.count
        for stated, true in zip(statement.phrases, described.phrases, strict=True):
            assert (stated.shape, stated.colour, stated.number) == (true.shape, true.colour, true.number)
            assert stated.size in (None, true.size)
        assert statement.background in (None, scene.background)
