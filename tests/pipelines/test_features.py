"""The denoiser's features: what a full forward pass computes at a block, reached early, with gradients to the input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pipelines
from pipelines import FAMILIES, PipelineError, TrainablePipeline
from t2i_align.config import TrainConfig
from t2i_align.data.schema import Batch
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives import NCPDPO
from t2i_align.training.reference import build_reference
from tests.tiny import example, randomise_lora

CPU = torch.device("cpu")


def inputs(pipeline: TrainablePipeline) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([10, 800]), pipeline.encode_prompts(["a cat", "two dogs"])


def hooks(denoiser: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in denoiser.modules())


def gradient_of(features: Tensor, latents: Tensor) -> Tensor:
    """Of a sum that weighs every entry differently."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((features * weights).sum(), latents)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_output_of_the_denoisers_block_and_the_rest_does_not_run(
    name: str, shared: Callable[[str], TrainablePipeline]
) -> None:
    """With gradients to the input and to no frozen weight, and no hook left behind."""
    pipeline = shared(name)
    denoiser, (latents, times, conditioning) = pipeline.denoiser, example(pipeline)
    before, finished, outputs = hooks(denoiser), [], []
    handle = denoiser.register_forward_hook(lambda *_: finished.append(True))
    features = pipeline.features(latents.requires_grad_(), times, conditioning)
    handle.remove()
    assert not finished and hooks(denoiser) == before
    assert len(features) == 2 and features.isfinite().all()
    features.square().mean().backward()
    assert latents.grad is not None and (latents.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    block = denoiser.get_submodule(pipeline.feature_block)
    handle = block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        pipeline.predict(latents, times, conditioning)
    handle.remove()
    parts = outputs[0] if isinstance(outputs[0], tuple) else outputs
    assert any(torch.equal(features, part) for part in parts)


def test_of_several_outputs_the_first_is_taken_and_a_missing_block_is_named(
    sd_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines.load(sd_path)
    monkeypatch.setattr(type(pipeline), "feature_block", "down_blocks.1")
    seen: list[Tensor] = []
    handle = pipeline.denoiser.mid_block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipeline.predict(*inputs(pipeline))
    handle.remove()
    assert torch.equal(pipeline.features(*inputs(pipeline)), seen[0])
    pipeline.denoiser.aside = nn.Identity()
    monkeypatch.setattr(type(pipeline), "feature_block", "aside")
    with pytest.raises(PipelineError, match="never ran its block 'aside'"):
        pipeline.features(*inputs(pipeline))
    assert not pipeline.denoiser.aside._forward_hooks


@pytest.mark.parametrize("kind", ["adapter_off", "copy", "offloaded_copy"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_of_every_reference_are_the_bases_also_in_the_backward_pass(
    kind: str, checkpointing: bool, sd_path: Path
) -> None:
    """Checkpointing runs blocks once more in the backward pass, when the adapters are on again: it must be off."""
    pipeline = pipelines.load(sd_path)
    latents, timesteps, conditioning = inputs(pipeline)
    latents.requires_grad_()
    of_base = pipeline.features(latents, timesteps, conditioning)
    expected = gradient_of(of_base, latents)
    randomise_lora(pipeline)
    if checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.denoiser.train()
    assert not torch.allclose(pipeline.features(latents, timesteps, conditioning), of_base)
    features = build_reference(TrainConfig(reference=kind), pipeline).features(latents, timesteps, conditioning)
    assert pipeline.denoiser.is_gradient_checkpointing is checkpointing
    torch.testing.assert_close(features, of_base)
    torch.testing.assert_close(gradient_of(features, latents), expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_denoiser_gives_its_features_too(sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    expected = pipeline.features(*inputs(pipeline))
    pipeline.denoiser.compile(backend="eager")
    pipeline.predict(*inputs(pipeline))  # compiled without the hook
    torch.testing.assert_close(pipeline.features(*inputs(pipeline)), expected)


@pytest.mark.parametrize("renoise", ["posterior", "uniform"])
def test_ncp_trains_a_lora_on_a_real_unet_and_nothing_else(renoise: str, sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    conditioning = pipeline.encode_prompts(["a cat", "two dogs"])
    pipeline.add_lora(rank=2, alpha=2.0, dropout=0.0, targets="attention")
    reference = build_reference(TrainConfig(), pipeline)
    batch = Batch(
        keys=("0/a", "0/b"),
        latents=torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(4)),
        scores=torch.tensor([[1.0, 0.0]] * 2),
        conditioning=conditioning,
    )
    draw = SampleRNG(0, batch.keys, pipeline.process)
    objective = NCPDPO(renoise=renoise)
    loss, _ = objective.step(pipeline.predict, reference, batch, draw)
    torch.testing.assert_close(loss, torch.full((2,), 2.0).log())  # a fresh LoRA changes nothing yet
    loss.mean().backward()
    moved = {name for name, p in pipeline.denoiser.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all("lora_B" in name for name in moved)
    assert all(p.grad is None for name, p in pipeline.denoiser.named_parameters() if "lora" not in name)
    with torch.no_grad():
        for parameter in pipeline.trainable_parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp_min(1e-12)
    after, _ = objective.step(pipeline.predict, reference, batch, draw)
    assert after.mean() < loss.mean()
