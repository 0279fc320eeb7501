"""kohya's files for FLUX and SD3, in whose names several modules of diffusers are one, and those of text encoders."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines import PipelineError
from pipelines.lora import LOADED, lora_layers
from pipelines.lora_files import read_lora
from tests.pipelines.conftest import Load
from tests.tiny import sample_latents

Tensors = dict[str, Tensor]
ALPHA = 1.5
JOINT, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
# kohya's module: diffusers' modules, whose rows it has in this order
FUSED = {
    "double_blocks_0_img_attn_qkv": [f"{JOINT}.attn.{name}" for name in ("to_q", "to_k", "to_v")],
    "double_blocks_0_txt_attn_qkv": [f"{JOINT}.attn.add_{name}_proj" for name in "qkv"],
    "double_blocks_0_img_attn_proj": [f"{JOINT}.attn.to_out.0"],
    "double_blocks_0_txt_attn_proj": [f"{JOINT}.attn.to_add_out"],
    "double_blocks_0_img_mlp_0": [f"{JOINT}.ff.net.0.proj"],
    "double_blocks_0_txt_mlp_2": [f"{JOINT}.ff_context.net.2"],
    "double_blocks_0_img_mod_lin": [f"{JOINT}.norm1.linear"],
    "single_blocks_1_linear2": [f"{SINGLE}.proj_out"],
    "single_blocks_1_modulation_lin": [f"{SINGLE}.norm.linear"],
}
LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


def pair(stem: str, rows: int, columns: int, rank: int = 3) -> Tensors:
    generator = torch.Generator().manual_seed(len(stem) + rows)
    shapes = {"lora_down": (rank, columns), "lora_up": (rows, rank)}
    tensors = {f"{stem}.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, f"{stem}.alpha": torch.tensor(ALPHA)}


def change(tensors: Tensors, stem: str) -> Tensor:
    """alpha / rank up down."""
    up, down = (tensors[f"{stem}.lora_{side}.weight"] for side in ("up", "down"))
    return ALPHA / len(down) * up @ down


def apart(tensors: Tensors, stem: str) -> None:
    """Each third of the rows with a third of the rank of its own, as sd-scripts' `split_qkv` saves it."""
    up = tensors[f"{stem}.lora_up.weight"]
    rows, rank = up.shape[0] // 3, up.shape[1] // 3
    up *= torch.block_diag(*[torch.ones(rows, rank)] * 3)


@pytest.mark.parametrize("split", [False, True])
def test_fused_modules_of_flux_add_their_rows_of_the_product(split: bool, fresh: Load, tmp_path: Path) -> None:
    pipeline, tensors, expected = fresh("flux"), {}, {}
    for name, modules in FUSED.items():
        stem, weights = f"lora_unet_{name}", [pipeline.denoiser.get_submodule(module).weight for module in modules]
        tensors |= pair(stem, sum(map(len, weights)), weights[0].shape[1], rank=6 if split else 4)
        if split and len(modules) == 3:
            apart(tensors, stem)
        rows = change(tensors, stem).split([*map(len, weights)])
        expected |= dict(zip(modules, rows, strict=True))
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline.load_lora(tmp_path / "lora.safetensors")
    layers = lora_layers(pipeline.denoiser, LOADED)
    assert layers.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(layers[module].get_delta_weight(LOADED), delta, rtol=1e-5, atol=1e-6, msg=module)


def test_the_first_matrix_of_a_single_block_is_divided_at_fluxs_own_width(fresh: Load, tmp_path: Path) -> None:
    """Which diffusers takes for given: 3 x 3072 rows for q, k and v, then 4 x 3072; of another width it is refused."""
    stem, file = "lora_unet_single_blocks_1_linear1", tmp_path / "lora.safetensors"
    save_file(tensors := pair(stem, 7 * 3072, 8), file)
    read = diffusers.FluxPipeline.lora_state_dict(read_lora(file, "transformer", ()))
    rows = change(tensors, stem).split([3072, 3072, 3072, 4 * 3072])
    for module, delta in zip(LINEAR1, rows, strict=True):
        a, b = (read.pop(f"transformer.{SINGLE}.{module}.lora_{side}.weight") for side in "AB")
        torch.testing.assert_close(b @ a, delta, rtol=1e-5, atol=1e-5, msg=module)
    assert not read
    save_file(pair(stem, 112, 16), file)
    with pytest.raises(PipelineError, match=r"diffusers cannot convert it \(AssertionError\)"):
        fresh("flux").load_lora(file)


TEXT = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")


def text_encoder(prefix: str) -> Tensors:
    """All that sd-scripts trains in one layer of the tiny CLIP."""
    shapes = {"mlp_fc1": (32, 16), "mlp_fc2": (16, 32)}
    stems = {f"{prefix}_text_model_encoder_layers_0_{name}": shapes.get(name, (16, 16)) for name in TEXT}
    return {key: value for stem, shape in stems.items() for key, value in pair(stem, *shape).items()}


def test_a_text_encoder_beside_flux_is_read_too(fresh: Load, tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(tensors := pair(stem, 48, 16) | text_encoder("lora_te1"), tmp_path / "lora.safetensors")
    pipeline = fresh("flux")
    pipeline.load_lora(tmp_path / "lora.safetensors")
    layers = lora_layers(pipeline.modules()["text_encoder"], LOADED)
    assert len(layers) == len(TEXT)
    for module, layer in layers.items():
        expected = change(tensors, f"lora_te1_text_model_{module.removeprefix('text_model.').replace('.', '_')}")
        torch.testing.assert_close(layer.get_delta_weight(LOADED), expected, rtol=1e-5, atol=1e-6, msg=module)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        # The three modules that a fused one becomes must not make up for those of T5, which diffusers drops.
        (
            "flux",
            pair("lora_unet_double_blocks_0_img_attn_qkv", 48, 16) | pair("lora_te3_block_0_layer_0_k", 32, 32),
            "2 of its 2 text encoders' tensors are of unknown modules",
        ),
        ("flux", pair("lora_unet_img_in", 16, 16), r"not loaded here, or .* such as 'x_embedder\."),
        ("flux", pair("lora_unet_double_blocks_5_img_attn_qkv", 48, 16), "blocks.5.* not found in the base model"),
        (
            "sd3",
            pair("lora_unet_joint_blocks_0_context_block_attn_qkv", 48, 16),
            r"names that diffusers does not read for this family, such as 'lora_unet_joint_blocks_0_context_block_at",
        ),
        ("sd3", text_encoder("lora_te1"), "does not read for this family, such as 'lora_te1_text_model_encoder_"),
        ("sd", text_encoder("lora_te"), "a LoRA of the text encoder alone, .* fuse it into the text encoder with diff"),
        ("flux", text_encoder("lora_te1"), "a LoRA of the text encoder alone, with nothing for the transformer"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(
    name: str, tensors: Tensors, message: str, fresh: Load, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline = fresh(name)
    with pytest.raises(PipelineError, match=f"LoRA does not fit {name} .*{message}"):
        pipeline.load_lora(tmp_path / "lora.safetensors")
    assert torch.equal(sample_latents(pipeline), sample_latents(fresh(name)))
