"""A run's page: what it draws, what it advises, and that it is there while the run trains."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from t2i_align import align
from t2i_align.training.report import SHOWN, advice, curves, shown, write_report
from tests.cli.test_cli import called
from tests.runs import jsonl_pairs, run_values


def history(**metrics: list[float]) -> list[dict[str, Any]]:
    """A line for each value, ten steps apart; `error__chosen` stands for error/chosen."""
    rows = zip(*metrics.values(), strict=True)
    names = [name.replace("__", "/") for name in metrics]
    return [{"step": 10 * number, **dict(zip(names, row, strict=True))} for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (history(error__chosen=[1.0, 1.1], error__chosen_minus_reference=[0, 0.1],
                 error__rejected_minus_reference=[0, 0.2]), "denoised 10% worse .* losers worse still"),
        (history(rewards__accuracies=[0.5] * 8), "Only 50% of the pairs"),
        (history(rewards__accuracies=[0.5, 0.7, 0.99, 0.99]), "99% of the training pairs .* by heart"),
        (history(validation__oracle=[0.5, 0.7, 0.5]), r"validation/oracle was best at step 10 \(0.7\) and is 0.5 at"),
        (history(held_out__loss=[0.69, 0.6, 0.8]), r"held_out/loss was best at step 10 \(0.6\) and is 0.8 at step 20"),
        ([{"step": 4, "rollback": 1, "diverged_at": 9}], "diverged and went back .* 1 times, last from step 9"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(lines: list[dict[str, Any]], expected: str) -> None:
    (text,) = advice(lines)
    assert re.search(expected, text)


def test_a_healthy_run_needs_no_advice() -> None:
    """Both errors fall, accuracy rises to 70 %, and the samples' score rises with a little noise."""
    rising = [0.5, 0.6, 0.66, 0.7, 0.69]
    falling = [-0.01 * i for i in range(5)]
    both = {f"error__{side}_minus_reference": falling for side in ("chosen", "rejected")}
    lines = history(rewards__accuracies=rising, validation__oracle=rising, error__chosen=[0.2] * 5, **both)
    assert advice(lines) == []


def test_winner_and_loser_are_apart_and_margins_are_split_by_time() -> None:
    late = {
        "step": 20,
        "rewards/margins/t0-250": 1.0,
        "rewards/margins/t750-1000": 2.0,
        "validation/clip": 0.3,
        "validation/clip/part": 0.1,
    }
    lines = [*history(rewards__chosen=[0, 1], rewards__rejected=[0, -1], loss=[0.7, 0.6]), late]
    drawn = curves(lines)
    assert drawn["Implicit reward"] == {"winner": [(0, 0), (10, 1)], "loser": [(0, 0), (10, -1)]}
    assert drawn["Margin by timestep (1000: noise)"] == {"0-250": [(20, 1.0)], "750-1000": [(20, 2.0)]}
    assert drawn["Samples by clip"] == {"score": [(20, 0.3)]} and drawn["Parts by clip"] == {"part": [(20, 0.1)]}


def test_first_and_last_validation_are_among_the_shown() -> None:
    files = [Path(f"step_{i}.png") for i in range(40)]
    assert len(shown(files)) == SHOWN and shown(files)[0] == files[0] and shown(files)[-1] == files[-1]
    assert shown(files[:3]) == files[:3]


def test_the_page_follows_a_run_and_its_commands_parse(
    sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {"every": 2, "steps": 1, "guidance": 1.0, "count": 2}
    run, pages = tmp_path / "run", []
    file = run / "report.html"
    align(
        run_values(sd_path, jsonl_pairs(tmp_path / "data", 4), run, validation=validation),
        on_step=lambda step, metrics: pages.append(file.read_text()),
        progress=False,
    )
    assert "At step 0 of 4" in pages[0] and 'http-equiv="refresh"' in pages[0]
    assert "At step 2 of 4" in pages[2] and "step 2</b>" in pages[2]
    page = file.read_text()
    assert "Trained 4 of 4 steps" in page and "refresh" not in page
    assert page.count("data:image/png") == 3 and "step 0</b> (base)" in page  # of steps 0, 2 and 4
    assert "http" not in page.replace("http-equiv", "")
    commands = re.findall(r"<pre>t2i-align (.*)</pre>", html.unescape(page))
    assert [command.split()[0] for command in commands] == ["evaluate", "generate", "export-lora"]
    for command in commands:
        assert called(shlex.split(command), monkeypatch)
    before = file.read_bytes()
    assert write_report(run).read_bytes() == before
