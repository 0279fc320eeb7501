"""Runs that diverge: seen, rolled back, continued, and stopped when that does not help."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align import align
from t2i_align import config as configuration
from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import Metrics
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.objectives.sft import SFT
from t2i_align.training import checkpoint
from t2i_align.training.loop import Loop
from t2i_align.training.monitor import Diverged
from t2i_align.utils.settings import settings
from tests.runs import Killed, align_killed, metrics, run_in_two_processes, run_values, same

DIVERGING = (
    0.1  # a learning rate at which all the tiny model's weights are soon useless, and half or a quarter of it is not
)
HOPELESS = 1.0  # and one at which a quarter is, too


def diverging(model: Path, pairs: Path, output: Path, lr: float = DIVERGING, **changes: Any) -> dict[str, Any]:
    """Full fine-tuning of 16 steps, a line every 2, a checkpoint every 4; the rate falls to 0 as a cosine."""
    options = {
        "lora": None, "optim__lr": lr, "optim__warmup_steps": 0, "optim__schedule": "cosine", "train__steps": 16,
        "log__every": 2, "log__checkpoint_every": 4, "data__cache_dir": str(pairs.parent / "cache"), **changes,
    }  # fmt: skip
    return run_values(model, pairs, output, **options)


def last_state(output: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    newest = checkpoint.all_steps(output)[-1]
    return newest.name, *checkpoint.load(newest)


def test_update_norm_is_that_of_the_logged_step_and_not_computed_otherwise(
    sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.nn.utils.get_total_norm, []
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda changes: calls.append(1) or real(changes))
    values = run_values(sd_path, pairs, tmp_path / "run", train__steps=6, log__every=2, log__checkpoint_every=1)
    values["log"]["keep_checkpoints"] = 10
    align(values, progress=False)
    weights = [checkpoint.load(step)[0] for step in checkpoint.all_steps(tmp_path / "run")]
    assert len(weights) == 7 and len(calls) == 3
    for line in metrics(tmp_path / "run"):
        now, before = weights[line["step"]], weights[line["step"] - 1]
        norm = math.sqrt(sum((now[name] - before[name]).square().sum().item() for name in now))
        assert line["update_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0


def test_divergent_run_rolls_back_and_finishes(
    sd_path: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The logged rate is the schedule's, a cosine, times the factor."""
    values = diverging(sd_path, pairs, tmp_path / "run")
    result = align(values, progress=False)
    output = (tmp_path / "run" / "run.log").read_text()
    assert "step 4 has winners that are denoised much worse than by the reference" in output
    assert f"goes back to {tmp_path / 'run' / 'checkpoints' / 'step_000000'} and on with 0.5 times" in output
    lines = metrics(tmp_path / "run")
    rollbacks = [line for line in lines if "rollback" in line]
    assert rollbacks[0] == {"step": 0, "rollback": 1, "diverged_at": 4} and len(rollbacks) <= 2
    assert "rollback 1 of at most 2" in output and output.count("goes back") == len(rollbacks)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(2, 17, 2)) and lines == rollbacks + logged
    factor = 0.5 ** len(rollbacks)
    for line in logged:
        assert line["lr"] == pytest.approx(factor * DIVERGING * 0.5 * (1 + math.cos(math.pi * line["step"] / 16)))
        assert line["error/chosen_minus_reference"] < 0.5 * line["error/chosen"] / 1.5
    assert result.steps == 16 and (result.weights / "unet").is_dir()


@pytest.mark.parametrize("when", ["after the rollback", "before the next checkpoint", "after the next checkpoint"])
def test_run_killed_around_a_rollback_resumes_bit_for_bit(
    when: str, sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that the run goes back to is not touched."""
    align(diverging(sd_path, pairs, tmp_path / "whole"), progress=False)
    assert any("rollback" in line for line in metrics(tmp_path / "whole"))
    values = diverging(sd_path, pairs, tmp_path / "killed")
    real, start = Loop._roll_back, tmp_path / "killed" / "checkpoints" / "step_000000"

    def roll_back(loop: Loop, divergence: Diverged) -> None:
        before = [(file.name, file.stat().st_mtime_ns) for file in start.iterdir()]
        real(loop, divergence)
        assert [(file.name, file.stat().st_mtime_ns) for file in start.iterdir()] == before
        if when == "after the rollback":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_roll_back", roll_back)
        align_killed(
            values,
            before=lambda step, state: state["rollbacks"] > 0 and when == "before the next checkpoint",
            after=lambda step, state: state["rollbacks"] > 0,
        )
    align({**values, "resume": True}, progress=False)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    (name, weights, state), (name_2, weights_2, state_2) = map(last_state, (tmp_path / "whole", tmp_path / "killed"))
    assert name == name_2 == "step_000016" and state["rollbacks"] == state_2["rollbacks"] > 0
    assert same(weights, weights_2)


def test_run_stops_after_the_allowed_rollbacks_and_names_the_last_good_checkpoint(
    sd_path: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = diverging(sd_path, pairs, tmp_path / "run", HOPELESS)
    with pytest.raises(
        UserError,
        match=r"after 2 rollbacks, so the run has stopped.*step_000000\. A smaller optim.lr, a larger objective.beta",
    ):
        align(values, progress=False)
    assert (tmp_path / "run" / "run.log").read_text().count("goes back") == 2
    # With more rollbacks allowed, the same run continues from there.
    more = {**values, "resume": True, "health": {"rollbacks": 6}}
    assert align(more, progress=False).steps == 16
    assert last_state(tmp_path / "run")[2]["rollbacks"] > 2
    with pytest.raises(
        UserError, match=r"by the reference .*against [\d.]+; .*times as much\), so the run has stopped"
    ):
        align(diverging(sd_path, pairs, tmp_path / "none", HOPELESS, health__rollbacks=0), progress=False)


def test_divergence_check_can_be_switched_off(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = diverging(sd_path, pairs, tmp_path / "run", HOPELESS, health__max_error_rise=None, train__steps=4)
    assert align(values, progress=False).metrics["error/chosen_minus_reference"] > 1


@settings
class SpoiltUnseen(DiffusionDPO):
    """Not finite from the third step on, as if what the first checkpoint holds had been spoilt already."""

    def step(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> tuple[Tensor, Metrics]:
        loss, values = super().step(policy, reference, batch, draw)
        return loss * batch.state["factor"], values

    def initial_state(self) -> dict[str, float]:
        return {"factor": 1.0}

    def update_state(self, state: Any, means: Any) -> dict[str, Tensor]:
        return {"factor": torch.where(state["factor"] > 2, math.nan, state["factor"] + 1)}


def test_checkpoint_that_diverges_again_is_replaced_by_the_one_before(
    sd_path: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", log__every=100, optim__warmup_steps=0, train__steps=8)
    config = dataclasses.replace(configuration.from_mapping(values), objective=SpoiltUnseen(beta=100.0))
    with pytest.raises(UserError, match=r"step 4 is not finite.*after 2 rollbacks"):
        align(config, progress=False)
    output = [line for line in (tmp_path / "run" / "run.log").read_text().splitlines() if "goes back" in line]
    assert "step_000002 and on with 0.5 times" in output[0] and "step_000000 and on with 0.25 times" in output[1]
    assert [line["rollback"] for line in metrics(tmp_path / "run") if "rollback" in line] == [1, 2]
    name, _, state = last_state(tmp_path / "run")
    assert (name, state["rollbacks"]) == ("step_000002", 2), "written anew from step 0 on"
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.25 * 1e-3)


def test_two_processes_roll_back_together(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    one = diverging(sd_path, pairs, tmp_path / "one")
    align(one, progress=False)
    run_in_two_processes(diverging(sd_path, pairs, tmp_path / "two", train__batch_size=2), tmp_path)
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert ours[0] == theirs[0] == {"step": 0, "rollback": 1, "diverged_at": 4}
    assert theirs[-1]["step"] == 16 and theirs[-1]["loss"] > 0


def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    """The first loss is log 2 whatever the rate; after a step of 1e36 the activations overflow float32."""
    values = run_values(sd_path, pairs, tmp_path / "run", optim__lr=1e36, log__checkpoint_every=1, log__every=100)
    values["optim"]["warmup_steps"] = 0
    values["health"] = {"rollbacks": 0}
    with pytest.raises(UserError, match=r"step 2 is not finite .loss (nan|inf).*so the run has stopped.*step_000001"):
        align(values, progress=False)
    weights, _ = checkpoint.load(checkpoint.all_steps(tmp_path / "run")[-1])
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@settings
class FiniteLossWithoutFiniteGradient(SFT):
    """sqrt at 0: the value is 0, the derivative infinite."""

    def step(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> tuple[Tensor, Metrics]:
        loss, metrics = super().step(policy, reference, batch, draw)
        return loss + (loss - loss.detach()).clamp_min(0).sqrt(), metrics


def test_weights_after_a_non_finite_gradient_are_never_saved(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", log__checkpoint_every=1, health__rollbacks=0)
    config = dataclasses.replace(configuration.from_mapping(values), objective=FiniteLossWithoutFiniteGradient())
    with pytest.raises(UserError, match=r"step 1 is not finite .loss 1\.\d+, gradient norm (nan|inf).*step_000000"):
        align(config, progress=False)
    (start,) = checkpoint.all_steps(tmp_path / "run")
    assert start.name == "step_000000" and not (tmp_path / "run" / "lora").exists()
    weights = checkpoint.load(start)[0]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(tensor.eq(0).all() for name, tensor in weights.items() if "lora_B" in name)
