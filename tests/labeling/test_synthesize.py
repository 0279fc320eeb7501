"""Preferences from prompts: a genuine tiny model draws, two plain scorers judge; the rest is checked by hand."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from reward_scorers import Scorer, ScorerError, registry
from t2i_align.cli import main
from t2i_align.data.readers import read
from t2i_align.data.schema import Group
from t2i_align.data.votes import majority, shares
from t2i_align.errors import UserError
from t2i_align.labeling import synthesize as module
from t2i_align.labeling.groups import Summary
from t2i_align.labeling.synthesize import synthesize
from t2i_align.utils.files import whole_lines

PROMPTS = ["a red fox", "a blue owl", "a red fox", "unspeakable", "a green dog"]


class Channel(Scorer):
    """The mean of one colour channel."""

    version = "1"

    def __init__(self, channel: int, margin: float = 0.0) -> None:
        self.channel, self.name, self.tie_margin = channel, f"channel-{channel}", margin

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if "unspeakable" in prompts:
            raise ScorerError("not a prompt for this scorer")

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels[:, self.channel].mean((1, 2))


def make(out: Path, model: Path, **options: Any) -> Summary:
    options = {"per_prompt": 3, "steps": 1, "guidance": 1.0, "height": 32, "width": 32, **options}
    return synthesize(PROMPTS, [model], [Channel(0), Channel(2)], out, progress=False, **options)


@pytest.fixture(scope="module")
def synthesis(tmp_path_factory: pytest.TempPathFactory, sd_path: Path) -> Path:
    out = tmp_path_factory.mktemp("synthesis")
    summary = Summary(out=out / "groups.jsonl", groups=3, skipped=1, why_skipped=out / "skipped.jsonl")
    assert make(out, sd_path) == summary
    return out


def test_groups_record_scorers_seeds_and_models(synthesis: Path) -> None:
    groups = whole_lines(synthesis / "groups.jsonl")
    assert [row["prompt"] for row in groups] == ["a red fox", "a blue owl", "a green dog"]  # each distinct one once
    assert whole_lines(synthesis / "skipped.jsonl")[0]["reason"] == "not a prompt for this scorer"
    for row in groups:
        raw = np.array([row["by_scorer"][name]["scores"] for name in ("channel-0", "channel-2")])
        assert row["scores"] == pytest.approx(majority(raw).tolist()) and len(set(row["seeds"])) == 3
        assert len({json.dumps(model) for model in row["models"]}) == 1 and len(row["models"][0]["sha256"]) == 16
    read_back = list(read(synthesis / "groups.jsonl"))
    assert all(isinstance(group, Group) and len(group.candidates) == 3 for group in read_back)


def test_existing_images_and_scores_are_kept(synthesis: Path, sd_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image and the scores lost, another image cut: two are drawn, and the result is the same, byte for byte."""
    before = (synthesis / "groups.jsonl").read_bytes()
    drawn: list[int] = []
    genuine = module.sample
    monkeypatch.setattr(module, "sample", lambda *a, **k: drawn.append(len(a[1])) or genuine(*a, **k))
    (synthesis / "groups.jsonl").unlink()
    (synthesis / "scores.jsonl").write_bytes((synthesis / "scores.jsonl").read_bytes()[:-9])
    (synthesis / "images" / "000001" / "0-2.png").unlink()
    os.truncate(synthesis / "images" / "000000" / "0-1.png", 0)
    make(synthesis, sd_path)
    assert sum(drawn) == 2 and (synthesis / "groups.jsonl").read_bytes() == before
    make(synthesis, sd_path)
    assert sum(drawn) == 2
    with pytest.raises(UserError, match=r"begun with other settings: steps is 1 there, 2 here"):
        make(synthesis, sd_path, steps=2)


@pytest.mark.parametrize("instant", [0, 1, 2, 6, 11, 12])
def test_a_kill_at_any_file_leaves_a_folder_that_continues(
    instant: int, tmp_path: Path, synthesis: Path, sd_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before settings.json (0), model-0.json (1), an image (2-10), skipped.jsonl (11) or groups.jsonl (12) is there."""

    class Kill(BaseException):
        pass

    replaced, replace = itertools.count(), os.replace

    def killed(*paths: Any) -> None:
        if next(replaced) == instant:
            raise Kill
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *args, **options: None)  # a kill cleans nothing up
        make(tmp_path, sd_path)
    assert any(file.name.startswith(".writing_") for file in tmp_path.rglob("*"))
    assert make(tmp_path, sd_path).groups == 3
    for alone, continued in zip(*(whole_lines(out / "groups.jsonl") for out in (synthesis, tmp_path)), strict=True):
        assert alone["seeds"] == continued["seeds"] and alone["scores"] == continued["scores"]


def test_processes_share_the_prompts(
    tmp_path: Path, synthesis: Path, sd_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes every second prompt; the one that finds all done writes what a single one writes."""
    monkeypatch.setattr(module, "BLOCK", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert make(tmp_path, sd_path).missing == 2 and not (tmp_path / "groups.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    assert make(tmp_path, sd_path).groups == 3
    alone, shared = whole_lines(synthesis / "groups.jsonl"), whole_lines(tmp_path / "groups.jsonl")
    assert [row["seeds"] for row in alone] == [row["seeds"] for row in shared]
    for one, other in zip(alone, shared, strict=True):  # batches differ, and with them the last bits of an image
        for name, scored in one["by_scorer"].items():
            assert scored["scores"] == pytest.approx(other["by_scorer"][name]["scores"], abs=0.01)


def test_pairs_need_agreement_of_the_scorers(synthesis: Path, sd_path: Path) -> None:
    groups = whole_lines(synthesis / "groups.jsonl")
    agreed = 0
    for row in groups:
        raw = np.array([scored["scores"] for scored in row["by_scorer"].values()])
        agreed += int((shares(raw) == 1).sum())
    summary = make(synthesis, sd_path, pairs="all", agree=0.75)
    pairs = whole_lines(synthesis / "groups.jsonl")
    assert summary.groups == len(pairs) == agreed and summary.skipped == 1 + 9 - agreed
    for row in pairs:
        assert row["id"].count("#") == 1 and row["scores"][0] > row["scores"][1]
        assert all(scored["scores"][0] > scored["scores"][1] for scored in row["by_scorer"].values())
    make(synthesis, sd_path)
    assert whole_lines(synthesis / "groups.jsonl") == groups
    with pytest.raises(UserError, match="no group is left of 4 prompts"):
        synthesize(PROMPTS, [sd_path], [Channel(0, 2.0), Channel(2, 2.0)], synthesis.parent / "never", per_prompt=2,
                   steps=1, guidance=1.0, height=32, width=32, agree=0.9, progress=False)  # fmt: skip


def test_command(
    tmp_path: Path, sd_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry.FACTORIES, "channel", lambda argument: Channel(int(argument)))
    (tmp_path / "prompts.txt").write_text("a red fox\na blue owl\n")
    command = f"synthesize {tmp_path}/prompts.txt --models {sd_path} --scorers channel:0,channel:2 --out {tmp_path}/out"
    assert main([*command.split(), *"--per-prompt 2 --steps 1 --height 32 --width 32 --guidance 1".split()]) == 0
    assert f"2 groups in {tmp_path / 'out' / 'groups.jsonl'}, 0 skipped" in capsys.readouterr().out


def test_video_models_are_refused(tmp_path: Path, sd_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = module.load_pipeline

    def video(*args: Any) -> Any:
        pipeline = genuine(*args)
        pipeline.video = True
        return pipeline

    monkeypatch.setattr(module, "load_pipeline", video)
    with pytest.raises(UserError, match="this model makes clips"):
        make(tmp_path / "out", sd_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"per_prompt": 1}, "make 2 candidates or more"),
        ({"pairs": "some"}, "unknown pairs 'some'"),
        ({"agree": 1.5}, r"agree must lie in \[0, 1\]"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, sd_path: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make(tmp_path / "out", sd_path, **options)
    assert not (tmp_path / "out").exists()


def test_foreign_folder_is_refused(tmp_path: Path, sd_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no synthesis"):
        make(tmp_path, sd_path)
