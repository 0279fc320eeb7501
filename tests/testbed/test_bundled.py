"""The shipped pairs and bases."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import pipelines
from t2i_align.testbed import BASES, base_path, pairs_path, prompts
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


def test_labels_name_the_image_with_the_higher_reward(table):
    rows = table.to_pylist()
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        winner = 0 if row["label_0"] == 1 else 1
        assert row["are_different"] and row[f"reward_{winner}"] > row[f"reward_{1 - winner}"]
        assert row["best_image_uid"] == row[f"image_{winner}_uid"]
    # Else a model could learn from the side alone.
    assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55


def test_images_decode_and_the_oracle_agrees_with_the_recorded_rewards(table):
    rows = table.to_pylist()
    assert {Image.open(io.BytesIO(row[f"jpg_{side}"])).size for row in rows for side in (0, 1)} == {(64, 64)}
    images = torch.stack([decode(row["jpg_0"]) for row in rows[:100]])
    verdict = Oracle().judge(images, [row["caption"] for row in rows[:100]])
    np.testing.assert_allclose(verdict.reward, [row["reward_0"] for row in rows[:100]], atol=1e-6)
    assert all(row["oracle"].startswith(Oracle.version) for row in rows)


def test_pairs_come_from_train_prompts_and_differ_in_faithfulness(table):
    assert set(table.column("caption").to_pylist()) <= set(prompts("train"))
    differs = table.column("faithfulness_0").to_numpy() != table.column("faithfulness_1").to_numpy()
    assert differs.mean() > 0.5


@pytest.mark.parametrize("name", BASES)
def test_shipped_bases_load_in_plain_diffusers(name):
    pipeline = DiffusionPipeline.from_pretrained(base_path(name))
    assert pipelines.wrap(pipeline).process.prediction_type == {
        "sd": "v_prediction", "sd-eps": "epsilon", "sdxl": "v_prediction",
    }.get(name, "flow")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "guidance", "colour"), [("sd", 2.0, 0.5), ("sd-eps", 2.0, 0.5), ("sdxl", 1.0, 0.35), ("sd3", 1.0, 0.35)]
)
def test_shipped_bases_follow_their_prompts(name, guidance, colour):
    """Far above chance: a colour would hold with probability 1/8."""
    captions = prompts("dev")[:12]
    images = sample(pipelines.load(base_path(name)), captions, range(12), steps=10, guidance=guidance)
    assert images.shape == (12, 3, 64, 64)
    assert Oracle().judge(images, captions).attributes["colour"].mean() > colour


def test_the_shipped_video_base_samples():
    family = pipelines.load(base_path("wan"))
    assert (family.family, family.default_frames, family.default_size) == ("wan", 9, (64, 64))
    clips = sample(family, prompts("video-dev")[:2], [0, 1], steps=2)
    assert clips.shape == (2, 9, 3, 64, 64) and clips.isfinite().all()
