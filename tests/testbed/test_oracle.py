"""The oracle against scenes whose truth is known. The templates share the renderer: this validates it on renders."""

import numpy as np
import pytest
import torch

from t2i_align.testbed.captions import FAULTS, CaptionError, corrupt, describe, write
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import DEGRADATIONS, degrade, render, sample_scene, to_uint8

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
