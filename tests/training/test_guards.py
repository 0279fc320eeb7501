"""What ends a run early: held-out scores that fall, drift from the reference; and that a resumed run agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from t2i_align import align
from t2i_align.errors import UserError
from t2i_align.training.guards import Best
from t2i_align.training.weights import Weights, older_policy
from tests.objectives.toy import SHORT
from tests.reward_scorers.small import write_hf_clip
from tests.runs import align_killed, metrics, run_values, same

SCORERS = '''
"""The red of an image; and scores that are read from a file, one a call."""
from pathlib import Path

import torch

from reward_scorers import Scorer


class Red(Scorer):
    name, version, differentiable = "red", "1", True

    def rate(self, inputs, prompts):
        red = inputs[:, 0].mean((1, 2))
        return red, {"part": 2 * red}


class Listed(Scorer):
    name, version = "listed", "1"

    def __init__(self, file):
        self.file = Path(file)

    def rate(self, inputs, prompts):
        first, *rest = self.file.read_text().split()
        self.file.write_text(" ".join(rest))
        return torch.full((len(prompts),), float(first))
'''


@pytest.fixture
def scorers(tmp_path: Path) -> str:
    (tmp_path / "scorers.py").write_text(SCORERS)
    return f"{tmp_path}/scorers.py"


def reward_run(model: Path, folder: Path, scorer: str, **changes: Any) -> dict[str, Any]:
    (folder / "prompts.txt").write_text("a cat\na dog. it sleeps.\na red house\n")
    objective = {"name": "reward", **SHORT["reward"], "scorer": scorer}
    return run_values(model, folder / "prompts.txt", folder / "run", objective=objective, **changes)


def test_the_best_of_an_average_is_the_averages() -> None:
    weights = Weights(nn.Linear(1, 1))
    weights.variants["ema"] = average = older_policy(weights)
    best = Best(weights, patience=1)
    assert not best.see("score", 1.0, 5)
    kept = average.tensors["weight"].clone()
    with torch.no_grad():
        average.tensors["weight"].add_(1)
    assert best.see("score", 1.0, 6) == "score has not risen since step 5 (1), now 1"
    before = weights.policy["weight"].clone()
    best.restore()
    assert torch.equal(average.tensors["weight"], kept) and torch.equal(weights.policy["weight"], before)


def test_a_run_ends_when_held_out_scores_fall_and_keeps_the_best_weights(
    sd_path: Path, scorers: str, tmp_path: Path
) -> None:
    (tmp_path / "scores").write_text("0.1 nan 0.5 0.5 0.3 0.9 0.9")
    validation = {"every": 1, "count": 1, "steps": 1, "scorers": [f"{scorers}:Listed:{tmp_path}/scores"], "patience": 2}
    values = reward_run(sd_path, tmp_path, f"{scorers}:Red", validation=validation, train__steps=6)
    values["log"] = {"every": 1, "checkpoint_every": 1, "keep_checkpoints": 9}
    align_killed(values, before=lambda step, _: False, after=lambda step, _: step == 3)
    result = align(values | {"resume": True}, progress=False)
    assert result.steps == 4 and (tmp_path / "scores").read_text() == "0.9 0.9"
    two = {**values, "output_dir": str(tmp_path / "two"), "validation": {}, "train": values["train"] | {"steps": 2}}
    assert same(load_file(result.weights), load_file(align(two, progress=False).weights))
    (last,) = (line for line in metrics(tmp_path / "run") if "ended" in line)
    assert last == {"step": 4, "ended": "validation/listed has not risen since step 2 (0.5), now 0.3"}
    again = align(values | {"resume": True}, progress=False)  # which has nothing left to do
    assert again.steps == 4 and same(load_file(again.weights), load_file(result.weights))


@pytest.mark.parametrize("adapter", ["lora", "model"])
def test_a_run_ends_where_the_policy_has_drifted(adapter: str, sd_path: Path, scorers: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optim__warmup_steps": 0, **({} if adapter == "lora" else {"lora": None})}
    values = reward_run(sd_path, tmp_path, f"{scorers}:Red", objective__drift=True, **changes)
    values |= {"health": {"max_drift": 1e-9}}
    result = align(values, progress=False)
    lines = [line for line in metrics(tmp_path / "run") if "drift" in line]
    assert lines[0]["drift"] == 0 and lines[1]["drift"] > 1e-9 and result.steps == 2
    assert lines[0]["reward/part"] == pytest.approx(2 * lines[0]["reward"], rel=1e-5)
    assert any("ended" in line and "health.max_drift=1e-09" in line["ended"] for line in metrics(tmp_path / "run"))
    assert result.weights.exists()
    free = align({**values, "output_dir": str(tmp_path / "free"), "health": {"max_drift": 1e9}}, progress=False)
    assert free.steps == 4


def test_what_a_scorer_has_averaged_is_resumed(sd_path: Path, tmp_path: Path) -> None:
    clip = write_hf_clip(tmp_path / "clip")
    (tmp_path / "score.yaml").write_text(f"scorer: hf-clip:{clip}\ndirection: ema\ndecay: 0.5\n")
    values = reward_run(sd_path, tmp_path, f"denscore:{tmp_path / 'score.yaml'}", train__batch_size=1)
    whole = align({**values, "output_dir": str(tmp_path / "whole")}, progress=False)
    align_killed(values, before=lambda step, _: False, after=lambda step, _: step == 2)
    resumed = align(values | {"resume": True}, progress=False)
    assert same(load_file(whole.weights), load_file(resumed.weights))
    assert metrics(tmp_path / "run")[-1]["reward/irrelevant"] == metrics(tmp_path / "whole")[-1]["reward/irrelevant"]


def test_guards_that_cannot_watch_are_refused(path: Callable[[str], Path], scorers: str, tmp_path: Path) -> None:
    red = f"{scorers}:Red"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"validation__patience": 2}, r"validation\.patience needs validation\.every and a scorer"),
        ({"health__max_drift": 0.1}, r"health\.max_drift: reward measures no drift.*; set objective\.drift=true"),
        ({"objective__drift": True, "lora": None, "soft_tokens": {}}, "soft_tokens serve objectives without"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            align(reward_run(path("sd"), tmp_path, red, **changes), progress=False)
    sft = {**reward_run(path("sd"), tmp_path, red, health__max_drift=0.1), "objective": {"name": "sft"}}
    with pytest.raises(UserError, match=r"sft measures no drift from a reference$"):
        align(sft, progress=False)
    with pytest.raises(UserError, match=r"objective\.guidance must be 1 for flux, .* distilled, found 2"):
        align(reward_run(path("flux"), tmp_path, red), progress=False)
