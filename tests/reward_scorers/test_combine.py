"""Combined scorers: each rule by hand, references, gradients, and files that cannot be used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import reward_scorers
from reward_scorers import Scorer, ScorerError
from reward_scorers.combine import Combined, from_mapping, read_reference
from reward_scorers.trained import load_head


class Channel(Scorer):
    """The mean of one colour channel times ten."""

    version = "1"
    differentiable = True

    def __init__(self, which: int, margin: float = 0.0) -> None:
        self.which, self.name, self.tie_margin = which, f"channel-{which}", margin

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return 10 * pixels[:, self.which].mean((1, 2))


def combined(rule: str, **more: Any) -> Combined:
    return from_mapping({"rule": rule, "scorers": [{"scorer": Channel(i)} for i in range(3)], **more})


PIXELS = torch.tensor([0.1, 0.4, 0.7]).view(1, 3, 1, 1).repeat(2, 1, 4, 4)
PIXELS[1] = 0.5


def test_the_rules_by_hand() -> None:
    """Scores (1, 4, 7) and (5, 5, 5): mean 4 and 5, population deviation sqrt(6) and 0."""
    mean = combined("mean_minus_std", strength=0.5).score(PIXELS, ["a", "b"])
    torch.testing.assert_close(mean, torch.tensor([4 - 0.5 * math.sqrt(6), 5.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(combined("min").score(PIXELS, ["a", "b"]), torch.tensor([1.0, 5.0]))
    members = [{"scorer": Channel(0), "weight": 2}, {"scorer": Channel(1), "weight": -1, "centre": 1, "spread": 3}]
    both = from_mapping({"rule": "weighted_sum", "scorers": members}).score(PIXELS, ["a", "b"])
    torch.testing.assert_close(both, torch.tensor([2 * 1 - 1.0, 10 - 4 / 3]))


def test_the_vote_and_the_conjunction_are_against_the_centre() -> None:
    """Centres 2, 4, 2: of (1, 4, 7) one votes against, one is tied, one is for: ½. Σ log σ of (-1, 0, 5)."""
    members = [{"scorer": Channel(i, margin=1e-3), "centre": centre} for i, centre in enumerate((2, 4, 2))]
    vote = from_mapping({"rule": "majority", "scorers": members})
    torch.testing.assert_close(vote.score(PIXELS, ["a", "b"]), torch.tensor([0.5, 1.0]))
    assert not vote.differentiable
    both = from_mapping({"rule": "conjunction", "scorers": members}).score(PIXELS, ["a", "b"])[0]
    assert both.item() == pytest.approx(-1.313262 - math.log(2) - 0.006715, abs=1e-4)
    close = [{"scorer": Channel(0, margin=1.5), "centre": 2}, {"scorer": Channel(2), "centre": 2}]
    assert from_mapping({"rule": "majority", "scorers": close}).score(PIXELS, ["a", "b"])[0] == 0.75
    spread = [{"scorer": Channel(2, margin=3.0), "centre": 2, "spread": 2}]  # 7 is 5 above, more than the margin
    assert from_mapping({"rule": "majority", "scorers": spread}).score(PIXELS, ["a", "b"]).tolist() == [1.0, 0.5]


def test_a_reference_gives_each_prompt_its_own_centre(tmp_path: Path) -> None:
    """The 0.75 quantile of 1, 2, 3, 4, 5 is 4; so 5 beats the reference of "b" and 1 does not beat that of "a"."""
    rows = [{"scorer": "channel-0", "version": "1, decoder 2", "prompt": "a", "score": s} for s in (1, 2, 3, 4, 5)]
    rows += [{"scorer": "channel-0", "version": "1, decoder 2", "prompt": "b", "score": 3.0}]
    rows += [{"scorer": "other", "version": "9", "prompt": "a", "score": 7}]
    rows += [{"scorer": "channel-0", "version": "1, decoder 2", "prompt": "b", "error": "unreadable"}]
    file = tmp_path / "base.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    members = [{"scorer": Channel(0), "reference": "base.jsonl"}]
    scorer = from_mapping({"rule": "min", "quantile": 0.75, "scorers": members}, root=tmp_path)
    torch.testing.assert_close(scorer.score(PIXELS, ["a", "b"]), torch.tensor([1.0 - 4, 5.0 - 3]))
    with pytest.raises(ScorerError, match=r"prompts\[1\]: the reference of channel-0 lacks 'c'"):
        scorer.check_prompts(["a", "c"])
    table = pa.Table.from_pylist([{"score": None, **row} for row in rows])
    pq.write_table(table, tmp_path / "base.parquet")
    assert read_reference(tmp_path / "base.parquet", Channel(0), 0.75) == read_reference(file, Channel(0), 0.75)
    for text in ("{", "[1]", '{"scorer": "channel-0"}'):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ScorerError, match=r"bad.jsonl: not a file of scores"):
            read_reference(tmp_path / "bad.jsonl", Channel(0), 0.5)
    file.write_text("".join(json.dumps({**rows[0], "version": v}) + "\n" for v in ("0, decoder 2", "1")))
    only = "of version '1, decoder 2', only of '0, decoder 2', '1' in it"  # the latter from before decoders were named
    with pytest.raises(ScorerError, match=f"no scores of channel-0 {only}"):
        from_mapping({"rule": "min", "scorers": members}, root=tmp_path)


def test_scores_under_autocast_are_measured_against_a_reference_scored_so(tmp_path: Path) -> None:
    plain, rounded = "1, decoder 2", "1, bfloat16 autocast, decoder 2"
    rows = [{"scorer": "channel-0", "version": rounded, "prompt": p, "score": 2.0} for p in ("a", "b")]
    file = tmp_path / "base.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    members = {"rule": "min", "scorers": [{"scorer": Channel(0), "reference": "base.jsonl"}]}
    with torch.autocast("cpu", torch.bfloat16):
        scores = from_mapping(members, root=tmp_path).score(PIXELS, ["a", "b"])
    torch.testing.assert_close(scores, torch.tensor([1.0 - 2, 5.0 - 2]))
    with pytest.raises(ScorerError, match=f"channel-0 was scored by version '{rounded}', this is '{plain}'"):
        from_mapping(members, root=tmp_path).check_prompts(["a"])
    versions = (plain, rounded, "0, decoder 2")
    file.write_text("".join(json.dumps({**row, "version": v}) + "\n" for row in rows for v in versions))
    assert from_mapping(members, root=tmp_path).score(PIXELS, ["a", "b"])[0].item() == pytest.approx(-1)


def test_parts_are_the_members_and_images_go_through_their_own_path() -> None:
    scorer = combined("min")
    total, parts = scorer.judge([Image.new("RGB", (4, 4), (51, 102, 204))], ["a"])
    assert scorer.name == "combine:min" and scorer.differentiable
    assert total.item() == pytest.approx(2.0) and parts["channel-2"].item() == pytest.approx(8.0)
    clips = PIXELS[None].repeat(1, 1, 1, 1, 1)  # one clip of two frames
    torch.testing.assert_close(scorer.score(clips, ["a"]), torch.tensor([3.0]))  # min of the means (3, 4.5, 6)


def test_gradients_go_through_every_smooth_rule() -> None:
    for rule in ("weighted_sum", "mean_minus_std", "min", "conjunction"):
        pixels = PIXELS.clone().requires_grad_()
        combined(rule).score(pixels, ["a", "b"]).sum().backward()
        assert pixels.grad is not None and pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0, rule


def test_the_version_tells_every_setting_apart() -> None:
    versions = {combined("min").version, combined("mean_minus_std").version}
    versions |= {combined("mean_minus_std", strength=2.0).version}
    for change in ({}, {"weight": 2}, {"centre": 2}, {"spread": 2}):
        sum_of = from_mapping({"rule": "weighted_sum", "scorers": [{"scorer": Channel(0), **change}, Channel(1)]})
        assert re.fullmatch(r"weighted_sum of channel-0, channel-1, sha256 [0-9a-f]{12}", sum_of.version)
        versions.add(sum_of.version)
    assert len(versions) == 7 and combined("min").version == combined("min").version


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rule: best\nscorers: [temporal_flickering]", "unknown rule 'best'. Choices: weighted_sum, mean_minus_std"),
        ("rule: min", "scorers: missing key"),
        (
            "rule: min\nscorers: [temporal_flickering, temporal_flickering]",
            "two scorers of the same name among temporal_flickering, temporal_flickering",
        ),
        ("rule: min\nscorers: [{weight: 1}]", r"scorers\[0\].scorer: missing key"),
        ("rule: min\nscorers: [{scorer: temporal_flickering, weight: 1}]", "weight belongs to the rule weighted_sum"),
        (
            "rule: min\nstrength: 1\nscorers: [temporal_flickering]",
            "strength belongs to the rule mean_minus_std, not to 'min'",
        ),
        (
            "rule: min\nquantile: 0.2\nscorers: [temporal_flickering]",
            "^combine: quantile is of a reference's scores, and no scorer has a reference$",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, spread: 0}]",
            r"scorers\[0\].spread: must be greater than 0",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, centre: x}]",
            "centre: must be a valid number, .*, found 'x'",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, centre: .inf}]",
            "centre: must be a finite number, found inf",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, reference: 3}]",
            "reference: Input is not a valid path .*, found 3",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, spred: 1}]",
            r"unknown key 'scorers\[0\].spred'. Choices: centre",
        ),
        (
            "rule: min\nquantile: 2\nscorers: [temporal_flickering]",
            "quantile: must be less than or equal to 1, found 2",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, reference: no.jsonl}]",
            "no such file of reference scores",
        ),
        (
            "rule: min\nscorers: [{scorer: temporal_flickering, centre: 1, reference: no.jsonl}]",
            r"^combine: scorers\[0\]: centre and reference are alternatives$",
        ),
        (
            "rule: min\nstrenght: 1\nscorers: [temporal_flickering]",
            "^combine: unknown key 'strenght'. Choices: name, quantile, rule, scorers, strength$",
        ),
        (
            "rule: 3\nname: 4\nscorers: [motion]",
            "^combine: name: must be a valid string, found 4; rule: must be a valid string, found 3$",
        ),
        ("rule: min\nscorers: [motoin]", "unknown scorer 'motoin'"),
        ("[1]", "expected a mapping of keys, found list"),
        ("{", "not valid YAML"),
    ],
)
def test_files_that_cannot_be_used_are_named(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(text)
    with pytest.raises(ScorerError, match=match):
        reward_scorers.build(f"combine:{tmp_path / 'all.yaml'}")


def test_a_file_gives_the_scorer_its_name(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("rule: min\nscorers: [temporal_flickering, motion_smoothness]")
    assert reward_scorers.build(f"combine:{tmp_path / 'both.yaml'}").name == "combine:both"
    for spec, what in (("combine", "nothing"), ("combine:nowhere.yaml", "nowhere.yaml")):
        with pytest.raises(ScorerError, match=rf"combine: {what}: no such file; expected combine:FILE\.yaml"):
            reward_scorers.build(spec)


def test_files_that_never_end_are_refused(tmp_path: Path) -> None:
    """An ensemble and a trained scorer of themselves, values nested too deeply, and names that no file can have."""
    heads = {"layout": 1, "kind": "linear", "name": "x", "base": f"trained:{tmp_path}", "base_weights": "?", "width": 4}
    (tmp_path / "scorer.json").write_text(json.dumps(heads))
    cases = {
        "self.yaml": f"rule: min\nscorers: ['combine:{tmp_path}/self.yaml']\n",
        "deep.yaml": f"rule: min\nscorers: {'[' * 5000}{']' * 5000}",
    }
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
    specs = [*(f"combine:{tmp_path / name}" for name in cases), f"trained:{tmp_path}"]
    for spec in specs:
        with pytest.raises(ScorerError, match="it is among its own scorers, or nested too deeply"):
            reward_scorers.build(spec)
    for name in ("combine", "trained", "hpsv2.1", "clip:ViT-B-32"):
        with pytest.raises(ScorerError, match="File name too long"):
            reward_scorers.build(f"{name}:{'x' * 5000}")
    with pytest.raises(ScorerError, match=r"scorer\.json: .*memory"):
        load_head(tmp_path, {**heads, "width": 10**13})
