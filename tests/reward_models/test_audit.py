"""Audits: calibration, agreement, best of n by hand, and a whole audit of two scorers on the testbed."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_scorers import Scorer
from t2i_align.errors import UserError
from t2i_align.reward_models.audit import agreement, audit, calibrate
from t2i_align.reward_models.optimise import ascent_curve, best_of_n, best_of_n_curve, draw_pool, score_pool
from t2i_align.testbed.world import prompts


class Contrast(Scorer):
    """How far pixels are from their mean: a proxy that knows nothing of the prompt and can be driven to any height."""

    name = "contrast"
    version = "1"
    differentiable = True

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.flatten(1).std(1)


def test_best_of_n_is_the_mean_over_all_choices() -> None:
    """Against every one of the C(5, n) subsets."""
    rng = np.random.default_rng(0)
    proxy, rewards = rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    for n in range(1, 6):
        expected = np.zeros((2, 2))
        subsets = list(itertools.combinations(range(5), n))
        for subset in subsets:
            for row in range(2):
                best = max(subset, key=lambda i, row=row: proxy[row, i])
                expected[:, row] += np.array([proxy[row, best], rewards[row, best]]) / len(subsets)
        np.testing.assert_allclose(best_of_n(proxy, rewards, n), expected, atol=1e-12)


def test_calibration_recovers_the_scale_and_a_random_scorer_loses_log_2() -> None:
    """Scores are logits divided by 3, so s is 3; shuffled ones predict ½ and lose log 2."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(6000) * 2
    won = rng.random(6000) < 1 / (1 + np.exp(-logits))
    labels = [torch.tensor([1.0, 0.0]) if w else torch.tensor([0.0, 1.0]) for w in won]
    texts = [f"prompt {i}" for i in range(6000)]
    good = calibrate([torch.tensor([x / 3, 0.0]) for x in logits], labels, texts)
    assert good.scale == pytest.approx(3, rel=0.15) and good.error < 0.03 and good.loss < 0.55
    bad = calibrate([torch.tensor([x / 3, 0.0]) for x in rng.permutation(logits)], labels, texts)
    assert bad.loss == pytest.approx(math.log(2), abs=0.01)
    few = calibrate([torch.tensor([1.0, 0.0])], labels[:1], texts[:1])
    assert math.isnan(few.loss) and str(few) == "calibration unknown (fewer than 20 pairs in a half)"


def test_agreement_leaves_out_draws() -> None:
    one = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0])]
    other = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0, -1.0])]
    table = agreement([one, other])
    assert table == [[1.0, pytest.approx(1 / 3)], [pytest.approx(1 / 3), 1.0]]


def test_a_blind_proxy_gains_while_the_truth_does_not() -> None:
    pool = draw_pool(prompts("dev")[:6], size=16, seed=1)
    assert pool.rewards.std() > 0.1 and pool.rewards.max() > 0.95
    scores = score_pool(Contrast(), pool, 64)
    curve = best_of_n_curve(scores, pool)
    assert curve.x == [1, 2, 4, 8, 16] and curve.proxy == sorted(curve.proxy) and curve.kl is not None
    assert curve.kl[0] == 0 and curve.gap[-1] > 0.3
    assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.oracle, curve.high, strict=True))
    climbed = ascent_curve(Contrast(), scores, pool, 64)
    assert climbed.proxy[-1] > climbed.proxy[0] and climbed.oracle[-1] < climbed.oracle[0] - 0.1


def test_a_whole_audit_of_the_truth_and_a_blind_scorer(tmp_path: Path) -> None:
    result = audit("testbed:pairs", ["oracle", Contrast()], tmp_path / "audit", limit=80, optimise=True,
                   prompt_count=4, progress=False)  # fmt: skip
    assert result.accuracy["oracle"].accuracy == 1.0  # the bundled labels are its own
    assert result.accuracy["contrast"].accuracy < 0.9
    assert result.agreement[0][2] == 1.0 and result.names == ["oracle", "contrast", "labels"]
    assert set(result.slices["contrast"]) >= {"prompt length", "image quality", "prompt kind"}
    pairs = [a.pairs for a in result.slices["contrast"]["image quality"].values()]
    assert sum(pairs) == result.accuracy["contrast"].pairs
    assert [curve.kind for curve in result.curves["oracle"]] == ["best of n"]  # no gradient flows
    assert result.curves["oracle"][0].oracle[-1] > 0.9
    stored = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert stored["accuracy"]["oracle"]["accuracy"] == 1.0 and stored["versions"]["contrast"] == "1"
    page = (tmp_path / "audit" / "report.html").read_text()
    assert page.count('<svg class="plot"') == 2 + 3 and "<script" not in page and "contrast" in page
    assert "best of n" in result.summary()


def test_an_audit_of_a_few_pairs_prints_no_nan(tmp_path: Path) -> None:
    for number, colour in enumerate(("white", "red")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "images": ["0.png", "1.png"], "scores": [1, 0]}\n')
    result = audit(tmp_path / "pairs.jsonl", [Contrast()], tmp_path / "out", progress=False)
    assert result.accuracy["contrast"].pairs == 1 and "too few prompts for an interval" in result.summary()
    for text in (result.summary(), *((tmp_path / "out" / name).read_text() for name in ("audit.json", "report.html"))):
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_sources_without_comparisons_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "images": ["a.png"], "scores": [1]}\n')
    with pytest.raises(UserError, match="need groups of two candidates or more"):
        audit(tmp_path / "one.jsonl", [Contrast()], tmp_path / "out", progress=False)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "tie.jsonl").write_text('{"prompt": "a", "images": ["a.png", "b.png"], "scores": [1, 1]}\n')
    with pytest.raises(UserError, match=r"tie.jsonl: only ties in it"):
        audit(tmp_path / "tie.jsonl", [Contrast()], tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="limit must be a whole number of at least 1, found 0"):
        audit("testbed:pairs", [Contrast()], tmp_path / "out", limit=0, progress=False)
    with pytest.raises(UserError, match=r"one.jsonl: is a file; expected a folder"):
        audit("testbed:pairs", [Contrast()], tmp_path / "one.jsonl", progress=False)
