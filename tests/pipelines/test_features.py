"""The denoiser's features: what a full forward pass computes at a block, reached early, with gradients to the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pipelines
from pipelines import FAMILIES, PipelineError
from t2i_align.config import TrainConfig
from t2i_align.training.reference import build_reference
from t2i_align.training.weights import adapters_off
from tests.pipelines.conftest import Load
from tests.tiny import example, randomise_lora


def hooks(denoiser: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in denoiser.modules())


def gradient_of(features: Tensor, latents: Tensor) -> Tensor:
    """Of a sum that weighs every entry differently."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((features * weights).sum(), latents)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_output_of_the_denoisers_block_and_the_rest_does_not_run(name: str, shared: Load) -> None:
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
    pipeline.predict(*example(pipeline))
    handle.remove()
    assert torch.equal(pipeline.features(*example(pipeline)), seen[0])
    pipeline.denoiser.aside = nn.Identity()
    monkeypatch.setattr(type(pipeline), "feature_block", "aside")
    with pytest.raises(PipelineError, match="never ran its block 'aside'"):
        pipeline.features(*example(pipeline))
    assert not pipeline.denoiser.aside._forward_hooks


@pytest.mark.parametrize("kind", ["adapter_off", "copy", "offloaded_copy"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_reference_predicts_and_has_features_as_the_base_also_in_the_backward_pass(
    kind: str, checkpointing: bool, sd_path: Path
) -> None:
    """Checkpointing runs blocks once more in the backward pass, when the adapters are on again: it must be off."""
    pipeline = pipelines.load(sd_path)
    inputs = latents, *_ = example(pipeline)
    with torch.no_grad():
        prediction = pipeline.predict(*inputs)
    latents.requires_grad_()
    of_base = pipeline.features(*inputs)
    expected = gradient_of(of_base, latents)
    randomise_lora(pipeline)
    if checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.denoiser.train()
    assert not torch.allclose(pipeline.features(*inputs), of_base)
    policy = pipeline.predict(*inputs)
    assert (policy - prediction).abs().max() > 1e-4
    reference = build_reference(TrainConfig(reference=kind), pipeline)
    out, features = reference(*inputs), reference.features(*inputs)
    assert pipeline.denoiser.is_gradient_checkpointing is checkpointing and not out.requires_grad
    torch.testing.assert_close(out, prediction, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, of_base)
    torch.testing.assert_close(gradient_of(features, latents), expected, rtol=1e-4, atol=1e-5)
    # The toggle between a forward pass and its backward pass must not lose the gradient.
    with pytest.raises(RuntimeError, match="boom"), adapters_off(pipeline.denoiser).using():
        raise RuntimeError("boom")
    policy.sum().backward()
    assert all(parameter.grad is not None for parameter in pipeline.trainable_parameters())
    assert torch.equal(pipeline.predict(*inputs), policy)


def test_a_compiled_denoiser_gives_its_features_too(sd_path: Path) -> None:
    pipeline = pipelines.load(sd_path)
    expected = pipeline.features(*example(pipeline))
    pipeline.denoiser.compile(backend="eager")
    pipeline.predict(*example(pipeline))  # compiled without the hook
    torch.testing.assert_close(pipeline.features(*example(pipeline)), expected)
