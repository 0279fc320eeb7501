"""The personal branch: the base at its start and without a user, one user among others, files, a LoRA beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

import pipelines
from pipelines import TrainablePipeline
from t2i_align.conditioning import personal
from t2i_align.conditioning.adapter import ADAPTERS
from t2i_align.conditioning.personal import Embedding, Encoder, Personal, serving, tell_apart
from t2i_align.errors import UserError
from t2i_align.evaluation.personal import identification
from t2i_align.inference.models import adapter_on, resolve_adapter
from tests.tiny import example, randomise_lora

PROMPTS = ["a red circle", "two blue squares"]
ADAPTER = ADAPTERS["personal"]
EMBEDDING = Embedding(embedder="clip:some", version="1", together=1, features=12, rows=3, tokens=2, width=8)


def rows(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, generator=torch.Generator().manual_seed(seed))


def trained(pipeline: TrainablePipeline) -> Personal:
    """A branch as training leaves it: its values are no longer zero."""
    torch.manual_seed(0)
    branch = personal.install(pipeline, EMBEDDING)
    for layer in branch.user_v:
        nn.init.normal_(layer.weight)
    return branch


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux"])
def pipeline(request: pytest.FixtureRequest, path: Callable[[str], Path]) -> TrainablePipeline:
    return pipelines.load(path(request.param))


@torch.no_grad()
def predicted(pipeline: TrainablePipeline, users: Tensor | None, denoiser: nn.Module | None = None) -> Tensor:
    latents, times, conditioning = example(pipeline)
    user = {} if users is None else {"user": users}
    return pipeline.predict(latents, times, {**conditioning, **user}, denoiser=denoiser)


def sampled(pipeline: TrainablePipeline, guidance: float = 3.0) -> Tensor:
    return pipeline.generate(PROMPTS, [0, 1], steps=2, guidance=guidance)


def test_base_at_the_start_and_without_a_user_bit_for_bit(pipeline: TrainablePipeline) -> None:
    base = predicted(pipeline, None)
    branch = personal.install(pipeline, EMBEDDING)
    assert torch.equal(predicted(pipeline, rows()), base)
    for layer in branch.user_v:
        nn.init.normal_(layer.weight)
    assert torch.equal(predicted(pipeline, torch.zeros(2, 3, 12)), base)
    assert torch.equal(predicted(pipeline, None), base)
    mixed = predicted(pipeline, torch.cat([torch.zeros(1, 3, 12), rows(1)]))
    torch.testing.assert_close(mixed[0], base[0], rtol=1e-5, atol=1e-6)  # batched kernels may differ by an ulp
    assert (mixed[1] - base[1]).abs().max() > 1e-3
    branch.off = True
    assert torch.equal(predicted(pipeline, rows()), base)


def test_the_genuine_pipeline_serves_a_user_and_guides_away_from_none(pipeline: TrainablePipeline) -> None:
    """Without the prompt there is no user: the branch is told which half of the batch that is, by its place."""
    base = sampled(pipeline)
    branch = trained(pipeline)
    with torch.no_grad():
        (tokens,) = branch.encoder(rows(1))
    for guidance in (1.0, 3.0):
        guided = guidance > 1 and not pipeline.distilled_guidance
        with serving(pipeline.denoiser, tokens, guided=guided):
            seen: list[Tensor] = []
            handle = branch.user_v[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            user = sampled(pipeline, guidance)
            handle.remove()
        halves = torch.cat([torch.zeros(2, *tokens.shape), tokens.expand(2, -1, -1)])
        assert torch.equal(seen[0], halves if guided else halves[2:])
    assert (user - base).abs().max() > 1e-3
    with serving(pipeline.denoiser, tokens, guided=guided, scale=0.0):
        assert torch.equal(sampled(pipeline), base)
    assert torch.equal(sampled(pipeline), base)


def test_saved_with_a_lora_beside_it_loaded_and_removed(pipeline: TrainablePipeline, tmp_path: Path) -> None:
    base = predicted(pipeline, rows())
    randomise_lora(pipeline)
    trained(pipeline)
    both = predicted(pipeline, rows())
    file = ADAPTER.save(pipeline, tmp_path / "both")
    assert sorted(f.name for f in file.parent.iterdir()) == ["personal.safetensors", "pytorch_lora_weights.safetensors"]
    ADAPTER.remove(pipeline)
    assert torch.equal(predicted(pipeline, rows()), base)
    for place in (file, file.parent):
        with adapter_on(pipeline, resolve_adapter(place)):
            torch.testing.assert_close(predicted(pipeline, rows()), both, rtol=1e-4, atol=1e-5)
        assert torch.equal(predicted(pipeline, rows()), base)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    with adapter_on(pipeline, resolve_adapter(alone)):
        assert not torch.equal(predicted(pipeline, rows()), base)
        assert not torch.allclose(predicted(pipeline, rows()), both, atol=1e-4)
        randomise_lora(pipeline)  # the hooks follow a LoRA that is put on later
        torch.testing.assert_close(predicted(pipeline, rows()), both, rtol=1e-4, atol=1e-5)
        pipeline.pipe.unload_lora_weights()


def test_it_is_ip_adapters_decoupled_cross_attention(sd_path: Path) -> None:
    """diffusers' own processor with the same projections gives the same images."""
    pipeline, plain = pipelines.load(sd_path), pipelines.load(sd_path)
    branch = trained(pipeline)
    with torch.no_grad():
        tokens = branch.encoder(rows())
    processors = dict(plain.denoiser.attn_processors)
    for number, place in enumerate(branch.places):
        inner = plain.denoiser.get_submodule(place).inner_dim
        processor = IPAdapterAttnProcessor2_0(inner, 8, num_tokens=(2,))
        processor.to_k_ip[0].load_state_dict(branch.user_k[number].state_dict())
        processor.to_v_ip[0].load_state_dict(branch.user_v[number].state_dict())
        processors[f"{place}.processor"] = processor
    plain.denoiser.set_attn_processor(processors)
    plain.denoiser.encoder_hid_proj = lambda embeds: [embeds]
    plain.denoiser.config.encoder_hid_dim_type = "ip_image_proj"
    latents, times, conditioning = example(plain)
    with torch.no_grad():
        theirs = plain.denoiser(
            latents, times, conditioning["prompt_embeds"], added_cond_kwargs={"image_embeds": tokens}, return_dict=False
        )[0]
    torch.testing.assert_close(predicted(pipeline, rows()), theirs, rtol=1e-5, atol=1e-5)


def test_a_copy_has_its_own_branch_and_gradients_pass_checkpointing(pipeline: TrainablePipeline) -> None:
    branch = trained(pipeline)
    twin = copy.deepcopy(pipeline.denoiser)
    user = predicted(pipeline, rows())
    assert torch.equal(predicted(pipeline, rows(), twin), user)
    twin.personal.off = True
    assert torch.equal(predicted(pipeline, rows()), user) and not torch.equal(predicted(pipeline, rows(), twin), user)

    def gradients() -> list[Tensor]:
        branch.zero_grad()
        latents, times, conditioning = example(pipeline)
        pipeline.predict(latents, times, {**conditioning, "user": rows()}).square().sum().backward()
        return [parameter.grad.clone() for parameter in branch.parameters()]

    pipeline.denoiser.requires_grad_(False)
    branch.requires_grad_(True)
    plain = gradients()
    assert all(gradient.abs().max() > 0 for gradient in plain)
    pipeline.denoiser.enable_gradient_checkpointing()
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pooling_ignores_order_and_absent_rows_and_takes_any_number() -> None:
    encoder = Encoder(12, 8, tokens=3)
    one = rows(1)
    expected = encoder(one)
    assert expected.shape == (1, 3, 8)
    torch.testing.assert_close(encoder(one[:, [2, 0, 1]]), expected)
    torch.testing.assert_close(encoder(torch.cat([one, torch.zeros(1, 5, 12)], dim=1)), expected)
    assert not torch.allclose(encoder(one[:, :2]), expected)
    assert not encoder(torch.zeros(1, 4, 12)).any()
    assert Encoder(12, 8, tokens=None)(one).shape == (1, 3, 8)


def test_files_and_models_that_do_not_fit_are_refused(path: Callable[[str], Path], tmp_path: Path) -> None:
    sd, sdxl, wan = (pipelines.load(path(name)) for name in ("sd", "sdxl", "wan"))
    trained(sdxl)
    file = ADAPTER.save(sdxl, tmp_path)
    blocks = len(personal.places(sd.denoiser))
    if blocks == len(personal.places(sdxl.denoiser)):
        ADAPTER.load(sd, file)  # of the same widths: it fits
        ADAPTER.remove(sd)
    with pytest.raises(UserError, match="not for WanTransformer3DModel"):
        personal.install(wan, EMBEDDING)
    with pytest.raises(UserError, match="this personal branch is for another model: "):
        ADAPTER.load(pipelines.load(path("sd3")), file)
    with pytest.raises(UserError, match="already"):
        personal.install(sdxl, EMBEDDING)


def test_pretraining_tells_apart_users_who_were_not_in_it() -> None:
    """Users differ in 4 of 32 features, and choices more so in the others: four choices then name a user."""
    rng = torch.Generator().manual_seed(0)

    def histories(count: int) -> dict[str, Tensor]:
        tastes = torch.randn(count, 1, 1, 4, generator=rng)
        own = tastes + 0.5 * torch.randn(count, 16, 1, 4, generator=rng)
        rows = torch.cat([own, 2 * torch.randn(count, 16, 1, 28, generator=rng)], dim=-1)
        return {str(number): user for number, user in enumerate(rows)}

    def named(encoder: Encoder) -> float:
        with torch.no_grad():
            return identification([encoder(user.view(4, 4, 32)) for user in new])[0]

    seen, new = histories(40), list(histories(12).values())
    torch.manual_seed(0)
    encoder = Encoder(32, 16, tokens=2)
    twin, before = copy.deepcopy(encoder), named(encoder)
    loss = tell_apart(encoder, seen, (1, 4), steps=100, seed=0)
    assert loss is not None and loss < math.log(40) - 1 and named(encoder) > before + 0.3
    assert tell_apart(twin, dict(reversed(seen.items())), (1, 4), steps=100, seed=0) == loss
    assert tell_apart(twin, {"0": seen["0"], "1": seen["1"][:1]}, (1, 4), steps=1, seed=0) is None
