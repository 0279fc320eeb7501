"""LoRA files: what is saved here is as strong in every tool, what others save is as strong here, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipelines
from pipelines import PipelineError, TrainablePipeline
from pipelines.lora import LOADED, lora_layers
from tests.pipelines.conftest import Load, PathOf
from tests.tiny import randomise_lora, sample_latents

Tensors = dict[str, Tensor]


def deltas(pipeline: TrainablePipeline, adapter: str = LOADED) -> Tensors:
    """What a LoRA adds to the weights, by module."""
    layers = lora_layers(pipeline.denoiser, adapter)
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys() and expected
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6, msg=name)


def by_tensors_alone(file: Path) -> Tensors:
    """B A x alpha tensor / rank (1 without one) of each pair: what a tool adds that reads no header."""
    weights, found = load_file(file), {}
    for key, down in weights.items():
        for side, other in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{side}.weight"):
                up, rank = weights[key.replace(side, other)], len(down)
                alpha = float(weights.get(key.replace(f"{side}.weight", "alpha"), torch.tensor(float(rank))))
                delta = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:]) * alpha / rank
                found[key.removesuffix(f".{side}.weight")] = delta
    return found


# Each family under the names of its tools; a LoRA with diffusers' names is also tried by `pipelines.check`.
NAMINGS = {"sd": "kohya", "sdxl": "comfyui", "sd3": "comfyui", "flux": "comfyui", "wan": "comfyui", "ltx": "comfyui",
           "cogvideox": "diffusers", "wan-experts": "diffusers"}  # fmt: skip


@pytest.mark.parametrize(("name", "naming"), NAMINGS.items())
def test_a_saved_lora_is_as_strong_by_its_tensors_in_plain_diffusers_and_here(
    name: str, naming: str, path: PathOf, fresh: Load, plain: Callable[[str], Any], tmp_path: Path
) -> None:
    """alpha = 1.5 rank: a file that lost alpha would come back at another strength. Of two experts, the second."""
    low = name == "wan-experts"
    trained, again = (pipelines.load(path(name), expert="low") if low else fresh(name) for _ in range(2))
    base = sample_latents(trained)
    randomise_lora(trained, rank=2, alpha=3.0, targets="all")
    expected, samples = deltas(trained, "default"), sample_latents(trained)
    assert (samples - base).abs().max() > 1e-3
    file = trained.save_lora(tmp_path, naming=naming)
    there, wanted = (sorted(float(d.sum()) for d in all.values()) for all in (by_tensors_alone(file), expected))
    assert there == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    theirs = plain(name)
    theirs.load_lora_weights(str(file), **({"load_into_transformer_2": True} if low else {}))
    torch.testing.assert_close(sample_latents(trained, theirs), samples, rtol=1e-5, atol=1e-4)
    theirs.unload_lora_weights()
    again.load_lora(file)
    assert_equal(deltas(again), expected)
    torch.testing.assert_close(sample_latents(again), samples, rtol=1e-5, atol=1e-4)
    again.pipe.unload_lora_weights()
    torch.testing.assert_close(sample_latents(again), base, rtol=0, atol=1e-6)


def test_comfyuis_names_are_the_ones_it_maps(fresh: Load, tmp_path: Path) -> None:
    """Native names for Wan and LTX, kohya's for the UNets; for SD3 and FLUX it reads diffusers' own."""
    expected = {
        "sd": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "sd3": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "flux": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "wan": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "ltx": "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight",
    }
    for name, key in expected.items():
        pipeline = fresh(name)
        randomise_lora(pipeline, targets="all")
        assert key in load_file(pipeline.save_lora(tmp_path / name, naming="comfyui"))
        modules = lora_layers(pipeline.denoiser, "default").keys()
        assert all("block" in module for module in modules)  # FLUX's last layer is called proj_out like some in them
        assert name != "flux" or modules >= {f"single_transformer_blocks.{i}.proj_out" for i in range(2)}
    wan = fresh("wan")
    wan.add_lora(rank=2, alpha=2, dropout=0, targets=["condition_embedder.time_proj"])
    with pytest.raises(PipelineError, match=r"module 'condition_embedder\.time_proj' has no comfyui name"):
        wan.save_lora(tmp_path, naming="comfyui")


def test_equal_weights_make_equal_files(fresh: Load, tmp_path: Path) -> None:
    files = []
    for number, targets in enumerate((["to_q", "to_k", "to_v"], ["to_v", "to_q", "to_k"])):
        pipeline = fresh("sd")
        pipeline.add_lora(rank=2, alpha=2, dropout=0, targets=targets)
        for parameter in pipeline.trainable_parameters():
            torch.nn.init.constant_(parameter, 0.5)
        files.append(pipeline.save_lora(tmp_path / str(number)).read_bytes())
    assert files[0] == files[1]
    with safe_open(tmp_path / "0" / "pytorch_lora_weights.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert json.loads(header["lora_adapter_metadata"])["unet.target_modules"] == ["to_k", "to_q", "to_v"]
    assert b'"__metadata__":{"format"' in files[0]  # of ten entries, in the order of their names


def by_peft(pipeline: TrainablePipeline, **options: Any) -> tuple[Tensors, LoraConfig]:
    """A LoRA that peft itself puts on the denoiser, as other trainers do, with random weights."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 2.0, "target_modules": ["to_q", "to_k", "to_out.0"], **options})
    pipeline.denoiser.add_adapter(config)
    randomise = torch.Generator().manual_seed(7)
    for parameter in pipeline.trainable_parameters():
        parameter.data = torch.randn(parameter.shape, generator=randomise) * 0.3
    return get_peft_model_state_dict(pipeline.denoiser), config


def kohya(weights: Tensors, alpha: Callable[[int], float]) -> Tensors:
    """kohya's names, with `alpha` of each module's number."""
    out: Tensors = {}
    for number, module in enumerate(sorted({key.rpartition(".lora_")[0] for key in weights})):
        stem = f"lora_unet_{module.replace('.', '_')}"
        out[f"{stem}.lora_down.weight"] = weights[f"{module}.lora_A.weight"]
        out[f"{stem}.lora_up.weight"] = weights[f"{module}.lora_B.weight"]
        out[f"{stem}.alpha"] = torch.tensor(alpha(number))
    return out


PEFT: dict[str, dict[str, Any]] = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"mid_block.*to_q": 8, "to_k": 2}, "alpha_pattern": {"to_k": 7.0}},
    "dora": {"use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def write_as(prefix: str, trained: TrainablePipeline, weights: Tensors, config: LoraConfig, folder: Path) -> None:
    """The folder that peft writes, or diffusers' file with peft's description in its header."""
    if prefix == "diffusers":
        header = {"unet_lora_layers": weights, "unet_lora_adapter_metadata": config.to_dict()}
        type(trained.pipe).save_lora_weights(str(folder), **header)
    else:
        save_file({f"{prefix}{key}": value for key, value in weights.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=list))


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusers"])
def test_loras_of_peft_are_read_with_their_description(
    prefix: str, options: dict[str, Any], fresh: Load, tmp_path: Path
) -> None:
    """From the folder that peft writes, and from the header that diffusers writes."""
    trained, again = fresh("sd"), fresh("sd")
    weights, config = by_peft(trained, **options)
    samples = sample_latents(trained)
    write_as(prefix, trained, weights, config, tmp_path)
    again.load_lora(tmp_path)
    torch.testing.assert_close(sample_latents(again), samples, rtol=1e-4, atol=1e-3)
    assert_equal(deltas(again), deltas(trained, "default"))
    if "dora" not in str(options):
        there = {f"lora_unet_{name.replace('.', '_')}": delta for name, delta in deltas(trained, "default").items()}
        assert_equal(by_tensors_alone(again.save_lora(tmp_path / "out", naming="kohya")), there)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {}])
@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusers"])
def test_loras_that_need_more_than_their_tensors_are_refused(
    prefix: str, options: dict[str, Any], fresh: Load, tmp_path: Path
) -> None:
    """These starts put the first B A into the LoRA and take it from the base; aLoRA changes only the tokens after some.

    Loaded onto the base as it was, the first B A would be added once too often.
    """
    trained, again = fresh("sd"), fresh("sd")
    weights, config = by_peft(trained, **options)
    config.alora_invocation_tokens = None if options else [1, 2]
    write_as(prefix, trained, weights, config, tmp_path)
    why = "init_lora_weights is '(pissa|olora)', which also changes the base" if options else "alora_invocation_tokens"
    with pytest.raises(PipelineError, match=f"LoRA does not fit sd .*{why}"):
        again.load_lora(tmp_path)
    assert torch.equal(sample_latents(again), sample_latents(fresh("sd")))


def old_diffusers(weights: Tensors) -> Tensors:
    """Names of 2023: X.processor.to_q_lora.down.weight."""
    out = {}
    for key, value in weights.items():
        module, _, side = key.removesuffix(".weight").rpartition(".lora_")
        attention, _, projection = module.removesuffix(".0").rpartition(".")
        out[f"unet.{attention}.processor.{projection}_lora.{'down' if side == 'A' else 'up'}.weight"] = value
    return out


def cut(weights: Tensors) -> Tensors:
    """Every third module at half its rank."""
    modules = sorted({key.rpartition(".lora_")[0] for key in weights})
    short = {f"{module}.lora_{side}.weight": dim for module in modules[::3] for side, dim in (("A", 0), ("B", 1))}
    return {k: v.narrow(short[k], 0, 2).clone() if k in short else v for k, v in weights.items()}


FOREIGN: dict[str, Callable[[Tensors], Tensors]] = {
    "kohya, alpha of each module": lambda weights: kohya(weights, lambda number: (0.5, 2.0, 94.0)[number % 3]),
    "kohya, no alpha": lambda w: {k: v for k, v in kohya(w, float).items() if not k.endswith(".alpha")},
    "kohya, rank and alpha of each module": lambda w: kohya(cut(w), lambda number: (0.5, 3.0)[number % 2]),
    "kohya in bf16": lambda w: {k: v.bfloat16() for k, v in kohya(w, lambda number: 1.0 + number % 2).items()},
    "ranks of each module, no alpha": lambda w: {f"unet.{key}": value for key, value in cut(w).items()},
    "no prefix": dict,
    "peft's prefix behind the component's": lambda w: {f"unet.base_model.model.{k}": v for k, v in w.items()},
    "diffusers of 2023": old_diffusers,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_loras_of_other_tools_have_the_strength_that_their_tensors_give(
    kind: str, fresh: Load, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Module by module, alpha / rank x B A computed here from the file."""
    weights, _ = by_peft(fresh("sd"))
    tensors = {key: value.contiguous() for key, value in FOREIGN[kind](weights).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = {}
    for module in {key.rpartition(".lora_")[0] for key in weights}:
        flat = f"lora_unet_{module.replace('.', '_')}"
        source = kohya(cut(weights) if "rank" in kind else weights, float)
        down, up = (source[f"{flat}.lora_{side}.weight"] for side in ("down", "up"))
        if "bf16" in kind:
            down, up = down.bfloat16().float(), up.bfloat16().float()
        alpha = float(tensors.get(f"{flat}.alpha", torch.tensor(float(len(down)))))
        expected[module] = up @ down * alpha / len(down)
    pipeline = fresh("sd")
    pipeline.load_lora(tmp_path / "lora.safetensors", scale=0.5)
    assert_equal({name: 2 * delta for name, delta in deltas(pipeline).items()}, expected)
    assert not [warning for warning in recwarn if "alpha_pattern" in str(warning.message)]


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "DoRA of LyCORIS": (lambda w: {**w, "X.dora_scale": torch.ones(4, 1)}, r"1 of its \d+ tensors .* 'X\.dora_scale'"),
    "LoHa": (lambda w: {"lora_unet_mid.hada_w1_a": torch.ones(4, 4)}, r"'lora_unet_mid\.hada_w1_a' \(DoRA .*LoHa"),
    "LoKr": (lambda w: {"lora_unet_mid.lokr_w1": torch.ones(2, 2)}, r"'lora_unet_mid\.lokr_w1'"),
    "difference of a bias": (lambda w: {**w, "unet.conv_in.diff_b": torch.ones(4)}, r"'unet\.conv_in\.diff_b'"),
    "textual inversion": (lambda w: {**w, "bundle_emb.fox": torch.ones(4)}, r"'bundle_emb\.fox'"),
    "an alpha of nothing": (lambda w: {**w, "lora_unet_x.alpha": torch.ones(())}, r"'lora_unet_x\.alpha'"),
    "not finite": (lambda w: {k: v * math.nan for k, v in w.items()}, r"\d+ of its \d+ tensors hold NaN"),
    "peft's own without its description": (
        lambda w: {key.replace("unet", "base_model.model", 1): value for key, value in w.items()},
        r"a file of peft without the adapter_config\.json beside it, which tells its strength",
    ),
    "a module that is not there": (
        lambda w: {**w, "unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)},
        r"\d+ of its \d+ unet tensors fit|not found in the base model|x",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_named_and_nothing_is_left(kind: str, fresh: Load, tmp_path: Path) -> None:
    pipeline = fresh("sd")
    (change, message), base = REFUSED[kind], sample_latents(pipeline)
    weights, _ = by_peft(fresh("sd"))
    save_file(change({f"unet.{key}": value for key, value in weights.items()}), tmp_path / "lora.safetensors")
    with pytest.raises(PipelineError, match=f"LoRA does not fit sd .*{message}"):
        pipeline.load_lora(tmp_path / "lora.safetensors")
    assert torch.equal(sample_latents(pipeline), base)


@pytest.mark.parametrize(("of", "onto"), [("sd", "sd3"), ("flux", "wan"), ("sd3", "flux"), ("sd", "sdxl")])
def test_a_lora_of_another_family_is_refused_and_leaves_nothing(
    of: str, onto: str, fresh: Load, tmp_path: Path
) -> None:
    other, pipeline = fresh(of), fresh(onto)
    randomise_lora(other)
    file = other.save_lora(tmp_path)
    base = sample_latents(pipeline)
    with pytest.raises(PipelineError, match=f"LoRA does not fit {onto}"):
        pipeline.load_lora(file)
    assert torch.equal(sample_latents(pipeline), base)
    randomise_lora(pipeline)  # another can be added
    pipeline.load_lora(pipeline.save_lora(tmp_path / "own"))


def test_unknown_targets_are_named(shared: Load) -> None:
    with pytest.raises(PipelineError, match="'to_x' matches no module"):
        shared("sd").lora_targets(["to_q", "to_x"])
    with pytest.raises(PipelineError, match=r"unknown LoRA targets 'everything'. Choices for sd: all, attention"):
        shared("sd").lora_targets("everything")
