"""Files of kohya and LyCORIS, of each kind that they write, with keys made by hand: as strong as there, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines import PipelineError, TrainablePipeline
from tests.pipelines.conftest import Load
from tests.tiny import sample_latents

Tensors = dict[str, Tensor]
LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.mlp.fc1"
RANK, ALPHA = 2, 3.0


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def weight_of(pipeline: TrainablePipeline, module: str) -> Tensor:
    part = pipeline.modules()["text_encoder"] if module == TEXT else pipeline.denoiser
    names = {name for name, _ in part.named_modules()}
    # kohya's names have what newer versions of transformers leave out.
    weight = part.get_submodule(module if module in names else module.removeprefix("text_model.")).weight
    assert isinstance(weight, Tensor)
    return weight


def stem(module: str) -> str:
    return f"lora_{'te' if module == TEXT else 'unet'}_{module.replace('.', '_')}"


def pair(module: str, weight: Tensor, alpha: float | None = ALPHA, flat: bool = False) -> Tensors:
    """kohya's names; of a convolution, its kernel is in the first of two, as in LoCon; flat: the other is a matrix."""
    out, inner, *kernel = weight.shape
    name = stem(module)
    tensors = {
        f"{name}.lora_down.weight": noise(RANK, inner, *kernel),
        f"{name}.lora_up.weight": noise(out, RANK, *(1 for _ in kernel if not flat)),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


# LoRA, LoCon, rsLoRA, bypass and a trained scalar all write these names, and DyLoRA, of LyCORIS with flat ones.
@pytest.mark.parametrize("modules", [(LINEAR,), (CONV,), (LINEAR, CONV), (TEXT,), (LINEAR, TEXT)])
@pytest.mark.parametrize(("alpha", "flat"), [(ALPHA, False), (None, False), (0.25, True)])
def test_pairs_add_alpha_by_rank_times_their_product(
    modules: tuple[str, ...], alpha: float | None, flat: bool, fresh: Load, tmp_path: Path
) -> None:
    """W + alpha / rank up down, merged by hand into a copy of the model, draws the same."""
    loaded, merged = fresh("sd"), fresh("sd")
    tensors: Tensors = {}
    for module in modules:
        tensors |= pair(module, weight_of(loaded, module), alpha, flat)
        down, up = (tensors[f"{stem(module)}.lora_{side}.weight"] for side in ("down", "up"))
        strength = 1.0 if alpha is None else alpha / RANK
        weight_of(merged, module).data += strength * torch.einsum("or,r...->o...", up.flatten(1), down)
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded.load_lora(tmp_path / "lora.safetensors")
    torch.testing.assert_close(sample_latents(loaded), sample_latents(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sample_latents(loaded), sample_latents(fresh("sd")), atol=1e-3)


KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoCon, Tucker": {"lora_mid.weight": (2, 2, 3, 3)},
    "DoRA, over outputs": {"dora_scale": (16, 1)},
    "DoRA, over inputs": {"dora_scale": (1, 16)},
    "LoHa": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16), "alpha": ()},
    "LoHa, Tucker": {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
    "LoKr, full": {"lokr_w1": (4, 4), "lokr_w2": (4, 4), "alpha": ()},
    "LoKr, Tucker": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
    "(IA)^3": {"weight": (16, 1), "on_input": ()},
    "full": {"diff": (16, 16), "diff_b": (16,)},
    "norms": {"w_norm": (16,), "b_norm": (16,)},
    "GLoRA": {"a1.weight": (2, 16), "a2.weight": (16, 2), "b1.weight": (2, 16), "b2.weight": (16, 2), "alpha": ()},
    "OFT": {"oft_blocks": (4, 4, 4), "alpha": ()},
    "BOFT": {"oft_blocks": (2, 4, 4, 4), "rescale": (16, 1), "alpha": ()},
    "T-LoRA": {"q_layer.weight": (2, 16), "p_layer.weight": (16, 2), "lambda_layer": (1, 2), "alpha": ()},
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_no_lora_are_refused_with_a_tensor(kind: str, beside: bool, fresh: Load, tmp_path: Path) -> None:
    pipeline, module = fresh("sd"), LINEAR.replace("to_q", "to_k")
    tensors = {f"{stem(module)}.{name}": noise(*shape) for name, shape in KINDS[kind].items()}
    if beside or not {"lora_mid.weight", "dora_scale"}.isdisjoint(KINDS[kind]):
        tensors |= pair(module if "lora_mid" in str(tensors) else LINEAR, weight_of(pipeline, LINEAR))
    save_file(tensors, tmp_path / "lora.safetensors")
    first = next(iter(KINDS[kind]))
    with pytest.raises(PipelineError, match=rf"tensors are not a LoRA's, such as '{stem(module)}\.{first}'"):
        pipeline.load_lora(tmp_path / "lora.safetensors")
    assert torch.equal(sample_latents(pipeline), sample_latents(fresh("sd")))
