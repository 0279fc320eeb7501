"""The shipped pairs and bases, and how pairs are chosen and written."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pipelines
from t2i_align.testbed import base_path, pairs_path, prompts
from t2i_align.testbed.annotators import Expert
from t2i_align.testbed.oracle import Oracle, Verdict
from t2i_align.testbed.scenes import render, sample_scene
from t2i_align.testbed.vision import View
from tools.testbed.pairs import SCHEMA, PairsConfig, choose, decode, encode_jpeg, make_pairs, write_parquet

PICK_A_PIC = (
    "are_different best_image_uid caption created_at has_label image_0_uid image_0_url image_1_uid image_1_url "
    "jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id num_example_per_prompt"
).split()


@pytest.fixture(scope="module")
def table():
    return pq.read_table(pairs_path())


def test_the_file_has_pick_a_pics_columns(table):
    assert set(PICK_A_PIC) <= set(table.column_names)
    assert table.schema.field("jpg_0").type == "binary" and table.schema.field("label_0").type == "double"
    assert table.num_rows >= 2000


def test_every_image_decodes(table):
    for side in (0, 1):
        for data in table.column(f"jpg_{side}").to_pylist():
            assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_labels_name_the_image_with_the_higher_reward(table):
    rows = table.to_pylist()
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        winner = 0 if row["label_0"] == 1 else 1
        assert row["are_different"] and row[f"reward_{winner}"] > row[f"reward_{1 - winner}"]
        assert row["best_image_uid"] == row[f"image_{winner}_uid"]
    # Else a model could learn from the side alone.
    assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55


def test_the_oracle_agrees_with_the_recorded_rewards(table):
    rows = table.slice(0, 100).to_pylist()
    images = torch.stack([decode(row["jpg_0"]) for row in rows])
    verdict = Oracle().judge(images, [row["caption"] for row in rows])
    np.testing.assert_allclose(verdict.reward, [row["reward_0"] for row in rows], atol=1e-6)
    assert all(row["oracle"].startswith(Oracle.version) for row in rows)


def test_pairs_come_from_train_prompts_and_differ_in_faithfulness(table):
    captions = set(table.column("caption").to_pylist())
    assert captions <= set(prompts("train"))
    differs = table.column("faithfulness_0").to_numpy() != table.column("faithfulness_1").to_numpy()
    assert differs.mean() > 0.5


def test_jpeg_keeps_the_verdict():
    rng = np.random.default_rng(4)
    images = torch.from_numpy(np.stack([render(sample_scene(rng, "single")) for _ in range(40)])).permute(0, 3, 1, 2)
    captions = ["a red circle"] * 40
    before = Oracle().judge(images, captions)
    after = Oracle().judge(torch.stack([decode(encode_jpeg(p)) for p in images]), captions)
    np.testing.assert_array_equal(before.faithfulness, after.faithfulness)
    np.testing.assert_allclose(before.quality, after.quality, atol=0.05)


def verdict_of(faithfulness, quality):
    faithfulness, quality = np.asarray(faithfulness), np.asarray(quality)
    views = tuple(View((), "gray", 0.0) for _ in quality)
    return Verdict(0.6 * faithfulness + 0.4 * quality, faithfulness, faithfulness, quality, {}, views)


def test_best_against_worst_by_hand():
    """Rewards of prompt 0: 1.0, 0.4, 0.8, 0.6, so (0, 1), then (2, 3), which differ in quality only.
    Prompt 1: all within 0.04 of each other, so none.
    """
    verdict = verdict_of([1, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0.5, 0, 1, 0.95, 0.9, 0.92])
    for quality_only, expected in ((0.0, [(0, 1)]), (1.0, [(0, 1), (2, 3)])):
        config = PairsConfig(candidates=4, per_prompt=2, margin=0.1, quality_only=quality_only)
        assert choose(verdict, 2, config, np.random.default_rng(0)) == expected
    config = PairsConfig(candidates=4, per_prompt=1, quality_only=1.0)
    assert choose(verdict, 2, config, np.random.default_rng(0)) == [(0, 1)]


def test_pairs_of_quality_alone_are_thinned_out():
    verdict = verdict_of(np.ones(4000), np.tile([1.0, 0.2], 2000))
    config = PairsConfig(candidates=2, quality_only=0.25)
    assert abs(len(choose(verdict, 2000, config, np.random.default_rng(0))) / 2000 - 0.25) < 0.04


def scenes_for(pipeline, captions, seeds, **_):
    """Answers each prompt with a random scene of its seed, where a base would take minutes."""
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in seeds]
    return torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in scenes])


def test_make_and_write_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.testbed.pairs.sample", scenes_for)
    rows = make_pairs(None, prompts("train")[:20], Expert(), PairsConfig(prompts_per_batch=8), limit=9)
    path = tmp_path / "pairs.parquet"
    write_parquet(rows, path)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA) and table.num_rows == 9
    again = make_pairs(None, prompts("train")[:20], Expert(), PairsConfig(prompts_per_batch=8), limit=9)
    assert again == rows
    with pytest.raises(FileExistsError, match="--force"):
        write_parquet(rows, path)


@pytest.mark.parametrize(("name", "prediction_type"), [("sd", "v_prediction"), ("sd-eps", "epsilon")])
def test_shipped_bases_load_in_plain_diffusers_and_know_their_world(name, prediction_type):
    """Far above chance: a shape of the wrong kind would hold with probability 1/5, a colour with 1/8."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base_path(name))
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    captions = prompts("dev")[:12]
    images = pipeline(
        captions, num_inference_steps=10, guidance_scale=2.0, output_type="pt", generator=torch.manual_seed(0)
    ).images
    assert images.shape == (12, 3, 64, 64)
    verdict = Oracle().judge(images, captions)
    assert verdict.attributes["colour"].mean() > 0.5


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_other_families_bases_sample_what_they_are_told(name):
    """A colour would hold with probability 1/8."""
    captions = prompts("dev")[:12]
    images = pipelines.load(base_path(name)).generate(captions, range(12), steps=10, guidance=1.0, batch_size=12)
    assert Oracle().judge(images, captions).attributes["colour"].mean() > 0.35
