"""Every family equals its genuine diffusers pipeline, and `pipelines.check` finds what a family does wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipelines
from pipelines import TrainablePipeline
from t2i_align import cli
from tests.pipelines.conftest import Load, PathOf
from tests.tiny import TINY, sample_latents


@pytest.mark.parametrize("name", TINY)
def test_every_family_passes_and_is_left_as_it_was(name: str, path: PathOf) -> None:
    """Of two experts, both."""
    for expert in ("high", "low") if name == "wan-experts" else (None,):
        pipeline = pipelines.load(path(name), expert=expert)
        before = sample_latents(pipeline)
        report = pipelines.check(pipeline)
        assert report.ok and len(report.findings) == 9, str(report)
        assert torch.equal(sample_latents(pipeline), before)
        assert not list(pipeline.trainable_parameters()) and not hasattr(pipeline.denoiser, "peft_config")


def wrong_sign(self: Any, output: Any, noisy: Tensor) -> Tensor:
    return -type(self).__mro__[1].unpack(self, output, noisy)


def wrong_time(self: Any, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> dict[str, Any]:
    return type(self).__mro__[1].denoiser_inputs(self, noisy, 1000 - timesteps, conditioning)


def wrong_scale(self: Any, latents: Tensor) -> tuple[Any, Any]:
    shift, scale = type(self).__mro__[1].normalisation(self, latents)
    return shift, 2 * scale


def own_denoiser(self: Any, noisy: Tensor, timesteps: Tensor, conditioning: Any, denoiser: Any = None) -> Tensor:
    return type(self).__mro__[1].predict(self, noisy, timesteps, conditioning)


def detached(self: Any, output: Any, noisy: Tensor) -> Tensor:
    return type(self).__mro__[1].unpack(self, output, noisy).detach()


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"unpack": wrong_sign}, "prediction", "has the wrong sign"),
    ({"denoiser_inputs": wrong_time}, "prediction", "runs through time the other way"),
    ({"unpack": wrong_sign, "denoiser_inputs": wrong_time}, "prediction", "the wrong sign and runs through time"),
    ({"normalisation": wrong_scale}, "decoding", "the VAE's scale, shift, mean or std is another"),
    ({"predict": own_denoiser}, "denoiser", "`predict` ignores its argument `denoiser`"),
    ({"unpack": detached}, "gradients", r"no gradient of `predict` reaches \d+ of \d+ tensors, as .*\.weight|bias"),
    ({"lora_presets": {"attention": ("spare",)}}, "gradients", "no gradient reaches any module that 'spare' matches"),
    ({"lora_presets": {"attention": ("to_q", "to_x")}}, "LoRA", "'to_x' matches no module of the denoiser"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(("changes", "check", "message"), MISTAKES, ids=[f"{c}:{m[:20]}" for _, c, m in MISTAKES])
def test_a_planted_mistake_is_named(changes: dict[str, Any], check: str, message: str, name: str, fresh: Load) -> None:
    pipeline: TrainablePipeline = fresh(name)
    pipeline.denoiser.spare = nn.Linear(2, 2).requires_grad_(False)
    pipeline.__class__ = type("Mistaken", (type(pipeline),), changes)
    report = pipelines.check(pipeline, whole=False)
    assert not report.ok
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(report.findings[check])
    assert "FAILED" in str(report) and check in str(report)


def test_the_command_prints_the_report_and_fails_where_a_check_does(
    path: PathOf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["check-model", str(path("sd")), "--quick"]) == 0
    assert "family sd: all checks passed" in capsys.readouterr().out
    monkeypatch.setattr(pipelines.FAMILIES["sd"], "lora_presets", {"attention": ("to_x",)})
    assert cli.main(["check-model", str(path("sd")), "--quick"]) == 2
    assert "'to_x' matches no module" in capsys.readouterr().err


def test_modules_without_a_gradient_are_left_out_of_a_lora(fresh: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose output is dropped, as the text stream of a last joint block is."""
    pipeline = fresh("sd")
    block = pipeline.denoiser.mid_block
    monkeypatch.setattr(block, "forward", dropping(block.forward))
    latents, times = torch.randn(1, 4, 16, 16), torch.tensor([500])
    conditioning = pipeline.encode_prompts(["a fox"])
    unreached = pipeline.unreached(latents, times, conditioning)
    assert unreached == {f"mid_block.{name}" for name, _ in block.named_parameters()}
    assert not any(parameter.requires_grad for parameter in pipeline.denoiser.parameters())
    pipeline.add_lora(rank=2, alpha=2.0, dropout=0.0, targets="attention", without=unreached)
    pipeline.predict(latents, times, conditioning).sum().backward()
    trained = dict(pipeline.denoiser.named_parameters())
    names = [name for name, parameter in trained.items() if parameter.requires_grad]
    assert names and not any(name.startswith("mid_block") for name in names)
    assert all(trained[name].grad is not None for name in names)


def dropping(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward(sample, *args, **kwargs)
        return sample

    return run
