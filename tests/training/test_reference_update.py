"""A reference that follows the policy: it becomes what the policy is, stops when it has drifted, and comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

import pipelines
from pipelines import PipelineError, TrainablePipeline
from t2i_align import align
from t2i_align.data.batch import Batch
from t2i_align.diffusion.noising import Noised
from t2i_align.training import checkpoint
from t2i_align.training.reference import Winners, build_reference
from t2i_align.training.sections import ReferenceUpdateConfig, TrainConfig
from tests.runs import align_killed, metrics, run_values, same

FULL = {"lora": None, "optim__lr": 1e-4}


def following(model: Path, pairs: Path, output: Path, max_drift: float = 10.0, **changes: Any) -> dict[str, Any]:
    """8 steps; the reference follows after every 2."""
    options = {
        "train__steps": 8, "train__reference_update": {"every": 2, "max_drift": max_drift}, "optim__warmup_steps": 0,
        "log__checkpoint_every": 1, "log__keep_checkpoints": 9, "data__cache_dir": str(pairs.parent / "cache"),
        **changes,
    }  # fmt: skip
    return run_values(model, pairs, output, **options)


def policy_and_reference(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, _ = checkpoint.load(folder)
    policy = {name: tensor for name, tensor in weights.items() if not name.startswith("reference.")}
    return policy, {name: weights[f"reference.{name}"] for name in policy}


def move_parameters(pipeline: TrainablePipeline) -> None:
    """Change all that is trained."""
    with torch.no_grad():
        for parameter in pipeline.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["lora", "copy", "offloaded_copy"])
def test_overwritten_reference_is_the_policy_at_that_time(kind: str, sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    if kind == "lora":
        pipeline.add_lora(rank=2, alpha=4.0, dropout=0.0, targets="attention")
    else:
        pipeline.denoiser.requires_grad_(True)
    args = (torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), pipeline.encode_prompts(["a", "b"]))
    train = TrainConfig(reference="auto" if kind == "lora" else kind, reference_update=ReferenceUpdateConfig())
    reference = build_reference(train, pipeline)
    base = pipeline.predict(*args).detach()
    assert torch.equal(reference(*args), base)
    move_parameters(pipeline)
    then = pipeline.predict(*args).detach()
    assert torch.equal(reference(*args), base) and (then - base).abs().max() > 1e-4
    reference.weights.overwrite("reference", reference.weights.policy)
    assert torch.equal(reference(*args), then)
    move_parameters(pipeline)
    policy = pipeline.predict(*args)
    answer = reference(*args)  # between the policy's forward pass and its backward pass
    assert torch.equal(answer, then) and not answer.requires_grad
    assert (policy - then).abs().max() > 1e-4 and torch.equal(pipeline.predict(*args), policy)
    policy.sum().backward()
    assert all(parameter.grad is not None for parameter in pipeline.trainable_parameters())


def test_older_adapter_has_no_dropout(sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    pipeline.add_lora(rank=2, alpha=4.0, dropout=0.5, targets="attention")
    pipeline.denoiser.train()
    move_parameters(pipeline)
    reference = build_reference(TrainConfig(reference_update=ReferenceUpdateConfig()), pipeline)
    args = (torch.randn(1, 4, 16, 16), torch.tensor([5]), pipeline.encode_prompts(["a"]))
    assert torch.equal(reference(*args), reference(*args))
    assert not torch.equal(pipeline.predict(*args), pipeline.predict(*args)), "the policy's dropout is on again"


@pytest.mark.parametrize("training", [{}, FULL, {**FULL, "train__reference": "offloaded_copy"}])
def test_reference_follows_and_the_margin_restarts_at_0(
    training: dict, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    align(following(sd_path, pairs, tmp_path / "run", **training), progress=False)
    steps = [policy_and_reference(folder) for folder in checkpoint.all_steps(tmp_path / "run")]
    assert len(steps) == 9
    for number, (policy, reference) in enumerate(steps):
        assert same(reference, steps[number - number % 2][0]), number
        assert same(policy, reference) == (number % 2 == 0), number
    lines = metrics(tmp_path / "run")
    drifts = [line for line in lines if "reference/drift" in line]
    assert [(line["step"], line["reference/frozen"]) for line in drifts] == [(2, 0), (4, 0), (6, 0), (8, 0)]
    assert all(math.isfinite(line["reference/drift"]) and line["reference/drift"] != 0 for line in drifts)
    for line in (line for line in lines if "loss" in line):
        fresh = line["step"] % 2 == 1  # policy and reference are then one, so that the margin is 0 to the last bit
        assert (line["rewards/margins"] == 0) == fresh, line["step"]


def test_reference_that_has_drifted_is_frozen_permanently(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    free = following(sd_path, pairs, tmp_path / "free", **FULL)
    align(free, progress=False)
    drifts = [line["reference/drift"] for line in metrics(tmp_path / "free") if "reference/drift" in line]
    limit = max(drifts[:2]) / 2
    before = next(number for number, drift in enumerate(drifts) if drift >= limit)  # so many updates are allowed
    assert limit > 0, "the errors of this run fall, so that nothing would stop the reference"
    align(following(sd_path, pairs, tmp_path / "run", limit, **FULL), progress=False)
    lines = [line for line in metrics(tmp_path / "run") if "reference/drift" in line]
    assert [line["reference/frozen"] for line in lines] == [0.0] * before + [1.0]
    assert lines[-1]["reference/drift"] == drifts[before]
    folders = checkpoint.all_steps(tmp_path / "run")
    kept = policy_and_reference(folders[2 * before])[0]
    for folder in folders[2 * before :]:
        policy, reference = policy_and_reference(folder)
        assert same(reference, kept)
    assert not same(policy, kept)


@pytest.mark.parametrize("objective", [{"name": "kto"}, {"name": "diffusion_dpo", "reduction": "sum", "beta": 0.1}])
def test_drift_is_the_rise_of_the_native_error_on_winners_whatever_the_objective(
    objective: dict, sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from the saved weights, on the winners that were seen, 32 of them evenly spread over time."""
    winners: list[Noised] = []
    real = Winners._at

    def noised(self: Winners, batch: Batch, quantiles: Tensor) -> tuple[Noised, Tensor]:
        out, liked = real(self, batch, quantiles)
        assert liked.all()
        clean = self.pipeline.process.to_clean(out.target, out.latents, out.timesteps)
        torch.testing.assert_close(clean, batch.latents[: len(quantiles), 0], rtol=1e-2, atol=1e-2)
        winners.append(out)
        return out, liked

    monkeypatch.setattr(Winners, "_at", noised)
    values = following(sd_path, pairs, tmp_path / "run", objective=objective, train__steps=2, train__batch_size=5)
    align({**values, "lora": None}, progress=False)
    assert torch.cat([each.timesteps for each in winners]).tolist() == [int((i + 0.5) / 32 * 1000) for i in range(32)]

    def error(weights: dict[str, Tensor]) -> float:
        pipeline = pipelines.load(sd_path)
        pipeline.denoiser.load_state_dict(weights)
        with torch.no_grad():
            wrong = [
                pipeline.predict(each.latents, each.timesteps, each.conditioning) - each.target for each in winners
            ]
        return torch.cat(wrong).square().mean().item()

    start, _, end = checkpoint.all_steps(tmp_path / "run")
    rise = error(policy_and_reference(end)[0]) - error(policy_and_reference(start)[0])
    (line,) = [line for line in metrics(tmp_path / "run") if "reference/drift" in line]
    assert line["reference/drift"] == pytest.approx(rise, rel=1e-3, abs=1e-6) and abs(rise) > 1e-4


def test_disliked_single_samples_are_not_winners() -> None:
    """Errors rise by 1, 5 and 3; the second is disliked: (1 + 3) / 2 = 2."""
    winners = object.__new__(Winners)
    winners.accelerator, winners.initial = Accelerator(cpu=True), torch.tensor([0.0, math.nan, 0.0])
    winners.errors = lambda: torch.tensor([1.0, math.nan, 3.0])  # type: ignore[method-assign]
    assert winners.means() == (2.0, 2.0)


@pytest.mark.parametrize(("training", "max_drift"), [({"lora__dropout": 0.3}, 10.0), (FULL, 10.0), (FULL, 1e-9)])
@pytest.mark.parametrize("killed_after", [3, 4])
def test_killed_run_resumes_with_its_reference(
    training: dict, max_drift: float, killed_after: int, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    align(following(sd_path, pairs, tmp_path / "whole", max_drift, **training), progress=False)
    values = following(sd_path, pairs, tmp_path / "killed", max_drift, **training)
    align_killed(values, before=lambda *_: False, after=lambda step, _: step == killed_after)
    align({**values, "resume": True}, progress=False)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for one, two in zip(*(checkpoint.all_steps(tmp_path / name) for name in ("whole", "killed")), strict=True):
        assert same(checkpoint.load(one)[0], checkpoint.load(two)[0]), one.name


def test_run_starts_from_a_lora_which_is_then_its_reference(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """First SFT, then Diffusion-DPO on top of it: the loss starts at log 2, also at another alpha."""
    cache = {"data__cache_dir": str(tmp_path / "cache")}
    tuned = align(run_values(sd_path, pairs, tmp_path / "sft", objective={"name": "sft"}, **cache), progress=False)
    for alpha in (4.0, 8.0):
        lora = {"rank": 2, "alpha": alpha, "init": str(tuned.weights)}
        values = run_values(sd_path, pairs, tmp_path / f"dpo{alpha}", lora=lora, train__steps=2, **cache)
        align(values, progress=False)
        start, end = (checkpoint.load(folder)[0] for folder in checkpoint.all_steps(tmp_path / f"dpo{alpha}"))
        policy, _ = policy_and_reference(checkpoint.all_steps(tmp_path / f"dpo{alpha}")[0])
        assert metrics(tmp_path / f"dpo{alpha}")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        for name, tensor in load_file(tuned.weights).items():
            ours = policy[name.removeprefix("unet.").replace(".weight", ".default.weight")]
            torch.testing.assert_close(ours, tensor / (alpha / 2 if "lora_B" in name else 1))
        assert all(torch.equal(start[f"reference.{name}"], tensor) for name, tensor in policy.items())
        assert all(torch.equal(end[f"reference.{name}"], tensor) for name, tensor in policy.items())
        assert not same(policy, {name: end[name] for name in policy})
    resumed = align({**values, "resume": True, "train": {**values["train"], "steps": 3}}, progress=False)
    through = run_values(sd_path, pairs, tmp_path / "through", lora=lora, train__steps=3, **cache)
    assert same(load_file(align(through, progress=False).weights), load_file(resumed.weights))
    other = run_values(sd_path, pairs, tmp_path / "other", lora={**lora, "rank": 4}, **cache)
    with pytest.raises(PipelineError, match=r"a LoRA of rank 2 on \d+ modules, expected rank 4 \(lora.rank\)"):
        align(other, progress=False)


def test_without_the_option_the_reference_stays(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    align(following(sd_path, pairs, tmp_path / "run", train__reference_update=None), progress=False)
    assert not any("reference/drift" in line for line in metrics(tmp_path / "run"))
    weights, _ = checkpoint.load(checkpoint.all_steps(tmp_path / "run")[-1])
    assert weights and not any(name.startswith("reference.") for name in weights)
