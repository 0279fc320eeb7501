"""Whole runs on tiny models: every kind of data and training, exact resume, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import pipelines
from pipelines import PipelineError
from t2i_align import align
from t2i_align import config as configuration
from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import Noised
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.training import checkpoint, optimizer
from t2i_align.utils.settings import settings
from tests.runs import jsonl_pairs, lora_of, metrics, run_in_two_processes, run_values, same, winner_loser_folders


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"train__reference": "adapter_off"},
        {"train__reference": "copy"},
        {"train__reference": "offloaded_copy"},
        {"lora": None},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_first_loss_is_log_2_for_every_reference_and_precision(
    precision: str, changes: dict, sd_path: Path, sd_v_path: Path, pairs: Path, tmp_path: Path
) -> None:
    model = sd_v_path if "lora" in changes else sd_path
    values = run_values(model, pairs, tmp_path / "run", train__steps=1, train__precision=precision, **changes)
    assert align(values, progress=False).metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("source", [jsonl_pairs, winner_loser_folders])
def test_cached_and_on_the_fly_encoding_train_alike(
    source: Callable[[Path], Path], sd_path: Path, tmp_path: Path
) -> None:
    data = source(tmp_path / "data")
    cached = align(run_values(sd_path, data, tmp_path / "a"), progress=False)
    fly = align(run_values(sd_path, data, tmp_path / "b", data__cache=False), progress=False)
    # The cache holds half precision, so the runs agree to its rounding and not to the bit.
    for ours, theirs in zip(metrics(cached.output_dir), metrics(fly.output_dir), strict=True):
        assert ours["error/chosen"] == pytest.approx(theirs["error/chosen"], rel=5e-3)


STATEFUL = {
    "lcpo": {"name": "lcpo", "beta": 100.0, "rate": 0.3},
    "automatic_beta": {"name": "diffusion_dpo", "beta": 100.0, "target_gradient": 0.3},
}


def last_state(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.all_steps(output)[-1])[1]["task"]["objective"]


@pytest.mark.parametrize("objective", [{"name": "diffusion_dpo", "beta": 100.0}, *STATEFUL.values()])
def test_batch_8_equals_2_times_4_accumulated(objective: dict, sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    whole = align(run_values(sd_path, pairs, tmp_path / "a", objective=objective, train__batch_size=8), progress=False)
    parts = run_values(sd_path, pairs, tmp_path / "b", objective=objective, train__batch_size=4, train__accumulate=2)
    halves = align(parts, progress=False)
    for one, two in zip(metrics(whole.output_dir), metrics(halves.output_dir), strict=True):
        assert one.keys() == two.keys()
        margins = [name for name in one if name.startswith("rewards/margins")]
        for name in ("loss", "grad_norm", "error/chosen", *margins):
            # Margins are 50 times a difference of errors near 1, which single precision knows to 1e-7.
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=3e-5), (one["step"], name)
    ours, theirs = last_state(whole.output_dir), last_state(halves.output_dir)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.item() == pytest.approx(theirs[name].item(), rel=1e-5), name


def test_logged_mean_is_over_the_groups_to_which_a_metric_applies(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """Margins by quarter of the schedule: weighed by how many groups fell into each, they make up the whole mean.

    Times follow from the seed, so their numbers in 2 steps of 2 x 2 are known; a quarter without any has no line.
    """
    values = run_values(sd_path, pairs, tmp_path / "run", train__batch_size=2, train__accumulate=2, log__every=2)
    process = pipelines.load(sd_path, encoders=False).process
    times: list[int] = []

    class Seen(DiffusionDPO):
        def noised(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> Noised:
            times.extend(SampleRNG(0, batch.keys, process).timesteps().tolist())
            return super().noised(policy, reference, batch, draw)

    align(dataclasses.replace(configuration.from_mapping(values), objective=Seen(beta=100.0)), progress=False)
    empty = 0
    for number, line in enumerate(metrics(tmp_path / "run")):
        window = times[8 * number : 8 * number + 8]
        counts = {f"rewards/margins/t{i}-{i + 250}": sum(i <= t < i + 250 for t in window) for i in range(0, 1000, 250)}
        assert sum(counts.values()) == 8
        assert {name for name in line if name.startswith("rewards/margins/")} == {n for n, c in counts.items() if c}
        whole = sum(count * line[name] for name, count in counts.items() if count) / 8
        assert line["rewards/margins"] == pytest.approx(whole, rel=1e-4)
        empty += sum(count == 0 for count in counts.values())
    assert empty and whole != 0, "every quarter had groups, or all margins were 0: nothing was tested"


def test_automatic_beta_follows_the_gradient_factor(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """Automatic beta: each step multiplies it by exp(1/2 (gradient factor - target)), of all the step's groups."""
    values = run_values(sd_path, pairs, tmp_path / "run", objective=STATEFUL["automatic_beta"], train__batch_size=2)
    values["train"]["accumulate"] = 2
    align(values, progress=False)
    beta = 100.0
    for line in metrics(tmp_path / "run"):
        assert line["beta"] == pytest.approx(beta, rel=1e-5)
        beta *= math.exp(0.5 * (line["rewards/gradient_factor"] - 0.3))
    assert last_state(tmp_path / "run")["beta"].item() == pytest.approx(beta, rel=1e-5)
    assert beta > 120


def test_options_that_save_memory_do_not_change_the_result(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    plain = align(run_values(sd_path, pairs, tmp_path / "a", lora=None), progress=False)
    saved = run_values(
        sd_path, pairs, tmp_path / "b", lora=None, train__gradient_checkpointing=True, train__reference="offloaded_copy"
    )
    for one, two in zip(metrics(plain.output_dir), metrics(align(saved, progress=False).output_dir), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3, abs=1e-6)


def test_resume_of_a_finished_run_and_of_one_without_checkpoints(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run")
    first = lora_of(align(values, progress=False).output_dir)
    assert same(lora_of(align({**values, "resume": True}, progress=False).output_dir), first)
    for step in checkpoint.all_steps(tmp_path / "run"):
        checkpoint.remove(step)
    again = align({**values, "resume": True}, progress=False)
    assert same(lora_of(again.output_dir), first) and len(metrics(again.output_dir)) == 4
    finished = align({**values, "resume": True}, progress=False)
    assert finished.metrics == again.metrics and finished.metrics["loss"] > 0


def test_resumed_step_takes_as_many_groups_as_before(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """4 x 1 may become 2 x 2 in the middle of a run; another size of step is refused."""
    cache = {"data__cache_dir": str(tmp_path / "cache")}
    whole = align(run_values(sd_path, pairs, tmp_path / "whole", train__steps=6, **cache), progress=False)
    values = run_values(sd_path, pairs, tmp_path / "run", train__steps=4, **cache)
    align(values, progress=False)
    smaller = {**values, "train": {**values["train"], "steps": 6, "batch_size": 2}, "resume": True}
    with pytest.raises(UserError, match=r"a step of this run takes 4 groups; .* is 2 now"):
        align(smaller, progress=False)
    resumed = align({**smaller, "train": {**smaller["train"], "accumulate": 2}}, progress=False)
    for name, tensor in lora_of(whole.output_dir).items():
        torch.testing.assert_close(lora_of(resumed.output_dir)[name], tensor, rtol=1e-3, atol=1e-6)


def test_schedule_that_depends_on_the_steps_keeps_them(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", optim__schedule="cosine")
    align(values, progress=False)
    with pytest.raises(UserError, match=r"train.steps is 4 there, 8 here"):
        align({**values, "resume": True, "train": {**values["train"], "steps": 8}}, progress=False)
    constant = run_values(sd_path, pairs, tmp_path / "constant")
    align(constant, progress=False)
    with pytest.raises(UserError, match=r"step_000004 is beyond train.steps=2"):
        align({**constant, "resume": True, "train": {**constant["train"], "steps": 2}}, progress=False)


@settings
class Fitted(DiffusionDPO):
    """Smoothing defaults to a quarter of the maximum score of the data, which is 1 for pairs."""

    smoothing: float | None = None

    def fit_to_data(self, facts: DataStats) -> Fitted:
        return self if self.smoothing is not None else dataclasses.replace(self, smoothing=facts.score_range[1] / 4)


def test_hyper_parameters_fitted_to_the_data_are_printed_kept_and_resumed(
    sd_path: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration.from_mapping(run_values(sd_path, pairs, tmp_path / "run"))
    config = dataclasses.replace(config, objective=Fitted(beta=100.0))
    align(config)
    assert "smoothing=0.25" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["objective"]["smoothing"] == 0.25
    again = dataclasses.replace(config, resume=True)
    assert align(again, progress=False).steps == 4
    changed = dataclasses.replace(again, objective=Fitted(beta=100.0, smoothing=0.5))
    with pytest.raises(UserError, match=r"objective.smoothing is 0.25 there, 0.5 here"):
        align(changed, progress=False)


def test_clearing_a_hyper_parameter_is_another_run(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", objective__guard=0.9)
    align(values, progress=False)
    with pytest.raises(UserError, match=r"objective.guard is 0.9 there, None here"):
        align({**values, "objective": {**values["objective"], "guard": None}, "resume": True}, progress=False)


def test_run_killed_before_its_first_file_can_start_again(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writing_run.yaml").write_text("output_d")
    assert align(run_values(sd_path, pairs, tmp_path / "run"), progress=False).steps == 4


def test_output_folder_with_another_run_is_left_alone(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run")
    align(values, progress=False)
    before = lora_of(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run already \(its newest checkpoint is step_000004\).*resume=true"):
        align(values, progress=False)
    other = {**values, "objective": {"name": "diffusion_dpo", "beta": 5.0}, "resume": True}
    with pytest.raises(UserError, match=r"another run.*objective.beta is 100.0 there, 5.0 here"):
        align(other, progress=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        align({**values, "output_dir": str(tmp_path / "photos"), "model": {"path": "/before/it/loads"}}, progress=False)
    assert same(lora_of(tmp_path / "run"), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__resolution": 33}, PipelineError, "33 x 33 pixels do not fit sd"),
        ({"data__path": "/nowhere/pairs.jsonl"}, UserError, "/nowhere/pairs.jsonl"),
        ({"model__path": "/nowhere"}, UserError, "/nowhere: no such model"),
        ({"train__attention": "flash"}, PipelineError, "Choices: native, xformers"),
        ({"optim__optimizer": "adamw8bit"}, UserError, "needs bitsandbytes"),
        ({"lora__targets": ["to_x"]}, PipelineError, "'to_x' matches no module"),
        ({"train__precision": "fp16"}, UserError, "'fp16' needs a CUDA GPU"),
        ({"log__trackers": ["wandb"]}, UserError, "'wandb' is not installed: pip install wandb"),
        ({"validation": {"every": 1, "scorers": ["clipp"]}}, UserError, r"Choices: .*clip, .*oracle"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes: dict, error: type[Exception], message: str, sd_path: Path, pairs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(optimizer, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        align(run_values(sd_path, pairs, tmp_path / "run", **changes), progress=False)
    assert not list(tmp_path.iterdir()), "neither the run nor the cache, which takes hours, was begun"


@pytest.mark.parametrize("kind", ["sd", "sd-v"])
def test_epsilon_without_signal_at_the_last_timestep_is_refused(
    kind: str, path: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    """There it implies no image; v-prediction does."""
    model = shutil.copytree(path(kind), tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    values = run_values(model, pairs, tmp_path / "run", train__steps=1)
    if kind == "sd":
        with pytest.raises(PipelineError, match=r"no signal at the last timestep .*expected 'v_prediction'"):
            align(values, progress=False)
    else:
        assert align(values, progress=False).steps == 1


def test_passes_over_the_data_are_printed_and_many_are_warned_of(
    sd_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 step of 32 groups from 2 is 16 passes, 2 steps are 32."""
    data = jsonl_pairs(tmp_path / "data", 2)
    for steps in (1, 2):
        changes = {"train__steps": steps, "train__batch_size": 32, "data__cache_dir": str(tmp_path / "cache")}
        changes |= {"optim__warmup_steps": 1}
        align(run_values(sd_path, data, tmp_path / f"run{steps}", **changes), progress=True)
        out = capsys.readouterr().out
        assert f"({16 * steps} passes over the data)" in out
        assert ("32 passes learn the groups by heart: fewer train.steps or more data" in out) == (steps == 2)
        assert ("optim.lr is not reached: optim.warmup_steps=1, train.steps=1" in out) == (steps == 1)


def test_validation_writes_images_and_scores(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    validation = {"every": 2, "prompts": str(prompts), "steps": 2, "scorers": ["oracle"]}
    cache = {"data__cache_dir": str(tmp_path / "cache")}
    values = run_values(sd_path, pairs, tmp_path / "run", validation=validation, **cache)
    align(run_values(sd_path, pairs, tmp_path / "first", **cache), progress=False)
    result = align(values, progress=False)  # from a cache that is there, so nothing else loaded the encoders
    scores = [line["validation/oracle"] for line in metrics(result.output_dir) if "validation/oracle" in line]
    assert len(scores) == 3 and all(0 <= score <= 1 for score in scores)
    names = sorted(file.name for file in (result.output_dir / "validation").iterdir())
    assert names == ["before", "step_000000.png", "step_000002.png", "step_000004.png"]
    plain = align(run_values(sd_path, pairs, tmp_path / "plain", **cache), progress=False)
    assert same(lora_of(plain.output_dir), lora_of(result.output_dir)), "validation must not change the run"


def test_two_processes_train_as_one_with_the_same_global_batch(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    one = align(run_values(sd_path, pairs, tmp_path / "one", data__cache_dir=cache), progress=False)
    values = run_values(sd_path, pairs, tmp_path / "two", train__batch_size=2, data__cache_dir=cache)
    run_in_two_processes(values, tmp_path)
    for ours, theirs in zip(metrics(one.output_dir), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "error/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (ours["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", "copy"])
def test_compiled_run_starts_at_log_2(reference: str, sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", train__compile=True, train__reference=reference)
    assert align(values, progress=False).steps == 4
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
