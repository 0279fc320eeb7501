"""What a run tells while it trains: lines, log, metrics of time, held-out preferences, samples, trackers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_align import align
from t2i_align.errors import UserError
from t2i_align.training.output import write_settings
from t2i_align.training.result import RunResult
from t2i_align.utils.progress import progress_bar
from tests.runs import jsonl_pairs, metrics, run_values


def test_redirected_output_is_a_plain_line_per_logged_step_and_so_is_the_log(
    sd_path: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 pairs, 4 a step: step 3 ends the first pass."""
    values = run_values(sd_path, pairs, tmp_path / "run", train__steps=6, log__every=3, optim__lr=1e-4)
    before = time.time()
    result = align(values)
    captured = capsys.readouterr()
    output, log = captured.out + captured.err, (tmp_path / "run/run.log").read_text()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 3/6", "step 6/6"]
    assert all(line in log for line in lines) and "objective  diffusion_dpo" in log
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert lines[-1].startswith(
        f"step 6/6: loss {last['loss']:.4f}, accuracy {last['rewards/accuracies']:.3g}, margin "
    )
    assert "lr 0.0001, passes 2, " in lines[-1] and "s/step, 00:00 left" in lines[-1]
    assert "train:" not in output, "a bar was drawn"
    assert last["epoch"] == 2.0 and before < last["time"] < time.time()
    assert 0 < last["seconds_per_step"] < 60 and 0.1 < last["memory_gib"] < 100
    assert result.next.startswith(f"to measure it: t2i-align evaluate --aligned {tmp_path / 'run'} --prompts ")
    with pytest.raises(UserError):
        align({**values, "train": {**values["train"], "steps": 3}, "resume": True}, progress=False)
    log = (tmp_path / "run/run.log").read_text()
    assert "stopped: " in log
    with pytest.raises(UserError, match="holds a run already"):
        align(values, progress=False)
    assert (tmp_path / "run/run.log").read_text() == log, "another run's refusal is not this one's"


@pytest.mark.parametrize(
    ("model", "measured", "looked_at"),
    [
        ("testbed:wan", "testbed:video-test --scorers motion_oracle", "a red circle moving to the left"),
        ("testbed:sd3", "testbed:test --scorers oracle", "a red circle above a blue square"),
        ("some/model", "held_out_prompts.txt --scorers pickscore", "a red fox"),
    ],
)
def test_next_commands_are_of_the_model_that_was_trained(
    model: str, measured: str, looked_at: str, tmp_path: Path
) -> None:
    write_settings(tmp_path, {"model": {"path": model}, "validation": {"data": None}})
    result = RunResult(output_dir=tmp_path, weights=tmp_path / "lora", steps=1, metrics={})
    assert f"--prompts {measured} " in result.next and f"--prompt '{looked_at}'" in result.next


def test_bars_are_lines_where_the_output_is_redirected(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=3, desc="encode", unit="row") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "\r" not in "".join(lines)
    assert "encode:   0%" in lines[0] and "encode: 100%" in lines[1] and "3/3" in lines[1]


def test_held_out_preferences_are_measured_with_the_same_noise(
    sd_path: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the reference the loss is log 2; the numbers depend on the model, not on batch size or dropout."""
    other = jsonl_pairs(tmp_path / "other", 6)
    other.write_text(other.read_text().replace('"prompt ', '"another '))
    validation = {"every": 2, "data": str(other), "pairs": 10, "count": 0}
    found = []
    for name, size in (("a", 4), ("b", 8)):
        changes = {"train__batch_size": size, "train__accumulate": 8 // size, "optim__lr": 1e-2, "lora__dropout": 0.2}
        values = run_values(sd_path, pairs, tmp_path / name, validation=validation, **changes)
        values["data"]["cache_dir"] = str(tmp_path / "cache")
        with caplog.at_level(logging.WARNING):
            align(values, progress=False)
        found.append([line for line in metrics(tmp_path / name) if "held_out/loss" in line])
        assert not list((tmp_path / name).glob("validation/*.png"))
    assert [line["step"] for line in found[0]] == [0, 2, 4] and "also trained on" not in caplog.text
    assert found[0][0]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0][0]["held_out/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert found[0][1]["held_out/loss"] != found[0][2]["held_out/loss"]
    share = found[0][2]["held_out/rewards/accuracies"] * 10
    assert share == pytest.approx(round(share)) and 0 <= share <= 10
    assert found[0][0].keys() == found[1][0].keys() and not any("/t" in name for name in found[0][0])
    for name, value in found[0][0].items():
        assert value == pytest.approx(found[1][0][name], abs=1e-5), name


def test_held_out_prompts_that_are_trained_on_are_reported(
    sd_path: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation = {"every": 1, "data": str(pairs), "pairs": 2, "count": 0}
    align(run_values(sd_path, pairs, tmp_path / "run", train__steps=1, validation=validation), progress=False)
    assert "5 of its 5 prompts are also trained on, as 'prompt 0'" in caplog.text
    with pytest.raises(UserError, match=r"validation.data is measured every validation.every steps, which is 0"):
        align(run_values(sd_path, pairs, tmp_path / "no", validation={"data": str(pairs)}), progress=False)


def test_samples_are_of_the_runs_own_prompts_with_the_base_beside_them(
    sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 distinct prompts in 2 columns of pairs; samples of 32 pixels are shown 6 times as large.

    Trackers get them as well, with the settings; W&B, where it is installed, without its server.
    """
    values = run_values(sd_path, pairs, tmp_path / "run", validation={"every": 4, "steps": 1}, optim__lr=1e-1)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = importlib.util.find_spec("wandb") is not None
    values["log"]["trackers"] = ["tensorboard", *(["wandb"] if wandb else [])]
    folder = align(values, progress=False).output_dir / "validation"
    prompts = json.loads((folder / "before/samples.json").read_text())["prompts"]
    assert sorted(prompts) == [f"prompt {i}" for i in range(5)]
    sheet = Image.open(folder / "step_000004.png")
    assert sheet.size == (2 * (2 * 200 + 8) + 8, 30 + 3 * (200 + 3 * 17 + 8))
    before = Image.open(folder / "before/00000.png").resize((192, 192), Image.Resampling.NEAREST)
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels[30:222, 8:200], np.asarray(before))
    assert not np.array_equal(pixels[30:222, 208:400], np.asarray(before)), "training changed nothing"
    assert (pixels[222:270, 8:400] < 128).any(), "no prompt below"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = {
        file.parent for file in (tmp_path / "run").rglob("events.out.tfevents.*") if file.parent.name == "t2i-align"
    }
    events = EventAccumulator(str(log)).Reload()
    assert [image.step for image in events.Images("validation")] == [0, 4]
    assert "train.steps: 4" in "".join(file.read_text() for file in log.rglob("hparams.yml"))
    if wandb:
        (file,) = (tmp_path / "run" / "wandb").rglob("*.wandb")
        assert b"train.steps" in file.read_bytes() and b"rewards/margins" in file.read_bytes()
        assert len([*file.parent.rglob("validation*.png")]) == 2
