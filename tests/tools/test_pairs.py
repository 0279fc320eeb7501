"""How pairs are chosen and written."""

from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from t2i_align.testbed import prompts
from t2i_align.testbed.oracle import Oracle, Verdict
from t2i_align.testbed.scenes import render, sample_scene
from t2i_align.testbed.vision import View
from tools.testbed.annotators import Expert
from tools.testbed.pairs import SCHEMA, PairsConfig, choose, decode, encode_jpeg, main, make_pairs, write_parquet


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
    captions, config = prompts("train")[:20], PairsConfig(prompts_per_batch=8)
    rows = list(islice(make_pairs(None, captions, Expert(), config), 9))
    path = tmp_path / "pairs.parquet"
    write_parquet(rows, path)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA) and table.num_rows == 9
    assert list(islice(make_pairs(None, captions, Expert(), config), 9)) == rows
    with pytest.raises(SystemExit, match="--force"):
        main(["testbed:sd", "--out", str(path)])
