"""The quickstart's own part: what it replaces and when, what it refuses, what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from t2i_align.errors import UserError
from t2i_align.evaluation import sides
from t2i_align.inference import options
from t2i_align.inference.options import resolve_prompts
from t2i_align.quickstart import BATCH_SIZE, MARKER, TEST_SEED, quickstart, replacing
from t2i_align.utils.files import WRITING

SMALL = ["data.limit=8", "train.steps=2", "train.batch_size=4", "optim.warmup_steps=1", "validation.steps=2"]


def written(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def put(folder: Path, text: str) -> None:
    """What a quickstart would leave in `folder`."""
    with replacing(folder) as temporary:
        (temporary / f"{text}.txt").write_text(text)


def test_complete_result_replaces_the_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    put(folder, "first")
    assert written(tmp_path) == {f"runs/a/{MARKER}", "runs/a/first.txt"}
    put(folder, "second")
    assert written(tmp_path) == {f"runs/a/{MARKER}", "runs/a/second.txt"}
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["a"]


@pytest.mark.parametrize("added", ["my_evaluation/report.html", "first.txt.bak", "run/notes.md"])
def test_what_a_user_added_is_not_removed(added: str, tmp_path: Path) -> None:
    put(tmp_path / "a", "first")
    file = tmp_path / "a" / added
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="was not written by the quickstart, which would remove it; move it"):
        put(tmp_path / "a", "second")
    assert written(tmp_path) == {f"a/{MARKER}", "a/first.txt", f"a/{added}"} and file.read_text() == "mine"


def test_an_earlier_result_outlives_a_kill_between_its_renames(tmp_path: Path) -> None:
    put(tmp_path / "a", "first")
    (tmp_path / "a").rename(tmp_path / f"{WRITING}a.old")  # as the kill leaves it
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a"):
        raise KeyboardInterrupt
    assert written(tmp_path) == {f"a/{MARKER}", "a/first.txt"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, UserError])
def test_unfinished_job_leaves_the_earlier_result_and_nothing_else(stop: type[BaseException], tmp_path: Path) -> None:
    put(tmp_path / "a", "first")
    with pytest.raises(stop), replacing(tmp_path / "a") as temporary:
        (temporary / "second.txt").write_text("second")
        assert written(tmp_path / "a") == {MARKER, "first.txt"}
        raise stop("stopped")
    assert written(tmp_path) == {f"a/{MARKER}", "a/first.txt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    put(tmp_path / "a", "second")


def test_folder_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no quickstart"):
        quickstart(output=tmp_path)
    with pytest.raises(UserError, match=r"mine.txt: is a file; expected a folder"):
        quickstart(output=tmp_path / "mine.txt")
    assert written(tmp_path) == {"mine.txt"}
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(UserError, match="this is a mount point"):
        quickstart(output=tmp_path / "volume")


def test_no_prompts_to_compare_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="count must be a whole number of at least 1, found 0"):
        quickstart(count=0, output=tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stesp=3", "train.stesp: unknown key"),
        ("data.path=typo.jsonl", "typo.jsonl: no such file"),
        ("output_dir=elsewhere", "choose that with --output"),
    ],
)
def test_wrong_override_leaves_the_earlier_result(override: str, says: str, tmp_path: Path) -> None:
    put(tmp_path / "a", "first")
    with pytest.raises(UserError, match=says):
        quickstart([override], output=tmp_path / "a", progress=False)
    assert written(tmp_path) == {f"a/{MARKER}", "a/first.txt"}


def test_cpu_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx512: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert options.cpu_computes_bf16() == (avx512 or amx)


@pytest.mark.parametrize(("model", "attention"), [("sd", "math"), ("sd3", "native")])
def test_attention_on_a_cpu_is_one_that_the_model_has(
    model: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    options = [f"model.path=testbed:{model}"]
    quickstart([*SMALL, *options], output=tmp_path / "q", prompts=resolve_prompts("testbed:test")[:2])
    assert yaml.safe_load((tmp_path / "q" / "run" / "run.yaml").read_text())["train"]["attention"] == attention


def test_small_job_runs_and_a_second_one_reuses_the_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = resolve_prompts("testbed:test")[:4]
    folder, sizes, sample = tmp_path / "q", [], sides.sample

    def recorded(*arguments, batch_size, **others):
        sizes.append(batch_size)
        return sample(*arguments, batch_size=batch_size, **others)

    monkeypatch.setattr(sides, "sample", recorded)
    for computes in (False, True):
        monkeypatch.setattr(options, "cpu_computes_bf16", lambda computes=computes: computes)
        result = quickstart(SMALL, output=folder, prompts=prompts)
        trained = yaml.safe_load((folder / "run" / "run.yaml").read_text())["train"]["precision"]
        assert trained == result.settings["precision"] == ("bf16" if computes else "fp32")
    printed = "".join(capsys.readouterr())
    assert f"output     {folder / 'run'}\n" in printed and f"{WRITING}q" not in printed
    values = json.loads((folder / "result.json").read_text())
    for name in ("", "faithfulness_", "quality_"):
        low, high = values[f"{name}win_rate_ci"]
        assert low <= values[f"{name}win_rate"] <= high
    assert values["win_rate"] == result.win_rate
    assert {"mean_before", "mean_after"} <= values.keys()
    assert (values["samples"], values["seed"], values["training_steps"]) == (4, TEST_SEED, 2)
    assert 0 < values["seconds_training"] < values["seconds"]
    assert set(sizes) == {BATCH_SIZE}
    weights = folder / "run" / "lora" / "pytorch_lora_weights.safetensors"
    assert weights.is_file() and values["aligned"] == str(weights)
    html = (folder / "report.html").read_text()
    assert "<html" in html and str(weights) in html
    assert f"output_dir: {folder / 'run'}" in (folder / "run" / "run.yaml").read_text()
    assert f"report: {folder / 'report.html'}" in result.summary()
    for file in filter(Path.is_file, folder.rglob("*")):
        assert f"{WRITING}q".encode() not in file.read_bytes(), f"{file.name} names the temporary folder"
    assert {entry.name for entry in tmp_path.iterdir()} == {"q", "cache"}
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1, "the second job takes the first one's latents"
