"""How pairs are chosen and written."""

from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from t2i_align.testbed import prompts
from t2i_align.testbed.oracle import Oracle, Verdict
from t2i_align.testbed.scenes import render, sample_scene
from tools.testbed.__main__ import main
from tools.testbed.annotators import Annotator
from tools.testbed.pairs import (
    SCHEMA,
    PairsConfig,
    choose,
    decode,
    encode_jpeg,
    make_pairs,
    sample_in_turn,
    write_parquet,
)


def test_jpeg_keeps_the_verdict():
    rng = np.random.default_rng(4)
    images = torch.from_numpy(np.stack([render(sample_scene(rng, "single")) for _ in range(40)])).permute(0, 3, 1, 2)
    after = torch.stack([decode(encode_jpeg(image)) for image in images])
    first, second = (Oracle().judge(pixels, ["a red circle"] * 40) for pixels in (images, after))
    np.testing.assert_array_equal(first.faithfulness, second.faithfulness)
    np.testing.assert_allclose(first.quality, second.quality, atol=0.05)


def chosen(faithfulness, quality, **options):
    faithfulness, quality = np.asarray(faithfulness), np.asarray(quality)
    verdict = Verdict(0.6 * faithfulness + 0.4 * quality, faithfulness, faithfulness, quality, {})
    config = PairsConfig(**options)
    return choose(verdict, len(quality) // config.candidates, config, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("per_prompt", "quality_only", "expected"), [(2, 0.0, [(0, 1)]), (2, 1.0, [(0, 1), (2, 3)]), (1, 1.0, [(0, 1)])]
)
def test_best_against_worst_by_hand(per_prompt, quality_only, expected):
    """Rewards of prompt 0: 1.0, 0.4, 0.8, 0.6, so (0, 1), then (2, 3), which differ in quality only.
    Prompt 1: all within 0.04 of each other, so none.
    """
    options = {"per_prompt": per_prompt, "quality_only": quality_only, "margin": 0.1}
    assert chosen([1, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0.5, 0, 1, 0.95, 0.9, 0.92], **options) == expected


def test_pairs_of_quality_alone_are_thinned_out():
    pairs = chosen(np.ones(4000), np.tile([1.0, 0.2], 2000), candidates=2, quality_only=0.25)
    assert abs(len(pairs) / 2000 - 0.25) < 0.04


def test_samples_of_a_prompt_take_their_guidance_in_turn(monkeypatch):
    """The value of a pixel is 10 * scale + seed; captions are those of the seeds."""

    def sample_numbers(family, captions, seeds, guidance, **_):
        assert captions == [f"caption {seed // 3}" for seed in seeds]
        return torch.stack([torch.full((3, 1, 1), 10 * guidance + seed) for seed in seeds])

    monkeypatch.setattr("tools.testbed.pairs.sample", sample_numbers)
    config = PairsConfig(candidates=3, guidance=(1.0, 3.0))
    drawn = sample_in_turn(None, [f"caption {i // 3}" for i in range(6)], range(6), config)
    assert drawn[:, 0, 0, 0].tolist() == [10, 31, 12, 13, 34, 15]


def assert_labelled(row):
    """The winner of a row is the image with the higher reward."""
    winner = int(row["label_0"] == 0)
    assert row[f"label_{winner}"] == 1 and row[f"label_{1 - winner}"] == 0
    assert row["has_label"] and row["are_different"] and row["best_image_uid"] == row[f"image_{winner}_uid"]
    assert row[f"reward_{winner}"] > row[f"reward_{1 - winner}"]


def test_rows_are_reproducible_and_fit_the_schema(tmp_path, monkeypatch):
    def sample_scenes(family, captions, seeds, **_):  # a base would take minutes
        scenes = [sample_scene(np.random.default_rng(seed)) for seed in seeds]
        return torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in scenes])

    monkeypatch.setattr("tools.testbed.pairs.sample", sample_scenes)
    captions, config, path = prompts("train")[:20], PairsConfig(prompts_per_batch=8), tmp_path / "pairs.parquet"
    rows, again = (list(islice(make_pairs(None, captions, Annotator(), config), 9)) for _ in range(2))
    write_parquet(rows, path)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA) and table.num_rows == 9 and rows == again
    for row in table.to_pylist():
        assert_labelled(row)
    with pytest.raises(SystemExit, match="exists; pass --force"):
        main(["pairs", "testbed:sd", "--out", str(path)])
