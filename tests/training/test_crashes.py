"""What befalls a run from outside: kills, signals, a full disk, damaged files, a base model that changes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_align import align
from t2i_align.errors import UserError
from t2i_align.training import checkpoint
from tests.runs import launch, lora_of, metrics, run_values, same


def newest(output: Path) -> int:
    steps = checkpoint.all_steps(output)
    return int(steps[-1].name[5:]) if steps else -1


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)


def end_of(process: subprocess.Popen) -> str:
    """The output of a process that ends soon."""
    output, _ = process.communicate(timeout=120)
    return output


# Kills and signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "objective"),
    [
        (signal.SIGKILL, {"name": "diffusion_dpo", "beta": 100.0, "target_gradient": 0.3}),
        (signal.SIGINT, {"name": "lcpo", "beta": 100.0, "rate": 0.3}),
    ],
)
def test_killed_run_resumes_bit_for_bit(
    number: signal.Signals, objective: dict, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    """LoRA dropout, averaging, the objective's state, log windows that straddle checkpoints: all are restored."""
    options = {
        "objective": objective,
        "train__steps": 60, "log__every": 4, "log__checkpoint_every": 5, "lora__dropout": 0.1, "optim__ema": 0.9,
        "optim__schedule": "cosine", "data__cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    uninterrupted = align(run_values(sd_path, pairs, tmp_path / "whole", **options), progress=False)
    values = run_values(sd_path, pairs, tmp_path / "killed", **options)
    process = launch(values, tmp_path)
    wait_for(process, lambda: newest(tmp_path / "killed") >= 10)
    process.send_signal(number)
    output = end_of(process)
    assert process.returncode != 0 and 10 <= newest(tmp_path / "killed") < 60, "the run had ended before"
    if number == signal.SIGINT:
        assert "Traceback" not in output and "resume=true" in output
    resumed = align({**values, "resume": True}, progress=False)
    assert resumed.steps == 60
    assert same(lora_of(resumed.output_dir), lora_of(uninterrupted.output_dir))
    assert metrics(resumed.output_dir) == metrics(uninterrupted.output_dir)


LONG = {"train__steps": 100000, "log__every": 1, "log__checkpoint_every": 100000}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_whole_group_twice_lets_the_step_finish_and_save(
    number: signal.Signals, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    """As `timeout`, service managers and a closed terminal send it: also to the loader's workers, and once more."""
    values = run_values(sd_path, pairs, tmp_path / "run", data__workers=2, **LONG)
    process = launch(values, tmp_path, start_new_session=True)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    for _ in range(2):
        os.killpg(process.pid, number)
        time.sleep(0.02)
    output = end_of(process)
    assert process.returncode == 130 and "Traceback" not in output and "interrupted" in output, output
    assert newest(tmp_path / "run") == metrics(tmp_path / "run")[-1]["step"] > 0


def test_ignored_hangup_stays_ignored(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """As under `nohup`."""
    values = run_values(sd_path, pairs, tmp_path / "run", **LONG)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch(values, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    steps = lambda: len(metrics(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0  # noqa: E731
    wait_for(process, lambda: steps() > 1)
    process.send_signal(signal.SIGHUP)
    seen = steps()
    wait_for(process, lambda: steps() > seen + 2)
    process.kill()
    end_of(process)


def test_two_processes_stop_together_at_once_where_one_gets_a_signal(
    sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    """Long before the next line or checkpoint; both save and leave."""
    rare = {**LONG, "log__every": 100000, "train__batch_size": 1}
    process = launch(run_values(sd_path, pairs, tmp_path / "run", **rare), tmp_path, processes=2)
    wait_for(process, lambda: newest(tmp_path / "run") == 0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(1)
    os.kill(int(children[1]), signal.SIGTERM)
    output = end_of(process)
    assert output.count("interrupted: stopped after step") == 2, output
    assert 0 < newest(tmp_path / "run") < 1000


# Damage ---------------------------------------------------------------------------------------------------------------


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    file.write_bytes(content)


def exchange(name: str) -> Callable[[Path], None]:
    """A file, or all, of the checkpoint before."""

    def damage(folder: Path) -> None:
        for file in filter(Path.is_file, (folder.parent / "step_000002").glob(name)):
            shutil.copy(file, folder / file.name)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_a_bit(folder / "weights.safetensors"), "weights.safetensors changed after"),
        (lambda folder: flip_a_bit(folder / "state.pt"), "damaged checkpoint"),
        (
            lambda folder: flip_a_bit(folder / "lora/pytorch_lora_weights.safetensors"),
            "lora/pytorch_lora_weights.safetensors changed after",
        ),
        (lambda folder: (folder / "sha256.json").write_text("{}"), "weights.safetensors and state.pt changed after"),
        (exchange("weights.safetensors"), "weights.safetensors changed after"),
        (exchange("state.pt"), "it is of step 2"),
        (exchange("*"), "it is of step 2"),
        (lambda folder: (folder / "state.pt").write_bytes(b"half"), "damaged checkpoint"),
        (lambda folder: torch.save([1], folder / "state.pt"), "damaged checkpoint"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "damaged checkpoint"),
        (lambda folder: (folder / "sha256.json").write_text("[]"), "damaged checkpoint"),
    ],
)
def test_damaged_checkpoint_is_named(
    damage: Callable[[Path], None], message: str, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run / "checkpoints" / "step_000004")
    with pytest.raises(UserError, match=r"step_000004: damaged checkpoint \(.*Remove this folder") as error:
        checkpoint.load(checkpoint.all_steps(run)[-1])
    assert message in str(error.value)


@pytest.fixture(scope="module")
def finished(sd_path: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with checkpoints at 2 and 4."""
    return align(run_values(sd_path, pairs, tmp_path_factory.mktemp("finished") / "run"), progress=False).output_dir


def test_checkpoint_of_another_version_is_named(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "checkpoints" / "step_000004", tmp_path / "step_000004")
    torch.save({**torch.load(folder / "state.pt", weights_only=True), "layout": 1}, folder / "state.pt")
    with pytest.raises(UserError, match="step_000004: written by another version"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.yaml", b"", "run.yaml: expected a run's settings, found NoneType"),
        ("run.yaml", b"[1, 2]", "run.yaml: expected a run's settings, found list"),
        ("run.yaml", b"a: [", "run.yaml: not valid YAML"),
        ("run.yaml", b"\xff\xfe\x00", "run.yaml: not UTF-8"),
        ("metrics.jsonl", b'{"loss": 1.0}\n', "metrics.jsonl, line 1: 'step' must be a whole number, found None"),
        ("metrics.jsonl", b'{"step": 1}\n{"step": "2"}\n', "metrics.jsonl, line 2: 'step' must be .*found '2'"),
        ("metrics.jsonl", b"7\n", "metrics.jsonl, line 1: expected an object, found int"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl, line 1: not valid JSON"),
        ("metrics.jsonl", None, "metrics.jsonl: cannot be read: Is a directory"),
        ("run.yaml", None, "folder is not empty and holds no run"),
    ],
)
def test_damaged_file_of_a_run_is_named(
    file: str, content: bytes | None, message: str, sd_path: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / file).unlink()
    (run / file).write_bytes(content) if content is not None else (run / file).mkdir()
    with pytest.raises(UserError, match=message):
        align({**run_values(sd_path, pairs, run), "resume": True}, progress=False)


def test_run_does_not_continue_on_other_base_weights(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    for trained in ({}, {"lora": None, "optim__lr": 1e-5}):
        model = shutil.copytree(sd_path, tmp_path / f"model{len(trained)}")
        values = run_values(model, pairs, tmp_path / f"run{len(trained)}", **trained)
        align(values, progress=False)
        again = {**values, "resume": True, "train": {**values["train"], "steps": 5}}
        assert align(again, progress=False).steps == 5
        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: 0.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(UserError, match=r"the base model has changed since step_000005 was saved"):
            align({**again, "train": {**again["train"], "steps": 6}}, progress=False)


@pytest.mark.parametrize("cache", [True, False])
def test_run_does_not_continue_with_other_encoders(cache: bool, sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    model = shutil.copytree(sd_path, tmp_path / "model")
    values = run_values(model, pairs, tmp_path / "run", data__cache=cache, train__steps=1)
    align(values, progress=False)
    file = model / "text_encoder" / "model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"the data has changed since step_000001 was saved"):
        align({**values, "resume": True}, progress=False)


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file may become larger than this, which each library reports as it reports a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("weights", "state"), [(100_000, 10), (10, 100_000)])
def test_full_disk_under_a_checkpoint_leaves_nothing_half_written(weights: int, state: int, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}, {}, keep=2)
    with full_disk(50_000), pytest.raises(UserError, match="step_000002: the checkpoint could not be written; earlier"):
        checkpoint.save(tmp_path, 2, {"a": torch.ones(weights)}, {"b": torch.ones(state)}, keep=2)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    assert checkpoint.load(folder)[0]["a"].tolist() == [1, 1]


def test_full_disk_under_the_final_weights_is_named(finished: Path, sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """Of a resumed run that has nothing left to train."""
    cache = {"data__cache_dir": str(finished.parent / "cache")}
    values = run_values(sd_path, pairs, shutil.copytree(finished, tmp_path / "run"), resume=True, **cache)
    before = lora_of(tmp_path / "run")
    with full_disk(6000), pytest.raises(UserError, match=r"run/lora: could not be written; resume=true writes it anew"):
        align(values, progress=False)
    assert same(lora_of(tmp_path / "run"), before)


def test_half_deleted_checkpoint_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [checkpoint.save(tmp_path, step, {"a": torch.ones(2)}, {}, keep=2) for step in (1, 2)]
    real = os.unlink

    def unlink(path: str, **options: object) -> None:
        real(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", unlink)
        checkpoint.save(tmp_path, 3, {"a": torch.ones(2)}, {}, keep=2)
    left = checkpoint.all_steps(tmp_path)
    assert [folder.name for folder in left] == ["step_000002", "step_000003"] and kept[1] in left
    for folder in left:
        checkpoint.load(folder)


@pytest.mark.parametrize("trained", ["lora", "model"])
def test_a_run_that_is_stopped_leaves_what_it_trained(trained: str, sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """With one checkpoint only, that of the signal."""
    changes = {**LONG, **({"lora": None, "optim__lr": 1e-5} if trained == "model" else {})}
    process = launch(run_values(sd_path, pairs, tmp_path / "run", **changes), tmp_path)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    output = end_of(process)
    assert process.returncode == 130, output
    weights = checkpoint.load(checkpoint.all_steps(tmp_path / "run")[-1])[0]
    if trained == "lora":
        saved = {name.removeprefix("unet."): tensor for name, tensor in lora_of(tmp_path / "run").items()}
        own = {name.replace(".default", ""): tensor for name, tensor in weights.items()}
        assert saved.keys() == own.keys() and any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    else:
        assert same(load_file(tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors"), weights)
