"""The shipped pairs and bases."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import pipelines
from t2i_align.testbed import base_path, pairs_path, prompts
from t2i_align.testbed.oracle import Oracle
from tests.tools.test_pairs import assert_labelled
from tools.testbed.pairs import SCHEMA, decode
from tools.testbed.sampling import sample

PICK_A_PIC = (
    "are_different best_image_uid caption created_at has_label image_0_uid image_0_url image_1_uid image_1_url "
    "jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id num_example_per_prompt"
).split()


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(pairs_path()).to_pylist()


def test_pairs_have_pick_a_pics_columns():
    schema = pq.read_schema(pairs_path())
    assert set(PICK_A_PIC) <= set(schema.names)
    assert {field.name: field.type for field in schema} == {field.name: field.type for field in SCHEMA}
    assert schema.field("jpg_0").type == "binary" and schema.field("label_0").type == "double"


def test_labels_name_the_image_with_the_higher_reward(rows):
    for row in rows:
        assert_labelled(row)
    # Else a model could learn from the side alone.
    assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55


def test_images_decode_and_the_oracle_agrees_with_the_recorded_rewards(rows):
    assert {Image.open(io.BytesIO(row[f"jpg_{side}"])).size for row in rows for side in (0, 1)} == {(64, 64)}
    images = torch.stack([decode(row["jpg_0"]) for row in rows[:100]])
    verdict = Oracle().judge(images, [row["caption"] for row in rows[:100]])
    np.testing.assert_allclose(verdict.reward, [row["reward_0"] for row in rows[:100]], atol=1e-6)
    assert all(row["oracle"].startswith(Oracle.version) for row in rows)


def test_pairs_come_from_train_prompts_and_differ_in_faithfulness(rows):
    assert len(rows) >= 2000 and {row["caption"] for row in rows} <= set(prompts("train"))
    assert np.mean([row["faithfulness_0"] != row["faithfulness_1"] for row in rows]) > 0.5


@pytest.mark.parametrize(
    ("name", "prediction", "guidance", "colour"),
    [
        ("sd", "v_prediction", 2.0, 0.5),
        ("sd-eps", "epsilon", 2.0, 0.5),
        ("sdxl", "v_prediction", 1.0, 0.35),
        ("sd3", "flow", 1.0, 0.35),
    ],
)
def test_shipped_bases_load_in_plain_diffusers_and_follow_their_prompts(name, prediction, guidance, colour):
    """Far above chance: a colour would hold with probability 1/8."""
    plain = pipelines.wrap(DiffusionPipeline.from_pretrained(base_path(name)))
    family, captions = pipelines.load(base_path(name)), prompts("dev")[:12]
    assert plain.process.prediction_type == family.process.prediction_type == prediction
    images = sample(family, captions, range(12), steps=10, guidance=guidance)
    assert images.shape == (12, 3, 64, 64)
    assert Oracle().judge(images, captions).attributes["colour"].mean() > colour


def test_the_shipped_video_base_loads_in_plain_diffusers_and_samples():
    assert pipelines.wrap(DiffusionPipeline.from_pretrained(base_path("wan"))).process.prediction_type == "flow"
    family = pipelines.load(base_path("wan"))
    assert family.family == "wan"
    assert (family.default_frames, family.default_size) == (9, (64, 64))
    clips = sample(family, prompts("video-dev")[:2], [0, 1], steps=2)
    assert clips.shape == (2, 9, 3, 64, 64) and clips.isfinite().all()
