"""Optimisers: each trains, and a run with it resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2i_align import align
from t2i_align.config import OptimConfig
from t2i_align.errors import UserError
from t2i_align.training import checkpoint
from t2i_align.training.optimizer import make_optimizer
from tests.runs import run_values, same


@pytest.mark.parametrize(
    ("name", "lr"), [("adafactor", 0.1), ("prodigy", 1.0), ("lion", 0.1), ("adamw8bit_torchao", 0.1)]
)
def test_each_optimiser_approaches_the_minimum(name: str, lr: float) -> None:
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("torchao")
    parameter = torch.nn.Parameter(torch.tensor([3.0, -2.0]).repeat(2048))  # torchao leaves small states as they are
    optimizer = make_optimizer(OptimConfig(optimizer=name, lr=lr, weight_decay=0.0), [parameter])  # type: ignore[arg-type]
    with torch.compiler.set_stance("force_eager"):  # torchao's is compiled, which takes longer than these steps
        for _ in range(200):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
    assert parameter.abs().max() < 0.5
    if "8bit" in name:
        assert {state.codes.dtype for state in list(optimizer.state[parameter].values())[1:]} == {torch.uint8}


def test_eight_bit_states_survive_a_checkpoint(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """Of all weights: states of more than 4096 numbers are kept in 8 bits. Not compiled, which takes minutes."""
    pytest.importorskip("torchao")
    options = {"optim__optimizer": "adamw8bit_torchao", "data__cache_dir": str(tmp_path / "cache"), "lora": None}
    with torch.compiler.set_stance("force_eager"):
        whole = align(run_values(sd_path, pairs, tmp_path / "whole", **options), progress=False)
        values = run_values(sd_path, pairs, tmp_path / "half", **options)
        align(values, progress=False)
        checkpoint.remove(checkpoint.all_steps(tmp_path / "half")[-1])
        half = align({**values, "resume": True}, progress=False)
    ours, theirs = (checkpoint.load(checkpoint.all_steps(run.output_dir)[-1]) for run in (whole, half))
    assert same(ours[0], theirs[0])
    states = [state["exp_avg"] for state in ours[1]["optimizer"]["state"].values()]
    assert any(hasattr(state, "codes") for state in states)


@pytest.mark.parametrize("name", ["adafactor", "prodigy"])
def test_a_run_resumes_with_its_optimiser(name: str, sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    options = {"optim__optimizer": name, "data__cache_dir": str(tmp_path / "cache")}
    whole = align(run_values(sd_path, pairs, tmp_path / "whole", **options), progress=False)
    values = run_values(sd_path, pairs, tmp_path / "half", **options)
    align(values, progress=False)
    checkpoint.remove(checkpoint.all_steps(tmp_path / "half")[-1])  # back to step 2
    half = align({**values, "resume": True}, progress=False)
    ours, theirs = (checkpoint.load(checkpoint.all_steps(run.output_dir)[-1])[0] for run in (whole, half))
    assert same(ours, theirs)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"'lion' needs pytorch_optimizer: pip install 't2i-align\[optimizers\]'"):
        make_optimizer(OptimConfig(optimizer="lion"), [torch.nn.Parameter(torch.zeros(1))])
