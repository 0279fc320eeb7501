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


@pytest.mark.parametrize(("name", "lr"), [("adafactor", 0.1), ("prodigy", 1.0), ("lion", 0.1)])
def test_each_optimiser_approaches_the_minimum(name: str, lr: float) -> None:
    pytest.importorskip("pytorch_optimizer")
    parameter = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make_optimizer(OptimConfig(optimizer=name, lr=lr, weight_decay=0.0), [parameter])  # type: ignore[arg-type]
    for _ in range(200):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.5


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
