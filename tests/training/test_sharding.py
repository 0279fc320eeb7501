"""Runs under FSDP2, on CPUs with gloo: the losses of one process, checkpoints for any number of them."""

from __future__ import annotations

import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file

from t2i_align import align
from t2i_align.config import from_mapping
from t2i_align.errors import UserError
from t2i_align.inference.models import load_pipeline
from t2i_align.training import checkpoint, sharding
from tests.runs import metrics, run_values, start_processes

LORA = "pytorch_lora_weights.safetensors"


def losses(output: Path) -> list[float]:
    return [line[name] for line in metrics(output) for name in ("loss", "grad_norm", "update_norm") if name in line]


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-3)


def test_two_processes_that_share_the_weights_train_as_one(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """With all that puts other weights in place of the policy's: an average, an older reference, a drawing of it."""
    changes: dict[str, Any] = {
        "optim__ema": 0.9, "train__reference_update": {"every": 2, "max_drift": 1.0},
        "train__gradient_checkpointing": True,
        "validation": {"every": 4, "count": 1, "steps": 2, "data": str(pairs), "pairs": 4},
    }  # fmt: skip
    align(run_values(sd_path, pairs, tmp_path / "one", **changes), progress=False)
    two = run_values(sd_path, pairs, tmp_path / "two", train__batch_size=2, train__shard=True, **changes)
    finish(start_processes(two, 2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    held_out = [
        [line["held_out/loss"] for line in metrics(tmp_path / n) if "held_out/loss" in line] for n in ("one", "two")
    ]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-3)
    steps = checkpoint.all_steps(tmp_path / "two")
    assert [len(list((step / "shards").glob("*.distcp"))) for step in steps] == [2, 2]
    for place in ("lora", f"checkpoints/{steps[0].name}/lora"):
        assert_close(*(load_file(tmp_path / name / place / LORA) for name in ("one", "two")))

    shutil.copytree(tmp_path / "two", tmp_path / "again")
    checkpoint.remove(tmp_path / "again" / "checkpoints" / steps[1].name)
    align(
        {**two, "output_dir": str(tmp_path / "again"), "train": {**two["train"], "batch_size": 4}, "resume": True},
        progress=False,
    )
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)
    assert_close(*(load_file(tmp_path / name / "lora" / LORA) for name in ("again", "two")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kills"),
    [({}, [(2, 4), (2, 1)]), ({"lora": None}, [(4, 2), (1, 2)])],
    ids=["lora", "full"],
)
def test_one_two_and_four_processes_and_a_kill(
    changes: dict[str, Any], kills: list[tuple[int, int]], sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    """DDP and FSDP2 train as one process; killed at once and resumed on another number, so does a run of FSDP2."""

    def values(name: str, processes: int, shard: bool, **others: Any) -> dict[str, Any]:
        sizes = {"train__batch_size": 4 // processes, "train__shard": shard, "train__steps": 6}
        return run_values(sd_path, pairs, tmp_path / name, **sizes, **changes, **others)

    def run(name: str, processes: int, shard: bool, **others: Any) -> list[float]:
        finish(start_processes(values(name, processes, shard, **others), processes))
        return losses(tmp_path / name)

    expected = run("one", 1, False)
    for shard in (False, True):
        for processes in (2, 4):
            assert run(f"{processes}{shard}", processes, shard) == pytest.approx(expected, rel=1e-3)
    for before, after in kills:
        name = f"{before}_{after}"
        started = start_processes(values(name, before, True), before)
        while not checkpoint.all_steps(tmp_path / name)[1:] and all(process.is_alive() for process in started):
            time.sleep(0.02)
        for process in started:
            process.kill()
            process.join()
        assert checkpoint.all_steps(tmp_path / name)[-1].name != "step_000006", "killed too late"
        assert run(name, after, True, resume=True) == pytest.approx(expected, rel=1e-3)
    if "lora" in changes:  # a checkpoint of shards is a model, too
        whole, sharded = (load_pipeline(checkpoint.all_steps(tmp_path / name)[-1]) for name in ("one", "4True"))
        assert_close(whole.denoiser.state_dict(), sharded.denoiser.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"train__compile": True}, {"train__precision": "fp16"}, {"train__reference": "offloaded_copy"},
        {"model__quantize": "int8"}, {"optim__optimizer": "adafactor"},
        {"objective": {"name": "inpo"}}, {"objective": {"name": "ncp_dpo"}},
        {"objective": {"name": "sft"}, "lora": None, "soft_tokens": {}},
        {"validation": {"every": 1, "scorers": ["oracle"], "patience": 1}},
    ],
)  # fmt: skip
def test_what_does_not_go_with_shared_weights_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not work with sharded weights \(FSDP2\)"):
        sharding.check(from_mapping(run_values(tmp_path, tmp_path, tmp_path / "run", **changes)))


def test_other_engines_are_refused(sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run")
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="launched as DEEPSPEED, expected one process or"),
    ):
        patch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
        align(values, progress=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="launched as FSDP 1, expected FSDP2: fsdp_version: 2"):
        align(values, progress=False)
