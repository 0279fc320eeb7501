"""The shipped pairs and bases."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pipelines
from t2i_align.testbed import base_path, pairs_path, prompts
from t2i_align.testbed.oracle import Oracle
from tools.testbed.pairs import SCHEMA, decode
from tools.testbed.sampling import sample

PICK_A_PIC = (
    "are_different best_image_uid caption created_at has_label image_0_uid image_0_url image_1_uid image_1_url "
    "jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id num_example_per_prompt"
).split()


@pytest.fixture(scope="module")
def table():
    return pq.read_table(pairs_path())


def test_pairs_have_pick_a_pics_columns(table):
    assert set(PICK_A_PIC) <= set(table.column_names)
    assert {field.name: field.type for field in table.schema} == {field.name: field.type for field in SCHEMA}
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
def test_shipped_bases_of_other_families_follow_their_prompts(name):
    """A colour would hold with probability 1/8."""
    captions = prompts("dev")[:12]
    images = pipelines.load(base_path(name)).generate(captions, range(12), steps=10, guidance=1.0, batch_size=12)
    assert Oracle().judge(images, captions).attributes["colour"].mean() > 0.35


def test_the_shipped_video_base_samples():
    pipeline = pipelines.load(base_path("wan"))
    assert (pipeline.family, pipeline.default_frames, pipeline.default_size) == ("wan", 9, (64, 64))
    clips = sample(pipeline, prompts("video-dev")[:2], [0, 1], steps=2)
    assert clips.shape == (2, 9, 3, 64, 64) and clips.isfinite().all()
