"""Loading a checkpoint: families, components, single files, without encoders, and the fingerprint of the encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_utils
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import pipelines
from pipelines import FAMILIES, PipelineError, VariancePreserving
from t2i_align import align
from t2i_align.config import TrainConfig
from t2i_align.training.reference import build_reference
from tests.pipelines.conftest import Load, PathOf
from tests.runs import jsonl_pairs, run_values
from tests.single_file import write_single_file
from tests.tiny import example


def test_full_copy_does_not_follow_the_policy(sd_path: Path) -> None:
    tuned = pipelines.load(sd_path)
    reference = build_reference(TrainConfig(), tuned)
    args = (torch.randn(1, 4, 16, 16), torch.tensor([100]), tuned.encode_prompts(["a"]))
    before = reference(*args)
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.mul_(1.1)
    assert torch.equal(reference(*args), before)
    assert not torch.allclose(tuned.predict(*args), before)


def test_single_file_checkpoint_loads_as_its_folder_does(sd_path: Path, tmp_path: Path) -> None:
    file = write_single_file(sd_path, tmp_path / "model.safetensors")
    loaded = pipelines.load(file, single_file_config=str(sd_path))
    expected = pipelines.load(sd_path).generate(["x"], [1], steps=3)
    torch.testing.assert_close(loaded.generate(["x"], [1], steps=3), expected, rtol=1e-5, atol=1e-5)


def test_a_single_files_marks_decide_what_it_predicts(sd_path: Path, path: PathOf, tmp_path: Path) -> None:
    """Trainers mark files with empty tensors v_pred and ztsnr; the configuration is usually SD's or SDXL's, epsilon."""
    file, config = write_single_file(sd_path, tmp_path / "plain.safetensors"), str(sd_path)
    whole = load_file(file)

    def loaded(*marks: str, **options: Any) -> pipelines.TrainablePipeline:
        save_file({**whole, **{mark: torch.zeros(0) for mark in marks}}, tmp_path / "marked.safetensors")
        return pipelines.load(tmp_path / "marked.safetensors", single_file_config=config, **options)

    process = loaded("v_pred").process
    assert isinstance(process, VariancePreserving) and process.prediction_type == "v_prediction"
    assert process.alphas_cumprod[-1] > 1e-3
    pipeline = loaded("v_pred", "ztsnr")
    assert isinstance(pipeline.process, VariancePreserving) and pipeline.process.alphas_cumprod[-1] < 1e-7
    assert pipeline.pipe.scheduler.config.timestep_spacing == "trailing"
    assert not torch.allclose(pipeline.generate(["x"], [1], steps=3), loaded().generate(["x"], [1], steps=3))
    assert loaded().process.prediction_type == "epsilon"
    assert loaded(prediction_type="v_prediction").process.prediction_type == "v_prediction"
    with pytest.raises(PipelineError, match="marked as v_pred, but prediction_type is 'epsilon'"):
        loaded("v_pred", prediction_type="epsilon")
    folder = pipelines.load(sd_path, prediction_type="v_prediction", encoders=False)
    assert folder.process.prediction_type == folder.load_encoders().pipe.scheduler.config.prediction_type
    with pytest.raises(PipelineError, match="sd3 is of rectified flow, found prediction_type 'epsilon'"):
        pipelines.load(path("sd3"), prediction_type="epsilon")
    sd2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({**whole, sd2: torch.zeros(1, 1024)}, file)
    with pytest.raises(
        PipelineError, match=r"SD2 does not say what it predicts; give prediction_type 'epsilon' \(base"
    ):
        pipelines.load(file)


@pytest.mark.parametrize(("scheduler", "samples"), [
    (EDMEulerScheduler(sigma_data=0.5), True), (DDIMScheduler(prediction_type="sample"), True),
    (FlowMatchEulerDiscreteScheduler(), False),
])  # fmt: skip
def test_a_scheduler_of_another_kind_may_sample_but_does_not_train(
    scheduler: Any, samples: bool, path: PathOf, tmp_path: Path
) -> None:
    copy, name = Path(shutil.copytree(path("sdxl"), tmp_path / "odd")), type(scheduler).__name__
    scheduler.save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    pipeline = pipelines.load(copy)
    if samples:
        assert pipeline.generate(["x"], [1], steps=2).isfinite().all()
    else:
        with pytest.raises(PipelineError, match=f"found {name}.*; diffusers cannot sample with it"):
            pipeline.generate(["x"], [1], steps=2)
    with pytest.raises(PipelineError, match=f"odd: the checkpoint's scheduler .*found {name}"):
        align(run_values(copy, jsonl_pairs(tmp_path / "data", count=2), tmp_path / "run"), progress=False)


def test_weights_of_a_variant_alone_name_it(sd_path: Path, tmp_path: Path) -> None:
    pipelines.load(sd_path).pipe.save_pretrained(str(tmp_path), variant="fp16")
    with pytest.raises(PipelineError, match=r"weights of 'unet' are of the variant fp16; give it as model\.variant"):
        pipelines.load(tmp_path)
    assert pipelines.load(tmp_path, variant="fp16").has_encoders


def test_fingerprint_is_of_the_encoders_not_of_the_denoiser(sd_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd_path, tmp_path / "copy"))
    assert pipelines.encoder_fingerprint(copy) == pipelines.encoder_fingerprint(sd_path)
    (copy / "unet" / "config.json").write_text((copy / "unet" / "config.json").read_text() + " ")
    assert pipelines.encoder_fingerprint(copy) == pipelines.encoder_fingerprint(sd_path)
    weights = next((copy / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert pipelines.encoder_fingerprint(copy) != pipelines.encoder_fingerprint(sd_path)


def test_fingerprint_is_of_the_variant_that_is_loaded(sd_path: Path, tmp_path: Path) -> None:
    """Half-precision weights beside the others are another model when they are asked for, and nothing when not."""
    plain = pipelines.encoder_fingerprint(sd_path)
    copy = Path(shutil.copytree(sd_path, tmp_path / "copy"))
    assert pipelines.encoder_fingerprint(copy, variant="fp16") == plain  # diffusers takes what there is
    pipelines.load(sd_path).pipe.vae.half().save_pretrained(str(tmp_path / "half"), variant="fp16")
    shutil.copy(next((tmp_path / "half").glob("*.fp16.safetensors")), copy / "vae")
    assert pipelines.encoder_fingerprint(copy) == plain
    half = pipelines.encoder_fingerprint(copy, variant="fp16")
    assert half != plain
    next((copy / "vae").glob("*_model.safetensors")).unlink()
    assert pipelines.encoder_fingerprint(copy, variant="fp16") == half


def test_fingerprint_of_a_single_file_is_with_its_configuration(sd_path: Path, tmp_path: Path) -> None:
    file = write_single_file(sd_path, tmp_path / "model.safetensors")
    copy = Path(shutil.copytree(sd_path, tmp_path / "copy"))
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()  # a configuration needs none
    before = pipelines.encoder_fingerprint(file, single_file_config=str(copy))
    assert before == pipelines.encoder_fingerprint(file, single_file_config=str(sd_path))
    assert before != pipelines.encoder_fingerprint(file)
    vae = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**vae, "scaling_factor": 0.5}))
    assert pipelines.encoder_fingerprint(file, single_file_config=str(copy)) != before


def test_fingerprint_of_a_hub_model_fetches_its_encoders_alone(sd_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers would ask the Hub for, of a repository with both variants of everything."""
    files = [file.relative_to(sd_path).as_posix() for file in sd_path.rglob("*") if file.is_file()]
    files += [file.replace(".safetensors", ".fp16.safetensors") for file in files if file.endswith(".safetensors")]
    asked: set[str] = set()

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        asked.update(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(sd_path)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "main", raising=False)
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda *_, **__: str(sd_path / "model_index.json"))
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot)
    index = json.loads((sd_path / "model_index.json").read_text())
    monkeypatch.setattr(pipeline_utils.DiffusionPipeline, "load_config", lambda *_, **__: index)
    assert pipelines.encoder_fingerprint("fox/sd", variant="fp16") == pipelines.encoder_fingerprint(sd_path)
    weights = sorted(file for file in asked if file.endswith(".safetensors"))
    assert weights == ["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]


def test_a_checkpoint_that_cannot_be_used_says_why(sd_path: Path, tmp_path: Path) -> None:
    """A folder that is damaged more and more, a file that is no checkpoint, and a path where there is nothing."""
    folder, junk = Path(shutil.copytree(sd_path, tmp_path / "damaged")), tmp_path / "junk.safetensors"
    weights, index = next((folder / "unet").glob("*.safetensors")), folder / "model_index.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    junk.write_bytes(b"not a checkpoint")
    with pytest.raises(PipelineError, match="could not be loaded"):
        pipelines.load(folder)
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"KandinskyPipeline"'))
    with pytest.raises(PipelineError, match=r"'KandinskyPipeline' is not supported.*StableDiffusionPipeline"):
        pipelines.load(folder)
    for content, message in (("{", "not JSON"), ("[]", "expected a mapping of components, found list")):
        index.write_text(content)
        with pytest.raises(PipelineError, match=rf"model_index\.json: {message}"):
            pipelines.load(folder)
    index.unlink()
    for path, message in (
        (folder, "no model_index.json"), (tmp_path / "nothing", "no such file or folder"),
        (junk, "not a readable checkpoint"),
    ):  # fmt: skip
        with pytest.raises(PipelineError, match=message):
            pipelines.load(path)


@pytest.mark.parametrize("name", [*FAMILIES, "wan-experts"])
def test_without_encoders_a_pipeline_predicts_the_same_and_knows_its_sizes(
    name: str, path: PathOf, shared: Load, tmp_path: Path
) -> None:
    whole, bare = shared(name), pipelines.load(path(name), encoders=False)
    assert not bare.has_encoders and list(bare.modules()) == [whole.denoiser_name]
    inputs = example(whole)
    with torch.no_grad():
        assert torch.equal(bare.predict(*inputs), whole.predict(*inputs))
    assert bare.default_size == whole.default_size and bare.default_frames == whole.default_frames
    bare.check_size(*bare.default_size, bare.default_frames)
    with pytest.raises(PipelineError, match=r"do not fit .* both sides must be multiples of"):
        bare.check_size(whole.default_size[0] + 1, whole.default_size[1], whole.default_frames)
    denoiser = bare.denoiser
    bare.load_encoders()
    assert bare.has_encoders and bare.denoiser is denoiser and bare.modules().keys() == whole.modules().keys()
    bare.drop_encoders()
    assert not bare.has_encoders and bare.denoiser is denoiser
    with pytest.raises(PipelineError, match="without its encoders"):
        bare.save(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_component_is_named_before_anything_loads(name: str, path: PathOf, tmp_path: Path) -> None:
    family = pipelines.FAMILIES[name]
    for component in (family.denoiser_name, "scheduler", "vae", "text_encoder", "tokenizer"):
        broken = tmp_path / component
        shutil.copytree(path(name), broken, ignore=lambda _, names, gone=component: [n for n in names if n == gone])
        with pytest.raises(PipelineError, match=f"lacks its component '{component}': there is no such folder"):
            pipelines.load(broken)
        index = json.loads((broken / "model_index.json").read_text())
        del index[component]
        (broken / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(PipelineError, match=f"lacks its component '{component}': model_index.json has none"):
            pipelines.load(broken)


def test_a_file_with_the_denoiser_alone_takes_the_rest_from_its_configuration(
    path: PathOf, shared: Load, tmp_path: Path
) -> None:
    whole = shared("ltx")
    theirs = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    weights = {}
    for key, value in whole.denoiser.state_dict().items():
        for ours, name in theirs.items():
            key = key.replace(ours, name)
        weights[f"model.diffusion_model.{key}"] = value * 1.5
    file = tmp_path / "ltx.safetensors"
    save_file(weights, file)
    loaded = pipelines.load(file, single_file_config=str(path("ltx")))
    for key, value in whole.denoiser.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[key], value * 1.5)
    inputs = example(loaded)
    for key, value in whole.encode_prompts(["a red circle", "two blue squares"]).items():
        assert torch.equal(inputs[2][key], value)
    clip = torch.zeros(1, 1, 3, 64, 64)
    assert torch.equal(loaded.encode_pixels(clip), whole.encode_pixels(clip))
